//! Optimal brain surgeon for groups of columns (Hassibi and Stork, 1993; of whole columns as ZipLM, arXiv 2302.04089).
//!
//! With `H` the second moments of the inputs, going without the columns `g` costs `tr(W_g (H^-1_gg)^-1 W_g^T)` at the outputs if
//! the others answer by `-W_g (H^-1_gg)^-1 H^-1_g`; then they are gone from `H^-1` too, by the same elimination.

use faer::{Mat, Par, Side, linalg::solvers::Solve};
use rayon::prelude::*;
use tensor::Tensor;

/// Part of the mean diagonal that is added to it.
const DAMPING: f64 = 0.01;

/// A matrix from which columns go.
pub struct Surgeon {
    rows: usize,
    cols: usize,
    /// Columns one after the other, `[cols, rows]`.
    weights: Vec<f64>,
    /// `[cols, cols]`.
    inverse: Vec<f64>,
    gone: Vec<bool>,
}

impl Surgeon {
    /// For inputs of these second moments, `[cols, cols]`; `None` where they are of no use.
    pub fn new(weight: &Tensor, gram: &[f64]) -> Option<Surgeon> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let mean = (0..cols).map(|j| gram[j * cols + j]).sum::<f64>() / cols.max(1) as f64;
        let damped =
            Mat::from_fn(cols, cols, |i, j| gram[i * cols + j] + if i == j { DAMPING * mean + 1e-30 } else { 0.0 });
        let factor = damped.llt(Side::Lower).ok()?;
        // The inverse of `L`, and from it that of `L L^T`.
        let mut lower = Mat::zeros(cols, cols);
        faer::linalg::triangular_inverse::invert_lower_triangular(lower.as_mut(), factor.L(), Par::Seq);
        let whole = lower.transpose() * &lower;
        let inverse = (0..cols).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| whole[(i, j)]).collect();
        let weights = (0..cols).flat_map(|j| (0..rows).map(move |i| f64::from(weight.row(i)[j]))).collect();
        Some(Surgeon { rows, cols, weights, inverse, gone: vec![false; cols] })
    }

    /// What going without some columns costs.
    pub fn cost(&self, group: &[usize]) -> f64 {
        match *group {
            [j] => self.column(j).iter().map(|w| w * w).sum::<f64>() / self.inverse[j * self.cols + j],
            _ => {
                let Some(factor) = self.block(group).llt(Side::Lower).ok() else { return f64::INFINITY };
                let w = Mat::from_fn(group.len(), self.rows, |i, r| self.column(group[i])[r]);
                let answer = factor.solve(&w);
                (0..self.rows).map(|r| (0..group.len()).map(|i| w[(i, r)] * answer[(i, r)]).sum::<f64>()).sum()
            }
        }
    }

    /// Goes without them; the other columns make up for it.
    pub fn remove(&mut self, group: &[usize]) {
        let Some(factor) = self.block(group).llt(Side::Lower).ok() else { return };
        let (rows, cols) = (self.rows, self.cols);
        let across: Vec<f64> = group.iter().flat_map(|g| self.inverse[g * cols..(g + 1) * cols].to_vec()).collect();
        let held: Vec<f64> = group.iter().flat_map(|g| self.column(*g).to_vec()).collect();
        // `(H^-1_gg)^-1` times the rows of `H^-1` that belong to the group, `[group, cols]`.
        let solved = factor.solve(&Mat::from_fn(group.len(), cols, |i, j| across[i * cols + j]));
        group.iter().for_each(|g| self.gone[*g] = true);
        let gone = &self.gone;
        // What is gone stays nothing, to the bit.
        let left = self.weights.par_chunks_mut(rows.max(1)).enumerate().filter(|(j, _)| !gone[*j]);
        left.for_each(|(j, column)| {
            for (i, held) in held.chunks(rows.max(1)).enumerate() {
                let by = solved[(i, j)];
                column.iter_mut().zip(held).for_each(|(w, h)| *w -= by * h);
            }
        });
        self.inverse.par_chunks_mut(cols).enumerate().for_each(|(j, row)| {
            for (i, across) in across.chunks(cols).enumerate() {
                let by = solved[(i, j)];
                row.iter_mut().zip(across).for_each(|(v, a)| *v -= by * a);
            }
        });
        for g in group {
            self.weights[g * rows..(g + 1) * rows].fill(0.0);
            // Out of the way of what is removed later.
            self.inverse[g * cols + g] = 1.0;
        }
    }

    /// The matrix as it is.
    pub fn matrix(&self) -> Tensor {
        let value = |(i, j): (usize, usize)| self.weights[j * self.rows + i] as f32;
        let all = (0..self.rows).flat_map(|i| (0..self.cols).map(move |j| (i, j)));
        Tensor::from_vec(self.rows, self.cols, all.map(value).collect())
    }

    fn column(&self, j: usize) -> &[f64] {
        &self.weights[j * self.rows..(j + 1) * self.rows]
    }

    fn block(&self, group: &[usize]) -> Mat<f64> {
        Mat::from_fn(group.len(), group.len(), |i, j| self.inverse[group[i] * self.cols + group[j]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::{Weight, ops, ops::Gram};

    fn noise(rows: usize, cols: usize, seed: u64) -> Tensor {
        let value = |i: usize| (model::uniform(seed, i as u64) - 0.5) as f32;
        Tensor::from_vec(rows, cols, (0..rows * cols).map(value).collect())
    }

    #[test]
    fn what_it_costs_is_what_is_lost_and_single_columns_end_where_a_group_does() {
        let (w, cols) = (noise(6, 10, 1), 10);
        let x = ops::matmul(&noise(200, 4, 2), &Weight::from_tensor(noise(cols, 4, 3)));
        let mut x = x;
        x.as_mut_slice().iter_mut().zip(noise(200, cols, 4).as_slice()).for_each(|(x, n)| *x += 0.3 * n);
        let mut gram = Gram::new(cols);
        gram.add(&x);
        let gram = gram.mean();
        let lost = |q: &Tensor| {
            let mut d = w.clone();
            d.as_mut_slice().iter_mut().zip(q.as_slice()).for_each(|(d, q)| *d -= q);
            super::super::super::spectrum::cost(&d, Some(&gram))
        };
        let mut one = Surgeon::new(&w, &gram).unwrap();
        let mut two = Surgeon::new(&w, &gram).unwrap();
        let said = one.cost(&[2, 7]);
        one.remove(&[2, 7]);
        two.remove(&[7]);
        two.remove(&[2]);
        let (a, b) = (one.matrix(), two.matrix());
        assert!(a.as_slice().iter().zip(b.as_slice()).all(|(a, b)| (a - b).abs() < 1e-5));
        assert!([&a, &b].iter().all(|m| (0..6).all(|r| m.row(r)[2] == 0.0 && m.row(r)[7] == 0.0)));
        // Damping counts in what it says and not in what is lost.
        assert!(lost(&a) < said && lost(&a) > 0.5 * said, "{} {said}", lost(&a));
        let mut plain = w.clone();
        (0..6).for_each(|r| [2, 7].iter().for_each(|j| plain.row_mut(r)[*j] = 0.0));
        assert!(lost(&a) < 0.7 * lost(&plain), "{} {}", lost(&a), lost(&plain));
    }
}
