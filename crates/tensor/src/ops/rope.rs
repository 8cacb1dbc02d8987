//! Rotary position embedding (arXiv 2104.09864), the layout that rotates the two halves of a head.

use super::each_row;
use crate::Tensor;

/// Cosines and sines for the positions of a batch: made once, used by every block.
#[derive(Clone, Default)]
pub struct Rotation {
    /// `[tokens, rotated / 2]`.
    cos: Tensor,
    /// `[tokens, rotated / 2]`.
    sin: Tensor,
}

impl Rotation {
    /// Makes room for `tokens` tokens of `half` angles each; [`Rotation::turn`] then sets every one.
    pub fn reset(&mut self, tokens: usize, half: usize) {
        self.cos.reset(tokens, half);
        self.sin.reset(tokens, half);
    }

    /// Cosines and sines of token `t`, `[rotated / 2]` each.
    pub(super) fn angles(&self, t: usize) -> (&[f32], &[f32]) {
        (self.cos.row(t), self.sin.row(t))
    }

    /// Sets the rotation of token `t` at `position` by inverse frequencies `[half]`, its length scaled by `scale`.
    ///
    /// Angles are products in `f32`, as the models were trained with.
    pub fn turn(&mut self, t: usize, position: usize, inverse_frequencies: &[f32], scale: f32) {
        for (i, f) in inverse_frequencies.iter().enumerate() {
            let (s, c) = (position as f32 * f).sin_cos();
            self.cos.row_mut(t)[i] = c * scale;
            self.sin.row_mut(t)[i] = s * scale;
        }
    }
}

/// Rotates the first `2 * inverse_frequencies.len()` channels of each head of `x` `[tokens, heads * head_dim]`.
pub fn rope(x: &mut Tensor, head_dim: usize, rotation: &Rotation) {
    let half = rotation.cos.cols();
    each_row(x, |t, row| {
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
