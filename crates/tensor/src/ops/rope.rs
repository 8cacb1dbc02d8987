//! Rotary position embedding (arXiv 2104.09864), the layout that rotates the two halves of a head.

use crate::Tensor;
use rayon::prelude::*;

/// Cosines and sines for the positions of a batch: made once, used by every block.
#[derive(Clone)]
pub struct Rotation {
    /// `[tokens, rotated / 2]`.
    cos: Tensor,
    /// `[tokens, rotated / 2]`.
    sin: Tensor,
}

impl Rotation {
    /// The rotation of each position by the inverse frequencies `[half]` of its row, its length scaled by `scale`.
    ///
    /// Angles are products in `f32`, as the models were trained with.
    pub fn new<'a>(
        positions: &[usize],
        inverse_frequencies: impl Fn(usize) -> &'a [f32],
        half: usize,
        scale: f32,
    ) -> Rotation {
        let mut cos = Tensor::zeros(positions.len(), half);
        let mut sin = Tensor::zeros(positions.len(), half);
        for (t, &position) in positions.iter().enumerate() {
            for (i, f) in inverse_frequencies(t).iter().enumerate() {
                let (s, c) = (position as f32 * f).sin_cos();
                cos.row_mut(t)[i] = c * scale;
                sin.row_mut(t)[i] = s * scale;
            }
        }
        Rotation { cos, sin }
    }
}

/// Rotates the first `2 * inverse_frequencies.len()` channels of each head of `x` `[tokens, heads * head_dim]`.
pub fn rope(x: &mut Tensor, head_dim: usize, rotation: &Rotation) {
    let half = rotation.cos.cols();
    let cols = x.cols().max(1);
    x.as_mut_slice().par_chunks_mut(cols).enumerate().for_each(|(t, row)| {
        let (cos, sin) = (rotation.cos.row(t), rotation.sin.row(t));
        for head in row.chunks_mut(head_dim) {
            let (low, high) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (a, b) = (low[i], high[i]);
                low[i] = a * cos[i] - b * sin[i];
                high[i] = b * cos[i] + a * sin[i];
            }
        }
    });
}
