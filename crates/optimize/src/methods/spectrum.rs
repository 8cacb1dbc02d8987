//! The thin matrices whose product comes nearest to a matrix, by what it makes of its inputs.
//!
//! With `G` the mean of `x x^T`, a change `D` of a matrix costs `tr(D G D^T)` at its outputs. The product of rank `r` that costs
//! least is `U U^T W`, `U` being the first eigenvectors of `W G W^T`: the whitening of SVD-LLM (arXiv 2403.07378) without an
//! inverse of anything. Where there are fewer inputs than outputs the eigenvectors of `C^T W^T W C` with `G = C C^T` are fewer.

use crate::{Error, Result};
use faer::{Mat, Side, linalg::solvers::Solve};
use model::Site;
use tensor::Tensor;

/// `up` `[outputs, rank]` times `down` `[rank, inputs]`.
pub(super) struct Thin {
    pub up: Tensor,
    pub down: Tensor,
}

/// What a matrix consists of, the largest part first.
pub(super) struct Spectrum {
    /// What is lost at the outputs without each part.
    pub values: Vec<f64>,
    basis: Basis,
}

enum Basis {
    /// Directions of outputs, by columns.
    Outputs(Mat<f64>),
    /// Directions of whitened inputs by columns, and `C`.
    Inputs(Mat<f64>, Mat<f64>),
}

/// Part of the mean square of inputs that is added to each where they are whitened.
const DAMPING: f64 = 1e-4;

/// What a change of the outputs costs: `tr(D^T A D)`, `A` being the mean of `g g^T` over the gradients of the loss.
pub(super) struct Outputs(Mat<f64>);

impl Outputs {
    /// Of the mean `[rows, rows]`, to whose diagonal a part of its mean is added; `None` where it is of no use.
    pub fn new(rows: usize, mean: &[f64], damping: f64) -> Option<Outputs> {
        let trace = (0..rows).map(|i| mean[i * rows + i]).sum::<f64>() / rows.max(1) as f64;
        let damped = |i: usize, j: usize| mean[i * rows + j] + if i == j { damping * trace + 1e-30 } else { 0.0 };
        Some(Outputs(Mat::from_fn(rows, rows, damped).llt(Side::Lower).ok()?.L().to_owned()))
    }

    /// The matrix whose outputs all cost the same: `L^T W` with `A = L L^T`.
    pub fn evened(&self, weight: &Tensor) -> Tensor {
        tensor(&(self.0.transpose() * mat(weight)))
    }

    /// What [`Outputs::evened`] made of it.
    pub fn back(&self, evened: &Tensor) -> Tensor {
        let mut out = mat(evened);
        faer::linalg::triangular_solve::solve_upper_triangular_in_place(
            self.0.transpose(),
            out.as_mut(),
            faer::Par::Seq,
        );
        tensor(&out)
    }
}

impl Spectrum {
    /// Of a matrix whose inputs have the second moments `gram` (`[cols, cols]`), or are all alike.
    ///
    /// # Errors
    /// If they are of no use.
    pub fn new(site: Site, weight: &Tensor, gram: Option<&[f64]>) -> Result<Spectrum> {
        let unusable = || Error::Site {
            site,
            reason: "its inputs have no usable second moments (are some of them infinite or not a number?)".into(),
        };
        let (w, cols) = (mat(weight), weight.cols());
        let at = |i: usize, j: usize| gram.map_or(f64::from(u8::from(i == j)), |g| g[i * cols + j]);
        if weight.rows() <= cols {
            let square = match gram {
                Some(_) => &w * Mat::from_fn(cols, cols, at) * w.transpose(),
                None => &w * w.transpose(),
            };
            let (values, vectors) = eigen(&square).ok_or_else(unusable)?;
            return Ok(Spectrum { values, basis: Basis::Outputs(vectors) });
        }
        let mean = (0..cols).map(|j| at(j, j)).sum::<f64>() / cols.max(1) as f64;
        let damped = Mat::from_fn(cols, cols, |i, j| at(i, j) + if i == j { DAMPING * mean + 1e-30 } else { 0.0 });
        let root = damped.llt(Side::Lower).map_err(|_| unusable())?.L().to_owned();
        let whitened = &w * &root;
        let (values, vectors) = eigen(&(whitened.transpose() * &whitened)).ok_or_else(unusable)?;
        Ok(Spectrum { values, basis: Basis::Inputs(vectors, root) })
    }

    /// The nearest product of so small a rank.
    pub fn thin(&self, weight: &Tensor, rank: usize) -> Thin {
        let (w, rank) = (mat(weight), rank.min(self.values.len()));
        match &self.basis {
            Basis::Outputs(vectors) => {
                let u = vectors.subcols(0, rank);
                Thin { up: tensor(&u.to_owned()), down: tensor(&(u.transpose() * &w)) }
            }
            Basis::Inputs(vectors, root) => {
                let v = vectors.subcols(0, rank).to_owned();
                let up = &w * root * &v;
                // Rows of `V^T C^-1` are columns of `C^-T V`.
                let mut down = v;
                faer::linalg::triangular_solve::solve_upper_triangular_in_place(
                    root.transpose(),
                    down.as_mut(),
                    faer::Par::Seq,
                );
                Thin { up: tensor(&up), down: tensor(&down.transpose().to_owned()) }
            }
        }
    }
}

impl Thin {
    /// The same product of factors whose columns and rows are of one length, so that neither is coarse beside the other where they
    /// are rounded or learn.
    pub fn balanced(mut self) -> Thin {
        for r in 0..self.down.rows() {
            let square = |v: &f32| f64::from(*v).powi(2);
            let down: f64 = self.down.row(r).iter().map(square).sum();
            let up: f64 = (0..self.up.rows()).map(|o| square(&self.up.row(o)[r])).sum();
            if up > 0.0 && down > 0.0 {
                let by = (down / up).powf(0.25);
                self.down.row_mut(r).iter_mut().for_each(|v| *v = (f64::from(*v) / by) as f32);
                (0..self.up.rows()).for_each(|o| {
                    let v = &mut self.up.row_mut(o)[r];
                    *v = (f64::from(*v) * by) as f32;
                });
            }
        }
        self
    }

    /// Other outputs' factor for the inputs' factor as it is, after it was rounded: the one that costs least.
    ///
    /// `None` where there is none.
    pub fn refit(weight: &Tensor, down: &Tensor, gram: Option<&[f64]>) -> Option<Tensor> {
        let (w, d, cols) = (mat(weight), mat(down), weight.cols());
        let seen = match gram {
            Some(g) => &d * Mat::from_fn(cols, cols, |i, j| g[i * cols + j]),
            None => d.clone(),
        };
        let square = &seen * d.transpose();
        let mean = (0..square.nrows()).map(|i| square[(i, i)]).sum::<f64>() / square.nrows().max(1) as f64;
        let damped = Mat::from_fn(square.nrows(), square.nrows(), |i, j| {
            square[(i, j)] + if i == j { 1e-9 * mean + 1e-30 } else { 0.0 }
        });
        let solved = damped.llt(Side::Lower).ok()?.solve(&(seen * w.transpose()));
        let up = tensor(&solved.transpose().to_owned());
        up.is_finite().then_some(up)
    }
}

/// What a change of a matrix costs at its outputs, a mean over tokens.
pub(super) fn cost(change: &Tensor, gram: Option<&[f64]>) -> f64 {
    let (d, cols) = (mat(change), change.cols());
    let seen = match gram {
        Some(g) => &d * Mat::from_fn(cols, cols, |i, j| g[i * cols + j]),
        None => d.clone(),
    };
    (0..d.nrows()).map(|i| (0..cols).map(|j| seen[(i, j)] * d[(i, j)]).sum::<f64>()).sum()
}

/// Eigenvalues, the largest first, and eigenvectors by columns.
pub(super) fn eigen(square: &Mat<f64>) -> Option<(Vec<f64>, Mat<f64>)> {
    let found = square.self_adjoint_eigen(Side::Lower).ok()?;
    let (values, n) = (found.S().column_vector(), square.nrows());
    let falling: Vec<f64> = (0..n).rev().map(|i| values[i].max(0.0)).collect();
    if falling.iter().any(|v| !v.is_finite()) {
        return None;
    }
    // A sign of its own for each vector, so that it does not hang on how they were found.
    let sign = |j: usize| {
        let column = found.U().col(j);
        let largest = (0..n).fold(0.0f64, |m, i| if column[i].abs() > m.abs() { column[i] } else { m });
        if largest < 0.0 { -1.0 } else { 1.0 }
    };
    let signs: Vec<f64> = (0..n).map(sign).collect();
    Some((falling, Mat::from_fn(n, n, |i, j| signs[n - 1 - j] * found.U()[(i, n - 1 - j)])))
}

fn mat(x: &Tensor) -> Mat<f64> {
    Mat::from_fn(x.rows(), x.cols(), |i, j| f64::from(x.row(i)[j]))
}

fn tensor(m: &Mat<f64>) -> Tensor {
    let values = (0..m.nrows()).flat_map(|i| (0..m.ncols()).map(move |j| m[(i, j)] as f32)).collect();
    Tensor::from_vec(m.nrows(), m.ncols(), values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::{Weight, ops, ops::Gram};

    fn noise(rows: usize, cols: usize, seed: u64) -> Tensor {
        let value = |i: usize| (model::uniform(seed, i as u64) - 0.5) as f32;
        Tensor::from_vec(rows, cols, (0..rows * cols).map(value).collect())
    }

    fn multiplied(thin: &Thin) -> Tensor {
        ops::matmul(&thin.up, &Weight::from_tensor(thin.down.transposed()))
    }

    #[test]
    fn what_is_lost_is_what_the_values_say_and_the_least() {
        for (rows, cols) in [(12, 20), (20, 12)] {
            let w = noise(rows, cols, 1);
            // Inputs that hang together and differ in size.
            let mut x = ops::matmul(&noise(300, cols, 2), &Weight::from_tensor(noise(cols, cols, 3)));
            let row = cols;
            x.as_mut_slice().chunks_mut(row).for_each(|r| r[0] *= 9.0);
            let mut gram = Gram::new(cols);
            gram.add(&x);
            let gram = gram.mean();
            let site = Site::of(0, model::Role::Q);
            let by_inputs = Spectrum::new(site, &w, Some(&gram)).unwrap();
            let plain = Spectrum::new(site, &w, None).unwrap();
            for rank in [1, 4, 9] {
                let lost = |thin: &Thin| {
                    let mut left = multiplied(thin);
                    left.as_mut_slice().iter_mut().zip(w.as_slice()).for_each(|(l, w)| *l = w - *l);
                    cost(&left, Some(&gram))
                };
                let best = by_inputs.thin(&w, rank);
                let (own, other) = (lost(&best), lost(&plain.thin(&w, rank)));
                let said: f64 = by_inputs.values[rank..].iter().sum();
                // Damping counts in what is said.
                assert!(own < 1.002 * said && own > 0.95 * said, "{rows} {rank}: {own} {said}");
                assert!(own < 0.9 * other, "{rows} {rank}: {own} {other}");
                let far = |a: &Tensor, b: &Tensor| {
                    a.as_slice().iter().zip(b.as_slice()).fold(0f32, |m, (a, b)| m.max((a - b).abs()))
                };
                let product = multiplied(&best);
                let best = best.balanced();
                assert!(far(&multiplied(&best), &product) < 1e-5);
                let lengths: f32 = best.down.row(0).iter().map(|v| v * v).sum();
                let other: f32 = (0..rows).map(|o| best.up.row(o)[0].powi(2)).sum();
                assert!((lengths / other - 1.0).abs() < 1e-4, "{lengths} {other}");
                let refitted = Thin::refit(&w, &best.down, Some(&gram)).unwrap();
                let again = lost(&Thin { up: refitted, down: best.down });
                assert!((again - own).abs() < 5e-3 * own + 1e-6, "{again} {own}");
            }
            // Where outputs count for different amounts, what is lost is least by that count.
            let mut gradients = Gram::new(rows);
            gradients.add(&ops::matmul(&noise(400, rows, 5), &Weight::from_tensor(noise(rows, rows, 6))));
            let outputs = Outputs::new(rows, &gradients.mean(), 0.0).unwrap();
            let evened = outputs.evened(&w);
            let spectrum = Spectrum::new(site, &evened, Some(&gram)).unwrap();
            let counted = |thin: &Thin| {
                let mut left = multiplied(thin);
                left.as_mut_slice().iter_mut().zip(w.as_slice()).for_each(|(l, w)| *l = w - *l);
                cost(&outputs.evened(&left), Some(&gram))
            };
            let thin = spectrum.thin(&evened, 4);
            let best = Thin { up: outputs.back(&thin.up), down: thin.down };
            let said: f64 = spectrum.values[4..].iter().sum();
            assert!(counted(&best) < 1.002 * said && counted(&best) > 0.95 * said, "{} {said}", counted(&best));
            assert!(counted(&best) < 0.9 * counted(&by_inputs.thin(&w, 4)));
            let all = by_inputs.thin(&w, rows.min(cols));
            let far = multiplied(&all).as_slice().iter().zip(w.as_slice()).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(far < 1e-4, "{far}");
        }
    }
}
