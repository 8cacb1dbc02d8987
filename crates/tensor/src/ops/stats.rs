//! Statistics of activations: what calibration keeps of them.

use super::matmul;
use crate::{Tensor, Weight};
use rayon::prelude::*;

/// `sum x^T x` over rows, and how many rows.
///
/// Each batch is summed in `f32` in row order and added in `f64`, so the result depends on how rows were
/// cut into batches, never on threads.
#[derive(Clone, Debug)]
pub struct Gram {
    cols: usize,
    rows: usize,
    sums: Vec<f64>,
}

impl Gram {
    /// Nothing seen yet.
    pub fn new(cols: usize) -> Gram {
        Gram { cols, rows: 0, sums: vec![0.0; cols * cols] }
    }

    /// Adds the rows of a batch.
    pub fn add(&mut self, x: &Tensor) {
        let t = x.transposed();
        let product = matmul(&t, &Weight::from_tensor(t.clone()));
        self.sums.par_chunks_mut(4096).zip(product.as_slice().par_chunks(4096)).for_each(|(s, p)| {
            s.iter_mut().zip(p).for_each(|(s, p)| *s += f64::from(*p));
        });
        self.rows += x.rows();
    }

    /// As if every column had been divided by a number of its own.
    pub fn divide(&mut self, by: &[f32]) {
        divide(&mut self.sums, by, by);
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows seen.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The mean of `x_i x_j` over rows, `[cols, cols]` row by row.
    pub fn mean(&self) -> Vec<f64> {
        let n = self.rows.max(1) as f64;
        self.sums.iter().map(|s| s / n).collect()
    }

    /// The mean of `x_i^2` over rows, `[cols]`.
    pub fn mean_squares(&self) -> Vec<f32> {
        let n = self.rows.max(1) as f64;
        (0..self.cols).map(|i| (self.sums[i * self.cols + i] / n) as f32).collect()
    }
}

/// Divides `[rows, cols]` sums of products by what their factors were divided by.
fn divide(sums: &mut [f64], rows: &[f32], cols: &[f32]) {
    for (sums, r) in sums.chunks_exact_mut(cols.len().max(1)).zip(rows) {
        sums.iter_mut().zip(cols).for_each(|(s, c)| *s /= f64::from(*r) * f64::from(*c));
    }
}

/// `sum a^T b` over rows, and how many rows: as [`Gram`], of two inputs.
#[derive(Clone, Debug)]
pub struct Cross {
    rows: usize,
    sums: Vec<f64>,
}

impl Cross {
    /// Nothing seen yet of `a` and `b` with so many columns each.
    pub fn new(cols: usize) -> Cross {
        Cross { rows: 0, sums: vec![0.0; cols * cols] }
    }

    /// Adds the rows of a batch.
    pub fn add(&mut self, a: &Tensor, b: &Tensor) {
        let product = matmul(&a.transposed(), &Weight::from_tensor(b.transposed()));
        self.sums.par_chunks_mut(4096).zip(product.as_slice().par_chunks(4096)).for_each(|(s, p)| {
            s.iter_mut().zip(p).for_each(|(s, p)| *s += f64::from(*p));
        });
        self.rows += a.rows();
    }

    /// As if every column of both had been divided by a number of its own.
    pub fn divide(&mut self, by: &[f32]) {
        divide(&mut self.sums, by, by);
    }

    /// The mean of `a_i b_j` over rows, `[cols, cols]` row by row.
    pub fn mean(&self) -> Vec<f64> {
        let n = self.rows.max(1) as f64;
        self.sums.iter().map(|s| s / n).collect()
    }
}

/// The largest magnitude of each column, `[cols]`.
pub fn absolute_maxima(x: &Tensor) -> Vec<f32> {
    let mut out = vec![0f32; x.cols()];
    for t in 0..x.rows() {
        out.iter_mut().zip(x.row(t)).for_each(|(m, v)| *m = m.max(v.abs()));
    }
    out
}
