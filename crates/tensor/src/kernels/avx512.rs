//! AVX-512 kernels.

use super::{Kernels, PANEL, PanelProduct, once::instantiate};
use std::arch::x86_64::*;

/// The table, where this machine has the instructions.
pub fn kernels() -> Option<&'static Kernels> {
    let runs = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512dq");
    runs.then_some(&KERNELS)
}

static KERNELS: Kernels =
    Kernels { isa: "avx512", panel, rows, decode_row, fit, rms_norm, layer_norm, dot, axpy, exp_sum, silu, gelu_tanh, soft_cap };

instantiate!("avx512f,avx512vl,avx512dq,avx2,fma");

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
