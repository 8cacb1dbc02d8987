//! The one hook into a forward pass: calibration, distillation, explanation and monitoring use it.

use crate::Site;
use tensor::Tensor;

/// Where in a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Point {
    /// What enters the product of a site, `[tokens, inputs]`.
    Input(Site),
    /// What leaves it, `[tokens, outputs]`.
    Output(Site),
    /// The residual stream after a block, `[tokens, dim]`.
    Residual(u16),
}

/// Watches a forward pass.
pub trait Tap {
    /// Sees the activations at one point of one batch.
    fn at(&mut self, point: Point, x: &Tensor);
}

/// Watches nothing.
impl Tap for () {
    fn at(&mut self, _: Point, _: &Tensor) {}
}
