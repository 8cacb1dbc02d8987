//! AVX2 kernels.

use super::{Kernels, PANEL, PanelProduct, once::instantiate};
use std::arch::x86_64::*;

/// The table, where this machine has the instructions.
pub fn kernels() -> Option<&'static Kernels> {
    (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(&KERNELS)
}

static KERNELS: Kernels = Kernels {
    isa: "avx2",
    panel,
    rows,
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

instantiate!("avx2,fma");

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
                6.. => row_of_tiles::<6>(p, t, out),
                3..6 => row_of_tiles::<3>(p, t, out),
                _ => row_of_tiles::<1>(p, t, out),
            }
        };
    }
}

/// `T` tokens against both halves of the panel, since sixteen registers hold only one; returns `T`.
///
/// # Safety
/// As stated in [`panel`].
#[target_feature(enable = "avx2,fma")]
unsafe fn row_of_tiles<const T: usize>(p: &PanelProduct<'_>, t: usize, out: &mut [f32]) -> usize {
    // SAFETY: columns 0..16 and 16..32 lie inside the panel.
    unsafe {
        tile::<T>(p, t, 0, out);
        tile::<T>(p, t, 16, out);
    }
    T
}

/// `T` tokens against sixteen columns of the panel from `column` on.
///
/// # Safety
/// As stated in [`panel`].
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const T: usize>(p: &PanelProduct<'_>, t: usize, column: usize, out: &mut [f32]) {
    // SAFETY: every address is `token * stride + k` or `k * PANEL + lane` inside the lengths that `panel` asserts.
    unsafe {
        let x = p.x.as_ptr().add(t * p.x_stride);
        let out = out.as_mut_ptr().add(t * PANEL + column);
        let mut acc = [[_mm256_setzero_ps(); 2]; T];
        for i in 0..T {
            acc[i] = [_mm256_loadu_ps(out.add(i * PANEL)), _mm256_loadu_ps(out.add(i * PANEL + 8))];
        }
        let mut w = p.panel.as_ptr().add(column);
        for k in 0..p.depth {
            let (w0, w1) = (_mm256_loadu_ps(w), _mm256_loadu_ps(w.add(8)));
            for i in 0..T {
                let v = _mm256_set1_ps(*x.add(i * p.x_stride + k));
                acc[i][0] = _mm256_fmadd_ps(v, w0, acc[i][0]);
                acc[i][1] = _mm256_fmadd_ps(v, w1, acc[i][1]);
            }
            w = w.add(PANEL);
        }
        for i in 0..T {
            _mm256_storeu_ps(out.add(i * PANEL), acc[i][0]);
            _mm256_storeu_ps(out.add(i * PANEL + 8), acc[i][1]);
        }
    }
}
