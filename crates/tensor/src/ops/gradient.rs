//! Gradients of norms, rotations and the elementwise operations.
//!
//! A gradient over tokens is summed in runs of [`RUN`] tokens, and the runs in rising order: the sum depends on the
//! number of tokens alone.

use super::{Activation, NormKind, Rotation, each_index, each_row};
use crate::{
    Tensor,
    kernels::kernels,
    threads::{self, Shared},
};

/// Tokens that one task sums.
const RUN: usize = 64;

/// What was normalised, and how.
#[derive(Clone, Copy)]
pub struct Normed<'a> {
    /// Which normalisation.
    pub kind: NormKind,
    /// Its input, `[tokens, cols]`.
    pub x: &'a Tensor,
    /// Its weight, `[cols]`, or `[head_dim]` where each head of a row is normalised by itself.
    pub weight: &'a [f32],
    /// Its epsilon.
    pub eps: f32,
}

/// Of [`super::norm`] and [`super::norm_heads`]: adds the gradient of the input to `dx`, those of the weight to `dw`
/// and of the bias, where there is one, to `db`.
///
/// `scratch` is memory that is used again from call to call.
///
/// # Panics
/// If shapes differ, which is the caller's fault.
pub fn norm_gradient(
    norm: Normed<'_>,
    dy: &Tensor,
    dx: &mut Tensor,
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    scratch: &mut Vec<f32>,
) {
    let (rows, cols, width) = (norm.x.rows(), norm.x.cols(), norm.weight.len());
    assert!([dy, &*dx].iter().all(|t| t.rows() == rows && t.cols() == cols), "shapes of a norm's gradient");
    let runs = rows.div_ceil(RUN);
    scratch.clear();
    scratch.resize(runs * 2 * width, 0.0);
    let (sums, out) = (Shared::new(scratch), Shared::new(dx.as_mut_slice()));
    let gradient = match norm.kind {
        NormKind::Rms => kernels().rms_norm_gradient,
        NormKind::Layer => kernels().layer_norm_gradient,
    };
    threads::each(runs, &|run| {
        // SAFETY: `scratch` outlives the section; this task alone writes this run's sums.
        let (dw, db) = unsafe { sums.slice(run * 2 * width, 2 * width) }.split_at_mut(width);
        for t in run * RUN..rows.min((run + 1) * RUN) {
            // SAFETY: `dx` outlives the section; this task alone writes the rows of this run.
            let out = unsafe { out.slice(t * cols, cols) };
            let heads = norm.x.row(t).chunks(width).zip(dy.row(t).chunks(width)).zip(out.chunks_mut(width));
            for ((x, dy), out) in heads {
                gradient(x, norm.weight, norm.eps, dy, out, dw);
                db.iter_mut().zip(dy).for_each(|(b, d)| *b += d);
            }
        }
    });
    for sums in scratch.chunks_exact(2 * width) {
        dw.iter_mut().zip(sums).for_each(|(w, s)| *w += s);
    }
    if let Some(db) = db {
        for sums in scratch.chunks_exact(2 * width) {
            db.iter_mut().zip(&sums[width..]).for_each(|(b, s)| *b += s);
        }
    }
}

/// Adds the sums of the columns of `x` to `out` `[cols]`: the gradient of a bias.
pub fn column_sums(x: &Tensor, out: &mut [f32], scratch: &mut Vec<f32>) {
    let (rows, cols) = (x.rows(), x.cols());
    let runs = rows.div_ceil(RUN);
    scratch.clear();
    scratch.resize(runs * cols, 0.0);
    let sums = Shared::new(scratch);
    threads::each(runs, &|run| {
        // SAFETY: `scratch` outlives the section; this task alone writes this run's sums.
        let sums = unsafe { sums.slice(run * cols, cols) };
        for t in run * RUN..rows.min((run + 1) * RUN) {
            sums.iter_mut().zip(x.row(t)).for_each(|(s, v)| *s += v);
        }
    });
    for sums in scratch.chunks_exact(cols.max(1)) {
        out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
    }
}

/// Of [`super::rope`]: turns the gradient of its output back into that of its input.
pub fn rope_gradient(dx: &mut Tensor, head_dim: usize, rotation: &Rotation) {
    each_row(dx, |t, row| {
        let (cos, sin) = rotation.angles(t);
        let half = cos.len();
        for head in row.chunks_mut(head_dim) {
            let (low, high) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (a, b) = (low[i], high[i]);
                low[i] = a * cos[i] + b * sin[i];
                high[i] = b * cos[i] - a * sin[i];
            }
        }
    });
}

/// Of [`super::gate_to`]: `gate` and `up` become their gradients; `dh` is that of the output.
pub fn gate_gradient(activation: Activation, gate: &mut Tensor, up: &mut Tensor, dh: &Tensor) {
    let (rows, cols) = (gate.rows(), gate.cols());
    let (gates, ups) = (Shared::new(gate.as_mut_slice()), Shared::new(up.as_mut_slice()));
    each_index(rows, cols, |t| {
        // SAFETY: both outlive the section; this task alone writes this row of either.
        let (g, u) = unsafe { (gates.slice(t * cols, cols), ups.slice(t * cols, cols)) };
        let mut value = [0f32; PIECE];
        for ((g, u), dh) in g.chunks_mut(PIECE).zip(u.chunks_mut(PIECE)).zip(dh.row(t).chunks(PIECE)) {
            let value = &mut value[..g.len()];
            activation.slope(g, value);
            for i in 0..g.len() {
                g[i] *= dh[i] * u[i];
                u[i] = dh[i] * value[i];
            }
        }
    });
}

/// Of [`Activation::apply`]: `x`, its input, becomes its gradient; `dy` is that of the output.
pub fn activation_gradient(activation: Activation, x: &mut Tensor, dy: &Tensor) {
    each_row(x, |t, x| {
        let mut value = [0f32; PIECE];
        for (x, dy) in x.chunks_mut(PIECE).zip(dy.row(t).chunks(PIECE)) {
            activation.slope(x, &mut value[..x.len()]);
            x.iter_mut().zip(dy).for_each(|(x, d)| *x *= d);
        }
    });
}

/// Of [`super::soft_cap`]: `dy`, the gradient of its output `y`, becomes that of its input.
pub fn soft_cap_gradient(dy: &mut Tensor, y: &Tensor, cap: f32) {
    each_row(dy, |t, dy| {
        for (d, y) in dy.iter_mut().zip(y.row(t)) {
            let tanh = y / cap;
            *d *= 1.0 - tanh * tanh;
        }
    });
}

/// Values whose activations are at hand at once.
const PIECE: usize = 256;
