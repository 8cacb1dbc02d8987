//! How tokens relate to each other inside a block, beside how they do in a teacher's (MiniLMv2, arXiv 2012.15828).

use crate::{
    Tensor,
    kernels::kernels,
    threads::{self, Shared},
};
use std::cell::RefCell;

/// Which relations are compared.
#[derive(Clone, Copy, Debug)]
pub struct Relating<'a> {
    /// Tokens of each sequence.
    pub rows: &'a [usize],
    /// Which tokens count.
    pub counts: &'a [bool],
    /// Parts into which the channels of both are cut; each relates the tokens for itself.
    pub heads: usize,
}

/// Relations of the tokens of one vector each, `softmax(x_t x_s / sqrt(channels))` over the tokens `s` up to `t`: adds
/// the gradient of `factor` times `KL(teacher || student)`, summed over tokens and meaned over heads, to `into`, and
/// returns that sum without the factor, in nats.
///
/// # Panics
/// If the numbers of tokens differ or heads do not divide the channels, which is the caller's fault.
pub fn relation_gradient(how: Relating<'_>, student: &Tensor, teacher: &Tensor, factor: f32, into: &mut Tensor) -> f64 {
    let divided = |x: &Tensor| x.cols().is_multiple_of(how.heads);
    assert!(divided(student) && divided(teacher), "heads do not divide the channels");
    assert_eq!((student.rows(), student.cols()), (into.rows(), into.cols()), "a gradient of another shape");
    assert_eq!(student.rows(), teacher.rows(), "other tokens");
    let firsts: Vec<usize> = how.rows.iter().scan(0, |next, n| Some(std::mem::replace(next, *next + n))).collect();
    let (tasks, width) = (how.rows.len() * how.heads, student.cols() / how.heads);
    let (mut sums, kernels) = (vec![0.0; tasks], kernels());
    let (cols, shared, told) = (into.cols(), Shared::new(into.as_mut_slice()), Shared::new(&mut sums));
    threads::each(tasks, &|task| {
        let (sequence, head) = (task / how.heads, task % how.heads);
        let (first, tokens) = (firsts[sequence], how.rows[sequence]);
        let part = |x: &Tensor, to: &mut Vec<f32>| {
            let width = x.cols() / how.heads;
            to.clear();
            (first..first + tokens).for_each(|t| to.extend_from_slice(&x.row(t)[head * width..(head + 1) * width]));
        };
        SCRATCH.with_borrow_mut(|Scratch { own, other, gradient, p, q }| {
            part(student, own);
            part(teacher, other);
            gradient.clear();
            gradient.resize(tokens * width, 0.0);
            let mut sum = 0.0;
            for t in (0..tokens).filter(|t| how.counts[first + t]) {
                relations(other, teacher.cols() / how.heads, t, p);
                relations(own, width, t, q);
                let each = factor / (how.heads as f32 * (width as f32).sqrt());
                for s in 0..=t {
                    sum += f64::from(p[s]) * (f64::from(p[s].max(LEAST)).ln() - f64::from(q[s].max(LEAST)).ln());
                    let slope = each * (q[s] - p[s]);
                    let (to_t, to_s) = (t * width..(t + 1) * width, s * width..(s + 1) * width);
                    (kernels.axpy)(slope, &own[to_s.clone()], &mut gradient[to_t.clone()]);
                    (kernels.axpy)(slope, &own[to_t], &mut gradient[to_s]);
                }
            }
            // SAFETY: both outlive the section; a task writes its head's channels of its sequence's tokens, and its sum.
            unsafe { told.slice(task, 1)[0] = sum / how.heads as f64 };
            for (t, from) in gradient.chunks_exact(width).enumerate() {
                // SAFETY: as above.
                let to = unsafe { shared.slice((first + t) * cols + head * width, width) };
                to.iter_mut().zip(from).for_each(|(t, f)| *t += f);
            }
        });
    });
    sums.iter().sum()
}

/// Below it a probability counts as this.
const LEAST: f32 = 1e-30;

/// Memory of a task.
#[derive(Default)]
struct Scratch {
    own: Vec<f32>,
    other: Vec<f32>,
    gradient: Vec<f32>,
    p: Vec<f32>,
    q: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// How token `t` relates to those up to it.
fn relations(x: &[f32], width: usize, t: usize, out: &mut Vec<f32>) {
    let own = &x[t * width..(t + 1) * width];
    let (scale, dot) = (1.0 / (width as f32).sqrt(), kernels().dot);
    out.clear();
    out.extend(x.chunks_exact(width).take(t + 1).map(|row| scale * dot(own, row)));
    let most = out.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    out.iter_mut().for_each(|v| *v = (*v - most).exp());
    let all: f32 = out.iter().sum();
    out.iter_mut().for_each(|v| *v /= all);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(rows: usize, cols: usize, seed: f32) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i as f32 * 1.7 + seed).sin()).collect())
    }

    #[test]
    fn its_gradient_is_that_of_finite_differences() {
        let (student, teacher) = (wave(9, 6, 0.3), wave(9, 8, 1.1));
        let counts = [true, true, false, true, true, true, true, false, true];
        let how = Relating { rows: &[4, 5], counts: &counts, heads: 2 };
        let mut gradient = Tensor::zeros(9, 6);
        let sum = relation_gradient(how, &student, &teacher, 0.7, &mut gradient);
        assert!(sum > 0.1, "{sum}");
        for i in 0..student.as_slice().len() {
            let at = |h: f32| {
                let mut moved = student.clone();
                moved.as_mut_slice()[i] += h;
                relation_gradient(how, &moved, &teacher, 0.0, &mut Tensor::zeros(9, 6))
            };
            let numeric = 0.7 * (at(1e-2) - at(-1e-2)) / 2e-2;
            let own = f64::from(gradient.as_slice()[i]);
            assert!((numeric - own).abs() < 1e-3, "{i}: by differences {numeric}, by the gradient {own}");
        }
        let same = relation_gradient(how, &student, &student, 1.0, &mut gradient);
        assert!(same.abs() < 1e-12, "{same}");
    }
}
