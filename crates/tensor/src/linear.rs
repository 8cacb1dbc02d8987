//! A linear map: a weight and an optional bias. It is what a method returns.

use crate::Weight;

/// `y = x W^T + b` with `W` `[outputs, inputs]`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The matrix.
    pub weight: Weight,
    /// `[outputs]`, added to every row of the product.
    pub bias: Option<Vec<f32>>,
}

impl Linear {
    /// A map without bias.
    pub fn new(weight: Weight) -> Linear {
        Linear { weight, bias: None }
    }

    /// Payload of weight and bias.
    pub fn size_bytes(&self) -> usize {
        self.weight.size_bytes() + self.bias.as_ref().map_or(0, |b| 4 * b.len())
    }
}
