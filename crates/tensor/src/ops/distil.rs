//! How far a student's distribution is from a teacher's, and the way towards it (arXiv 1503.02531, 2306.13649).

use super::{each_row, loss};
use crate::{Tensor, threads::Shared};
use std::cell::RefCell;

/// Which divergence of a student's distribution `q` from a teacher's `p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Likeness {
    /// `KL(p || q)`: the student covers all that the teacher may say.
    Forward,
    /// `KL(q || p)`: the student says only what the teacher may say.
    Reverse,
    /// The mean divergence of both from their mean (Jensen-Shannon).
    Between,
}

/// What a student learns from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distilling {
    /// Which divergence.
    pub likeness: Likeness,
    /// Both distributions are flattened by it, and the divergence is counted times its square.
    pub temperature: f32,
    /// Share of the divergence in the loss; the rest is the negative log-likelihood of the targets.
    pub share: f32,
}

/// Replaces every row of a student's logits by the gradient of `factor` times its loss, and writes the negative
/// log-likelihood of the row's target (nats) to `losses`; rows without a target become zeros.
///
/// # Panics
/// If shapes differ or a target is no column, which is the caller's fault.
pub fn distil(
    how: Distilling,
    logits: &mut Tensor,
    teacher: &Tensor,
    targets: &[Option<u32>],
    factor: f32,
    losses: &mut [f32],
) {
    assert_eq!((logits.rows(), logits.cols()), (teacher.rows(), teacher.cols()), "logits of student and teacher");
    let shared = Shared::new(losses);
    each_row(logits, |t, row| {
        let Some(target) = targets[t] else { return row.fill(0.0) };
        SCRATCH.with_borrow_mut(|[p, q, hard]| {
            let own = row[target as usize];
            let total = loss::softmax(row, 1.0, hard);
            // SAFETY: `losses` outlives the section; this task alone writes this row's.
            let loss = unsafe { shared.slice(t, 1) };
            loss[0] = total - own;
            let apart = [loss::softmax(teacher.row(t), how.temperature, p), loss::softmax(row, how.temperature, q)];
            toward(how, row, teacher.row(t), [p, q], apart);
            let (soft, firm) = (factor * how.share * how.temperature, factor * (1.0 - how.share));
            row.iter_mut().zip(&*hard).for_each(|(r, h)| *r = soft * *r + firm * h);
            row[target as usize] -= firm;
        });
    });
}

/// What a teacher says of one prediction: the tokens that it names, and all others together.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    /// Tokens, each once.
    pub ids: &'a [u32],
    /// The logarithms of their probabilities at the temperature of both; what is missing to one is that of all others.
    pub logs: &'a [f32],
}

/// [`distil`] from a teacher of whom only the likeliest tokens are known: `KL(p || q)` over these and the rest as one. Where
/// nothing is known of a row, only the likelihood of its target is learned.
///
/// # Panics
/// If a target or a token is no column, which is the caller's fault.
pub fn distil_listed<'a>(
    how: Distilling,
    logits: &mut Tensor,
    listed: impl Fn(usize) -> Option<Listed<'a>> + Sync,
    targets: &[Option<u32>],
    factor: f32,
    losses: &mut [f32],
) {
    let shared = Shared::new(losses);
    each_row(logits, |t, row| {
        let Some(target) = targets[t] else { return row.fill(0.0) };
        SCRATCH.with_borrow_mut(|[_, q, hard]| {
            let own = row[target as usize];
            let total = loss::softmax(row, 1.0, hard);
            // SAFETY: `losses` outlives the section; this task alone writes this row's.
            let loss = unsafe { shared.slice(t, 1) };
            loss[0] = total - own;
            let said = listed(t);
            match said {
                Some(said) => {
                    loss::softmax(row, how.temperature, q);
                    row.copy_from_slice(q);
                    toward_listed(said, row, q);
                }
                None => row.fill(0.0),
            }
            let share = if said.is_some() { how.share } else { 0.0 };
            let (soft, firm) = (factor * share * how.temperature, factor * (1.0 - share));
            row.iter_mut().zip(&*hard).for_each(|(r, h)| *r = soft * *r + firm * h);
            row[target as usize] -= firm;
        });
    });
}

/// Replaces a student's probabilities (`row`, and the same in `q`) by the gradient of the divergence.
fn toward_listed(said: Listed<'_>, row: &mut [f32], q: &[f32]) {
    let mut named = 0f64;
    for (id, log) in said.ids.iter().zip(said.logs) {
        row[*id as usize] = 0.0;
        named += f64::from(*log).exp();
    }
    // All others share one difference, each by its part of their probability.
    let others: f64 = row.iter().map(|v| f64::from(*v)).sum();
    let rest = (1.0 - named).max(0.0);
    let each = if others > 0.0 { ((others - rest) / others) as f32 } else { 0.0 };
    row.iter_mut().for_each(|v| *v *= each);
    for (id, log) in said.ids.iter().zip(said.logs) {
        row[*id as usize] = q[*id as usize] - log.exp();
    }
}

/// Replaces a student's logits by the gradient of the divergence, times the temperature.
fn toward(how: Distilling, student: &mut [f32], teacher: &[f32], [p, q]: [&[f32]; 2], totals: [f32; 2]) {
    if how.likeness == Likeness::Forward {
        return student.iter_mut().zip(p.iter().zip(q)).for_each(|(s, (p, q))| *s = q - p);
    }
    // `q (g - sum q g)`, `g` being the derivative of the divergence by `q`.
    let mut mean = 0f64;
    for (i, s) in student.iter_mut().enumerate() {
        *s = match how.likeness {
            Likeness::Reverse => (*s - teacher[i]) / how.temperature - (totals[1] - totals[0]),
            _ => 0.5 * ((*s / how.temperature - totals[1]) - (0.5 * (p[i] + q[i])).max(f32::MIN_POSITIVE).ln()),
        };
        mean += f64::from(q[i]) * f64::from(*s);
    }
    student.iter_mut().zip(q).for_each(|(s, q)| *s = q * (*s - mean as f32));
}

thread_local! {
    static SCRATCH: RefCell<[Vec<f32>; 3]> = RefCell::default();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The loss by its definition.
    fn defined(how: Distilling, student: &[f32], teacher: &[f32], target: usize) -> f64 {
        let softmax = |x: &[f32], t: f64| {
            let e: Vec<f64> = x.iter().map(|v| (f64::from(*v) / t).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|v| v / sum).collect::<Vec<_>>()
        };
        let t = f64::from(how.temperature);
        let (p, q) = (softmax(teacher, t), softmax(student, t));
        let kl = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * (a / b).ln()).sum::<f64>();
        let m: Vec<f64> = p.iter().zip(&q).map(|(p, q)| 0.5 * (p + q)).collect();
        let apart = match how.likeness {
            Likeness::Forward => kl(&p, &q),
            Likeness::Reverse => kl(&q, &p),
            Likeness::Between => 0.5 * (kl(&p, &m) + kl(&q, &m)),
        };
        let share = f64::from(how.share);
        share * t * t * apart - (1.0 - share) * softmax(student, 1.0)[target].ln()
    }

    #[test]
    fn what_is_not_listed_counts_as_one() {
        let row = |a: f32| -> Vec<f32> { (0..40).map(|i| (i as f32 * a).sin() * 3.0).collect() };
        let (teacher, student) = (row(0.7), row(0.5));
        for (temperature, share, top) in [(1.0, 1.0, 5), (2.0, 0.7, 12), (1.0, 1.0, 40)] {
            let softmax = |x: &[f32]| {
                let e: Vec<f64> = x.iter().map(|v| f64::from(*v / temperature).exp()).collect();
                let sum: f64 = e.iter().sum();
                e.iter().map(|v| v / sum).collect::<Vec<_>>()
            };
            let p = softmax(&teacher);
            let mut ids: Vec<u32> = (0..40).collect();
            ids.sort_by(|a, b| p[*b as usize].total_cmp(&p[*a as usize]));
            ids.truncate(top);
            let logs: Vec<f32> = ids.iter().map(|id| p[*id as usize].ln() as f32).collect();
            let defined = |x: &[f32]| {
                let q = softmax(x);
                let named: f64 = ids.iter().map(|id| p[*id as usize] * (p[*id as usize] / q[*id as usize]).ln()).sum();
                let left = |p: &[f64]| 1.0 - ids.iter().map(|id| p[*id as usize]).sum::<f64>();
                let rest = if top < 40 { left(&p) * (left(&p) / left(&q)).ln() } else { 0.0 };
                let e: f64 = x.iter().map(|v| f64::from(*v).exp()).sum();
                let t = f64::from(temperature);
                f64::from(share) * t * t * (named + rest) - (1.0 - f64::from(share)) * (f64::from(x[5]).exp() / e).ln()
            };
            let how = Distilling { likeness: Likeness::Forward, temperature, share };
            let mut got = Tensor::from_vec(2, 40, [student.clone(), student.clone()].concat());
            let mut losses = [0.0; 2];
            let listed = |row| (row == 0).then_some(Listed { ids: &ids, logs: &logs });
            distil_listed(how, &mut got, listed, &[Some(5), Some(5)], 0.25, &mut losses);
            for i in 0..40 {
                let at = |h: f32| {
                    let mut moved = student.clone();
                    moved[i] += h;
                    defined(&moved)
                };
                let want = 0.25 * (at(1e-2) - at(-1e-2)) / 2e-2;
                let error = (f64::from(got.row(0)[i]) - want).abs();
                assert!(error < 2e-4 * (1.0 + want.abs()), "top {top}, {i}: {} {want}", got.row(0)[i]);
            }
            // Of the second row nothing is known.
            let mut text = Tensor::from_vec(1, 40, student.clone());
            loss::cross_entropy(&mut text, &[Some(5)], 0.25, &mut [0.0]);
            let error = text.row(0).iter().zip(got.row(1)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(losses[0] == losses[1] && error < 1e-6, "{error}");
        }
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let row = |a: f32| -> Vec<f32> { (0..40).map(|i| (i as f32 * a).sin() * 3.0).collect() };
        let teacher = Tensor::from_vec(2, 40, [row(0.7), row(0.3)].concat());
        let student = Tensor::from_vec(2, 40, [row(0.5), row(1.1)].concat());
        for likeness in [Likeness::Forward, Likeness::Reverse, Likeness::Between] {
            for (temperature, share) in [(1.0, 1.0), (2.0, 0.7), (0.5, 0.3)] {
                let how = Distilling { likeness, temperature, share };
                let (mut got, mut losses) = (student.clone(), [0.0; 2]);
                distil(how, &mut got, &teacher, &[Some(5), None], 0.25, &mut losses);
                assert!(got.row(1).iter().all(|v| *v == 0.0));
                let want = defined(Distilling { share: 0.0, ..how }, student.row(0), teacher.row(0), 5);
                assert!((f64::from(losses[0]) - want).abs() < 1e-5);
                for i in 0..40 {
                    let at = |h: f32| {
                        let mut moved = student.row(0).to_vec();
                        moved[i] += h;
                        defined(how, &moved, teacher.row(0), 5)
                    };
                    let want = 0.25 * (at(1e-2) - at(-1e-2)) / 2e-2;
                    let error = (f64::from(got.row(0)[i]) - want).abs();
                    assert!(error < 2e-4 * (1.0 + want.abs()), "{how:?} {i}: {} {want}", got.row(0)[i]);
                }
            }
        }
    }
}
