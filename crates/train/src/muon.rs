//! Muon: a moment of the gradient whose singular values are all made about one, by five products each way
//! (Newton and Schulz; Keller Jordan 2024, arXiv 2502.16982).

use tensor::{
    Tensor, Weight,
    ops::{self, matmul},
};

/// A step of Muon.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// Learning rate, that of AdamW: the step has the size that AdamW's would have.
    pub rate: f32,
    /// Decay of the moment.
    pub momentum: f32,
    /// Weight decay, times the rate.
    pub decay: f32,
    /// Factor on the gradient.
    pub scale: f32,
}

/// Coefficients of the odd polynomial whose powers draw every singular value near one.
const POLYNOMIAL: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// How often it is applied.
const TURNS: usize = 5;
/// The root of the mean square of a step of AdamW.
const SIZE: f32 = 0.2;

/// Moves a matrix.
pub(crate) fn step(values: &mut Tensor, gradient: &Tensor, moment: &mut [f32], step: Step) {
    let Step { rate, momentum, decay, scale } = step;
    let (rows, cols) = (values.rows(), values.cols());
    let mut ahead = Tensor::zeros(rows, cols);
    let numbers = ahead.as_mut_slice().iter_mut().zip(moment.iter_mut()).zip(gradient.as_slice());
    for ((ahead, moment), g) in numbers {
        let g = g * scale;
        *moment += (1.0 - momentum) * (g - *moment);
        // The moment as it will be after another such gradient (Nesterov).
        *ahead = g + momentum * (*moment - g);
    }
    let moves = orthogonal(&ahead);
    let by = rate * SIZE * (rows.max(cols) as f32).sqrt();
    let keep = 1.0 - rate * decay;
    for (value, m) in values.as_mut_slice().iter_mut().zip(moves.as_slice()) {
        *value = *value * keep - by * m;
    }
}

/// A matrix of the same singular vectors, whose singular values are between 0.7 and 1.2.
fn orthogonal(x: &Tensor) -> Tensor {
    let tall = x.rows() > x.cols();
    let mut x = if tall { transposed(x) } else { x.clone() };
    let norm = ops::squared_norm(x.as_slice()).sqrt() as f32;
    ops::scale(&mut x, 1.0 / norm.max(1e-7));
    let [a, b, c] = POLYNOMIAL;
    for _ in 0..TURNS {
        let square = matmul(&x, &Weight::from_tensor(x.clone()));
        let mut mix = matmul(&square, &Weight::from_tensor(square.clone()));
        mix.as_mut_slice().iter_mut().zip(square.as_slice()).for_each(|(m, s)| *m = b * s + c * *m);
        let turned = matmul(&mix, &Weight::from_tensor(transposed(&x)));
        x.as_mut_slice().iter_mut().zip(turned.as_slice()).for_each(|(x, t)| *x = a * *x + t);
    }
    if tall { transposed(&x) } else { x }
}

fn transposed(x: &Tensor) -> Tensor {
    let mut out = Tensor::zeros(x.cols(), x.rows());
    for t in 0..x.rows() {
        for (c, v) in x.row(t).iter().enumerate() {
            out.row_mut(c)[t] = *v;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_nearly_orthogonal() {
        for (rows, cols) in [(24, 24), (16, 40), (40, 16)] {
            let x = Tensor::from_vec(
                rows,
                cols,
                (0..rows * cols).map(|i| model::uniform(3, i as u64) as f32 - 0.5).collect(),
            );
            let y = orthogonal(&x);
            let small = if rows > cols { transposed(&y) } else { y.clone() };
            let square = matmul(&small, &Weight::from_tensor(small.clone()));
            // Of a matrix with singular values from 0.6 to 1.3, the trace of the square is near its height.
            let trace: f32 = (0..square.rows()).map(|i| square.row(i)[i]).sum();
            let rest: f32 = (0..square.rows())
                .flat_map(|i| (0..i).map(move |j| (i, j)))
                .map(|(i, j)| square.row(i)[j].powi(2))
                .sum();
            let height = square.rows() as f32;
            assert!((trace / height - 0.9).abs() < 0.3, "{rows} {cols}: {trace}");
            assert!(rest < 0.05 * height, "{rows} {cols}: {rest}");
            // It still points where the matrix did.
            let along: f32 = x.as_slice().iter().zip(y.as_slice()).map(|(a, b)| a * b).sum();
            assert!(along > 0.0);
        }
    }
}
