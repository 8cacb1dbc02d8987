//! Products of codes in tiles: a chunk is unpacked to bytes once, multiplied with sixteen or 32 tokens, and its whole-number
//! sums are scaled while those of the next one are made. Fewer tokens are AVX-512's.

use super::{LANES, REGISTER, set_up};
use crate::{
    kernels::{
        Lanes, Tile,
        avx512::{self, Avx512},
        input_chunk,
        tile::{self, ChunkScales},
    },
    packed::form::{CHUNK, Form},
};
use std::arch::{asm, x86_64::*};

/// Tokens of a register.
const TOKENS: usize = 16;
type Words = Avx512<true>;

/// # Safety
/// As of the kernels' `run`.
pub(super) unsafe fn run(tile: &Tile) {
    if tile.width < TOKENS {
        // SAFETY: the caller's.
        return unsafe { (avx512::BRAIN_TABLE.codes.run)(tile) };
    }
    let Form::Codes(form) = tile.form else { return };
    // Products of many tokens open panels with holes before they come here.
    debug_assert!(form.pattern.is_none());
    set_up(TOKENS as u8, form.sub);
    let halves = tile.width / TOKENS;
    // SAFETY: the constants are those of the form.
    unsafe { if halves == 1 { of_form::<1>(tile) } else { of_form::<2>(tile) } }
}

/// # Safety
/// As of the kernels' `run`, and the registers are set up; the tile has `H` times sixteen tokens.
unsafe fn of_form<const H: usize>(tile: &Tile) {
    let Form::Codes(form) = tile.form else { return };
    for panel in 0..tile.panels {
        // SAFETY: the constants are those of the form.
        unsafe {
            match (form.plane_bits(), form.table.filter(|_| !form.is_opened()), form.sub, form.minimum) {
                (4, Some(_), 16, _) => code_panel::<H, 4, true, 16, false>(tile, panel),
                (4, Some(_), ..) => code_panel::<H, 4, true, 32, false>(tile, panel),
                (3, Some(_), 16, _) => code_panel::<H, 3, true, 16, false>(tile, panel),
                (3, Some(_), ..) => code_panel::<H, 3, true, 32, false>(tile, panel),
                (2, Some(_), ..) => code_panel::<H, 2, true, 32, false>(tile, panel),
                (2, _, 16, _) => code_panel::<H, 2, false, 16, true>(tile, panel),
                (3, _, 16, _) => code_panel::<H, 3, false, 16, false>(tile, panel),
                (6, _, 16, _) => code_panel::<H, 6, false, 16, false>(tile, panel),
                (2, _, _, false) => code_panel::<H, 2, false, 32, false>(tile, panel),
                (3, _, _, false) => code_panel::<H, 3, false, 32, false>(tile, panel),
                (4, _, _, false) => code_panel::<H, 4, false, 32, false>(tile, panel),
                (5, _, _, false) => code_panel::<H, 5, false, 32, false>(tile, panel),
                (6, _, _, false) => code_panel::<H, 6, false, 32, false>(tile, panel),
                (7, _, _, false) => code_panel::<H, 7, false, 32, false>(tile, panel),
                (8, _, _, false) => code_panel::<H, 8, false, 32, false>(tile, panel),
                (2, _, _, true) => code_panel::<H, 2, false, 32, true>(tile, panel),
                (3, _, _, true) => code_panel::<H, 3, false, 32, true>(tile, panel),
                (4, _, _, true) => code_panel::<H, 4, false, 32, true>(tile, panel),
                (5, _, _, true) => code_panel::<H, 5, false, 32, true>(tile, panel),
                (6, _, _, true) => code_panel::<H, 6, false, 32, true>(tile, panel),
                (7, _, _, true) => code_panel::<H, 7, false, 32, true>(tile, panel),
                _ => code_panel::<H, 8, false, 32, true>(tile, panel),
            }
        }
    }
}

/// Memory between the tiles and the lanes.
#[repr(align(64))]
struct Between {
    /// The codes of a chunk as bytes, `[steps][LANES][4]`.
    codes: [u8; REGISTER],
    /// Whole-number sums of two chunks, `[sub-blocks][halves][TOKENS][LANES]`.
    dots: [[u8; 8 * REGISTER]; 2],
    /// `[tokens][LANES]`.
    sums: [f32; 2 * TOKENS * LANES],
}

/// A chunk whose whole-number sums are made and not yet scaled.
#[derive(Clone, Copy)]
struct Pending {
    scales: ChunkScales<__m512>,
    /// Offsets and scales of its inputs.
    offsets: *const u8,
}

/// Multiplies one panel.
///
/// # Safety
/// As of the kernels' `run`, and the registers are set up; the constants are those of the tile's form and width.
#[target_feature(
    enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,popcnt,fma,f16c"
)]
unsafe fn code_panel<const H: usize, const BITS: usize, const TABLE: bool, const SUB: usize, const MIN: bool>(
    tile: &Tile,
    panel: usize,
) {
    let Form::Codes(form) = tile.form else { return };
    let (span, span_header) = (tile.form.span(), tile.form.span_header());
    let places = tile.form.chunk_places();
    let span_bytes = span_header + span * (tile.form.chunk_header() + tile.form.chunk_body());
    let tokens = H * TOKENS;
    let mut between = Between { codes: [0; REGISTER], dots: [[0; 8 * REGISTER]; 2], sums: [0.0; 2 * TOKENS * LANES] };
    // SAFETY: the caller's tile holds the panels, chunks and sums.
    unsafe {
        let [panel_step, token_step] = tile.steps;
        let out = tile.out.add(panel * panel_step);
        let sums = between.sums.as_mut_ptr();
        for t in 0..tokens {
            let start = if tile.add { Words::load(out.add(t * token_step)) } else { Words::zero() };
            Words::store(sums.add(t * LANES), start);
        }
        let mut w = tile.weights.add(panel * tile.panel_bytes);
        let mut x = tile.inputs;
        let (mut left, mut turn) = (tile.length, 0);
        let mut pending: Option<Pending> = None;
        while left > 0 {
            let shared = tile::shared_scales::<Words, MIN>(form, w);
            let (mut own, mut codes) = (w.add(span_header), w.add(span_header + places.codes));
            for _ in 0..span.min(left) {
                unpack::<BITS, TABLE>(codes, form.levels(), &mut between.codes);
                multiply::<H, SUB>(between.codes.as_ptr(), x, between.dots[turn].as_mut_ptr());
                if let Some(pending) = pending {
                    settle::<H, SUB, MIN>(&pending, between.dots[1 - turn].as_ptr(), sums);
                }
                let scales = if SUB == 16 {
                    tile::scales::<Words, 4, MIN>(form, shared, own)
                } else {
                    tile::scales::<Words, 2, MIN>(form, shared, own)
                };
                pending = Some(Pending { scales, offsets: x.add(CHUNK * tokens) });
                turn = 1 - turn;
                own = own.add(places.scale_step);
                codes = codes.add(places.code_step);
                x = x.add(input_chunk(tokens, SUB));
            }
            left -= span.min(left);
            w = w.add(span_bytes);
        }
        if let Some(pending) = pending {
            settle::<H, SUB, MIN>(&pending, between.dots[1 - turn].as_ptr(), sums);
        }
        for t in 0..tokens {
            Words::store(out.add(t * token_step), Words::load(sums.add(t * LANES)));
        }
    }
}

/// Unpacks the codes of a chunk to bytes.
///
/// # Safety
/// The processor has the instructions, and the planes are those of a chunk.
#[inline(always)]
unsafe fn unpack<const BITS: usize, const TABLE: bool>(planes: *const u8, levels: &[u8; 16], out: &mut [u8; REGISTER]) {
    // Steps are constants, so that every shift is one.
    macro_rules! steps {
        ($($half:literal $step:literal,)*) => {$(
            // SAFETY: the caller's planes, and sixteen steps of 64 bytes.
            unsafe {
                let codes = tile::step_codes::<Words, BITS, TABLE, $step>(planes.add($half * BITS * 64), levels);
                _mm512_store_si512(out.as_mut_ptr().add(64 * (8 * $half + $step)).cast(), codes);
            }
        )*};
    }
    steps!(0 0, 0 1, 0 2, 0 3, 0 4, 0 5, 0 6, 0 7, 1 0, 1 1, 1 2, 1 3, 1 4, 1 5, 1 6, 1 7,);
}

/// The whole-number sums of the sub-blocks of a chunk; two of them run side by side.
///
/// # Safety
/// The registers are set up, and the pointers hold what [`Between`] says.
#[inline(always)]
unsafe fn multiply<const H: usize, const SUB: usize>(codes: *const u8, x: *const u8, dots: *mut u8) {
    for sub in (0..CHUNK / SUB).step_by(2) {
        // SAFETY: the caller's.
        unsafe {
            let codes = codes.add(sub * SUB * LANES);
            let x = x.add(sub * SUB);
            let dots = dots.add(sub * H * REGISTER);
            macro_rules! products {
                ($($line:literal)*) => {
                    asm!(
                        $($line,)*
                        codes = in(reg) codes,
                        x = in(reg) x,
                        out = in(reg) dots,
                        line = in(reg) 64usize,
                        second = const SUB * LANES,
                        next = const SUB,
                        options(nostack, preserves_flags)
                    )
                };
            }
            if H == 2 {
                products!(
                    "tileloadd tmm6, [{codes} + {line}*1]"
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tilezero tmm0"
                    "tdpbsud tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{x} + {line}*1 + 1024]"
                    "tilezero tmm1"
                    "tdpbsud tmm1, tmm5, tmm6"
                    "tileloadd tmm7, [{codes} + {line}*1 + {second}]"
                    "tileloadd tmm4, [{x} + {line}*1 + {next}]"
                    "tilezero tmm2"
                    "tdpbsud tmm2, tmm4, tmm7"
                    "tileloadd tmm5, [{x} + {line}*1 + {next} + 1024]"
                    "tilezero tmm3"
                    "tdpbsud tmm3, tmm5, tmm7"
                    "tilestored [{out} + {line}*1], tmm0"
                    "tilestored [{out} + {line}*1 + 1024], tmm1"
                    "tilestored [{out} + {line}*1 + 2048], tmm2"
                    "tilestored [{out} + {line}*1 + 3072], tmm3"
                );
            } else {
                products!(
                    "tileloadd tmm6, [{codes} + {line}*1]"
                    "tileloadd tmm4, [{x} + {line}*1]"
                    "tilezero tmm0"
                    "tdpbsud tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{codes} + {line}*1 + {second}]"
                    "tileloadd tmm5, [{x} + {line}*1 + {next}]"
                    "tilezero tmm2"
                    "tdpbsud tmm2, tmm5, tmm7"
                    "tilestored [{out} + {line}*1], tmm0"
                    "tilestored [{out} + {line}*1 + 1024], tmm2"
                );
            }
        }
    }
}

/// Scales the sums of a chunk, in the order of the lanes' own product ([`tile`]), and adds them up.
///
/// # Safety
/// The processor has the instructions, and the pointers hold what [`Between`] and [`Tile`] say.
#[inline(always)]
unsafe fn settle<const H: usize, const SUB: usize, const MIN: bool>(
    pending: &Pending,
    dots: *const u8,
    sums: *mut f32,
) {
    let (subs, tokens) = (CHUNK / SUB, H * TOKENS);
    let Pending { scales, offsets } = pending;
    // SAFETY: the caller's.
    unsafe {
        let factors = offsets.add(4 * subs * tokens);
        for t in 0..tokens {
            let mut part = Words::zero();
            for sub in 0..subs {
                let at = dots.add((sub * H + t / TOKENS) * REGISTER + t % TOKENS * 64);
                let mut dot = _mm512_load_si512(at.cast());
                let offset = offsets.add(4 * (sub * tokens + t));
                if !MIN {
                    dot = _mm512_add_epi32(dot, Words::splat_int(offset));
                }
                part = Words::fma(Words::to_floats(dot), scales.scale[sub], part);
                if MIN {
                    part = Words::fma(Words::splat(offset), scales.minimum[sub], part);
                }
            }
            let sum = sums.add(t * LANES);
            Words::store(sum, Words::fma(part, Words::splat(factors.add(4 * t)), Words::load(sum)));
        }
    }
}
