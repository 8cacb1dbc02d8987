//! From rows as they are stored to panels as they are multiplied.

use super::{
    form::{CHUNK, Codes, Form, LANES, Scales},
    sparse,
};
use crate::{
    Storage,
    grid::{self, Grid, Zero},
    kernels::Lanes,
};

/// Packs up to [`LANES`] rows of `cols` values into a panel; missing rows are zeros.
///
/// `rows` holds the stored bytes of the rows one after the other, `out` [`Form::panel_bytes`].
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
pub(crate) unsafe fn pack_panel<V: Lanes>(storage: Storage, cols: usize, rows: &[u8], out: &mut [u8]) {
    let width = storage.row_bytes(cols).max(1);
    if let Storage::Sparse(sparse) = storage {
        return sparse::pack(sparse, cols, rows, width, out);
    }
    // SAFETY: the caller's.
    unsafe {
        match (storage, Form::of(storage)) {
            (Storage::Grid(grid), Form::F16) => widened::<V>(grid, cols, rows, width, out),
            (Storage::F16, _) => transpose::<V, 2>(rows, width, out),
            (Storage::F32 | Storage::Bf16, _) => transpose::<V, 4>(rows, width, out),
            // The loops over the blocks of a grid that is known when they are compiled ask no questions.
            (Storage::Grid(Grid::Q8_0), Form::Codes(codes)) => {
                pack_codes::<V, 256>(Grid::Q8_0, codes, cols, rows, width, out)
            }
            (Storage::Grid(Grid::Q4K), Form::Codes(codes)) => {
                pack_codes::<V, 256>(Grid::Q4K, codes, cols, rows, width, out)
            }
            // Pieces of 256 columns fit into half of the first-level cache: rows are cut into them, blocks put together.
            (Storage::Grid(grid), Form::Codes(codes))
                if grid.block_len() <= 128 || grid.block_len() <= 256 && grid.block_len() % 64 == 0 =>
            {
                pack_codes::<V, 256>(grid, codes, cols, rows, width, out)
            }
            (Storage::Grid(grid), Form::Codes(codes)) => pack_codes::<V, 2048>(grid, codes, cols, rows, width, out),
            // `Form::of` gives codes no other form.
            (Storage::Grid(_) | Storage::Sparse(_), _) => {}
        }
    }
}

/// Codes as the 16-bit floats nearest to what they stand for.
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
unsafe fn widened<V: Lanes>(grid: Grid, cols: usize, rows: &[u8], width: usize, out: &mut [u8]) {
    let mut values = vec![0f32; cols];
    let mut halves = Vec::with_capacity(rows.len() / width * cols * 2);
    for row in rows.chunks_exact(width) {
        grid.decode_blocks(row, &mut values);
        halves.extend(values.iter().flat_map(|v| halved(*v).to_le_bytes()));
    }
    // SAFETY: the caller's.
    unsafe { transpose::<V, 2>(&halves, 2 * cols, out) }
}

/// `[rows][n]` units of `U` bytes to `[n][LANES]`, a cache line of each row at a time.
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
unsafe fn transpose<V: Lanes, const U: usize>(rows: &[u8], width: usize, out: &mut [u8]) {
    let whole = width / U * U;
    let full = rows.len() / width == LANES;
    let quick = if U == 4 && full { width / 64 * 64 } else { 0 };
    for at in (0..quick).step_by(64) {
        // SAFETY: sixteen rows of `width` bytes hold 64 from `at` on, and the panel sixteen times as many.
        unsafe { V::transpose(rows.as_ptr().add(at), width, out[at * LANES..][..64 * LANES].as_mut_ptr()) }
    }
    out[quick * LANES..].fill(0);
    for (lane, row) in rows.chunks_exact(width).enumerate() {
        // An odd number of brain floats: the missing half of the last pair stays zero.
        let odd = &row[whole..];
        out.get_mut((whole / U * LANES + lane) * U..).unwrap_or_default()[..odd.len()].copy_from_slice(odd);
    }
    for from in (quick / U..whole / U).step_by(64 / U) {
        let to = (whole / U).min(from + 64 / U);
        for (lane, row) in rows.chunks_exact(width).enumerate() {
            for (k, unit) in row[from * U..to * U].as_chunks::<U>().0.iter().enumerate() {
                out[((from + k) * LANES + lane) * U..][..U].copy_from_slice(unit);
            }
        }
    }
}

/// Turns rows of words, one after the other, into the tokens of a tile: `[cols][width]`. More rows than `width` may follow;
/// sixteen make it fast.
///
/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
pub(crate) unsafe fn pack_words<V: Lanes>(rows: &[u32], cols: usize, width: usize, out: &mut [u32]) {
    // SAFETY: the caller's.
    unsafe {
        match width {
            16 => words::<V, 16>(rows, cols, out),
            12 => words::<V, 12>(rows, cols, out),
            8 => words::<V, 8>(rows, cols, out),
            6 => words::<V, 6>(rows, cols, out),
            4 => words::<V, 4>(rows, cols, out),
            _ => {
                for (k, out) in out.chunks_exact_mut(width).enumerate() {
                    out.iter_mut().enumerate().for_each(|(t, o)| *o = rows[t * cols + k]);
                }
            }
        }
    }
}

/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
unsafe fn words<V: Lanes, const WIDTH: usize>(rows: &[u32], cols: usize, out: &mut [u32]) {
    let quick = if rows.len() >= LANES * cols { cols / LANES * LANES } else { 0 };
    let out = &mut out.as_chunks_mut::<WIDTH>().0[..cols];
    let mut block = [[0u32; LANES]; LANES];
    for at in (0..quick).step_by(LANES) {
        // SAFETY: sixteen rows hold sixteen words from `at` on, and the block as many.
        unsafe { V::transpose(rows[at..].as_ptr().cast(), 4 * cols, block.as_mut_ptr().cast()) };
        for (out, words) in out[at..at + LANES].iter_mut().zip(&block) {
            out.copy_from_slice(&words[..WIDTH]);
        }
    }
    for k in quick..cols {
        for t in 0..WIDTH {
            out[k][t] = rows[t * cols + k];
        }
    }
}

/// The unpacked scales and codes of one piece of `PIECE` columns of all lanes: a whole number of blocks and of chunks.
struct Piece<const PIECE: usize> {
    codes: [[u8; PIECE]; LANES],
    /// Per 16 columns, or less often.
    d: [[u16; LANES]; SUBS],
    m: [[u16; LANES]; SUBS],
    steps: [[u8; LANES]; SUBS],
    mins: [[u8; LANES]; SUBS],
}

/// How the blocks of a row are cut for packing: as they are stored, or 256 columns of a row that is one block.
struct Blocks {
    grid: Grid,
    codes: Codes,
    /// Columns of a block, and its bytes.
    len: usize,
    size: usize,
}

/// Columns of a row that are packed as one block.
const OF_A_ROW: usize = 256;

impl Blocks {
    #[inline(always)]
    fn of(grid: Grid, codes: Codes, cols: usize) -> Blocks {
        match grid.is_by_row() {
            true => Blocks { grid, codes, len: OF_A_ROW, size: OF_A_ROW * usize::from(grid.code_bits()) / 8 },
            false => Blocks { grid, codes, len: grid.block_len(), size: grid.block_bytes_in(cols) },
        }
    }

    /// The bytes of a block's scales, and of the block; `None` beyond the last one.
    #[inline(always)]
    fn get<'a>(&self, row: &'a [u8], block: usize) -> Option<(&'a [u8], &'a [u8])> {
        if !self.grid.is_by_row() {
            let bytes = row.get(block * self.size..(block + 1) * self.size)?;
            return Some((bytes, bytes));
        }
        let (header, codes) = row.split_at(self.grid.header_bytes());
        let from = block * self.size;
        (from < codes.len()).then(|| (header, &codes[from..codes.len().min(from + self.size)]))
    }

    #[inline(always)]
    fn unpack(&self, bytes: &[u8], codes: &mut [u8]) {
        if !self.grid.is_by_row() {
            return grid::unpack(self.grid, bytes, codes);
        }
        // The end of a row may be short of a piece.
        let bits = self.grid.code_bits();
        let held = bytes.len() * 8 / usize::from(bits);
        grid::unpack_bits(bytes, bits, &mut codes[..held]);
        codes[held..].fill(0);
    }

    /// Scale, and minimum or code of zero, as 16-bit floats, of a sub-block whose scale is no multiple of the block's.
    #[inline(always)]
    fn scale(&self, header: &[u8], sub: usize) -> (u16, u16) {
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let (d, after) = match self.grid {
            Grid::Mxfp4 => return (halved(grid::half_power(header[0].into())), 0),
            Grid::Nvfp4 => return (halved(grid::half_e4m3(header[sub])), 0),
            Grid::Tq1 | Grid::Tq2 => return (half(header.len() - 2), 0),
            grid if grid.is_by_row() => {
                let scale = f32::from_le_bytes([header[0], header[1], header[2], header[3]]);
                (halved(scale), 4)
            }
            _ => (half(0), 2),
        };
        match self.grid {
            Grid::Int { zero: Zero::Point, .. } => (d, halved(f32::from(header[after]))),
            _ => (d, if self.codes.minimum { half(after) } else { 0 }),
        }
    }
}

#[inline(always)]
fn halved(x: f32) -> u16 {
    half::f16::from_f32(x).to_bits()
}

/// Most sub-blocks of a piece: 16 of a block of 256 in steps of 16, or 64 of two groups of almost 1024 in 32.
const SUBS: usize = 64;

/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
unsafe fn pack_codes<V: Lanes, const PIECE: usize>(
    grid: Grid,
    codes: Codes,
    cols: usize,
    rows: &[u8],
    width: usize,
    out: &mut [u8],
) {
    let form = Form::Codes(codes);
    let blocks = Blocks::of(grid, codes, cols);
    let len = blocks.len;
    // Groups are odd multiples of 32 or multiples of 64; small blocks go together.
    let piece = if len.is_multiple_of(CHUNK) { len } else { 2 * len };
    let piece = piece * (256 / piece).max(1);
    let sub = usize::from(codes.sub);
    let (parts, own) = (piece / len, len / sub);
    let stepped = matches!(codes.scales, Scales::Steps | Scales::Sixes | Scales::Pairs);
    let mut p = Piece::<PIECE> {
        codes: [[0; PIECE]; LANES],
        d: [[0; LANES]; SUBS],
        m: [[0; LANES]; SUBS],
        steps: [[0; LANES]; SUBS],
        mins: [[0; LANES]; SUBS],
    };
    let (mut chunk, mut first) = (0, 0);
    let mut scales = grid::Block::empty(grid);
    while first * len < cols {
        for (lane, row) in rows.chunks_exact(width).enumerate() {
            for part in 0..parts {
                let subs = part * own..(part + 1) * own;
                let Some((header, bytes)) = blocks.get(row, first + part) else {
                    // Beyond the last block lies the padding of the last chunk.
                    p.codes[lane][part * len..(part + 1) * len].fill(0);
                    subs.for_each(|s| (p.d[s][lane], p.m[s][lane], p.steps[s][lane], p.mins[s][lane]) = (0, 0, 0, 0));
                    continue;
                };
                blocks.unpack(bytes, &mut p.codes[lane][part * len..(part + 1) * len]);
                if let (8, Grid::Levels { table, .. }) = (codes.bits, grid) {
                    // More levels than a register looks up.
                    let levels = table.levels();
                    p.codes[lane][part * len..(part + 1) * len]
                        .iter_mut()
                        .for_each(|code| *code = (levels[usize::from(*code)] + 128.0) as u8);
                }
                if stepped {
                    grid::read_scales(grid, header, &mut scales);
                    for (i, s) in subs.enumerate() {
                        (p.d[s][lane], p.m[s][lane]) = (scales.d, scales.m);
                        (p.steps[s][lane], p.mins[s][lane]) = (scales.steps[i] as u8, scales.mins[i]);
                    }
                } else {
                    for (i, s) in subs.enumerate() {
                        (p.d[s][lane], p.m[s][lane]) = blocks.scale(header, i);
                    }
                }
            }
        }
        first += parts;
        for c in 0..(cols.div_ceil(CHUNK) - chunk).min(piece / CHUNK) {
            let subs = c * CHUNK / sub..(c + 1) * CHUNK / sub;
            let place = Place::of(form, chunk);
            if place.number == 0 && form.span_header() > 0 {
                let mut at = place.span;
                put(&mut at, out, bytemuck::bytes_of(&p.d[subs.start]));
                if codes.minimum {
                    put(&mut at, out, bytemuck::bytes_of(&p.m[subs.start]));
                }
            }
            chunk_scales(codes, &p, subs, place, out);
            let (lanes, out) = (p.codes[0][c * CHUNK..].as_ptr(), &mut out[place.codes..][..form.chunk_body()]);
            if codes.bits == 8 {
                // SAFETY: every lane holds a chunk of codes from this column on, and whole bytes of them are what is written.
                unsafe { V::transpose(lanes, PIECE, out.as_mut_ptr()) };
            } else {
                let mut steps = [[0u8; 64]; CHUNK / 4];
                // SAFETY: as above.
                unsafe { V::transpose(lanes, PIECE, steps.as_mut_ptr().cast()) };
                let halves = out.chunks_exact_mut(form.chunk_body() / 2);
                steps.as_chunks::<8>().0.iter().zip(halves).for_each(|(half, out)| planes(half, codes.bits, out));
            }
            chunk += 1;
        }
    }
}

/// Where a chunk lies in its panel.
#[derive(Clone, Copy)]
struct Place {
    /// Its span.
    span: usize,
    /// Which of the span's it is.
    number: usize,
    /// Its scales.
    scales: usize,
    /// Its codes.
    codes: usize,
}

impl Place {
    #[inline(always)]
    fn of(form: Form, chunk: usize) -> Place {
        let (chunks, places) = (form.span(), form.chunk_places());
        let bytes = form.span_header() + chunks * (form.chunk_header() + form.chunk_body());
        let (span, number) = (chunk / chunks * bytes, chunk % chunks);
        let first = span + form.span_header();
        Place {
            span,
            number,
            scales: first + number * places.scale_step,
            codes: first + places.codes + number * places.code_step,
        }
    }
}

/// Writes the scales of a chunk.
#[inline(always)]
fn chunk_scales<const PIECE: usize>(
    codes: Codes,
    p: &Piece<PIECE>,
    subs: std::ops::Range<usize>,
    place: Place,
    out: &mut [u8],
) {
    let (first, at) = (subs.start, &mut { place.scales });
    match codes.scales {
        Scales::Halves => {
            subs.clone().for_each(|s| put(at, out, bytemuck::bytes_of(&p.d[s])));
            if codes.minimum {
                subs.for_each(|s| put(at, out, bytemuck::bytes_of(&p.m[s])));
            }
        }
        // Panels are opened from packed ones, never from rows.
        Scales::Group(_) | Scales::Floats => {}
        Scales::Steps => subs.for_each(|s| put(at, out, &p.steps[s])),
        Scales::Sixes => {
            // The four bytes of what a span shares, one to each of its chunks.
            let shared = if place.number < 2 { &p.d[first] } else { &p.m[first] };
            let (scale, minimum) = ([&p.steps[first], &p.steps[first + 1]], [&p.mins[first], &p.mins[first + 1]]);
            let mut words = [0u32; LANES];
            for (lane, word) in words.iter_mut().enumerate() {
                let field = |six: &[u8; LANES]| u32::from(six[lane]);
                let byte = u32::from(shared[lane] >> (8 * (place.number % 2)) & 0xff);
                *word = field(scale[0]) | field(scale[1]) << 6 | field(minimum[0]) << 12 | field(minimum[1]) << 18;
                *word = (*word | byte << 24).to_le();
            }
            put(at, out, bytemuck::bytes_of(&words));
        }
        Scales::Pairs => subs.for_each(|s| {
            let pairs: [u8; LANES] = std::array::from_fn(|l| p.steps[s][l] | p.mins[s][l] << 4);
            put(at, out, &pairs);
        }),
    }
}

#[inline(always)]
fn put(at: &mut usize, out: &mut [u8], bytes: &[u8]) {
    out[*at..*at + bytes.len()].copy_from_slice(bytes);
    *at += bytes.len();
}

/// Writes the bit planes of eight steps of codes.
#[inline(always)]
pub(super) fn planes(steps: &[[u8; 64]; 8], bits: u8, out: &mut [u8]) {
    let (mut out, mut low) = (out.as_chunks_mut::<64>().0, 0);
    if bits == 8 {
        return out.copy_from_slice(steps);
    }
    if bits & 4 != 0 {
        let (own, rest) = out.split_at_mut(4);
        plane::<4, 2>(steps, low, own);
        (out, low) = (rest, low + 4);
    }
    if bits & 2 != 0 {
        let (own, rest) = out.split_at_mut(2);
        plane::<2, 4>(steps, low, own);
        (out, low) = (rest, low + 2);
    }
    if bits & 1 != 0 {
        plane::<1, 8>(steps, low, out);
    }
}

/// Writes the plane of the `WIDTH` bits from `low` on, `TOGETHER` steps to a byte.
#[inline(always)]
pub(super) fn plane<const WIDTH: u32, const TOGETHER: usize>(steps: &[[u8; 64]; 8], low: u32, out: &mut [[u8; 64]]) {
    let mask = (1u8 << WIDTH) - 1;
    for (out, steps) in out.iter_mut().zip(steps.as_chunks::<TOGETHER>().0) {
        for i in 0..64 {
            let mut byte = 0;
            for (j, step) in steps.iter().enumerate() {
                byte |= (step[i] >> low & mask) << (WIDTH * j as u32);
            }
            out[i] = byte;
        }
    }
}

/// Reads one lane of a panel back into the values that its storage decodes to.
pub(crate) fn unpack_row(form: Form, panel: &[u8], lane: usize, out: &mut [f32]) {
    if form.pattern().is_some() {
        return sparse::unpack_row(form, panel, lane, out);
    }
    let half = |at: usize| grid::widen(u16::from_le_bytes([panel[at], panel[at + 1]]));
    let codes = match form {
        Form::F32 | Form::Half => {
            for (k, o) in out.iter_mut().enumerate() {
                let at = 4 * (k * LANES + lane);
                *o = f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]]);
            }
            return;
        }
        Form::F16 => {
            return out.iter_mut().enumerate().for_each(|(k, o)| *o = half(2 * (k * LANES + lane)));
        }
        Form::Bf16 => {
            for (k, o) in out.iter_mut().enumerate() {
                let at = 4 * (k / 2 * LANES + lane) + 2 * (k % 2);
                *o = f32::from_bits(u32::from(u16::from_le_bytes([panel[at], panel[at + 1]])) << 16);
            }
            return;
        }
        Form::Codes(codes) => codes,
        Form::Sparse(..) => return,
    };
    let sub = usize::from(codes.sub);
    for (chunk, out) in out.chunks_mut(CHUNK).enumerate() {
        let place = Place::of(form, chunk);
        for (k, o) in out.iter_mut().enumerate() {
            let (scale, minimum) = lane_scales(codes, panel, place, k / sub, lane);
            let bits = codes.plane_bits();
            let planes = &panel[place.codes + k / 32 * 64 * usize::from(bits)..];
            let code = lane_code(planes, bits, k % 32, lane);
            let level = match codes.table {
                Some(_) if codes.is_opened() => i32::from(code) - 128,
                Some(_) => i32::from(codes.levels()[usize::from(code & 15)]) - 128,
                None => i32::from(code) - i32::from(codes.zero),
            };
            *o = scale * level as f32 + minimum;
        }
    }
}

/// Scale and minimum of a sub-block of one lane.
fn lane_scales(codes: Codes, panel: &[u8], Place { span, scales, .. }: Place, sub: usize, lane: usize) -> (f32, f32) {
    let half = |at: usize| grid::widen(u16::from_le_bytes([panel[at], panel[at + 1]]));
    let min = codes.minimum;
    let (scale, minimum) = match codes.scales {
        Scales::Halves => {
            let at = scales + 2 * (sub * LANES + lane);
            (half(at), if min { half(at + 2 * LANES * CHUNK / usize::from(codes.sub)) } else { -0.0 })
        }
        Scales::Floats => {
            let float = |at: usize| f32::from_le_bytes(std::array::from_fn(|i| panel[at + 4 * lane + i]));
            let at = scales + 4 * LANES * sub;
            return (float(at), if min { float(at + 4 * LANES * CHUNK / usize::from(codes.sub)) } else { -0.0 });
        }
        Scales::Group(_) => (half(span + 2 * lane), if min { half(span + 2 * (LANES + lane)) } else { -0.0 }),
        Scales::Steps => {
            let step = panel[scales + sub * LANES + lane];
            (codes.unit() * half(span + 2 * lane) * f32::from(step as i8), -0.0)
        }
        Scales::Sixes => {
            let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| panel[at + 4 * lane + i]));
            let shared = [0, 1, 2, 3].map(|quarter| (word(span + quarter * 4 * LANES) >> 24) as u16);
            let [d, m] = [shared[0] | shared[1] << 8, shared[2] | shared[3] << 8].map(grid::widen);
            let field = |i: usize| (word(scales) >> (6 * i) & 63) as f32;
            (d * field(sub), -(m * field(2 + sub)))
        }
        Scales::Pairs => {
            let pair = panel[scales + sub * LANES + lane];
            let (d, m) = (half(span + 2 * lane), half(span + 2 * (LANES + lane)));
            (d * f32::from(pair & 15), -(m * f32::from(pair >> 4)))
        }
    };
    (scale, if codes.point { -(scale * minimum) } else { minimum })
}

/// The code of column `k` of a half chunk.
pub(super) fn lane_code(planes: &[u8], bits: u8, k: usize, lane: usize) -> u8 {
    let (mut at, mut low, mut code) = (0, 0, 0);
    for width in [8u8, 4, 2, 1] {
        if bits & width == 0 {
            continue;
        }
        let together = 8 / usize::from(width);
        let step = k / 4;
        let byte = planes[at + step / together * 64 + 4 * lane + k % 4];
        let mask = ((1u16 << width) - 1) as u8;
        code |= (byte >> (usize::from(width) * (step % together)) & mask) << low;
        at += 8 / together * 64;
        low += width;
    }
    code
}
