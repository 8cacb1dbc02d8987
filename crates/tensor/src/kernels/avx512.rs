//! AVX-512 kernels.

use super::{Kernels, PANEL, PanelProduct, once::instantiate};
use std::arch::x86_64::*;

/// The table, where this machine has the instructions.
pub fn kernels() -> Option<&'static Kernels> {
    let runs = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    runs.then_some(&KERNELS)
}

static KERNELS: Kernels = Kernels {
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

instantiate!("avx512f,avx512vl,avx512dq,avx2,fma");

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
