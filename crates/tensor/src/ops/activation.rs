//! Elementwise operations.

use crate::{Tensor, kernels::kernels};
use rayon::prelude::*;

/// The nonlinearity of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Phi(x)` by the error function (arXiv 1606.08415).
    Gelu,
    /// Its approximation by a hyperbolic tangent.
    GeluTanh,
    /// Its approximation `x sigmoid(1.702 x)`.
    GeluQuick,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2`.
    ReluSquared,
    /// Hyperbolic tangent.
    Tanh,
}

/// Values that one task works on.
const CHUNK: usize = 4096;

impl Activation {
    /// Applies it to every value.
    pub fn apply(self, x: &mut Tensor) {
        x.as_mut_slice().par_chunks_mut(CHUNK).for_each(|x| self.apply_slice(x));
    }

    pub(super) fn apply_slice(self, x: &mut [f32]) {
        match self {
            Activation::Silu => (kernels().silu)(x),
            Activation::GeluTanh => (kernels().gelu_tanh)(x),
            Activation::Gelu => {
                for v in x {
                    *v = 0.5 * *v * (1.0 + libm::erff(*v * std::f32::consts::FRAC_1_SQRT_2));
                }
            }
            Activation::GeluQuick => {
                for v in x {
                    *v /= 1.0 + (-1.702 * *v).exp();
                }
            }
            Activation::Relu => x.iter_mut().for_each(|v| *v = v.max(0.0)),
            Activation::ReluSquared => x.iter_mut().for_each(|v| *v = v.max(0.0) * v.max(0.0)),
            Activation::Tanh => x.iter_mut().for_each(|v| *v = v.tanh()),
        }
    }
}

/// `gate = activation(gate) * up`, value by value.
pub fn gate(activation: Activation, gate: &mut Tensor, up: &Tensor) {
    gate.as_mut_slice().par_chunks_mut(CHUNK).zip(up.as_slice().par_chunks(CHUNK)).for_each(|(g, u)| {
        activation.apply_slice(g);
        g.iter_mut().zip(u).for_each(|(g, u)| *g *= u);
    });
}

/// Adds `bias` `[cols]` to every row.
pub fn add_bias(x: &mut Tensor, bias: &[f32]) {
    let cols = x.cols().max(1);
    x.as_mut_slice().par_chunks_mut(cols).for_each(|row| row.iter_mut().zip(bias).for_each(|(v, b)| *v += b));
}

/// `x += y`.
pub fn add_to(x: &mut Tensor, y: &Tensor) {
    let add = |(x, y): (&mut [f32], &[f32])| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    x.as_mut_slice().par_chunks_mut(CHUNK).zip(y.as_slice().par_chunks(CHUNK)).for_each(add);
}

/// `x *= factor`.
pub fn scale(x: &mut Tensor, factor: f32) {
    x.as_mut_slice().par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|v| *v *= factor));
}

/// `x = cap tanh(x / cap)`.
pub fn soft_cap(x: &mut Tensor, cap: f32) {
    x.as_mut_slice().par_chunks_mut(CHUNK).for_each(|x| (kernels().soft_cap)(x, cap));
}
