//! Portable kernels, and the meaning of each.

use super::{Kernels, PANEL, PanelProduct, once};

/// The table that every machine runs.
pub static KERNELS: Kernels = Kernels {
    isa: "generic",
    panel,
    rows: |x, rows, out| once::rows_with(x, rows, out, |a, b, c| a * b + c),
    decode_row: once::decode_row,
    fit: once::fit,
    rms_norm: once::rms_norm,
    layer_norm: once::layer_norm,
    dot: once::dot,
    axpy: once::axpy,
    exp_sum: once::exp_sum,
    silu: once::silu,
    gelu_tanh: once::gelu_tanh,
    soft_cap: once::soft_cap,
};

fn panel(p: &PanelProduct<'_>, out: &mut [f32]) {
    for t in 0..p.tokens {
        let x = &p.x[t * p.x_stride..t * p.x_stride + p.depth];
        let out = &mut out[t * PANEL..(t + 1) * PANEL];
        for (x, w) in x.iter().zip(p.panel.chunks_exact(PANEL)) {
            for (o, w) in out.iter_mut().zip(w) {
                *o += x * w;
            }
        }
    }
}
