//! From rows as they are stored to panels as they are multiplied.

use super::form::{CHUNK, Codes, Form, LANES, Scales};
use crate::{
    Storage,
    grid::{self, Grid},
};

/// Most columns that are unpacked at once: a multiple of every block that has a form, and of a chunk.
const PIECE: usize = 2048;

/// Packs up to [`LANES`] rows of `cols` values into a panel; missing rows are zeros.
///
/// `rows` holds the stored bytes of the rows one after the other, `out` [`Form::panel_bytes`].
#[inline(always)]
pub(crate) fn pack_panel(storage: Storage, cols: usize, rows: &[u8], out: &mut [u8]) {
    let width = storage.row_bytes(cols).max(1);
    match (storage, Form::of(storage)) {
        (Storage::F16, _) => transpose::<2>(rows, width, out),
        (Storage::F32 | Storage::Bf16, _) => transpose::<4>(rows, width, out),
        (Storage::Grid(grid), Some(Form::Codes(codes))) => pack_codes(grid, codes, cols, rows, width, out),
        // `Form::of` gives every other storage no panels.
        _ => {}
    }
}

/// `[rows][n]` units of `U` bytes to `[n][LANES]`, a cache line of each row at a time.
#[inline(always)]
fn transpose<const U: usize>(rows: &[u8], width: usize, out: &mut [u8]) {
    out.fill(0);
    for (lane, row) in rows.chunks_exact(width).enumerate() {
        if row.len() % U != 0 {
            // An odd number of brain floats: the missing half of the last pair stays zero.
            let whole = row.len() / U * U;
            out[(whole / U * LANES + lane) * U..][..row.len() - whole].copy_from_slice(&row[whole..]);
        }
    }
    let units = width / U;
    for from in (0..units).step_by(64 / U) {
        let to = units.min(from + 64 / U);
        for (lane, row) in rows.chunks_exact(width).enumerate() {
            for (k, unit) in row[from * U..to * U].as_chunks::<U>().0.iter().enumerate() {
                out[((from + k) * LANES + lane) * U..][..U].copy_from_slice(unit);
            }
        }
    }
}

/// Sub-blocks whose scales a piece holds.
const SUBS: usize = PIECE / 16;

/// The unpacked scales and codes of one piece of all lanes.
struct Piece {
    codes: [[u8; PIECE]; LANES],
    d: [[u16; LANES]; SUBS],
    m: [[u16; LANES]; SUBS],
    steps: [[u8; LANES]; SUBS],
    mins: [[u8; LANES]; SUBS],
}

#[inline(always)]
fn pack_codes(grid: Grid, codes: Codes, cols: usize, rows: &[u8], width: usize, out: &mut [u8]) {
    let form = Form::Codes(codes);
    let (len, size) = (grid.block_len(), grid.block_bytes());
    // A whole number of blocks and of chunks: groups are odd multiples of 32 or multiples of 64.
    let piece = if len % CHUNK == 0 { len } else { 2 * len };
    let sub = usize::from(codes.sub);
    let mut p = Piece {
        codes: [[0; PIECE]; LANES],
        d: [[0; LANES]; SUBS],
        m: [[0; LANES]; SUBS],
        steps: [[0; LANES]; SUBS],
        mins: [[0; LANES]; SUBS],
    };
    let (mut at, mut chunk) = (0, 0);
    for from in (0..cols).step_by(piece) {
        for (lane, row) in rows.chunks_exact(width).enumerate() {
            for half in 0..piece / len {
                let block = from / len + half;
                let Some(bytes) = row.get(block * size..(block + 1) * size) else {
                    // Only the second of two short blocks can be missing: its columns are padding.
                    p.codes[lane][half * len..(half + 1) * len].fill(0);
                    for s in half * len / sub..(half + 1) * len / sub {
                        (p.d[s][lane], p.m[s][lane]) = (0, 0);
                    }
                    continue;
                };
                grid::unpack(grid, bytes, &mut p.codes[lane][half * len..(half + 1) * len]);
                let scales = grid::scales(grid, bytes);
                for s in 0..len / sub {
                    let to = half * len / sub + s;
                    (p.d[to][lane], p.m[to][lane]) = (scales.d, scales.m);
                    if matches!(codes.scales, Scales::Steps | Scales::Pairs) {
                        (p.steps[to][lane], p.mins[to][lane]) = (scales.steps[s] as u8, scales.mins[s]);
                    }
                }
            }
        }
        for c in 0..(cols.div_ceil(CHUNK) - chunk).min(piece / CHUNK) {
            let subs = c * CHUNK / sub..(c + 1) * CHUNK / sub;
            if chunk % form.span() == 0 && form.span_header() > 0 {
                put(&mut at, out, bytemuck::bytes_of(&p.d[subs.start]));
                if codes.minimum {
                    put(&mut at, out, bytemuck::bytes_of(&p.m[subs.start]));
                }
            }
            match codes.scales {
                Scales::Halves => {
                    subs.clone().for_each(|s| put(&mut at, out, bytemuck::bytes_of(&p.d[s])));
                    if codes.minimum {
                        subs.clone().for_each(|s| put(&mut at, out, bytemuck::bytes_of(&p.m[s])));
                    }
                }
                Scales::Group(_) => {}
                Scales::Steps => {
                    subs.clone().for_each(|s| put(&mut at, out, &p.steps[s]));
                    if codes.minimum {
                        subs.clone().for_each(|s| put(&mut at, out, &p.mins[s]));
                    }
                }
                Scales::Pairs => subs.clone().for_each(|s| {
                    let pairs: [u8; LANES] = std::array::from_fn(|l| p.steps[s][l] | p.mins[s][l] << 4);
                    put(&mut at, out, &pairs);
                }),
            }
            for half in 0..2 {
                let column = c * CHUNK + half * 32;
                let steps = &mut out[at..at + 64 * usize::from(codes.bits)];
                planes(&p.codes, column, codes.bits, steps);
                at += steps.len();
            }
            chunk += 1;
        }
    }
}

#[inline(always)]
fn put(at: &mut usize, out: &mut [u8], bytes: &[u8]) {
    out[*at..*at + bytes.len()].copy_from_slice(bytes);
    *at += bytes.len();
}

/// Writes the bit planes of 32 columns from `column` on.
#[inline(always)]
fn planes(codes: &[[u8; PIECE]; LANES], column: usize, bits: u8, out: &mut [u8]) {
    let mut steps = [[0u8; 64]; 8];
    for (lane, codes) in codes.iter().enumerate() {
        let row = &codes[column..column + 32];
        for (step, four) in row.as_chunks::<4>().0.iter().enumerate() {
            steps[step][4 * lane..4 * lane + 4].copy_from_slice(four);
        }
    }
    let (mut at, mut low) = (0, 0);
    for width in [8u8, 4, 2, 1] {
        if bits & width == 0 {
            continue;
        }
        let together = 8 / usize::from(width);
        let mask = ((1u16 << width) - 1) as u8;
        for steps in steps.chunks_exact(together) {
            let out = &mut out[at..at + 64];
            for i in 0..64 {
                let mut byte = 0;
                for (j, step) in steps.iter().enumerate() {
                    byte |= (step[i] >> low & mask) << (usize::from(width) * j);
                }
                out[i] = byte;
            }
            at += 64;
        }
        low += width;
    }
}

/// Reads one lane of a panel back into the values that its storage decodes to.
pub(crate) fn unpack_row(form: Form, panel: &[u8], lane: usize, out: &mut [f32]) {
    let half = |at: usize| grid::widen(u16::from_le_bytes([panel[at], panel[at + 1]]));
    let codes = match form {
        Form::F32 => {
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
    };
    let sub = usize::from(codes.sub);
    let subs = CHUNK / sub;
    let (mut at, mut span) = (0, 0);
    for (chunk, out) in out.chunks_mut(CHUNK).enumerate() {
        if chunk % form.span() == 0 {
            span = at;
            at += form.span_header();
        }
        for (k, o) in out.iter_mut().enumerate() {
            let (scale, minimum) = lane_scales(codes, panel, span, at, k / sub, subs, lane);
            let planes = &panel[at + form.chunk_header() + k / 32 * 64 * usize::from(codes.bits)..];
            let code = lane_code(planes, codes.bits, k % 32, lane);
            let level = if codes.table { i32::from(grid::IQ4_NL[usize::from(code)]) } else { i32::from(code) - i32::from(codes.zero) };
            *o = scale * level as f32 + minimum;
        }
        at += form.chunk_header() + form.chunk_body();
    }
}

/// Scale and minimum of a sub-block of one lane.
fn lane_scales(codes: Codes, panel: &[u8], span: usize, chunk: usize, sub: usize, subs: usize, lane: usize) -> (f32, f32) {
    let half = |at: usize| grid::widen(u16::from_le_bytes([panel[at], panel[at + 1]]));
    let min = codes.minimum;
    match codes.scales {
        Scales::Halves => {
            let at = chunk + 2 * (sub * LANES + lane);
            (half(at), if min { half(at + 2 * LANES * subs) } else { -0.0 })
        }
        Scales::Group(_) => (half(span + 2 * lane), if min { half(span + 2 * (LANES + lane)) } else { -0.0 }),
        Scales::Steps => {
            let step = panel[chunk + sub * LANES + lane];
            let d = half(span + 2 * lane);
            if !min {
                return (d * f32::from(step as i8), -0.0);
            }
            let m = half(span + 2 * (LANES + lane));
            (d * f32::from(step), -(m * f32::from(panel[chunk + (subs + sub) * LANES + lane])))
        }
        Scales::Pairs => {
            let pair = panel[chunk + sub * LANES + lane];
            let (d, m) = (half(span + 2 * lane), half(span + 2 * (LANES + lane)));
            (d * f32::from(pair & 15), -(m * f32::from(pair >> 4)))
        }
    }
}

/// The code of column `k` of a half chunk.
fn lane_code(planes: &[u8], bits: u8, k: usize, lane: usize) -> u8 {
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
