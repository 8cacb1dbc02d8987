//! AVX-512 kernels.

pub(super) use super::avx512_lanes::Avx512;
use super::{
    CodeTiles, Kernels,
    compile::{code_tiles, float_tiles},
    once::instantiate,
};
use crate::grid::{Grid, Zero, widen};
use std::arch::x86_64::*;

/// The table, where this machine has the instructions.
pub fn kernels() -> Option<&'static Kernels> {
    let runs = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vbmi2")
        && is_x86_feature_detected!("avx512vnni");
    let brain = is_x86_feature_detected!("avx512bf16");
    runs.then_some(match brain {
        true if follows_streams() => &WAITING,
        true => &WITH_BF16,
        false => &KERNELS,
    })
}

/// Is it a Zen 4? Its prefetchers follow codes whose scales lie between them at uneven steps, and asking for these costs a tenth.
/// Those of a Zen 5 and of Intel's lose them: asking is worth 1.3 to 1.7 x on the one, 1.2 to 1.4 x on the other.
fn follows_streams() -> bool {
    let vendor = __cpuid(0);
    let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD";
    let version = __cpuid(1).eax;
    // The base family, and what is added to it where that is 15.
    amd && (version >> 8 & 15) == 15 && 15 + (version >> 20 & 255) == 0x19
}

/// Tiles of twelve tokens share much of what opening a panel saves.
const OPENING: CodeTiles = CodeTiles { opens_from: 64, ..CODES };

const TABLE: Kernels = Kernels {
    isa: "avx512",
    floats: FLOATS,
    codes: CodeTiles { busy: 1, ..OPENING },
    decode_row: decode_row_by_bytes,
    fit,
    round,
    rms_norm,
    layer_norm,
    dot,
    axpy,
    exp_sum,
    brain_pairs,
    add_turned,
    silu,
    gelu_tanh,
    soft_cap,
    columns,
    brain_weave,
    rms_norm_gradient,
    layer_norm_gradient,
    attention_gradient,
    silu_slope,
    gelu_tanh_slope,
    adamw,
};

static KERNELS: Kernels = TABLE;
/// The same with products of brain floats.
static WITH_BF16: Kernels = BRAIN_TABLE;
/// The same where few tokens leave it to the processor to read ahead.
static WAITING: Kernels = Kernels { codes: OPENING, ..BRAIN_TABLE };
/// What AMX builds on.
pub(super) const BRAIN_TABLE: Kernels = Kernels { floats: with_bf16::FLOATS, ..TABLE };

instantiate!("avx512f,avx512vl,avx512dq,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni,avx2,popcnt,fma,f16c");

float_tiles!(
    Avx512<false>,
    "avx512f,avx512vl,avx512dq,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni,avx2,popcnt,fma,f16c",
    [1 x 4 2 x 4 4 x 4 8 x 2 12 x 2]
);
code_tiles!(
    Avx512<false>,
    "avx512f,avx512vl,avx512dq,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni,avx2,popcnt,fma,f16c",
    [1 x 1 2 x 1 4 x 1 8 x 1 12 x 1]
);

mod with_bf16 {
    use super::{Avx512, float_tiles};
    float_tiles!(
        Avx512<true>,
        "avx512f,avx512vl,avx512dq,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,popcnt,fma,f16c",
        [1 x 4 2 x 4 4 x 4 8 x 2 12 x 2]
    );
}

fn decode_row_by_bytes(grid: Grid, bytes: &[u8], out: &mut [f32]) {
    match grid {
        Grid::Int { bits, group, zero: Zero::Middle } if group > 0 && group % 32 == 0 => {
            assert!(bytes.len() >= grid.row_bytes(out.len()));
            // SAFETY: the table exists only where the instructions do, and the length is asserted above.
            unsafe { decode_groups(usize::from(bits), group.into(), bytes, out) }
        }
        other => decode_row(other, bytes, out),
    }
}

/// Rows of symmetric groups: the `8 bits` of eight codes go to one lane of 64 bits, which one instruction cuts
/// into eight bytes.
///
/// # Safety
/// `bytes` holds every group of `out`, whose last one may be short.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vl,avx512dq,avx2,fma")]
unsafe fn decode_groups(bits: usize, group: usize, bytes: &[u8], out: &mut [f32]) {
    let base = _mm512_set1_epi32(1 << (bits - 1));
    let spread: [u8; 64] = std::array::from_fn(|i| if i % 8 < bits { (i / 8 * bits + i % 8) as u8 } else { 63 });
    let shifts: [u8; 64] = std::array::from_fn(|i| (i % 8 * bits) as u8);
    let mask = _mm512_set1_epi8(((1u16 << bits) - 1) as u8 as i8);
    // SAFETY: the arrays hold 64 bytes each.
    let (spread, shifts) =
        unsafe { (_mm512_loadu_si512(spread.as_ptr().cast()), _mm512_loadu_si512(shifts.as_ptr().cast())) };
    for (bytes, out) in bytes.chunks_exact(2 + bits * group / 8).zip(out.chunks_mut(group)) {
        let d = _mm512_set1_ps(widen(u16::from_le_bytes([bytes[0], bytes[1]])));
        for (codes, out) in bytes[2..].chunks(8 * bits).zip(out.chunks_mut(64)) {
            // Byte 63 stays zero wherever eight codes take less than 64 bits, so it may fill the lanes.
            let held = if codes.len() == 64 { u64::MAX } else { (1u64 << codes.len()) - 1 };
            // SAFETY: only the bytes that `held` names are read, and they are those of `codes`.
            let packed = unsafe { _mm512_maskz_loadu_epi8(held, codes.as_ptr().cast()) };
            let words = _mm512_permutexvar_epi8(spread, packed);
            let codes = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, words), mask);
            let quarters = [
                _mm512_castsi512_si128(codes),
                _mm512_extracti32x4_epi32::<1>(codes),
                _mm512_extracti32x4_epi32::<2>(codes),
                _mm512_extracti32x4_epi32::<3>(codes),
            ];
            for (quarter, out) in quarters.into_iter().zip(out.chunks_mut(16)) {
                let level = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(quarter), base));
                let fill = ((1u32 << out.len()) - 1) as u16;
                // SAFETY: only as many values are written as `out` has.
                unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), fill, _mm512_mul_ps(d, level)) };
            }
        }
    }
}
