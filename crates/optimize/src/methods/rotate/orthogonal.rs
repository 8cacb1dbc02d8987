//! Orthogonal matrices whose values are all of about one size.

use model::uniform;
use tensor::{Tensor, Weight, ops};

/// A random orthogonal matrix `[n, n]` whose values are all of about one size: a Hadamard matrix with random signs, or with
/// that of `ones`, one that leaves the vector of ones as it is. Which one depends on `seed` and `draw` alone.
pub fn orthogonal(n: usize, ones: bool, seed: u64, draw: u64) -> Tensor {
    let flat = flat(n);
    // The first column of what is flat is constant: its sign is that of ones.
    let negative = |i: usize| !(ones && i == 0) && uniform(seed, draw << 32 | i as u64) < 0.5;
    let mut signed = if ones { flat.transposed() } else { flat.clone() };
    for row in (0..n).filter(|i| negative(*i)) {
        signed.row_mut(row).iter_mut().for_each(|v| *v = -*v);
    }
    if ones { product(&flat, &signed) } else { signed }
}

/// `a` times `b`, both `[n, n]`.
pub fn product(a: &Tensor, b: &Tensor) -> Tensor {
    ops::matmul(a, &Weight::from_tensor(b.transposed()))
}

/// An orthogonal matrix `[n, n]` of values of about one size whose first column is constant: Sylvester's Hadamard matrix for
/// the largest power of two in `n`, and in each of its places the cosine transform of the odd rest.
fn flat(n: usize) -> Tensor {
    let odd = if n == 0 { 1 } else { n >> n.trailing_zeros() };
    let scale = 1.0 / (n.max(1) as f64).sqrt();
    let value = |row: usize, col: usize| {
        let sign = if ((row / odd) & (col / odd)).count_ones().is_multiple_of(2) { scale } else { -scale };
        let (i, j) = (row % odd, col % odd);
        let angle = std::f64::consts::PI * (i as f64 + 0.5) * j as f64 / odd as f64;
        let cosine = if j == 0 { 1.0 } else { std::f64::consts::SQRT_2 * angle.cos() };
        (sign * cosine) as f32
    };
    Tensor::from_vec(n, n, (0..n * n).map(|i| value(i / n, i % n)).collect())
}

/// Is the matrix orthogonal, and does it with `ones` leave the vector of ones as it is?
#[cfg(test)]
pub fn check(r: &Tensor, ones: bool, within: f32) {
    let square = product(r, &r.transposed());
    for i in 0..r.rows() {
        for (j, v) in square.row(i).iter().enumerate() {
            assert!((v - f32::from(u8::from(i == j))).abs() < within, "{i} {j}: {v}");
        }
        let sum: f32 = r.row(i).iter().sum();
        assert!(!ones || (sum - 1.0).abs() < 10.0 * within, "row {i} sums to {sum}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_are_orthogonal_flat_and_keep_ones_where_asked() {
        for n in [1, 2, 12, 40, 64, 96] {
            for ones in [false, true] {
                let r = orthogonal(n, ones, 7, 1);
                check(&r, ones, 1e-5);
                assert_eq!(r.as_slice(), orthogonal(n, ones, 7, 1).as_slice());
                let largest = r.as_slice().iter().fold(0f32, |m, v| m.max(v.abs())) * (n as f32).sqrt();
                assert!(largest <= if ones { 4.5 } else { 1.42 } || n < 3, "{n} {ones}: {largest}");
                assert!(
                    n < 12 || r.as_slice() != orthogonal(n, ones, 7, 2).as_slice(),
                    "another draw is another matrix"
                );
            }
        }
    }
}
