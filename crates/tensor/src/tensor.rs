//! A dense row-major matrix of `f32`: the activations of a forward pass.
//!
//! Weights are not tensors: how they are stored is [`crate::Weight`]'s business.

/// A dense row-major `[rows, cols]` matrix of `f32`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tensor {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Tensor {
    /// A matrix of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Tensor { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Takes another shape, in the same memory where it suffices; the values are left as they come.
    pub fn reset(&mut self, rows: usize, cols: usize) {
        (self.rows, self.cols) = (rows, cols);
        self.data.resize(rows * cols, 0.0);
    }

    /// Becomes a copy of `other`, in the same memory where it suffices.
    pub fn copy_from(&mut self, other: &Tensor) {
        self.reset(other.rows, other.cols);
        self.data.copy_from_slice(&other.data);
    }

    /// Wraps row-major values.
    ///
    /// # Panics
    /// If `data` does not hold `rows * cols` values, which is the caller's fault.
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * cols, "a tensor of {rows} x {cols}");
        Tensor { rows, cols, data }
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
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// One row, to be written.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.cols..(row + 1) * self.cols]
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
        self.data
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
        for r0 in (0..self.rows).step_by(TILE) {
            for c0 in (0..self.cols).step_by(TILE) {
                for r in r0..(r0 + TILE).min(self.rows) {
                    for c in c0..(c0 + TILE).min(self.cols) {
                        out.data[c * self.rows + r] = self.data[r * self.cols + c];
                    }
                }
            }
        }
        out
    }

    /// Is every value finite?
    pub fn is_finite(&self) -> bool {
        self.data.iter().all(|v| v.is_finite())
    }
}
