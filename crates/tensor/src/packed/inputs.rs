//! Packed inputs: the activations of a product, rounded and laid out as a tile kernel reads them.

use super::{
    form::{CHUNK, Codes, Form, LANES},
    repack::pack_words,
};
use crate::{
    Tensor,
    kernels::{Kernels, Lanes, input_chunk},
    lines::Lines,
    threads::{self, Shared},
};
use half::{bf16, f16};
use std::{cell::RefCell, ops::Range};

/// How inputs are rounded and laid out: forms of one kind read the same inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// `[cols][tokens]` floats.
    F32,
    /// The same, rounded to 16-bit floats.
    Half,
    /// `[cols / 2][tokens][2]` brain floats, or as many steps together as the kernels read
    /// (see [`crate::kernels::FloatTiles::together_of`]).
    Bf16,
    /// Signed bytes that share a scale over [`CHUNK`] columns.
    Bytes {
        /// Columns of a sub-block: 16 or 32.
        sub: usize,
        /// Sums start from so many times the sum of a sub-block's inputs; `None` where those sums are multiplied by
        /// the minima.
        start: Option<i32>,
    },
}

impl InputKind {
    /// What `kernels` reads beside weights of `form`.
    pub fn of(form: Form, kernels: &Kernels) -> InputKind {
        match form {
            Form::F32 | Form::F16 | Form::Sparse(..) => InputKind::F32,
            Form::Half => InputKind::Half,
            Form::Bf16 => InputKind::Bf16,
            Form::Codes(Codes { sub, minimum: true, .. }) => InputKind::Bytes { sub: sub.into(), start: None },
            Form::Codes(codes) => {
                let signed = kernels.codes.signed && codes.is_wide();
                let start = if signed { 128 } else { 0 } - i32::from(codes.zero);
                InputKind::Bytes { sub: codes.sub.into(), start: Some(start) }
            }
        }
    }

    /// Words of four bytes of the inputs of a tile of `width` tokens.
    fn tile_words(self, width: usize, cols: usize, kernels: &Kernels) -> usize {
        match self {
            InputKind::F32 | InputKind::Half => width * cols,
            InputKind::Bf16 => width * cols.div_ceil(2).next_multiple_of(kernels.floats.together),
            InputKind::Bytes { sub, .. } => input_chunk(width, sub) / 4 * cols.div_ceil(CHUNK),
        }
    }

    /// Widths of the tiles of this kind, rising.
    fn widths(self, kernels: &Kernels) -> &'static [usize] {
        match self {
            InputKind::Bytes { .. } => kernels.codes.widths,
            InputKind::Bf16 => kernels.floats.brain_widths,
            InputKind::F32 | InputKind::Half => kernels.floats.widths,
        }
    }
}

/// Rows whose columns a task packs.
const RUN: usize = 64;

/// Rows whose columns are packed one after the other: what lies beside those that are read stays in the first-level cache.
const FEW: usize = 8;

/// Rows in runs of [`FEW`].
pub(crate) fn few_rows(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    rows.clone().step_by(FEW).map(move |first| first..rows.end.min(first + FEW))
}

/// Tokens that run side by side.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// First token.
    pub first: usize,
    /// Tokens.
    pub width: usize,
    /// The word where the tile's inputs start.
    pub at: usize,
}

/// The packed inputs of a product; its memory is used again from product to product.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    kind: Option<InputKind>,
    cols: usize,
    data: Lines<u32>,
    spans: Vec<Span>,
}

impl Inputs {
    /// Cuts tokens into tiles and makes room for them.
    fn cut(&mut self, tokens: Range<usize>, cols: usize, kind: InputKind, kernels: &'static Kernels) {
        (self.kind, self.cols) = (Some(kind), cols);
        self.spans.clear();
        let widths = kind.widths(kernels);
        let (mut first, mut at) = (tokens.start, 0);
        while first < tokens.end {
            // The widest that fits: there is always one of a single token.
            let width = widths.iter().copied().rfind(|w| *w <= tokens.end - first).unwrap_or(1);
            self.spans.push(Span { first, width, at });
            at += kind.tile_words(width, cols, kernels);
            first += width;
        }
        self.data.resize(at);
    }

    /// Rounds and packs every row of `x`.
    pub fn pack(&mut self, x: &Tensor, kind: InputKind, kernels: &'static Kernels) {
        self.pack_rows(x, 0..x.rows(), kind, kernels);
    }

    /// Rounds and packs some rows of `x`: the tokens of its tiles are numbered as in `x`.
    pub fn pack_rows(&mut self, x: &Tensor, rows: Range<usize>, kind: InputKind, kernels: &'static Kernels) {
        self.cut(rows, x.cols(), kind, kernels);
        let shared = Shared::new(&mut self.data);
        let spans = &self.spans;
        threads::each(spans.len(), &|i| {
            let span = spans[i];
            // SAFETY: spans lie one after the other inside `data`; this task alone writes this one.
            let out = unsafe { shared.slice(span.at, kind.tile_words(span.width, x.cols(), kernels)) };
            match kind {
                InputKind::Bytes { .. } => (kernels.codes.pack_codes)(x, span, kind, out),
                _ => pack_floats(x, span, kind, kernels, out),
            }
        });
    }

    /// Packs the columns of `x` as tokens, for sums over its rows; `kind` is one of floats.
    pub fn pack_columns(&mut self, x: &Tensor, kind: InputKind, kernels: &'static Kernels) {
        let form = match kind {
            InputKind::Bf16 => Form::Bf16,
            InputKind::Half => Form::Half,
            _ => Form::F32,
        };
        let [tokens, cols] = [x.cols(), x.rows()];
        self.cut(0..tokens, cols, kind, kernels);
        let shared = Shared::new(&mut self.data);
        let spans = &self.spans;
        threads::each(cols.div_ceil(RUN), &|run| {
            let rows = run * RUN..cols.min((run + 1) * RUN);
            let together = kernels.floats.together_of(form);
            let place = |rows: &Range<usize>, span: &Span| {
                let first = form.length(rows.start);
                let count = (form.length(rows.end) - first).next_multiple_of(together);
                // SAFETY: spans lie one after the other inside `data`; this task alone writes these steps.
                unsafe { shared.slice(span.at + first * span.width, count * span.width) }
            };
            if together > 1 {
                return spans.iter().for_each(|span| turn_columns(x, rows.clone(), span, kernels, place(&rows, span)));
            }
            for rows in few_rows(rows) {
                for span in spans {
                    (kernels.columns)(x, rows.clone(), span.first, span.width, form, place(&rows, span));
                }
            }
        });
    }

    /// The kind that was packed last.
    pub fn kind(&self) -> Option<InputKind> {
        self.kind
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The tiles.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Numbers of the tiles that begin with one of these tokens.
    pub fn spans_of(&self, tokens: Range<usize>) -> Range<usize> {
        let before = |token| self.spans.partition_point(|s| s.first < token);
        before(tokens.start)..before(tokens.end)
    }

    /// The inputs of a tile from a step on.
    pub(crate) fn words(&self, span: &Span, step: usize) -> &[u32] {
        let next = self.spans.partition_point(|s| s.at <= span.at);
        &self.data[span.at + step * span.width..self.spans.get(next).map_or(self.data.len(), |s| s.at)]
    }

    /// The inputs of a tile, for a kernel.
    pub fn tile(&self, span: &Span) -> *const u8 {
        self.data[span.at..].as_ptr().cast()
    }
}

/// Packs the tokens of one tile of floats: see [`crate::kernels::Tile`] for the layout.
fn pack_floats(x: &Tensor, span: Span, kind: InputKind, kernels: &Kernels, out: &mut [u32]) {
    let cols = x.cols();
    // More rows than the tile has may lie behind it: they are read with it, and left.
    let rows = x.rows().min(span.first + span.width.max(LANES));
    if kind == InputKind::F32 {
        let words = bytemuck::cast_slice(&x.as_slice()[span.first * cols..rows * cols]);
        return (kernels.codes.pack_words)(words, cols, span.width, out);
    }
    if kind == InputKind::Half {
        return WORDS.with_borrow_mut(|words| {
            words.clear();
            words.extend(x.as_slice()[span.first * cols..rows * cols].iter().map(|v| halved(*v).to_bits()));
            (kernels.codes.pack_words)(words, cols, span.width, out);
        });
    }
    WORDS.with_borrow_mut(|words| {
        let pairs = cols.div_ceil(2);
        // What fills the sixteen rows of a tile of fewer is left as it comes.
        words.resize(LANES.max(span.width) * pairs, 0);
        for (t, words) in words.chunks_exact_mut(pairs.max(1)).take(span.width).enumerate() {
            (kernels.brain_pairs)(x.row(span.first + t), words);
            if kernels.floats.together == TOGETHER {
                put_together(words, t, span.width, out);
            }
        }
        if kernels.floats.together == TOGETHER {
            return;
        }
        (kernels.codes.pack_words)(words, pairs, span.width, out);
    });
}

/// Steps that lie together for each token where kernels want it so.
const TOGETHER: usize = 16;

/// Writes the steps of token `t` as `[steps / TOGETHER][width][TOGETHER]`, with zeros behind the last.
pub(crate) fn put_together(words: &[u32], t: usize, width: usize, out: &mut [u32]) {
    let places = out.as_chunks_mut::<TOGETHER>().0[t..].iter_mut().step_by(width);
    let (whole, rest) = words.as_chunks::<TOGETHER>();
    for (i, place) in places.enumerate() {
        if let Some(words) = whole.get(i) {
            *place = *words;
        } else {
            *place = [0; TOGETHER];
            place[..rest.len()].copy_from_slice(rest);
        }
    }
}

/// `[panels][width][N]` to `[panels][N][width]`.
pub(crate) fn regroup<const N: usize>(from: &[u32], width: usize, to: &mut [u32]) {
    for (from, to) in from.chunks_exact(width * N).zip(to.chunks_exact_mut(width * N)) {
        for (t, from) in from.as_chunks::<N>().0.iter().enumerate() {
            for k in 0..N {
                to[k * width + t] = from[k];
            }
        }
    }
}

/// `[panels][width][N]` to `[panels / 2][width][2 N]`.
pub(crate) fn join<const N: usize>(from: &[u32], width: usize, to: &mut [u32]) {
    for (from, to) in from.chunks_exact(2 * width * N).zip(to.chunks_exact_mut(2 * width * N)) {
        let (first, second) = from.split_at(width * N);
        for (t, to) in to.chunks_exact_mut(2 * N).enumerate() {
            to[..N].copy_from_slice(&first[t * N..(t + 1) * N]);
            to[N..].copy_from_slice(&second[t * N..(t + 1) * N]);
        }
    }
}

/// Packs some rows of the columns of a tile as tokens whose steps lie together.
fn turn_columns(x: &Tensor, rows: Range<usize>, span: &Span, kernels: &Kernels, out: &mut [u32]) {
    let mut lines = [0u32; TOGETHER * LANES];
    for (block, out) in out.chunks_exact_mut(TOGETHER * span.width).enumerate() {
        let first = rows.start + 2 * TOGETHER * block;
        let rows = first..rows.end.min(first + 2 * TOGETHER);
        let steps = rows.len().div_ceil(2);
        for (half, out) in out.chunks_mut(TOGETHER * LANES).enumerate() {
            let (at, width) = (span.first + half * LANES, out.len() / TOGETHER);
            lines[steps * width..].fill(0);
            (kernels.columns)(x, rows.clone(), at, width, Form::Bf16, &mut lines[..steps * width]);
            if width == LANES {
                (kernels.codes.pack_words)(&lines, LANES, LANES, out);
                continue;
            }
            for (t, out) in out.chunks_exact_mut(TOGETHER).enumerate() {
                out.iter_mut().enumerate().for_each(|(step, o)| *o = lines[step * width + t]);
            }
        }
    }
}

thread_local! {
    static WORDS: RefCell<Vec<u32>> = RefCell::default();
}

/// Rounds and packs the tokens of one tile of codes: see [`crate::kernels::Tile`] for the layout.
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
pub(crate) unsafe fn pack_codes<V: Lanes>(x: &Tensor, span: Span, kind: InputKind, out: &mut [u32]) {
    let InputKind::Bytes { sub, start } = kind else { return };
    let (width, subs) = (span.width, CHUNK / sub);
    let ones = [1u8; 4 * LANES];
    let mut lines = [[0u32; LANES]; LANES];
    for (chunk, out) in out.chunks_exact_mut(input_chunk(width, sub) / 4).enumerate() {
        let (codes, rest) = out.split_at_mut(LANES * width);
        for t in 0..width {
            let row = &x.row(span.first + t)[chunk * CHUNK..];
            let (line, factor) = match row.first_chunk() {
                // SAFETY: the caller's.
                Some(values) => unsafe { round::<V>(values) },
                None => {
                    let mut values = [0f32; CHUNK];
                    values[..row.len()].copy_from_slice(row);
                    // SAFETY: as above.
                    unsafe { round::<V>(&values) }
                }
            };
            *if width < LANES { &mut lines[t] } else { &mut codes.as_chunks_mut().0[t] } = line;
            // Sums of four columns each, then of sixteen.
            let (mut fours, mut sums) = ([0f32; LANES], [0f32; CHUNK / 16]);
            // SAFETY: arrays of sixteen lanes.
            unsafe {
                let none = V::to_ints(V::zero());
                let dots = V::dot(none, V::bytes(ones.as_ptr()), V::ints(line.as_ptr().cast()));
                V::store(fours.as_mut_ptr(), V::to_floats(dots));
            }
            for i in 0..sums.len() {
                sums[i] = fours[4 * i] + fours[4 * i + 1] + (fours[4 * i + 2] + fours[4 * i + 3]);
            }
            for i in 0..subs {
                let sum = if sub == 16 { sums[i] } else { sums[2 * i] + sums[2 * i + 1] };
                rest[i * width + t] = start.map_or(sum.to_bits(), |times| (times * sum as i32).cast_unsigned());
            }
            rest[subs * width + t] = factor.to_bits();
        }
        if width < LANES {
            // SAFETY: the caller's.
            unsafe { pack_words::<V>(lines.as_flattened(), LANES, width, codes) }
        }
    }
}

/// The nearest 16-bit float; what is larger than all of them is infinite.
pub(crate) fn halved(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

/// A brain float, rounded to nearest even.
#[inline(always)]
pub(crate) fn brain(v: f32) -> u16 {
    if v.is_nan() {
        return bf16::NAN.to_bits();
    }
    let bits = v.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Rounds a chunk to signed bytes of one scale; where a value is not finite the scale is not a number, so that the product is not
/// one either.
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
unsafe fn round<V: Lanes>(values: &[f32; CHUNK]) -> ([u32; LANES], f32) {
    let mut lanes = [0f32; LANES];
    let one = 1f32;
    // SAFETY: sixteen floats at a time.
    unsafe {
        let one = V::splat((&raw const one).cast());
        let (mut most, mut odd) = (V::zero(), V::zero());
        for v in values.as_chunks::<LANES>().0 {
            let v = V::load(v.as_ptr());
            most = V::max(V::max(v, V::negative_mul(v, one)), most);
            odd = V::fma(v, V::zero(), odd);
        }
        V::store(lanes.as_mut_ptr(), V::add(most, odd));
    }
    let most = largest(&lanes);
    let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
    // A scale below the normal floats has no inverse; such inputs count as zero.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let mut codes = [0i8; CHUNK];
    for i in 0..CHUNK {
        // Beside 1.5 * 2^23 a float keeps whole numbers in its lowest bits, rounded to nearest even.
        const MAGIC: f32 = 12_582_912.0;
        codes[i] = (values[i] * inverse + MAGIC).to_bits() as i8;
    }
    (bytemuck::cast(codes), most / 127.0)
}

/// The largest of sixteen sizes, by halves, or one that is not a number: these are ordered as their bits are, which come last.
#[inline(always)]
fn largest(lanes: &[f32; LANES]) -> f32 {
    let (mut eight, mut four) = ([0; 8], [0; 4]);
    for i in 0..8 {
        eight[i] = (lanes[i].to_bits() << 1).max(lanes[i + 8].to_bits() << 1);
    }
    for i in 0..4 {
        four[i] = eight[i].max(eight[i + 4]);
    }
    f32::from_bits(four[0].max(four[2]).max(four[1].max(four[3])) >> 1)
}
