//! AVX-512 kernels.

use super::{Kernels, PANEL, PanelProduct, once::instantiate};
use crate::grid::{Grid, widen};
use std::arch::x86_64::*;

/// The table, where this machine has the instructions.
pub fn kernels() -> Option<&'static Kernels> {
    let runs = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    let bytes = is_x86_feature_detected!("avx512vbmi") && is_x86_feature_detected!("avx512bw");
    runs.then_some(if bytes { &WITH_BYTES } else { &KERNELS })
}

const TABLE: Kernels = Kernels {
    isa: "avx512",
    panel,
    rows: rows_by_sixteen,
    decode_row,
    fit,
    rms_norm,
    layer_norm,
    dot,
    axpy,
    exp_sum,
    silu,
    gelu_tanh,
    soft_cap,
};

static KERNELS: Kernels = TABLE;
/// The same with byte permutations, which unpack codes of any width.
static WITH_BYTES: Kernels = Kernels { decode_row: decode_row_by_bytes, ..TABLE };

instantiate!("avx512f,avx512vl,avx512dq,avx2,fma");

fn decode_row_by_bytes(grid: Grid, bytes: &[u8], out: &mut [f32]) {
    match grid {
        Grid::Int { bits, group, asymmetric: false } if group % 32 == 0 => {
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

fn rows_by_sixteen(x: &[f32], w: &[f32], out: &mut [f32]) {
    let depth = x.len();
    assert!(w.len() >= PANEL * depth && out.len() >= PANEL);
    // SAFETY: the table exists only where the instructions do, and the lengths are asserted above.
    unsafe {
        sixteen_rows(x, &w[..16 * depth], &mut out[..16]);
        sixteen_rows(x, &w[16 * depth..], &mut out[16..]);
    }
}

/// Sixteen rows against one token: tiles of 16 x 16 values are transposed in registers, so that one multiply-add
/// serves one input channel of all rows and each sum keeps its order.
///
/// # Safety
/// `rows` holds `16 * x.len()` values and `out` sixteen.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]
unsafe fn sixteen_rows(x: &[f32], rows: &[f32], out: &mut [f32]) {
    let depth = x.len();
    let whole = depth / 16 * 16;
    // SAFETY: loads read `rows[r * depth + k .. + 16]` with `k + 16 <= whole <= depth`.
    unsafe {
        let mut acc = _mm512_setzero_ps();
        for k in (0..whole).step_by(16) {
            let mut t = [_mm512_setzero_ps(); 16];
            for r in 0..16 {
                t[r] = _mm512_loadu_ps(rows.as_ptr().add(r * depth + k));
            }
            for (j, column) in transpose(t).into_iter().enumerate() {
                acc = _mm512_fmadd_ps(_mm512_set1_ps(*x.get_unchecked(k + j)), column, acc);
            }
        }
        _mm512_storeu_ps(out.as_mut_ptr(), acc);
    }
    for k in whole..depth {
        for r in 0..16 {
            out[r] = x[k].mul_add(rows[r * depth + k], out[r]);
        }
    }
}

/// The transpose of a 16 x 16 tile.
#[target_feature(enable = "avx512f")]
fn transpose(t: [__m512; 16]) -> [__m512; 16] {
    let mut a = t;
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_ps(t[2 * i], t[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(t[2 * i], t[2 * i + 1]);
    }
    let d = |v: __m512| _mm512_castps_pd(v);
    let s = |v: __m512d| _mm512_castpd_ps(v);
    let mut b = a;
    for i in 0..4 {
        let [p, q, r, u] = [a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]];
        b[4 * i] = s(_mm512_unpacklo_pd(d(p), d(r)));
        b[4 * i + 1] = s(_mm512_unpackhi_pd(d(p), d(r)));
        b[4 * i + 2] = s(_mm512_unpacklo_pd(d(q), d(u)));
        b[4 * i + 3] = s(_mm512_unpackhi_pd(d(q), d(u)));
    }
    let mut c = b;
    for i in 0..4 {
        // Register `i + 4 g` holds column `i + 4 lane` of rows `4 g .. 4 g + 4` in each lane.
        c[i] = _mm512_shuffle_f32x4::<0x88>(b[i], b[i + 4]);
        c[i + 4] = _mm512_shuffle_f32x4::<0xdd>(b[i], b[i + 4]);
        c[i + 8] = _mm512_shuffle_f32x4::<0x88>(b[i + 8], b[i + 12]);
        c[i + 12] = _mm512_shuffle_f32x4::<0xdd>(b[i + 8], b[i + 12]);
    }
    let mut out = c;
    for i in 0..4 {
        out[i] = _mm512_shuffle_f32x4::<0x88>(c[i], c[i + 8]);
        out[i + 8] = _mm512_shuffle_f32x4::<0xdd>(c[i], c[i + 8]);
        out[i + 4] = _mm512_shuffle_f32x4::<0x88>(c[i + 4], c[i + 12]);
        out[i + 12] = _mm512_shuffle_f32x4::<0xdd>(c[i + 4], c[i + 12]);
    }
    out
}

fn panel(p: &PanelProduct<'_>, out: &mut [f32]) {
    assert!(p.tokens == 0 || p.x.len() >= (p.tokens - 1) * p.x_stride + p.depth);
    assert!(p.panel.len() >= p.depth * PANEL && out.len() >= p.tokens * PANEL);
    let mut t = 0;
    while t < p.tokens {
        let left = p.tokens - t;
        // SAFETY: the table exists only where the instructions do, the lengths are asserted above, and a tile
        // of `T` tokens starts at `t` with `t + T <= tokens`.
        t += unsafe {
            match left {
                12.. => tile::<12>(p, t, out),
                6..12 => tile::<6>(p, t, out),
                4..6 => tile::<4>(p, t, out),
                2..4 => tile::<2>(p, t, out),
                _ => tile::<1>(p, t, out),
            }
        };
    }
}

/// `T` tokens against the panel, accumulators in registers; returns `T`.
///
/// # Safety
/// As stated in [`panel`].
#[target_feature(enable = "avx512f")]
unsafe fn tile<const T: usize>(p: &PanelProduct<'_>, t: usize, out: &mut [f32]) -> usize {
    // SAFETY: every address is `token * stride + k` or `k * PANEL + lane` inside the lengths that `panel` asserts.
    unsafe {
        let x = p.x.as_ptr().add(t * p.x_stride);
        let out = out.as_mut_ptr().add(t * PANEL);
        let mut acc = [[_mm512_setzero_ps(); 2]; T];
        for i in 0..T {
            acc[i] = [_mm512_loadu_ps(out.add(i * PANEL)), _mm512_loadu_ps(out.add(i * PANEL + 16))];
        }
        let mut w = p.panel.as_ptr();
        for k in 0..p.depth {
            let (w0, w1) = (_mm512_loadu_ps(w), _mm512_loadu_ps(w.add(16)));
            for i in 0..T {
                let v = _mm512_set1_ps(*x.add(i * p.x_stride + k));
                acc[i][0] = _mm512_fmadd_ps(v, w0, acc[i][0]);
                acc[i][1] = _mm512_fmadd_ps(v, w1, acc[i][1]);
            }
            w = w.add(PANEL);
        }
        for i in 0..T {
            _mm512_storeu_ps(out.add(i * PANEL), acc[i][0]);
            _mm512_storeu_ps(out.add(i * PANEL + 16), acc[i][1]);
        }
    }
    T
}
