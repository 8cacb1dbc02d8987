//! A linear map: a weight, an optional bias, and how its inputs are rounded. It is what a method returns.

use crate::{Tensor, Weight, grid::Table};

/// `y = x W^T + b` with `W` `[outputs, inputs]`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The matrix.
    pub weight: Weight,
    /// `[outputs]`, added to every row of the product.
    pub bias: Option<Vec<f32>>,
    /// What the engine that the model is stored for does to the inputs first.
    pub rounding: Option<Rounding>,
}

/// How the inputs of a product are rounded to eight bits before it: as compressed-tensors defines it for W8A8, or as engines do
/// that multiply codes with whole numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounding {
    /// To what.
    pub to: Eight,
    /// The scale of all tokens; each takes that of its own largest magnitude where there is none.
    pub scale: Option<f32>,
    /// So many neighbouring inputs have a scale of their own; 0: all inputs of a token share one.
    pub block: usize,
}

/// Numbers of eight bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eight {
    /// Whole numbers, -128 to 127.
    Int,
    /// Floats with four bits of exponent (E4M3).
    Float,
}

impl Linear {
    /// A map without bias.
    pub fn new(weight: Weight) -> Linear {
        Linear::with_bias(weight, None)
    }

    /// A map whose inputs stay as they are.
    pub fn with_bias(weight: Weight, bias: Option<Vec<f32>>) -> Linear {
        Linear { weight, bias, rounding: None }
    }

    /// Payload of weight and bias.
    pub fn size_bytes(&self) -> usize {
        self.weight.size_bytes() + self.bias.as_ref().map_or(0, |b| 4 * b.len())
    }
}

impl Rounding {
    /// Rounds `[tokens, inputs]` in place.
    pub fn apply(self, x: &mut Tensor) {
        let cols = x.cols().max(1);
        let block = if self.block == 0 { cols } else { self.block };
        for row in x.as_mut_slice().chunks_exact_mut(cols).flat_map(|row| row.chunks_mut(block)) {
            let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
            let scale = self.scale.unwrap_or(self.to.scale(largest));
            if scale > 0.0 && scale.is_finite() {
                row.iter_mut().for_each(|v| *v = scale * self.to.nearest(*v / scale));
            }
        }
    }
}

impl Eight {
    /// The scale for numbers up to `largest`.
    pub fn scale(self, largest: f32) -> f32 {
        largest / if self == Eight::Int { 127.5 } else { 448.0 }
    }

    fn nearest(self, x: f32) -> f32 {
        match self {
            Eight::Int => x.round_ties_even().clamp(-128.0, 127.0),
            Eight::Float => Table::E4m3.levels()[usize::from(Table::E4m3.nearest(x))],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_rounded_by_its_own_largest_value_or_by_a_scale_of_all() {
        let x = Tensor::from_vec(2, 3, vec![127.5, 1.4, -127.6, 0.0, 0.0, 0.0]);
        let rounded = |to, scale| {
            let mut x = x.clone();
            Rounding { to, scale, block: 0 }.apply(&mut x);
            x.as_slice().to_vec()
        };
        assert_eq!(rounded(Eight::Int, Some(1.0)), [127.0, 1.0, -128.0, 0.0, 0.0, 0.0]);
        assert_eq!(rounded(Eight::Float, Some(1.0))[..3], [128.0, 1.375, -128.0]);
        let own = rounded(Eight::Int, None);
        assert!((own[2] + 127.6).abs() < 0.6 && (own[1] - 1.4).abs() < 0.6 && own[3] == 0.0);
        // What shares no scale with a large value keeps its small one.
        let last = |block| {
            let mut x = Tensor::from_vec(1, 4, vec![100.0, 0.3, 0.3, 0.1]);
            Rounding { to: Eight::Int, scale: None, block }.apply(&mut x);
            x.as_slice()[3]
        };
        assert!(last(0) == 0.0 && (last(2) - 0.1).abs() < 0.002);
    }
}
