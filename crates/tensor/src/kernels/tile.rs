//! Products of packed weights with packed inputs, written once in the words of [`Lanes`].
//!
//! A tile is `T` tokens against panels of [`LANES`] rows. Sums run over chunks in rising order and inside a chunk
//! over its sub-blocks, whatever `T` is: a token's result does not depend on its neighbours.

use super::lanes::Lanes;
use crate::packed::form::{CHUNK, Codes, Form, LANES, Scales};
use std::ops::Range;

/// The operands of a tile product.
///
/// For [`Form::Codes`] the inputs of a chunk are `[16][T][4]` signed bytes, `[CHUNK / sub][T]` four-byte offsets (whole
/// numbers to start a sum from, or the sums of the inputs as floats where the form has minima) and `[T]` scales; of
/// sixteen tokens and more the bytes are `[T][CHUNK]`.
/// For floats they are `[cols][T]` floats, or `[cols / 2][T][2]` brain floats, whose steps may lie together (see
/// [`super::FloatTiles::together_of`]).
#[derive(Clone, Copy)]
pub struct Tile {
    /// How the weights lie.
    pub form: Form,
    /// First panel.
    pub weights: *const u8,
    /// Bytes from one panel to the next.
    pub panel_bytes: usize,
    /// Panels.
    pub panels: usize,
    /// Chunks of a panel; for floats, steps (columns, or pairs of them).
    pub length: usize,
    /// The packed inputs of the tile.
    pub inputs: *const u8,
    /// Floats that are likely to be multiplied after them; the same where nobody knows. They are only announced.
    pub next: *const u8,
    /// Tokens: one of the widths that the table lists.
    pub width: usize,
    /// Where the sum of the first panel's first lane and the first token goes; those of its other lanes follow.
    pub out: *mut f32,
    /// Floats from the sums of one panel to those of the next, and from those of one token to those of the next.
    pub steps: [usize; 2],
    /// Is the product added to what lies there?
    pub add: bool,
}

impl Tile {
    /// Weights without inputs, from the first panel on; sums are not added to anything.
    pub fn new(form: Form, weights: *const u8, panel_bytes: usize, length: usize) -> Tile {
        let (inputs, out) = (std::ptr::null(), std::ptr::null_mut());
        let (next, steps) = (inputs, [0; 2]);
        Tile { form, weights, panel_bytes, panels: 0, length, inputs, next, width: 0, out, steps, add: false }
    }

    /// The steps of sums that lie as `[panels][width][LANES]`.
    pub fn block(width: usize) -> [usize; 2] {
        [width * LANES, LANES]
    }

    /// Multiplies some steps of some of the panels with inputs of `width` tokens; all but the first steps are added to
    /// what lies at `out`. Only floats are cut into steps, and between those that lie together.
    ///
    /// # Safety
    /// As of [`super::Kernels::tile`].
    pub unsafe fn part(
        &self,
        panels: Range<usize>,
        steps: Range<usize>,
        inputs: *const u8,
        width: usize,
        out: *mut f32,
    ) {
        let weights = self.weights.wrapping_add(panels.start * self.panel_bytes + steps.start * self.form.step_bytes());
        let inputs = inputs.wrapping_add(steps.start * 4 * width);
        let tile = Tile {
            form: self.form,
            weights,
            panel_bytes: self.panel_bytes,
            panels: panels.len(),
            length: steps.len(),
            inputs,
            // Tiles of inputs lie one after the other.
            next: inputs.wrapping_add(self.length * 4 * width),
            width,
            out,
            steps: self.steps,
            add: self.add || steps.start > 0,
        };
        // SAFETY: the caller's.
        unsafe { super::kernels().tile(&tile) }
    }
}

/// Bytes of the inputs of one chunk for `T` tokens.
pub const fn input_chunk(width: usize, sub: usize) -> usize {
    width * (CHUNK + 4 * (CHUNK / sub) + 4)
}

/// Tokens from which on a panel of codes is multiplied more slowly than memory is read, while its inputs, read again and again,
/// distract the prefetcher of the weights. For fewer tokens what the processor reads ahead by itself is faster.
pub(super) const BUSY: usize = 8;
/// How far ahead of the products weights are asked for then.
const AHEAD: usize = 4096;

/// Says that what lies [`AHEAD`] bytes on is read soon.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
pub(super) unsafe fn read_ahead<V: Lanes, const R: usize>(panels: [*const u8; R], bytes: usize) {
    for panel in panels {
        let mut at = 0;
        while at < bytes {
            // SAFETY: a line that is only announced may lie anywhere.
            unsafe { V::prefetch(panel.wrapping_add(AHEAD + at)) };
            at += 64;
        }
    }
}

/// Scales and minima of the sub-blocks of a chunk.
#[derive(Clone, Copy)]
pub(super) struct ChunkScales<F> {
    pub(super) scale: [F; 4],
    pub(super) minimum: [F; 4],
}

/// Scale and minimum that the chunks of a span share, and zeros where they share none.
///
/// # Safety
/// The processor has the instructions, and the pointer is at a span of a panel of that form.
#[inline(always)]
pub(super) unsafe fn shared_scales<V: Lanes, const MIN: bool>(codes: Codes, span: *const u8) -> [V::Floats; 2] {
    // SAFETY: the headers are as long as `Form` says.
    unsafe {
        match codes.scales {
            Scales::Halves | Scales::Floats => [V::zero(); 2],
            Scales::Group(_) if MIN && codes.point => {
                let d = V::halves(span);
                [d, V::negative_mul(d, V::halves(span.add(32)))]
            }
            Scales::Steps if codes.halvings > 0 => {
                let unit = codes.unit();
                [V::mul(V::halves(span), V::splat((&raw const unit).cast())), V::zero()]
            }
            Scales::Group(_) | Scales::Steps | Scales::Pairs => {
                [V::halves(span), if MIN { V::halves(span.add(32)) } else { V::zero() }]
            }
            Scales::Sixes => V::uppermost(span),
        }
    }
}

/// Scales and minima of a chunk from its header and what its span shares.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Tile`] says.
#[inline(always)]
pub(super) unsafe fn scales<V: Lanes, const SUBS: usize, const MIN: bool>(
    codes: Codes,
    [d, m]: [V::Floats; 2],
    chunk: *const u8,
) -> ChunkScales<V::Floats> {
    // SAFETY: the headers are as long as `Form` says.
    unsafe {
        let mut s = ChunkScales { scale: [V::zero(); 4], minimum: [V::zero(); 4] };
        match codes.scales {
            Scales::Halves => {
                for i in 0..SUBS {
                    s.scale[i] = V::halves(chunk.add(i * 32));
                    if MIN {
                        let minimum = V::halves(chunk.add((SUBS + i) * 32));
                        s.minimum[i] = if codes.point { V::negative_mul(s.scale[i], minimum) } else { minimum };
                    }
                }
            }
            Scales::Floats => {
                for i in 0..SUBS {
                    s.scale[i] = V::load(chunk.cast::<f32>().add(i * LANES));
                    if MIN {
                        s.minimum[i] = V::load(chunk.cast::<f32>().add((SUBS + i) * LANES));
                    }
                }
            }
            Scales::Group(_) => {
                s.scale = [d; 4];
                if MIN {
                    s.minimum = [m; 4];
                }
            }
            Scales::Steps => {
                for i in 0..SUBS {
                    s.scale[i] = V::mul(d, V::signed(chunk.add(i * 16)));
                }
            }
            Scales::Sixes => {
                [s.scale[0], s.scale[1], s.minimum[0], s.minimum[1]] = V::sixes(chunk, d, m);
            }
            Scales::Pairs => {
                for i in 0..SUBS {
                    let (step, minimum) = V::nibbles(chunk.add(i * 16));
                    s.scale[i] = V::mul(d, step);
                    s.minimum[i] = V::negative_mul(m, minimum);
                }
            }
        }
        s
    }
}

/// The codes of step `STEP` (0 to 7) of a half chunk whose planes start at `p`; with a table what it holds for them.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Tile`] says.
#[inline(always)]
pub(super) unsafe fn step_codes<V: Lanes, const BITS: usize, const TABLE: bool, const STEP: usize>(
    p: *const u8,
    levels: &[u8; 16],
) -> V::Bytes {
    // SAFETY: a half chunk holds `BITS * 64` bytes of planes.
    unsafe {
        let low = match BITS {
            2 => two::<V, STEP, 0>(p),
            3 => V::or(two::<V, STEP, 0>(p), one::<V, STEP, 2>(p.add(128))),
            4 => four::<V, STEP>(p),
            5 => V::or(four::<V, STEP>(p), one::<V, STEP, 4>(p.add(256))),
            6 => V::or(four::<V, STEP>(p), two::<V, STEP, 4>(p.add(256))),
            7 => V::or(V::or(four::<V, STEP>(p), two::<V, STEP, 4>(p.add(256))), one::<V, STEP, 6>(p.add(384))),
            _ => V::bytes(p.add(64 * STEP)),
        };
        if TABLE { V::lookup(levels, low) } else { low }
    }
}

/// The low four bits of a step.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Tile`] says.
#[inline(always)]
unsafe fn four<V: Lanes, const STEP: usize>(p: *const u8) -> V::Bytes {
    // SAFETY: as in `step_codes`.
    unsafe {
        let v = V::bytes(p.add(64 * (STEP / 2)));
        V::and(if STEP.is_multiple_of(2) { v } else { V::down::<4>(v) }, 15)
    }
}

/// Two bits of a step, moved to the bits from `AT` (0 or 4) on.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Tile`] says.
#[inline(always)]
pub(super) unsafe fn two<V: Lanes, const STEP: usize, const AT: usize>(p: *const u8) -> V::Bytes {
    // SAFETY: as in `step_codes`.
    unsafe {
        let v = V::bytes(p.add(64 * (STEP / 4)));
        let v = match (AT, STEP % 4) {
            (0, 0) | (4, 2) => v,
            (0, 1) | (4, 3) => V::down::<2>(v),
            (0, 2) => V::down::<4>(v),
            (0, _) => V::down::<6>(v),
            (_, 0) => V::up::<4>(v),
            _ => V::up::<2>(v),
        };
        V::and(v, 3 << AT)
    }
}

/// One bit of a step, moved to bit `AT`.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Tile`] says.
#[inline(always)]
unsafe fn one<V: Lanes, const STEP: usize, const AT: usize>(p: *const u8) -> V::Bytes {
    // SAFETY: as in `step_codes`.
    unsafe {
        let v = V::bytes(p);
        let v = match STEP as isize - AT as isize {
            -6 => V::up::<6>(v),
            -5 => V::up::<5>(v),
            -4 => V::up::<4>(v),
            -3 => V::up::<3>(v),
            -2 => V::up::<2>(v),
            -1 => V::up::<1>(v),
            0 => v,
            1 => V::down::<1>(v),
            2 => V::down::<2>(v),
            3 => V::down::<3>(v),
            4 => V::down::<4>(v),
            _ => V::down::<5>(v),
        };
        V::and(v, 1 << AT)
    }
}

/// Runs a tile whose form is codes of `BITS` bits in sub-blocks of `SUB` columns, `R` panels at a time.
///
/// # Safety
/// The pointers hold what [`Tile`] says for `T` tokens, and `tile.form` is the form that the constants tell.
#[inline(always)]
pub(crate) unsafe fn codes<
    V: Lanes,
    const T: usize,
    const R: usize,
    const BITS: usize,
    const TABLE: bool,
    const SUB: usize,
    const MIN: bool,
>(
    tile: &Tile,
) {
    let together = tile.panels / R * R;
    for panel in (0..together).step_by(R) {
        // SAFETY: the caller's tile holds so many panels.
        unsafe { code_panels::<V, T, R, BITS, TABLE, SUB, MIN>(tile, panel) }
    }
    for panel in together..tile.panels {
        // SAFETY: as above.
        unsafe { code_panels::<V, T, 1, BITS, TABLE, SUB, MIN>(tile, panel) }
    }
}

#[inline(always)]
unsafe fn code_panels<
    V: Lanes,
    const T: usize,
    const R: usize,
    const BITS: usize,
    const TABLE: bool,
    const SUB: usize,
    const MIN: bool,
>(
    tile: &Tile,
    panel: usize,
) {
    let Form::Codes(form) = tile.form else { return };
    let (span, span_header) = (tile.form.span(), tile.form.span_header());
    let places = tile.form.chunk_places();
    let span_bytes = span_header + span * (tile.form.chunk_header() + BITS * 128);
    // SAFETY: the caller's tile holds the panels, chunks and sums.
    unsafe {
        let [panel_step, token_step] = tile.steps;
        let out = tile.out.add(panel * panel_step);
        let mut acc = [[V::zero(); T]; R];
        if tile.add {
            for r in 0..R {
                for t in 0..T {
                    acc[r][t] = V::load(out.add(r * panel_step + t * token_step));
                }
            }
        }
        let mut w: [*const u8; R] = std::array::from_fn(|r| tile.weights.add((panel + r) * tile.panel_bytes));
        let mut x = tile.inputs;
        let mut left = tile.length;
        // Whole bytes lie so that any prefetcher follows them: each load is as far from its next one as from its last.
        let ahead = T >= BUSY || BITS < 8 && T >= super::kernels().codes.busy;
        while left > 0 {
            let mut shared = [[V::zero(); 2]; R];
            for r in 0..R {
                shared[r] = shared_scales::<V, MIN>(form, w[r]);
            }
            let mut scales = w.map(|w| w.add(span_header));
            let mut codes = scales.map(|s| s.add(places.codes));
            for _ in 0..span.min(left) {
                if ahead {
                    read_ahead::<V, R>(codes, places.code_step);
                }
                chunk::<V, T, R, BITS, TABLE, SUB, MIN>(form, shared, scales, codes, x, &mut acc);
                scales = scales.map(|s| s.add(places.scale_step));
                codes = codes.map(|c| c.add(places.code_step));
                x = x.add(input_chunk(T, SUB));
            }
            left -= span.min(left);
            w = w.map(|w| w.add(span_bytes));
        }
        for r in 0..R {
            for t in 0..T {
                V::store(out.add(r * panel_step + t * token_step), acc[r][t]);
            }
        }
    }
}

/// One chunk of `R` panels.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Tile`] says.
#[inline(always)]
unsafe fn chunk<
    V: Lanes,
    const T: usize,
    const R: usize,
    const BITS: usize,
    const TABLE: bool,
    const SUB: usize,
    const MIN: bool,
>(
    form: Codes,
    shared: [[V::Floats; 2]; R],
    own: [*const u8; R],
    planes: [*const u8; R],
    x: *const u8,
    acc: &mut [[V::Floats; T]; R],
) {
    let wide = BITS == 8 || TABLE;
    let levels = if TABLE { form.levels() } else { &[0; 16] };
    // SAFETY: offsets stay inside the chunks and their inputs.
    unsafe {
        let mut s = [ChunkScales { scale: [V::zero(); 4], minimum: [V::zero(); 4] }; R];
        for r in 0..R {
            s[r] = if SUB == 16 {
                scales::<V, 4, MIN>(form, shared[r], own[r])
            } else {
                scales::<V, 2, MIN>(form, shared[r], own[r])
            };
        }
        let offsets = x.add(CHUNK * T);
        let mut part = [[V::zero(); T]; R];
        // Steps are constants, so that every shift is one.
        macro_rules! sub_block {
            ($sub:expr, $half:expr, $($step:literal)*) => {{
                let offsets = offsets.add($sub * T * 4);
                let mut dots = [start::<V, T, MIN>(offsets, wide); R];
                let planes = planes.map(|p| p.add($half * BITS * 64));
                $(
                    // No closures here: they would be compiled without the instruction set.
                    let mut codes = [step_codes::<V, BITS, TABLE, $step>(planes[0], levels); R];
                    for r in 1..R {
                        codes[r] = step_codes::<V, BITS, TABLE, $step>(planes[r], levels);
                    }
                    for t in 0..T {
                        let x = V::splat_int(x.add((($half * 8 + $step) * T + t) * 4));
                        for r in 0..R {
                            let dot = dots[r][t];
                            dots[r][t] = if wide { V::dot_wide(dot, codes[r], x) } else { V::dot(dot, codes[r], x) };
                        }
                    }
                )*
                for t in 0..T {
                    for r in 0..R {
                        part[r][t] = V::fma(V::to_floats(dots[r][t]), s[r].scale[$sub], part[r][t]);
                    }
                    if MIN {
                        let sum = V::splat(offsets.add(t * 4));
                        for r in 0..R {
                            part[r][t] = V::fma(sum, s[r].minimum[$sub], part[r][t]);
                        }
                    }
                }
            }};
        }
        if SUB == 32 {
            sub_block!(0, 0, 0 1 2 3 4 5 6 7);
            sub_block!(1, 1, 0 1 2 3 4 5 6 7);
        } else {
            sub_block!(0, 0, 0 1 2 3);
            sub_block!(1, 0, 4 5 6 7);
            sub_block!(2, 1, 0 1 2 3);
            sub_block!(3, 1, 4 5 6 7);
        }
        let factors = offsets.add(CHUNK / SUB * T * 4);
        for t in 0..T {
            let factor = V::splat(factors.add(t * 4));
            for r in 0..R {
                acc[r][t] = V::fma(part[r][t], factor, acc[r][t]);
            }
        }
    }
}

/// What the whole-number sums of a sub-block start from.
/// # Safety
/// As of the kernels' `run`.
#[inline(always)]
pub(super) unsafe fn start<V: Lanes, const T: usize, const MIN: bool>(offsets: *const u8, wide: bool) -> [V::Ints; T] {
    // SAFETY: `T` offsets of four bytes.
    unsafe {
        let mut dots = [V::to_ints(V::zero()); T];
        for t in 0..T {
            let at = offsets.add(t * 4);
            if !MIN {
                dots[t] = V::splat_int(at);
            } else if wide && V::SIGNED {
                dots[t] = V::ints_up::<7>(V::to_ints(V::splat(at)));
            }
        }
        dots
    }
}
