//! Elementwise operations.

use super::each_row;
use crate::{Tensor, kernels::kernels};

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

impl Activation {
    /// Applies it to every value.
    pub fn apply(self, x: &mut Tensor) {
        each_row(x, |_, x| self.apply_slice(x));
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
    each_row(gate, |t, g| {
        activation.apply_slice(g);
        g.iter_mut().zip(up.row(t)).for_each(|(g, u)| *g *= u);
    });
}

/// `x += y`.
pub fn add_to(x: &mut Tensor, y: &Tensor) {
    each_row(x, |t, x| x.iter_mut().zip(y.row(t)).for_each(|(x, y)| *x += y));
}

/// `x *= factor`.
pub fn scale(x: &mut Tensor, factor: f32) {
    each_row(x, |_, x| x.iter_mut().for_each(|v| *v *= factor));
}

/// `x = cap tanh(x / cap)`.
pub fn soft_cap(x: &mut Tensor, cap: f32) {
    each_row(x, |_, x| (kernels().soft_cap)(x, cap));
}
