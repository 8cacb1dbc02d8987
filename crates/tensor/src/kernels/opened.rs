//! Panels of codes that are opened once and then multiplied with many tokens: every code a byte that was looked up already, every
//! scale a float, so that all tokens share what that costs.

use super::{
    holes::masked_step,
    lanes::{Lanes, gathered},
    tile::{Tile, input_chunk, scales, shared_scales, start, step_codes, two},
};
use crate::packed::form::{CHUNK, Codes, Form, LANES, MASKS};

/// Opens a panel of codes (see [`super::CodeTiles::open`]).
///
/// # Safety
/// The processor has the instructions, and the pointers hold a panel of `length` chunks and room for the opened one.
#[inline(always)]
pub(crate) unsafe fn open<V: Lanes>(form: Form, length: usize, panel: *const u8, out: *mut u8) {
    let Form::Codes(codes) = form else { return };
    // SAFETY: the caller's.
    unsafe {
        match (codes.sub, codes.minimum) {
            (16, false) => open_codes::<V, 4, false>(form, codes, length, panel, out),
            (16, true) => open_codes::<V, 4, true>(form, codes, length, panel, out),
            (_, false) => open_codes::<V, 2, false>(form, codes, length, panel, out),
            (_, true) => open_codes::<V, 2, true>(form, codes, length, panel, out),
        }
    }
}

/// # Safety
/// As of [`open`]; a chunk of the form has `SUBS` sub-blocks.
#[inline(always)]
unsafe fn open_codes<V: Lanes, const SUBS: usize, const MIN: bool>(
    form: Form,
    codes: Codes,
    length: usize,
    panel: *const u8,
    out: *mut u8,
) {
    let (span, span_header, places) = (form.span(), form.span_header(), form.chunk_places());
    // Between the codes of two chunks lie the scales of the second, or nothing.
    let gap = places.code_step - form.chunk_body();
    let (mut at, mut out, mut left) = (panel, out, length);
    // SAFETY: the caller's panel, and as many bytes as the opened form says.
    unsafe {
        while left > 0 {
            let shared = shared_scales::<V, MIN>(codes, at);
            let mut own = at.add(span_header);
            at = own.add(places.codes);
            for _ in 0..span.min(left) {
                let s = scales::<V, SUBS, MIN>(codes, shared, own);
                for i in 0..SUBS {
                    V::store(out.cast::<f32>().add(i * LANES), s.scale[i]);
                    if MIN {
                        V::store(out.cast::<f32>().add((SUBS + i) * LANES), s.minimum[i]);
                    }
                }
                out = out.add(header(SUBS, MIN));
                let end = open_chunk::<V>(codes, at, out);
                out = out.add(CHUNK * LANES);
                own = if gap == 0 { own.wrapping_add(places.scale_step) } else { end };
                at = end.wrapping_add(gap);
            }
            at = at.wrapping_sub(gap);
            left -= span.min(left);
        }
    }
}

/// Bytes of the scales, and the minima, of an opened chunk.
pub(crate) const fn header(subs: usize, minima: bool) -> usize {
    4 * LANES * subs * if minima { 2 } else { 1 }
}

/// Opens the codes of a chunk; where they end.
///
/// # Safety
/// As of [`open`]; the pointers are at the codes of a chunk, or at its masks.
#[inline(always)]
unsafe fn open_chunk<V: Lanes>(codes: Codes, at: *const u8, out: *mut u8) -> *const u8 {
    let levels = codes.levels();
    // SAFETY: the caller's.
    unsafe {
        if codes.pattern.is_some() && !codes.is_paired() {
            let mut values = at.add(MASKS);
            for step in 0..CHUNK / 4 {
                let (four, bytes) = match codes.bits {
                    4 => masked_step::<V, 4>(at, step, values, codes.zero),
                    _ => masked_step::<V, 8>(at, step, values, codes.zero),
                };
                out.add(4 * LANES * step).cast::<V::Bytes>().write_unaligned(four);
                values = values.add(bytes);
            }
            return values;
        }
        macro_rules! of_width {
            ($bits:literal, $table:literal) => {{
                if codes.is_paired() {
                    unpair::<V, $bits, $table>(at, levels, codes.zero, out);
                    at.add(MASKS + CHUNK * LANES / 2 * $bits / 8)
                } else {
                    unpack::<V, $bits, $table>(at, levels, out);
                    at.add(CHUNK * LANES * $bits / 8)
                }
            }};
        }
        match (codes.bits, codes.table) {
            (2, Some(_)) => of_width!(2, true),
            (3, Some(_)) => of_width!(3, true),
            (_, Some(_)) => of_width!(4, true),
            (2, _) => of_width!(2, false),
            (3, _) => of_width!(3, false),
            (4, _) => of_width!(4, false),
            (5, _) => of_width!(5, false),
            (6, _) => of_width!(6, false),
            (7, _) => of_width!(7, false),
            _ => of_width!(8, false),
        }
    }
}

/// Unpacks the codes of a chunk.
///
/// # Safety
/// As of [`open_chunk`].
#[inline(always)]
unsafe fn unpack<V: Lanes, const BITS: usize, const TABLE: bool>(planes: *const u8, levels: &[u8; 16], out: *mut u8) {
    // Steps are constants, so that every shift is one.
    macro_rules! steps {
        ($half:literal: $($step:literal)*) => {$(
            // SAFETY: the caller's planes, and sixteen steps of 64 bytes.
            unsafe {
                let codes = step_codes::<V, BITS, TABLE, $step>(planes.add($half * BITS * 64), levels);
                out.add(4 * LANES * (8 * $half + $step)).cast::<V::Bytes>().write_unaligned(codes);
            }
        )*};
    }
    steps!(0: 0 1 2 3 4 5 6 7);
    steps!(1: 0 1 2 3 4 5 6 7);
}

/// Puts the codes of a chunk in pairs where they belong, and `zero` elsewhere.
///
/// # Safety
/// As of [`open_chunk`]; the places are those of a chunk.
#[inline(always)]
unsafe fn unpair<V: Lanes, const BITS: usize, const TABLE: bool>(
    places: *const u8,
    levels: &[u8; 16],
    zero: u8,
    out: *mut u8,
) {
    let zeros = u32::from_le_bytes([zero; 4]);
    // SAFETY: the caller's places and planes, and sixteen steps of 64 bytes.
    unsafe {
        macro_rules! steps {
            ($($step:literal)*) => {$(
                let codes = step_codes::<V, BITS, TABLE, $step>(places.add(MASKS), levels);
                let from = two::<V, $step, 0>(places);
                let [mut code, mut place] = [[0u32; LANES]; 2];
                (&raw mut code).cast::<V::Bytes>().write_unaligned(codes);
                (&raw mut place).cast::<V::Bytes>().write_unaligned(from);
                let mut fours = [[0u32; LANES]; 2];
                for (half, four) in fours.iter_mut().enumerate() {
                    for lane in 0..LANES {
                        let (code, place) = (code[lane] >> (16 * half), place[lane] >> (16 * half));
                        let (first, second) = (8 * (place & 3), 8 * (place >> 8 & 3));
                        let rest = zeros & !(255 << first | 255 << second);
                        four[lane] = rest | (code & 255) << first | (code >> 8 & 255) << second;
                    }
                }
                out.add(2 * $step * 4 * LANES).cast::<[[u32; LANES]; 2]>().write_unaligned(fours);
            )*};
        }
        steps!(0 1 2 3 4 5 6 7);
    }
}

/// Runs a tile of opened panels.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Tile`] says for `T` tokens; the tile's form is an opened one
/// that the constants tell: `WIDE` says whether the products are those of the codes less 128.
#[inline(always)]
pub(crate) unsafe fn codes<V: Lanes, const T: usize, const SUB: usize, const MIN: bool, const WIDE: bool>(tile: &Tile) {
    let Form::Codes(form) = tile.form else { return };
    // Products whose sums are settled together.
    let run = if WIDE { 1 } else { gathered(form.bits).min(SUB / 4) };
    let [panel_step, token_step] = tile.steps;
    for panel in 0..tile.panels {
        // SAFETY: the caller's tile holds the panels, chunks and sums.
        unsafe {
            let out = tile.out.add(panel * panel_step);
            let mut acc = [V::zero(); T];
            if tile.add {
                for t in 0..T {
                    acc[t] = V::load(out.add(t * token_step));
                }
            }
            let (mut w, mut x) = (tile.weights.add(panel * tile.panel_bytes), tile.inputs);
            for _ in 0..tile.length {
                chunk::<V, T, SUB, MIN, WIDE>(run, w, x, &mut acc);
                w = w.add(header(CHUNK / SUB, MIN) + CHUNK * LANES);
                x = x.add(input_chunk(T, SUB));
            }
            for t in 0..T {
                V::store(out.add(t * token_step), acc[t]);
            }
        }
    }
}

/// One chunk: the sums of [`super::tile`]'s, in their order.
///
/// # Safety
/// As of [`codes`]; the pointers are at a chunk of a panel and at its inputs.
#[inline(always)]
unsafe fn chunk<V: Lanes, const T: usize, const SUB: usize, const MIN: bool, const WIDE: bool>(
    run: usize,
    w: *const u8,
    x: *const u8,
    acc: &mut [V::Floats; T],
) {
    // SAFETY: offsets stay inside the chunk and its inputs.
    unsafe {
        let (scales, codes) = (w.cast::<f32>(), w.add(header(CHUNK / SUB, MIN)));
        let offsets = x.add(CHUNK * T);
        let mut part = [V::zero(); T];
        for sub in 0..CHUNK / SUB {
            let offsets = offsets.add(sub * T * 4);
            let mut dots = start::<V, T, MIN>(offsets, WIDE);
            let steps = sub * SUB / 4..(sub + 1) * SUB / 4;
            if V::GATHERS && run > 1 {
                for first in steps.step_by(run) {
                    let mut sums = [V::to_ints(V::zero()); T];
                    for step in first..first + run {
                        let four = V::bytes(codes.add(4 * LANES * step));
                        for t in 0..T {
                            sums[t] = V::gather(sums[t], four, V::splat_int(x.add((step * T + t) * 4)));
                        }
                    }
                    for t in 0..T {
                        dots[t] = V::settle(dots[t], sums[t]);
                    }
                }
            } else {
                for step in steps {
                    let four = V::bytes(codes.add(4 * LANES * step));
                    for t in 0..T {
                        let x = V::splat_int(x.add((step * T + t) * 4));
                        dots[t] = if WIDE { V::dot_wide(dots[t], four, x) } else { V::dot(dots[t], four, x) };
                    }
                }
            }
            let scale = V::load(scales.add(sub * LANES));
            for t in 0..T {
                part[t] = V::fma(V::to_floats(dots[t]), scale, part[t]);
            }
            if MIN {
                let minimum = V::load(scales.add((CHUNK / SUB + sub) * LANES));
                for t in 0..T {
                    part[t] = V::fma(V::splat(offsets.add(t * 4)), minimum, part[t]);
                }
            }
        }
        let factors = offsets.add(CHUNK / SUB * T * 4);
        for t in 0..T {
            acc[t] = V::fma(part[t], V::splat(factors.add(t * 4)), acc[t]);
        }
    }
}
