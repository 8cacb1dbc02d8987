//! Steps of optimizers, fused: every value is read and written once.

use crate::{
    kernels::kernels,
    packed::halved,
    threads::{self, Shared},
};
use std::ops::Range;

/// A step of AdamW (arXiv 1711.05101).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate.
    pub rate: f32,
    /// Decay of the two moments.
    pub beta: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Weight decay, times the learning rate.
    pub decay: f32,
    /// `1 / (1 - beta^step)` of either moment.
    pub corrections: [f32; 2],
    /// Factor on the gradients: what clips them, and undoes the scale of the loss.
    pub scale: f32,
}

/// Values of a task.
const RUN: usize = 1 << 14;

/// Takes a step: values, gradients, first and second moments, all of one length.
pub fn adamw(step: AdamW, values: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
    let len = values.len();
    assert!(gradient.len() == len && first.len() == len && second.len() == len, "lengths of a step");
    let shared = [Shared::new(values), Shared::new(first), Shared::new(second)];
    threads::each(len.div_ceil(RUN), &|run| {
        let range = run * RUN..len.min((run + 1) * RUN);
        // SAFETY: all of them outlive the section; this task alone writes these values.
        let [p, m, v] = shared.map(|s| unsafe { s.slice(range.start, range.len()) });
        (kernels().adamw)(step, p, &gradient[range], m, v);
    });
}

/// A step of Lion (arXiv 2302.06675).
#[derive(Clone, Copy, Debug)]
pub struct Lion {
    /// Learning rate.
    pub rate: f32,
    /// Shares of the moment: in the direction of the step, and in the moment that remains.
    pub beta: [f32; 2],
    /// Weight decay, times the learning rate.
    pub decay: f32,
    /// Factor on the gradients.
    pub scale: f32,
}

/// Takes a step of Lion: values, gradients, the moment, all of one length.
pub fn lion(step: Lion, values: &mut [f32], gradient: &[f32], first: &mut [f32]) {
    let len = values.len();
    assert!(gradient.len() == len && first.len() == len, "lengths of a step");
    let first = Shared::new(first);
    each_run(values, |range, values| {
        // SAFETY: the moment outlives the section; this task alone writes these values.
        let first = unsafe { first.slice(range.start, range.len()) };
        lion_run(step, values, &gradient[range], first);
    });
}

pub(super) fn lion_run(step: Lion, values: &mut [f32], gradient: &[f32], first: &mut [f32]) {
    let Lion { rate, beta, decay, scale } = step;
    for ((p, m), g) in values.iter_mut().zip(first).zip(gradient) {
        let g = g * scale;
        let direction = beta[0] * *m + (1.0 - beta[0]) * g;
        // A sum of nothing has no sign.
        let sign = if direction == 0.0 { 0.0 } else { direction.signum() };
        *p -= rate * (sign + decay * *p);
        *m = beta[1] * *m + (1.0 - beta[1]) * g;
    }
}

/// Runs `f(range, values)` for runs of values.
fn each_run(x: &mut [f32], f: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    let len = x.len();
    let shared = Shared::new(x);
    threads::each(len.div_ceil(RUN), &|run| {
        let range = run * RUN..len.min((run + 1) * RUN);
        // SAFETY: `x` outlives the section; this task alone writes these values.
        f(range.clone(), unsafe { shared.slice(range.start, range.len()) });
    });
}

/// `to += from`.
pub fn add_slices(to: &mut [f32], from: &[f32]) {
    each_run(to, |range, to| to.iter_mut().zip(&from[range]).for_each(|(t, f)| *t += f));
}

/// Each value becomes the nearest 16-bit float, or infinite where all of these are smaller.
pub fn round_to_halves(x: &mut [f32]) {
    each_run(x, |_, x| x.iter_mut().for_each(|v| *v = halved(*v)));
}

/// `to = from`; both are of one length.
pub fn copy_slices(to: &mut [f32], from: &[f32]) {
    each_run(to, |range, to| to.copy_from_slice(&from[range]));
}

/// `x = 0`.
pub fn clear(x: &mut [f32]) {
    each_run(x, |_, x| x.fill(0.0));
}

/// Sum of the squares, in a fixed order.
pub fn squared_norm(x: &[f32]) -> f64 {
    let mut sums = vec![0f64; x.len().div_ceil(RUN)];
    let shared = Shared::new(&mut sums);
    threads::each(x.len().div_ceil(RUN), &|run| {
        let part = &x[run * RUN..x.len().min((run + 1) * RUN)];
        // SAFETY: `sums` outlives the section; this task alone writes this run's.
        let sum = unsafe { shared.slice(run, 1) };
        sum[0] = f64::from((kernels().dot)(part, part));
    });
    sums.iter().sum()
}
