//! What a row of logits says: log-probabilities, divergence, the likeliest tokens.

use super::each_row;
use crate::{Tensor, kernels::kernels, threads::Shared};

/// `ln sum exp(x)` of a row of logits.
fn log_sum_exp(logits: &[f32], scratch: &mut Vec<f32>) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    scratch.clear();
    scratch.extend_from_slice(logits);
    f64::from(max) + f64::from((kernels().exp_sum)(scratch, max)).ln()
}

/// Writes the distribution of a row of logits over a temperature; returns the logarithm of what it was divided by.
pub fn softmax(logits: &[f32], temperature: f32, out: &mut Vec<f32>) -> f32 {
    out.clear();
    out.extend(logits.iter().map(|v| v / temperature));
    let max = out.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let sum = (kernels().exp_sum)(out, max);
    out.iter_mut().for_each(|v| *v /= sum);
    max + sum.ln()
}

/// Natural logarithm of the probability of `token`.
pub fn log_prob(logits: &[f32], token: usize) -> f64 {
    f64::from(logits[token]) - log_sum_exp(logits, &mut Vec::new())
}

/// Kullback-Leibler divergence `KL(base || other)` in nats between the distributions of two rows of logits.
pub fn divergence(base: &[f32], other: &[f32]) -> f64 {
    let mut p = Vec::new();
    let other_norm = log_sum_exp(other, &mut p);
    let base_norm = log_sum_exp(base, &mut p);
    let total: f64 = p.iter().map(|v| f64::from(*v)).sum();
    let shift = other_norm - base_norm;
    let sum: f64 = (0..p.len()).map(|i| f64::from(p[i]) * (f64::from(base[i]) - f64::from(other[i]))).sum();
    (sum / total + shift).max(0.0)
}

/// Number of the largest logit; of equal ones the first.
pub fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] {
            best = i;
        }
    }
    best
}

/// Numbers of the `count` largest logits, largest first; of equal ones the first.
pub fn top(logits: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let before = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, before);
        order.truncate(count);
    }
    order.sort_unstable_by(before);
    order
}

/// Replaces every row of logits by the gradient of its share of the loss, `factor (softmax - target)`, and writes the
/// negative log-likelihood of the row's target (nats) to `losses`; rows without a target become zeros.
///
/// # Panics
/// If a target is no column, which is the caller's fault.
pub fn cross_entropy(logits: &mut Tensor, targets: &[Option<u32>], factor: f32, losses: &mut [f32]) {
    let shared = Shared::new(losses);
    each_row(logits, |t, row| {
        let Some(target) = targets[t] else { return row.fill(0.0) };
        let target = target as usize;
        let max = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        let own = row[target] - max;
        let sum = (kernels().exp_sum)(row, max);
        // SAFETY: `losses` outlives the section; this task alone writes this row's.
        let loss = unsafe { shared.slice(t, 1) };
        loss[0] = sum.ln() - own;
        let factor_each = factor / sum;
        row.iter_mut().for_each(|v| *v *= factor_each);
        row[target] -= factor;
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_what_its_definition_says() {
        let base: Vec<f32> = (0..50).map(|i| (i as f32).sin() * 3.0).collect();
        let other: Vec<f32> = (0..50).map(|i| (i as f32).sin() * 2.5 + (i as f32 * 0.3).cos()).collect();
        let softmax = |x: &[f32]| {
            let e: Vec<f64> = x.iter().map(|v| f64::from(*v).exp()).collect();
            let s: f64 = e.iter().sum();
            e.iter().map(|v| v / s).collect::<Vec<_>>()
        };
        let (p, q) = (softmax(&base), softmax(&other));
        let want: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((divergence(&base, &other) - want).abs() < 1e-6);
        assert!(divergence(&base, &base) < 1e-9);
        assert!((log_prob(&base, 7) - p[7].ln()).abs() < 1e-6);
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(top(&[1.0, 3.0, 3.0, 2.0], 3), [1, 2, 3]);
    }
}
