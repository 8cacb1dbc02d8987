//! Normalisation of rows.

use crate::{Tensor, kernels::kernels};
use rayon::prelude::*;

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square (arXiv 1910.07467).
    Rms,
    /// Mean and variance (arXiv 1607.06450).
    Layer,
}

/// Rows that one task normalises.
const ROWS: usize = 16;

/// Normalises every row of `x` and scales it by `weight` `[cols]`, then adds `bias` `[cols]`.
pub fn norm(kind: NormKind, x: &Tensor, weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Tensor {
    let mut out = Tensor::zeros(x.rows(), x.cols());
    let cols = x.cols().max(1);
    out.as_mut_slice().par_chunks_mut(ROWS * cols).zip(x.as_slice().par_chunks(ROWS * cols)).for_each(|(out, x)| {
        for (out, x) in out.chunks_mut(cols).zip(x.chunks(cols)) {
            norm_row(kind, x, weight, eps, out);
        }
    });
    if let Some(bias) = bias {
        super::add_bias(&mut out, bias);
    }
    out
}

/// Normalises each head of each row in place: `x` is `[tokens, heads * weight.len()]`.
pub fn norm_heads(kind: NormKind, x: &mut Tensor, weight: &[f32], eps: f32) {
    let cols = x.cols().max(1);
    x.as_mut_slice().par_chunks_mut(ROWS * cols).for_each(|rows| {
        let mut out = vec![0.0; weight.len()];
        for head in rows.chunks_mut(weight.len()) {
            norm_row(kind, head, weight, eps, &mut out);
            head.copy_from_slice(&out);
        }
    });
}

fn norm_row(kind: NormKind, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    match kind {
        NormKind::Rms => (kernels().rms_norm)(x, weight, eps, out),
        NormKind::Layer => (kernels().layer_norm)(x, weight, eps, out),
    }
}
