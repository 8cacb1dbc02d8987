//! A linear map: a weight and an optional bias. It is what a method returns.

use crate::{Tensor, Weight};

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

    /// Applies the map to every row of `x` (`[tokens, inputs]` to `[tokens, outputs]`).
    pub fn apply(&self, x: &Tensor) -> Tensor {
        let mut y = crate::ops::matmul(x, &self.weight);
        if let Some(bias) = &self.bias {
            crate::ops::add_bias(&mut y, bias);
        }
        y
    }

    /// Payload of weight and bias.
    pub fn size_bytes(&self) -> usize {
        self.weight.size_bytes() + self.bias.as_ref().map_or(0, |b| 4 * b.len())
    }
}
