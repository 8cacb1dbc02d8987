//! Products of packed weights with holes, in the words of [`Lanes`]: what is kept is spread to its places, or, in pairs, the inputs
//! that it belongs to are picked.

use super::{
    lanes::Lanes,
    tile::{BUSY, ChunkScales, Tile, input_chunk, read_ahead, scales, shared_scales, start, step_codes, two},
};
use crate::packed::form::{CHUNK, Codes, Floats, Form, LANES, MASKS};

/// Opens a panel of floats with holes (see [`super::CodeTiles::open`]).
///
/// # Safety
/// The processor has the instructions, and the pointers hold a panel of `cols` columns and room for the opened one.
#[inline(always)]
pub(crate) unsafe fn open<V: Lanes>(floats: Floats, cols: usize, panel: *const u8, out: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        match floats {
            Floats::F32 => open_floats::<V, 4, false>(cols, panel, out),
            Floats::F16 => open_floats::<V, 2, false>(cols, panel, out),
            Floats::Bf16 => open_floats::<V, 2, true>(cols, panel, out),
        }
    }
}

/// # Safety
/// As of [`open`].
#[inline(always)]
unsafe fn open_floats<V: Lanes, const BYTES: usize, const BRAIN: bool>(cols: usize, panel: *const u8, out: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        let (mut at, mut out) = (panel, out.cast::<f32>());
        for chunk in (0..cols).step_by(CHUNK) {
            let mut values = at.add(MASKS);
            for k in 0..CHUNK.min(cols - chunk) {
                let mask = at.add(2 * k).cast::<u16>().read_unaligned();
                let weights = match BYTES {
                    4 => V::spread_floats(values, mask),
                    _ => V::spread_halves::<BRAIN>(values, mask),
                };
                V::store(out, weights);
                values = values.add(mask.count_ones() as usize * BYTES);
                out = out.add(LANES);
            }
            at = values;
        }
    }
}

/// A panel of floats of `BYTES` bytes with holes.
///
/// # Safety
/// As of [`super::float_tile::floats`].
#[inline(always)]
pub(super) unsafe fn sparse_floats<V: Lanes, const T: usize, const BYTES: usize, const BRAIN: bool>(
    tile: &Tile,
    panel: usize,
) {
    // SAFETY: the caller's tile holds the panel, inputs and sums; of the last chunk only columns that have inputs have bits.
    unsafe {
        let [panel_step, token_step] = tile.steps;
        let out = tile.out.add(panel * panel_step);
        let mut acc = [V::zero(); T];
        if tile.add {
            for t in 0..T {
                acc[t] = V::load(out.add(t * token_step));
            }
        }
        let (mut at, mut x) = (tile.weights.add(panel * tile.panel_bytes), tile.inputs);
        let ahead = T >= BUSY || T >= super::kernels().codes.busy;
        for _ in 0..tile.length {
            let mut values = at.add(MASKS);
            if ahead {
                read_ahead::<V, 1>([values], MASKS + CHUNK * LANES * BYTES / 2);
            }
            for k in 0..CHUNK {
                let mask = at.add(2 * k).cast::<u16>().read_unaligned();
                if mask == 0 {
                    continue;
                }
                let weights = match BYTES {
                    4 => V::spread_floats(values, mask),
                    _ => V::spread_halves::<BRAIN>(values, mask),
                };
                for t in 0..T {
                    acc[t] = V::fma(V::splat(x.add((k * T + t) * 4)), weights, acc[t]);
                }
                values = values.add(mask.count_ones() as usize * BYTES);
            }
            at = values;
            x = x.add(CHUNK * T * 4);
        }
        for t in 0..T {
            V::store(out.add(t * token_step), acc[t]);
        }
    }
}

/// Runs a tile of codes of `BITS` bits with holes: in pairs, or beside masks in halves of bytes or in bytes.
///
/// # Safety
/// As of [`super::tile::codes`].
#[inline(always)]
pub(crate) unsafe fn codes<V: Lanes, const T: usize, const BITS: usize, const TABLE: bool, const PAIRED: bool>(
    tile: &Tile,
) {
    for panel in 0..tile.panels {
        // SAFETY: the caller's tile holds so many panels.
        unsafe { code_panel::<V, T, BITS, TABLE, PAIRED>(tile, panel) }
    }
}

/// # Safety
/// As of [`codes`].
#[inline(always)]
unsafe fn code_panel<V: Lanes, const T: usize, const BITS: usize, const TABLE: bool, const PAIRED: bool>(
    tile: &Tile,
    panel: usize,
) {
    let Form::Codes(form) = tile.form else { return };
    let (span, span_header, header) = (tile.form.span(), tile.form.span_header(), tile.form.chunk_header());
    // About what a chunk takes.
    let bytes = MASKS + CHUNK * LANES / 2 * BITS / 8;
    let ahead = T >= BUSY || T >= super::kernels().codes.busy;
    // SAFETY: the caller's tile holds the panel, inputs and sums.
    unsafe {
        let [panel_step, token_step] = tile.steps;
        let out = tile.out.add(panel * panel_step);
        let mut acc = [V::zero(); T];
        if tile.add {
            for t in 0..T {
                acc[t] = V::load(out.add(t * token_step));
            }
        }
        let (mut at, mut x) = (tile.weights.add(panel * tile.panel_bytes), tile.inputs);
        let mut left = tile.length;
        while left > 0 {
            let shared = shared_scales::<V, false>(form, at);
            at = at.add(span_header);
            for _ in 0..span.min(left) {
                let s = scales::<V, 2, false>(form, shared, at);
                at = at.add(header);
                if ahead {
                    read_ahead::<V, 1>([at], bytes);
                }
                at = match PAIRED {
                    true => paired_chunk::<V, T, BITS, TABLE>(form, &s, at, x, &mut acc),
                    false => masked_chunk::<V, T, BITS>(form, &s, at, x, &mut acc),
                };
                x = x.add(input_chunk(T, SUB));
            }
            left -= span.min(left);
        }
        for t in 0..T {
            V::store(out.add(t * token_step), acc[t]);
        }
    }
}

/// Columns of a sub-block.
const SUB: usize = 32;

/// One chunk of codes in pairs; where the next one begins.
///
/// # Safety
/// As of [`codes`]; the places are those of a chunk.
#[inline(always)]
unsafe fn paired_chunk<V: Lanes, const T: usize, const BITS: usize, const TABLE: bool>(
    form: Codes,
    s: &ChunkScales<V::Floats>,
    places: *const u8,
    x: *const u8,
    acc: &mut [V::Floats; T],
) -> *const u8 {
    let wide = BITS == 8 || TABLE;
    let levels = if TABLE { form.levels() } else { &[0; 16] };
    // What is kept differs from lane to lane, so the sums of its inputs are made beside the products, but where these are of the
    // codes less 128.
    let sums = !(wide && V::SIGNED);
    let (minus, zero) = (-1f32, [form.zero; 64]);
    // SAFETY: the caller's.
    unsafe {
        let (minus, zero, second) =
            (V::splat((&raw const minus).cast()), V::bytes(zero.as_ptr()), V::bytes(SECOND.as_ptr()));
        let planes = places.add(MASKS);
        let mut part = [V::zero(); T];
        // Steps are constants, so that every shift is one.
        macro_rules! sub_block {
            ($sub:literal, $($step:literal)*) => {{
                let mut dots = [V::to_ints(V::zero()); T];
                let mut under = [V::to_ints(V::zero()); T];
                $(
                    let codes = step_codes::<V, BITS, TABLE, $step>(planes, levels);
                    let from = V::or(two::<V, $step, 0>(places), second);
                    for t in 0..T {
                        let at = |step: usize| x.add((step * T + t) * 4);
                        let x = V::select(at(2 * $step), at(2 * $step + 1), from);
                        dots[t] = if wide { V::dot_wide(dots[t], codes, x) } else { V::dot(dots[t], codes, x) };
                        if sums {
                            under[t] = if wide { V::dot_wide(under[t], zero, x) } else { V::dot(under[t], zero, x) };
                        }
                    }
                )*
                for t in 0..T {
                    let mut sum = V::to_floats(dots[t]);
                    if sums {
                        sum = V::fma(V::to_floats(under[t]), minus, sum);
                    }
                    part[t] = V::fma(sum, s.scale[$sub], part[t]);
                }
            }};
        }
        sub_block!(0, 0 1 2 3);
        sub_block!(1, 4 5 6 7);
        let factors = x.add((CHUNK + CHUNK / SUB * 4) * T);
        for t in 0..T {
            acc[t] = V::fma(part[t], V::splat(factors.add(t * 4)), acc[t]);
        }
        planes.add(BITS * 64)
    }
}

/// One chunk of codes beside masks; where the next one begins.
///
/// # Safety
/// As of [`codes`]; the masks are those of a chunk.
#[inline(always)]
unsafe fn masked_chunk<V: Lanes, const T: usize, const BITS: usize>(
    form: Codes,
    s: &ChunkScales<V::Floats>,
    masks: *const u8,
    x: *const u8,
    acc: &mut [V::Floats; T],
) -> *const u8 {
    // SAFETY: the caller's.
    unsafe {
        let mut values = masks.add(MASKS);
        let offsets = x.add(CHUNK * T);
        let mut part = [V::zero(); T];
        for sub in 0..CHUNK / SUB {
            let mut dots = start::<V, T, false>(offsets.add(sub * T * 4), BITS > 4);
            for step in sub * SUB / 4..(sub + 1) * SUB / 4 {
                let (codes, bytes) = masked_step::<V, BITS>(masks, step, values, form.zero);
                values = values.add(bytes);
                for t in 0..T {
                    let x = V::splat_int(x.add((step * T + t) * 4));
                    dots[t] = if BITS > 4 { V::dot_wide(dots[t], codes, x) } else { V::dot(dots[t], codes, x) };
                }
            }
            for t in 0..T {
                part[t] = V::fma(V::to_floats(dots[t]), s.scale[sub], part[t]);
            }
        }
        let factors = offsets.add(CHUNK / SUB * T * 4);
        for t in 0..T {
            acc[t] = V::fma(part[t], V::splat(factors.add(t * 4)), acc[t]);
        }
        values
    }
}

/// The codes of step `STEP` of a chunk whose masks are at `masks`, and how many bytes they take.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Tile`] says.
#[inline(always)]
pub(super) unsafe fn masked_step<V: Lanes, const BITS: usize>(
    masks: *const u8,
    step: usize,
    values: *const u8,
    zero: u8,
) -> (V::Bytes, usize) {
    // SAFETY: the caller's.
    unsafe {
        let mask = masks.add(8 * step).cast::<u64>().read_unaligned();
        let count = mask.count_ones() as usize;
        match BITS {
            4 => (V::spread_nibbles(values, mask, zero), count.div_ceil(2)),
            _ => (V::spread_bytes(values, mask, zero), count),
        }
    }
}

/// What is added to the places of pairs among four columns: the second pair of a lane is of the second four.
static SECOND: [u8; 64] = {
    let mut second = [0; 64];
    let mut i = 0;
    while i < 64 {
        second[i] = if i % 4 < 2 { 0 } else { 4 };
        i += 1;
    }
    second
};
