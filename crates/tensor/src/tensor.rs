//! A dense row-major matrix of `f32`: the activations of a forward pass.
//!
//! Weights are not tensors: how they are stored is [`crate::Weight`]'s business.

use crate::{lines::Lines, ops};

/// A dense row-major `[rows, cols]` matrix of `f32`.
#[derive(Clone, Debug, Default)]
pub struct Tensor {
    rows: usize,
    cols: usize,
    data: Lines<f32>,
}

impl PartialEq for Tensor {
    fn eq(&self, other: &Tensor) -> bool {
        self.rows == other.rows && self.cols == other.cols && self.as_slice() == other.as_slice()
    }
}

impl Tensor {
    /// A matrix of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        let mut all = Tensor::default();
        all.reset(rows, cols);
        all
    }

    /// Takes another shape, in the same memory where it suffices; the values are left as they come.
    pub fn reset(&mut self, rows: usize, cols: usize) {
        (self.rows, self.cols) = (rows, cols);
        self.data.resize(rows * cols);
    }

    /// Becomes a copy of `other`, in the same memory where it suffices.
    pub fn copy_from(&mut self, other: &Tensor) {
        self.reset(other.rows, other.cols);
        ops::copy_slices(self.as_mut_slice(), other.as_slice());
    }

    /// Wraps row-major values.
    ///
    /// # Panics
    /// If `data` does not hold `rows * cols` values, which is the caller's fault.
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * cols, "a tensor of {rows} x {cols}");
        Tensor { rows, cols, data: data.into() }
    }

    /// Number of rows (tokens, for activations).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (channels, for activations).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.as_slice()[row * self.cols..(row + 1) * self.cols]
    }

    /// One row, to be written.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let cols = self.cols;
        &mut self.as_mut_slice()[row * cols..(row + 1) * cols]
    }

    /// All values, row by row.
    pub fn as_slice(&self) -> &[f32] {
        &self.data
    }

    /// All values, row by row, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// The values, row by row.
    pub fn into_vec(self) -> Vec<f32> {
        self.data.into()
    }

    /// Copies the rows whose numbers are listed.
    pub fn select_rows(&self, rows: &[usize]) -> Tensor {
        let mut out = Tensor::zeros(rows.len(), self.cols);
        for (to, &from) in rows.iter().enumerate() {
            out.row_mut(to).copy_from_slice(self.row(from));
        }
        out
    }

    /// The transposed matrix.
    pub fn transposed(&self) -> Tensor {
        const TILE: usize = 32;
        let mut out = Tensor::zeros(self.cols, self.rows);
        let (from, to) = (self.as_slice(), out.as_mut_slice());
        for r0 in (0..self.rows).step_by(TILE) {
            for c0 in (0..self.cols).step_by(TILE) {
                for r in r0..(r0 + TILE).min(self.rows) {
                    for c in c0..(c0 + TILE).min(self.cols) {
                        to[c * self.rows + r] = from[r * self.cols + c];
                    }
                }
            }
        }
        out
    }

    /// Is every value finite?
    pub fn is_finite(&self) -> bool {
        self.as_slice().iter().all(|v| v.is_finite())
    }
}
