//! Rotations that learn: gradient descent over orthogonal matrices (Cayley transform, arXiv 2002.01113, as SpinQuant has it)
//! on the fourth powers of the values that are turned (OptRot, arXiv 2512.24124). Turning keeps their squares, so values of
//! the least fourth powers are those with the fewest outliers, and blocks of them need the smallest scales.

use super::orthogonal::product;
use crate::{
    Error, Result,
    progress::{self, Progress},
};
use faer::{Mat, linalg::solvers::Solve};
use model::{Model, Role, Site, Stage, uniform};
use tensor::{Tensor, Weight, ops};

/// What is learned of a rotation in every step: the momentum keeps this part of the last.
const MOMENTUM: f32 = 0.8;

/// The first step's length over the square root of the width; it falls to nothing.
const RATE: f32 = 0.0375;

/// How many rows a step draws for a width of `n`: enough that most matrices of a small model are seen whole, and no more than
/// memory has room for.
fn rows(n: usize) -> usize {
    (16 * n).max(4096).min((1 << 26) / n.max(1)).max(1)
}

/// Bytes that [`learn`] holds for a width of `n`: the rows of a step, turned, cubed and across, and square matrices in two
/// precisions.
pub fn memory(n: usize) -> usize {
    6 * 4 * rows(n) * n + 64 * n * n
}

/// Turns `start` so that rows times it have small fourth powers; `draw` gives the rows of a step, as many as it is asked for.
/// With `ones` it goes on leaving the vector of ones as it is.
///
/// # Errors
/// Those of `draw`, and if the job was interrupted.
pub fn learn(
    start: Tensor,
    ones: bool,
    steps: usize,
    mut draw: impl FnMut(usize, usize) -> Result<Tensor>,
    bar: &dyn Progress,
) -> Result<Tensor> {
    let n = start.cols();
    let (mut turn, mut momentum) = (start, Tensor::zeros(n, n));
    for step in 0..steps {
        progress::check()?;
        let turned = product(&draw(step, rows(n))?, &turn);
        let mut cubes = turned.clone();
        cubes.as_mut_slice().iter_mut().for_each(|v| *v = *v * *v * *v);
        let gradient = ops::matmul(&turned.transposed(), &Weight::from_tensor(cubes.transposed()));
        let mut slope = skew(&gradient);
        if ones {
            centre(&mut slope);
        }
        let norm = slope.as_slice().iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32;
        if norm == 0.0 {
            break;
        }
        momentum.as_mut_slice().iter_mut().zip(slope.as_slice()).for_each(|(m, s)| *m = MOMENTUM * *m + s / norm);
        let rate = RATE * (n as f32).sqrt() * (1.0 - step as f32 / steps as f32);
        turn = product(&turn, &cayley(&momentum, -rate));
        bar.advance(1);
    }
    Ok(turn)
}

/// `x - x^T`.
fn skew(x: &Tensor) -> Tensor {
    let mut out = x.transposed();
    out.as_mut_slice().iter_mut().zip(x.as_slice()).for_each(|(t, v)| *t = v - *t);
    out
}

/// Takes the vector of ones out of what a skew matrix turns.
fn centre(x: &mut Tensor) {
    let n = x.cols();
    let means: Vec<f32> = (0..n).map(|i| x.row(i).iter().sum::<f32>() / n.max(1) as f32).collect();
    // Of a skew matrix the columns' means are those of the rows with the other sign, and the mean of all is nothing.
    for i in 0..n {
        x.row_mut(i).iter_mut().zip(&means).for_each(|(v, m)| *v += m - means[i]);
    }
}

/// `(1 - a x / 2)^-1 (1 + a x / 2)`, which is orthogonal where `x` is skew.
fn cayley(x: &Tensor, a: f32) -> Tensor {
    let n = x.cols();
    let one = |i: usize, j: usize| f64::from(u8::from(i == j));
    let half = |i: usize, j: usize| f64::from(0.5 * a * x.row(i)[j]);
    let right = Mat::from_fn(n, n, |i, j| one(i, j) + half(i, j));
    let solved = Mat::from_fn(n, n, |i, j| one(i, j) - half(i, j)).partial_piv_lu().solve(right);
    Tensor::from_vec(n, n, (0..n * n).map(|i| solved[(i / n, i % n)] as f32).collect())
}

/// What of a model lies along the residual stream: rows of matrices that read it, columns of those that write it.
pub struct Stream<'a> {
    model: &'a Model,
    /// Each matrix with its number of rows or columns, what its values are divided by, and the norm before it.
    parts: Vec<Part<'a>>,
    total: usize,
    seed: u64,
}

struct Part<'a> {
    site: Site,
    count: usize,
    scale: f32,
    norm: Option<&'a [f32]>,
}

impl<'a> Stream<'a> {
    /// Of those sites that are asked for.
    ///
    /// # Errors
    /// If one is missing, or holds what is no number.
    pub fn new(model: &'a Model, asked: impl Fn(Site) -> bool, seed: u64) -> Result<Stream<'a>> {
        let mut parts = Vec::new();
        for site in model.spec.matrices().into_iter().filter(|site| asked(*site)) {
            let norm = norm_before(site).map(|norm| model.norm(norm)).transpose()?.map(|norm| &norm.scale[..]);
            let values = values(model, site, norm)?;
            let square = values.as_slice().iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
            if !square.is_finite() {
                let reason = "holds values that are infinite or not numbers; the model is damaged".into();
                return Err(Error::Site { site, reason });
            }
            let mean = (square / values.as_slice().len().max(1) as f64).sqrt() as f32;
            if mean > 0.0 {
                parts.push(Part { site, count: values.rows(), scale: 1.0 / mean, norm });
            }
        }
        let total = parts.iter().map(|part| part.count).sum();
        Ok(Stream { model, parts, total, seed })
    }

    /// Some of them, which a step decides.
    ///
    /// # Errors
    /// If a matrix is missing.
    pub fn draw(&self, step: usize, count: usize) -> Result<Tensor> {
        let mut drawn = pick(self.total, count, self.seed, step);
        drawn.sort_unstable();
        let (mut out, mut first, mut at) = (Vec::with_capacity(drawn.len() * self.model.spec.dim), 0, 0);
        for part in &self.parts {
            let until = at + drawn[at..].partition_point(|row| *row < first + part.count);
            if until > at {
                let values = values(self.model, part.site, part.norm)?;
                for row in &drawn[at..until] {
                    out.extend(values.row(row - first).iter().map(|v| v * part.scale));
                }
            }
            (at, first) = (until, first + part.count);
        }
        Ok(Tensor::from_vec(drawn.len(), self.model.spec.dim, out))
    }
}

/// `count` numbers below `total`, or all of them.
fn pick(total: usize, count: usize, seed: u64, step: usize) -> Vec<usize> {
    if count >= total {
        return (0..total).collect();
    }
    let number = |i: usize| uniform(seed, (step as u64 + 1) << 40 | i as u64);
    (0..count).map(|i| ((number(i) * total as f64) as usize).min(total - 1)).collect()
}

/// Rows of `n` values, some of which a step decides.
pub fn some(rows: &Tensor, count: usize, seed: u64, step: usize) -> Tensor {
    rows.select_rows(&pick(rows.rows(), count, seed, step))
}

/// A matrix along the residual stream: as it is, or transposed where it writes to it.
fn values(model: &Model, site: Site, norm: Option<&[f32]>) -> Result<Tensor> {
    let mut values = model.linear(site)?.weight.to_tensor();
    if matches!(site.role, Role::O | Role::Down) {
        return Ok(values.transposed());
    }
    for row in values.as_mut_slice().chunks_exact_mut(norm.map_or(usize::MAX, <[f32]>::len)) {
        row.iter_mut().zip(norm.unwrap_or_default()).for_each(|(v, g)| *v *= g);
    }
    Ok(values)
}

/// The norm whose outputs a matrix reads.
fn norm_before(site: Site) -> Option<Site> {
    let Some(layer) = site.layer else { return (site == Site::HEAD).then_some(Site::FINAL_NORM) };
    Stage::ALL.into_iter().find(|stage| stage.roles().contains(&site.role))?.norm().map(|role| Site::of(layer, role))
}

#[cfg(test)]
mod tests {
    use super::{
        super::orthogonal::{check, orthogonal},
        *,
    };
    use crate::progress::Silent;

    #[test]
    fn outliers_become_fewer_and_the_matrix_stays_orthogonal() {
        // Two loud directions and noise: some basis makes it flat.
        let (n, count) = (48, 600);
        let x = |i: usize, j: usize| {
            let noise = (0..4).map(|k| uniform(3, (4 * (i * n + j) + k) as u64) - 0.5).sum::<f64>();
            (noise * if j < 2 { 9.0 } else { 1.0 }) as f32
        };
        let rows = Tensor::from_vec(count, n, (0..count * n).map(|i| x(i / n, i % n)).collect());
        let fourth = |turn: &Tensor| -> f32 { product(&rows, turn).as_slice().iter().map(|v| v.powi(4)).sum() };
        for ones in [false, true] {
            let start = orthogonal(n, ones, 1, 0);
            let before = fourth(&start);
            let learned = learn(start, ones, 60, |step, _| Ok(some(&rows, 400, 9, step)), &Silent).unwrap();
            let after = fourth(&learned);
            println!("ones {ones}: fourth powers {after} after {before}");
            assert!(after < 0.9 * before, "{after} after {before}");
            check(&learned, ones, 1e-4);
        }
    }
}
