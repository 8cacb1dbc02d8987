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

    /// Replaces values by the slopes there, and writes the activations to `out`.
    pub(super) fn slope(self, x: &mut [f32], out: &mut [f32]) {
        let each = |x: &mut [f32], out: &mut [f32], f: &dyn Fn(f32) -> (f32, f32)| {
            x.iter_mut().zip(out).for_each(|(x, o)| (*o, *x) = f(*x));
        };
        match self {
            Activation::Silu => (kernels().silu_slope)(x, out),
            Activation::GeluTanh => (kernels().gelu_tanh_slope)(x, out),
            Activation::Gelu => each(x, out, &|v| {
                let below = 0.5 * (1.0 + libm::erff(v * std::f32::consts::FRAC_1_SQRT_2));
                // The density of the normal distribution, 1 / sqrt(2 pi) at 0.
                (v * below, below + v * 0.398_942_3 * (-0.5 * v * v).exp())
            }),
            Activation::GeluQuick => each(x, out, &|v| {
                let s = 1.0 / (1.0 + (-1.702 * v).exp());
                (v * s, s * (1.0 + 1.702 * v * (1.0 - s)))
            }),
            Activation::Relu => each(x, out, &|v| (v.max(0.0), if v > 0.0 { 1.0 } else { 0.0 })),
            Activation::ReluSquared => each(x, out, &|v| (v.max(0.0) * v.max(0.0), 2.0 * v.max(0.0))),
            Activation::Tanh => each(x, out, &|v| (v.tanh(), 1.0 - v.tanh() * v.tanh())),
        }
    }
}

/// `out = activation(gate) * up`, value by value.
pub fn gate_to(activation: Activation, gate: &Tensor, up: &Tensor, out: &mut Tensor) {
    out.reset(gate.rows(), gate.cols());
    each_row(out, |t, out| {
        out.copy_from_slice(gate.row(t));
        activation.apply_slice(out);
        out.iter_mut().zip(up.row(t)).for_each(|(o, u)| *o *= u);
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
