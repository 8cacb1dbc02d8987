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

    /// That of what a matrix `[outputs, cols]` makes of the same rows.
    ///
    /// # Panics
    /// If it has other columns, which is the caller's fault.
    pub fn through(&self, matrix: &Tensor) -> Gram {
        assert_eq!(self.cols, matrix.cols(), "inputs of a matrix and their moments");
        let (n, cols) = (matrix.rows(), self.cols);
        let dot = |a: &[f64], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum::<f64>();
        // `S M^T`, by its columns: `S` is its own transpose.
        let mut seen = vec![0.0; n * cols];
        seen.par_chunks_mut(cols.max(1)).enumerate().for_each(|(i, out)| {
            out.iter_mut().enumerate().for_each(|(j, o)| *o = dot(&self.sums[j * cols..(j + 1) * cols], matrix.row(i)));
        });
        let mut sums = vec![0.0; n * n];
        sums.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, out)| {
            for (j, o) in out.iter_mut().enumerate() {
                // Either half from the same numbers, so that they agree to the bit.
                let (i, j) = (i.max(j), i.min(j));
                *o = dot(&seen[i * cols..(i + 1) * cols], matrix.row(j));
            }
        });
        Gram { cols: n, rows: self.rows, sums }
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

    /// The sums on and below the diagonal, row by row, `[cols (cols + 1) / 2]`: all of them, since both halves are summed in
    /// one order and so agree to the bit.
    pub fn lower(&self) -> Vec<f64> {
        (0..self.cols).flat_map(|i| &self.sums[i * self.cols..=i * self.cols + i]).copied().collect()
    }

    /// The sums of so many rows from what [`Gram::lower`] returned; `None` where their number is not that of `cols`.
    pub fn from_lower(cols: usize, rows: usize, lower: &[f64]) -> Option<Gram> {
        if cols.checked_add(1)?.checked_mul(cols)? / 2 != lower.len() {
            return None;
        }
        let mut gram = Gram { rows, ..Gram::new(cols) };
        let mut rest = lower;
        for i in 0..cols {
            let (row, later) = rest.split_at(i + 1);
            gram.sums[i * cols..=i * cols + i].copy_from_slice(row);
            row.iter().enumerate().for_each(|(j, s)| gram.sums[j * cols + i] = *s);
            rest = later;
        }
        Some(gram)
    }
}

/// `sum x_i^2` over rows, and how many rows: the diagonal of a [`Gram`], for what needs no more.
#[derive(Clone, Debug, PartialEq)]
pub struct Squares {
    rows: usize,
    sums: Vec<f64>,
}

impl Squares {
    /// Nothing seen yet.
    pub fn new(cols: usize) -> Squares {
        Squares { rows: 0, sums: vec![0.0; cols] }
    }

    /// Sums of so many rows, `[cols]`.
    pub fn from_sums(rows: usize, sums: Vec<f64>) -> Squares {
        Squares { rows, sums }
    }

    /// Adds the rows of a batch.
    pub fn add(&mut self, x: &Tensor) {
        for t in 0..x.rows() {
            self.sums.iter_mut().zip(x.row(t)).for_each(|(s, v)| *s += f64::from(*v) * f64::from(*v));
        }
        self.rows += x.rows();
    }

    /// As if every column had been divided by a number of its own.
    pub fn divide(&mut self, by: &[f32]) {
        self.sums.iter_mut().zip(by).for_each(|(s, b)| *s /= f64::from(*b) * f64::from(*b));
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.sums.len()
    }

    /// Rows seen.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The sums, `[cols]`.
    pub fn sums(&self) -> &[f64] {
        &self.sums
    }

    /// The mean of `x_i^2` over rows, `[cols]`. Files keep sums as 32-bit floats, so it is made of those.
    pub fn mean(&self) -> Vec<f32> {
        let n = self.rows.max(1) as f32;
        self.sums.iter().map(|s| *s as f32 / n).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(rows: usize, cols: usize) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| ((i * i % 7919) as f32 * 0.731).sin()).collect())
    }

    #[test]
    fn the_lower_half_holds_all_of_it() {
        for (rows, cols) in [(1, 1), (7, 5), (50, 37), (130, 64), (300, 200)] {
            let mut gram = Gram::new(cols);
            gram.add(&wave(rows, cols));
            gram.add(&wave(3, cols));
            let lower = gram.lower();
            let back = Gram::from_lower(cols, gram.rows(), &lower).unwrap();
            assert_eq!((back.rows(), back.mean()), (gram.rows(), gram.mean()), "{rows} {cols}");
            assert!(Gram::from_lower(cols + 1, 1, &lower).is_none());
        }
        assert!(Gram::from_lower(usize::MAX, 1, &[]).is_none());
    }

    #[test]
    fn squares_are_the_diagonal() {
        let (x, by) = (wave(90, 33), vec![2.5f32; 33]);
        let (mut gram, mut squares) = (Gram::new(33), Squares::new(33));
        gram.add(&x);
        squares.add(&x);
        gram.divide(&by);
        squares.divide(&by);
        assert_eq!((squares.rows(), squares.cols()), (90, 33));
        for (a, b) in gram.mean_squares().iter().zip(squares.mean()) {
            assert!((a - b).abs() < 1e-5 * a, "{a} {b}");
        }
        assert_eq!(Squares::from_sums(90, squares.sums().to_vec()), squares);
    }
}
