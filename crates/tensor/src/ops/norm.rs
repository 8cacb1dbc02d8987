//! Normalisation of rows.

use super::each_row;
use crate::{Tensor, kernels::kernels};

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square (arXiv 1910.07467).
    Rms,
    /// Mean and variance (arXiv 1607.06450).
    Layer,
}

/// Normalises every row of `x`, scales it by `weight` `[cols]`, and adds `bias` `[cols]`; `out` takes the shape of `x`.
pub fn norm(kind: NormKind, x: &Tensor, weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut Tensor) {
    out.reset(x.rows(), x.cols());
    each_row(out, |t, out| {
        norm_row(kind, x.row(t), weight, eps, out);
        if let Some(bias) = bias {
            out.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
        }
    });
}

/// The same for the rows of `x` that are listed: `out` is `[rows, cols]`.
pub fn norm_rows(
    kind: NormKind,
    x: &Tensor,
    rows: &[usize],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut Tensor,
) {
    out.reset(rows.len(), x.cols());
    each_row(out, |t, out| {
        norm_row(kind, x.row(rows[t]), weight, eps, out);
        if let Some(bias) = bias {
            out.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
        }
    });
}

/// Normalises each head of each row in place: `x` is `[tokens, heads * weight.len()]`.
pub fn norm_heads(kind: NormKind, x: &mut Tensor, weight: &[f32], eps: f32) {
    each_row(x, |_, row| {
        let mut copy = [0f32; 1024];
        for head in row.chunks_mut(weight.len()) {
            let copy = &mut copy[..head.len()];
            copy.copy_from_slice(head);
            norm_row(kind, copy, weight, eps, head);
        }
    });
}

fn norm_row(kind: NormKind, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    match kind {
        NormKind::Rms => (kernels().rms_norm)(x, weight, eps, out),
        NormKind::Layer => (kernels().layer_norm)(x, weight, eps, out),
    }
}
