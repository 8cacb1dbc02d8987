//! A step of Adafactor (arXiv 1804.04235): of a matrix it remembers the mean squares of rows and columns only.

use super::squared_norm;
use crate::{
    Tensor,
    kernels::kernels,
    threads::{self, Shared},
};

/// A step of Adafactor, as PyTorch takes it.
#[derive(Clone, Copy, Debug)]
pub struct Adafactor {
    /// Largest relative step: what is moved is this times the size of the values.
    pub rate: f32,
    /// What a new square counts in the means: `step ^ -0.8`.
    pub share: f32,
    /// The step is at most `1 / sqrt(step)`.
    pub most: f32,
    /// Weight decay, times the rate.
    pub decay: f32,
    /// Factor on the gradients.
    pub scale: f32,
}

/// Least mean square.
const LEAST: f32 = f32::EPSILON;
/// Least size of values that a step is relative to.
const LEAST_SIZE: f32 = 1e-3;

impl Adafactor {
    /// The size of the step for values of that size.
    fn step(&self, values: &[f32]) -> f32 {
        let size = (squared_norm(values) / values.len().max(1) as f64).sqrt() as f32;
        size.max(LEAST_SIZE) * self.rate.min(self.most)
    }

    fn mix(&self, mean: &mut f32, square: f32) {
        *mean += self.share * (square * self.scale * self.scale - *mean);
    }
}

/// Takes a step on a matrix; `rows` and `columns` are the means of its squares.
pub fn adafactor(step: Adafactor, values: &mut Tensor, gradient: &Tensor, rows: &mut [f32], columns: &mut [f32]) {
    let (height, width) = (values.rows(), values.cols());
    assert!(gradient.rows() == height && gradient.cols() == width, "shapes of a step");
    assert!(rows.len() == height && columns.len() == width, "means of a matrix");
    for (t, mean) in rows.iter_mut().enumerate() {
        step.mix(mean, (kernels().dot)(gradient.row(t), gradient.row(t)) / width as f32);
    }
    let mut sums = vec![0f32; width];
    for t in 0..height {
        sums.iter_mut().zip(gradient.row(t)).for_each(|(sum, g)| *sum += g * g);
    }
    columns.iter_mut().zip(&sums).for_each(|(mean, sum)| step.mix(mean, sum / height as f32));
    let mean = rows.iter().sum::<f32>() / height as f32;
    let inverse = 1.0 / mean.max(LEAST);
    let root = |row: f32, column: f32| (row * column * inverse).max(LEAST * LEAST).sqrt();
    let (rows, columns) = (&*rows, &*columns);
    let mut squares = vec![0f64; height];
    let shared = Shared::new(&mut squares);
    threads::each(height, &|t| {
        let moves = gradient.row(t).iter().zip(columns).map(|(g, c)| f64::from(g * step.scale / root(rows[t], *c)));
        // SAFETY: the sums outlive the section; this task alone writes this row's.
        let sum = unsafe { shared.slice(t, 1) };
        sum[0] = moves.map(|m| m * m).sum();
    });
    let by = step.step(values.as_slice()) / clip(squares.iter().sum(), values.as_slice().len()) * step.scale;
    let keep = 1.0 - step.rate * step.decay;
    let shared = Shared::new(values.as_mut_slice());
    threads::each(height, &|t| {
        // SAFETY: the values outlive the section; this task alone writes this row.
        let values = unsafe { shared.slice(t * width, width) };
        for ((v, g), c) in values.iter_mut().zip(gradient.row(t)).zip(columns) {
            *v = *v * keep - by * g / root(rows[t], *c);
        }
    });
}

/// Takes a step on a vector; `means` are those of its squares.
pub fn adafactor_vector(step: Adafactor, values: &mut [f32], gradient: &[f32], means: &mut [f32]) {
    assert!(gradient.len() == values.len() && means.len() == values.len(), "lengths of a step");
    means.iter_mut().zip(gradient).for_each(|(mean, g)| step.mix(mean, g * g));
    let root = |mean: f32| mean.max(LEAST * LEAST).sqrt();
    let squares = gradient.iter().zip(&*means).map(|(g, m)| f64::from(g * step.scale / root(*m)).powi(2)).sum();
    let by = step.step(values) / clip(squares, values.len()) * step.scale;
    let keep = 1.0 - step.rate * step.decay;
    for ((v, g), m) in values.iter_mut().zip(gradient).zip(means) {
        *v = *v * keep - by * g / root(*m);
    }
}

/// What shortens a step whose squares have that sum.
fn clip(squares: f64, len: usize) -> f32 {
    (squares / len.max(1) as f64).sqrt().max(1.0) as f32
}
