//! Panels of sparse matrices: masks, then what is kept.

use super::{
    form::{CHUNK, Codes, Floats, Form, LANES, MASKS, Scales},
    repack,
};
use crate::{
    Sparse, Storage,
    grid::{self, Grid},
};

/// Packs up to [`LANES`] stored rows of `width` bytes into a panel; missing rows are zeros.
pub(super) fn pack(sparse: Sparse, cols: usize, rows: &[u8], width: usize, out: &mut [u8]) {
    let form = Form::of(Storage::Sparse(sparse));
    out.fill(0);
    match (form, sparse.values()) {
        (Form::Codes(codes), Storage::Grid(grid)) => {
            let lanes: Vec<_> = rows.chunks_exact(width).map(|row| Lane::of(sparse, grid, row, cols)).collect();
            pack_codes(form, codes, &lanes, cols, out);
        }
        (Form::Sparse(floats, _), _) => {
            let lanes: Vec<_> = rows.chunks_exact(width).map(|row| floats_of(sparse, row, cols, floats)).collect();
            pack_floats(floats, &lanes, cols, out);
        }
        // `Form::of` gives sparse matrices no other form.
        _ => {}
    }
}

/// The code where none is kept.
const HOLE: u16 = u16::MAX;

/// A row of codes.
struct Lane {
    /// Of each column, or [`HOLE`].
    codes: Vec<u16>,
    /// Scales of the groups, as 16-bit floats.
    scales: Vec<u16>,
    /// Columns of a group.
    group: usize,
}

impl Lane {
    fn of(sparse: Sparse, grid: Grid, row: &[u8], cols: usize) -> Lane {
        let (kept, shared) = sparse.kept_codes(grid, row, cols);
        let mut codes = vec![HOLE; cols.next_multiple_of(CHUNK)];
        sparse.each_kept(row, cols, |j, next| codes[j] = kept[next].into());
        let scale = |header: &[u8]| match grid.is_by_row() {
            true => half::f16::from_f32(f32::from_le_bytes(std::array::from_fn(|i| header[i]))).to_bits(),
            false => u16::from_le_bytes([header[0], header[1]]),
        };
        let scales = shared.chunks_exact(grid.header_bytes()).map(scale).collect();
        Lane { codes, scales, group: grid.block_len_in(cols) }
    }

    /// The scale of the group of a column; of columns that pad the last chunk that of the last group.
    fn scale(&self, col: usize) -> u16 {
        self.scales.get(col / self.group).or(self.scales.last()).copied().unwrap_or(0)
    }
}

fn put(at: &mut usize, out: &mut [u8], bytes: &[u8]) {
    out[*at..*at + bytes.len()].copy_from_slice(bytes);
    *at += bytes.len();
}

fn pack_codes(form: Form, codes: Codes, lanes: &[Lane], cols: usize, out: &mut [u8]) {
    let scales = |at: &mut usize, out: &mut [u8], col: usize| {
        let mut each = [0u16; LANES];
        each.iter_mut().zip(lanes).for_each(|(s, lane)| *s = lane.scale(col));
        put(at, out, bytemuck::bytes_of(&each));
    };
    let (span, sub, mut at) = (form.span(), usize::from(codes.sub), 0);
    for chunk in 0..cols.div_ceil(CHUNK) {
        let first = chunk * CHUNK;
        match codes.scales {
            Scales::Halves => (first..first + CHUNK).step_by(sub).for_each(|col| scales(&mut at, out, col)),
            _ if chunk % span == 0 => scales(&mut at, out, first),
            _ => {}
        }
        if codes.is_paired() {
            let [places, pairs] = pairs_of(lanes, first);
            repack::plane::<2, 4>(&places, 0, out[at..at + MASKS].as_chunks_mut().0);
            at += MASKS;
            let bytes = 64 * usize::from(codes.bits);
            repack::planes(&pairs, codes.bits, &mut out[at..at + bytes]);
            at += bytes;
            continue;
        }
        let masks = at;
        at += MASKS;
        for step in 0..CHUNK / 4 {
            let (mut mask, mut count) = (0u64, 0);
            for (l, lane) in lanes.iter().enumerate() {
                let four = &lane.codes[first + 4 * step..][..4];
                for (i, code) in four.iter().enumerate().filter(|(_, code)| **code != HOLE) {
                    mask |= 1 << (4 * l + i);
                    match codes.bits {
                        4 => out[at + count / 2] |= (*code as u8) << (4 * (count % 2)),
                        _ => out[at + count] = *code as u8,
                    }
                    count += 1;
                }
            }
            out[masks + 8 * step..][..8].copy_from_slice(&mask.to_le_bytes());
            at += if codes.bits == 4 { count.div_ceil(2) } else { count };
        }
    }
}

/// Places and codes of the pairs of a chunk, `[eight columns][lane][4]`.
fn pairs_of(lanes: &[Lane], first: usize) -> [[[u8; 64]; 8]; 2] {
    let [mut places, mut pairs] = [[[0u8; 64]; 8]; 2];
    for (l, lane) in lanes.iter().enumerate() {
        let kept = lane.codes[first..first + CHUNK].iter().enumerate().filter(|(_, code)| **code != HOLE);
        for (n, (col, code)) in kept.enumerate() {
            (places[n / 4][4 * l + n % 4], pairs[n / 4][4 * l + n % 4]) = ((col % 4) as u8, *code as u8);
        }
    }
    [places, pairs]
}

/// The values of a row as the bytes of floats, and which are kept. Codes that no kernel multiplies are the 16-bit floats nearest to
/// what they stand for.
fn floats_of(sparse: Sparse, row: &[u8], cols: usize, floats: Floats) -> (Vec<u8>, Vec<bool>) {
    let width = floats.bytes();
    let (mut bytes, mut keep) = (vec![0u8; cols * width], vec![false; cols]);
    let halves: Vec<u8>;
    let kept = match sparse.values() {
        Storage::Grid(_) => {
            let mut values = vec![0f32; cols];
            sparse.decode_row(row, &mut values);
            let mut all = Vec::new();
            sparse.each_kept(row, cols, |j, _| all.extend(half::f16::from_f32(values[j]).to_le_bytes()));
            halves = all;
            &halves
        }
        _ => sparse.kept_floats(row, cols),
    };
    sparse.each_kept(row, cols, |j, next| {
        keep[j] = true;
        bytes[j * width..(j + 1) * width].copy_from_slice(&kept[next * width..(next + 1) * width]);
    });
    (bytes, keep)
}

fn pack_floats(floats: Floats, lanes: &[(Vec<u8>, Vec<bool>)], cols: usize, out: &mut [u8]) {
    let (width, mut at) = (floats.bytes(), 0);
    for first in (0..cols).step_by(CHUNK) {
        let masks = at;
        at += MASKS;
        for k in 0..CHUNK.min(cols - first) {
            let (col, mut mask) = (first + k, 0u16);
            for (l, (values, keep)) in lanes.iter().enumerate() {
                if keep[col] {
                    mask |= 1 << l;
                    put(&mut at, out, &values[col * width..(col + 1) * width]);
                }
            }
            out[masks + 2 * k..][..2].copy_from_slice(&mask.to_le_bytes());
        }
    }
}

/// Reads one lane of a panel back into the values that its storage decodes to.
pub(super) fn unpack_row(form: Form, panel: &[u8], lane: usize, out: &mut [f32]) {
    out.fill(0.0);
    match form {
        Form::Codes(codes) => unpack_codes(form, codes, panel, lane, out),
        Form::Sparse(floats, _) => unpack_floats(floats, panel, lane, out),
        _ => {}
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    grid::widen(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn unpack_codes(form: Form, codes: Codes, panel: &[u8], lane: usize, out: &mut [f32]) {
    let (mut at, mut shared) = (0, 0);
    for (chunk, out) in out.chunks_mut(CHUNK).enumerate() {
        if chunk % form.span() == 0 {
            shared = at;
            at += form.span_header();
        }
        let scales = at;
        let masks = scales + form.chunk_header();
        at = masks + if codes.is_paired() { form.chunk_body() } else { MASKS };
        let scale = |k: usize| match codes.scales {
            Scales::Halves => half_at(panel, scales + 2 * (k / usize::from(codes.sub) * LANES + lane)),
            _ => half_at(panel, shared + 2 * lane),
        };
        if codes.is_paired() {
            let places = |n: usize| panel[masks + n / 16 * 64 + 4 * lane + n % 4] >> (n / 4 % 4 * 2) & 3;
            for n in 0..out.len() / 2 {
                let k = n / 2 * 4 + usize::from(places(n));
                let code = repack::lane_code(&panel[masks + MASKS..], codes.bits, n, lane);
                let level = if codes.table.is_some() { codes.levels()[usize::from(code & 15)] } else { code };
                out[k] = scale(k) * f32::from(i16::from(level) - i16::from(codes.zero));
            }
            continue;
        }
        for step in 0..CHUNK / 4 {
            let mask = u64::from_le_bytes(std::array::from_fn(|i| panel[masks + 8 * step + i]));
            for bit in (4 * lane..4 * lane + 4).filter(|bit| mask >> bit & 1 == 1) {
                let before = (mask & ((1 << bit) - 1)).count_ones() as usize;
                let code = match codes.bits {
                    4 => panel[at + before / 2] >> (4 * (before % 2)) & 15,
                    _ => panel[at + before],
                };
                let k = 4 * step + bit % 4;
                out[k] = scale(k) * f32::from(i16::from(code) - i16::from(codes.zero));
            }
            let count = mask.count_ones() as usize;
            at += if codes.bits == 4 { count.div_ceil(2) } else { count };
        }
    }
}

fn unpack_floats(floats: Floats, panel: &[u8], lane: usize, out: &mut [f32]) {
    let mut at = 0;
    for out in out.chunks_mut(CHUNK) {
        let masks = at;
        at += MASKS;
        for (k, out) in out.iter_mut().enumerate() {
            let mask = u16::from_le_bytes([panel[masks + 2 * k], panel[masks + 2 * k + 1]]);
            if mask >> lane & 1 == 1 {
                let at = at + (mask & ((1 << lane) - 1)).count_ones() as usize * floats.bytes();
                *out = match floats {
                    Floats::F32 => f32::from_le_bytes(std::array::from_fn(|i| panel[at + i])),
                    Floats::F16 => half_at(panel, at),
                    Floats::Bf16 => f32::from_bits(u32::from(panel[at]) << 16 | u32::from(panel[at + 1]) << 24),
                };
            }
            at += mask.count_ones() as usize * floats.bytes();
        }
    }
}
