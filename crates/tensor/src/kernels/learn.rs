//! Kernels that only training needs, plain loops as those of [`super::once`].

use super::once::{dot, exp, fold, lanes, tanh};
use crate::{
    Tensor,
    ops::{AdamW, Asked},
    packed::{Form, brain, halved},
};
use std::ops::Range;

const LANES: usize = 16;

/// See [`super::Kernels::columns`].
#[inline(always)]
pub fn columns(x: &Tensor, rows: Range<usize>, at: usize, width: usize, form: Form, out: &mut [u32]) {
    match width {
        16 => columns_of::<16>(x, rows, at, form, out),
        12 => columns_of::<12>(x, rows, at, form, out),
        8 => columns_of::<8>(x, rows, at, form, out),
        6 => columns_of::<6>(x, rows, at, form, out),
        4 => columns_of::<4>(x, rows, at, form, out),
        2 => columns_of::<2>(x, rows, at, form, out),
        1 => columns_of::<1>(x, rows, at, form, out),
        _ => unreachable!("a tile of {width} tokens"),
    }
}

#[inline(always)]
fn columns_of<const WIDTH: usize>(x: &Tensor, rows: Range<usize>, at: usize, form: Form, out: &mut [u32]) {
    match form {
        Form::Bf16 => brain_of::<WIDTH>(x, rows, at, out),
        Form::Half => floats_of::<WIDTH, true>(x, rows, at, out),
        _ => floats_of::<WIDTH, false>(x, rows, at, out),
    }
}

#[inline(always)]
fn floats_of<const WIDTH: usize, const HALF: bool>(x: &Tensor, rows: Range<usize>, at: usize, out: &mut [u32]) {
    let cols = x.cols();
    let out: &mut [f32] = bytemuck::cast_slice_mut(out);
    let rows = x.as_slice()[rows.start * cols..rows.end * cols].chunks_exact(cols);
    for (out, row) in out.as_chunks_mut::<WIDTH>().0.iter_mut().zip(rows) {
        // Copies of a known size are a few instructions, those of another a call.
        match row[at..].first_chunk() {
            Some(values) => *out = *values,
            None => *out = part_of(row, at),
        }
        if HALF {
            for v in out {
                *v = halved(*v);
            }
        }
    }
}

/// What a row holds of the columns from `at` on, then zeros.
#[inline(always)]
fn part_of<const WIDTH: usize>(row: &[f32], at: usize) -> [f32; WIDTH] {
    let mut values = [0f32; WIDTH];
    values.iter_mut().zip(&row[at..]).for_each(|(v, x)| *v = *x);
    values
}

#[inline(always)]
fn pair<const WIDTH: usize>(a: &[f32; WIDTH], b: &[f32; WIDTH], out: &mut [u32; WIDTH]) {
    for i in 0..WIDTH {
        out[i] = u32::from(brain(a[i])) | u32::from(brain(b[i])) << 16;
    }
}

#[inline(always)]
fn brain_of<const WIDTH: usize>(x: &Tensor, rows: Range<usize>, at: usize, out: &mut [u32]) {
    for (out, first) in out.as_chunks_mut::<WIDTH>().0.iter_mut().zip(rows.clone().step_by(2)) {
        let (even, odd) = (x.row(first), (first + 1 < rows.end).then(|| x.row(first + 1)));
        // Reads of a known size are a few instructions, those of another a call.
        match (even[at..].first_chunk(), odd.and_then(|odd| odd[at..].first_chunk())) {
            (Some(a), Some(b)) => pair::<WIDTH>(a, b, out),
            _ => {
                let b = odd.map_or([0f32; WIDTH], |odd| part_of(odd, at));
                pair::<WIDTH>(&part_of(even, at), &b, out);
            }
        }
    }
}

/// See [`super::Kernels::brain_weave`].
#[inline(always)]
pub fn brain_weave(x: &[f32], out: &mut [u32]) {
    let (pairs, rest) = x.as_chunks::<{ 2 * LANES }>();
    let out = out.as_chunks_mut::<LANES>().0;
    for (out, pair) in out.iter_mut().zip(pairs) {
        for i in 0..LANES {
            out[i] = u32::from(brain(pair[i])) | u32::from(brain(pair[LANES + i])) << 16;
        }
    }
    if let (Some(row), Some(out)) = (rest.as_chunks::<LANES>().0.first(), out.get_mut(pairs.len())) {
        for i in 0..LANES {
            out[i] = u32::from(brain(row[i]));
        }
    }
}

/// With `r = 1 / sqrt(mean(x^2) + eps)`: `dx += r (w dy - x r^2 mean(w dy x))` and `dw += dy x r`.
#[inline(always)]
pub fn rms_norm_gradient(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    let n = x.len();
    let r = 1.0 / (lanes(x, |v| v * v) / n as f32 + eps).sqrt();
    let c = three(w, dy, x) / n as f32 * r * r;
    for i in 0..n {
        dx[i] += r * (w[i] * dy[i] - x[i] * c);
        dw[i] += dy[i] * x[i] * r;
    }
}

/// With `y = (x - mean) r`: `dx += r (w dy - mean(w dy) - y mean(w dy y))` and `dw += dy y`.
#[inline(always)]
pub fn layer_norm_gradient(x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    let n = x.len() as f32;
    let mean = lanes(x, |v| v) / n;
    let r = 1.0 / (lanes(x, |v| (v - mean) * (v - mean)) / n + eps).sqrt();
    let flat = dot(w, dy) / n;
    let along = (three(w, dy, x) / n - mean * flat) * r;
    for i in 0..x.len() {
        let y = (x[i] - mean) * r;
        dx[i] += r * (w[i] * dy[i] - flat - y * along);
        dw[i] += dy[i] * y;
    }
}

/// `sum a b c` in sixteen lanes.
#[inline(always)]
fn three(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sum = [0f32; LANES];
    let whole = a.len() / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        let (a, b, c) = (&a[at..at + LANES], &b[at..at + LANES], &c[at..at + LANES]);
        for i in 0..LANES {
            sum[i] += a[i] * b[i] * c[i];
        }
    }
    for i in whole..a.len() {
        sum[i - whole] += a[i] * b[i] * c[i];
    }
    fold(sum)
}

/// Scores `[positions / 16][queries][16]` from position `first` on become probabilities, and `changes`, the gradients of
/// these, become those of the scores before their cap: `p (change - delta)`.
#[inline(always)]
pub fn attention_gradient(scores: &mut [f32], changes: &mut [f32], first: usize, cap: Option<f32>, asked: &[Asked]) {
    let panels = scores.as_chunks_mut::<LANES>().0.chunks_exact_mut(asked.len());
    let changes = changes.as_chunks_mut::<LANES>().0.chunks_exact_mut(asked.len());
    for (panel, (scores, changes)) in panels.zip(changes).enumerate() {
        let start = first + panel * LANES;
        for (q, (score, change)) in asked.iter().zip(scores.iter_mut().zip(changes)) {
            let (from, to) = (q.from.saturating_sub(start), q.to.saturating_sub(start));
            if to == 0 || from >= LANES {
                (*score, *change) = ([0.0; LANES], [0.0; LANES]);
                continue;
            }
            let mut slope = [1f32; LANES];
            if let Some(cap) = cap {
                for i in 0..LANES {
                    let t = tanh(score[i] / cap);
                    (score[i], slope[i]) = (cap * t, 1.0 - t * t);
                }
            }
            for i in 0..LANES {
                score[i] = exp(score[i] - q.log_sum);
                change[i] = score[i] * (change[i] - q.delta) * slope[i];
            }
            if from > 0 || to < LANES {
                for i in (0..from).chain(to.min(LANES)..LANES) {
                    (score[i], change[i]) = (0.0, 0.0);
                }
            }
        }
    }
}

/// See [`super::Kernels::silu_slope`].
#[inline(always)]
pub fn silu_slope(x: &mut [f32], out: &mut [f32]) {
    for (x, o) in x.iter_mut().zip(out) {
        let s = 1.0 / (1.0 + exp(-*x));
        *o = *x * s;
        *x = s * (1.0 + *x * (1.0 - s));
    }
}

/// See [`super::Kernels::gelu_tanh_slope`].
#[inline(always)]
pub fn gelu_tanh_slope(x: &mut [f32], out: &mut [f32]) {
    const C: f32 = 0.797_884_6;
    const D: f32 = 0.044_715;
    for (x, o) in x.iter_mut().zip(out) {
        let v = *x;
        let t = tanh(C * (v + D * v * v * v));
        *o = 0.5 * v * (1.0 + t);
        *x = 0.5 * (1.0 + t) + 0.5 * v * (1.0 - t * t) * C * (1.0 + 3.0 * D * v * v);
    }
}

/// See [`crate::ops::adamw`].
#[inline(always)]
pub fn adamw(step: AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let AdamW { rate, beta, eps, decay, corrections, scale } = step;
    let keep = 1.0 - rate * decay;
    for i in 0..p.len() {
        let g = g[i] * scale;
        m[i] = beta[0] * m[i] + (1.0 - beta[0]) * g;
        v[i] = beta[1] * v[i] + (1.0 - beta[1]) * g * g;
        let size = (v[i] * corrections[1]).sqrt() + eps;
        p[i] = p[i] * keep - rate * (m[i] * corrections[0]) / size;
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        Tensor,
        kernels::{Kernels, available, generic},
        ops::{AdamW, Asked},
        packed::{Form, form::LANES},
    };

    fn wave(n: usize, step: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * step).sin() * 3.0).collect()
    }

    /// What every kernel makes of rows of `n` values.
    fn made(k: &Kernels, n: usize) -> Vec<Vec<f32>> {
        let (x, w, dy) = (wave(n, 0.37), wave(n, 0.91), wave(n, 1.7));
        let mut all = Vec::new();
        for gradient in [k.rms_norm_gradient, k.layer_norm_gradient] {
            let (mut dx, mut dw) = (wave(n, 0.2), wave(n, 0.3));
            gradient(&x, &w, 1e-5, &dy, &mut dx, &mut dw);
            all.extend([dx, dw]);
        }
        for slope in [k.silu_slope, k.gelu_tanh_slope] {
            let mut at: Vec<f32> = x.iter().map(|v| v * 5.0).collect();
            let mut value = vec![0.0; n];
            slope(&mut at, &mut value);
            all.extend([at, value]);
        }
        for cap in [None, Some(2.0)] {
            let asked = |from, to| Asked { from, to, log_sum: 1.5, delta: 0.3 };
            let asked = [asked(3, 60), asked(16, 80), asked(0, 16), asked(70, 71)];
            let mut scores: Vec<f32> = (0..4 * 64).map(|i| x[i % n]).collect();
            let mut changes: Vec<f32> = (0..4 * 64).map(|i| dy[i % n]).collect();
            (k.attention_gradient)(&mut scores, &mut changes, 16, cap, &asked);
            // What a query does not see has no part in it.
            let seen = scores[2 * 16..3 * 16].iter().chain(&changes[2 * 16..3 * 16]);
            assert!(seen.into_iter().all(|v| *v == 0.0), "{}: a query sees what comes after it", k.isa);
            all.extend([scores, changes]);
        }
        let step =
            AdamW { rate: 0.01, beta: [0.9, 0.99], eps: 1e-8, decay: 0.1, corrections: [10.0, 100.0], scale: 0.5 };
        let (mut p, mut m, mut v) = (x.clone(), vec![0.0; n], vec![0.0; n]);
        (k.adamw)(step, &mut p, &dy, &mut m, &mut v);
        all.extend([p, m, v]);
        all
    }

    #[test]
    fn every_instruction_set_agrees_with_generic() {
        for n in [1, 15, 16, 17, 64, 100, 257] {
            let want = made(&generic::KERNELS, n);
            for k in available() {
                for (i, (got, want)) in made(k, n).iter().zip(&want).enumerate() {
                    let bad = got.iter().zip(want).position(|(a, b)| (a - b).abs() > 5e-5 * (1.0 + b.abs()));
                    assert!(bad.is_none(), "{} {n}, {i}: {bad:?} {got:?} {want:?}", k.isa);
                }
            }
        }
    }

    #[test]
    fn columns_are_the_same_bits_everywhere() {
        let x = Tensor::from_vec(7, 37, wave(7 * 37, 0.77));
        let tiles = available().flat_map(|k| [k.floats.widths, k.floats.brain_widths]).flatten().copied();
        for width in tiles.filter(|width| *width <= LANES).chain([16, 12, 8, 6, 4, 2, 1]) {
            for (rows, at) in [(0..7, 0), (2..6, 21), (1..2, 36)] {
                let columns = |k: &Kernels, form: Form| {
                    let mut out = vec![7u32; form.length(rows.len()) * width];
                    (k.columns)(&x, rows.clone(), at, width, form, &mut out);
                    out
                };
                for form in [Form::F32, Form::Half] {
                    let want = columns(&generic::KERNELS, form);
                    for (i, word) in want.iter().enumerate() {
                        let value = x.row(rows.start + i / width).get(at + i % width).copied().unwrap_or(0.0);
                        let value = if form == Form::Half { half::f16::from_f32(value).to_f32() } else { value };
                        assert_eq!(*word, value.to_bits(), "{width} {i}");
                    }
                    assert!(available().all(|k| columns(k, form) == want));
                }
                let want = columns(&generic::KERNELS, Form::Bf16);
                for (i, word) in want.iter().enumerate() {
                    let (pair, col) = (rows.start + i / width * 2, at + i % width);
                    let brain = |row: usize| {
                        let held = row < rows.end && col < 37;
                        half::bf16::from_f32(if held { x.row(row)[col] } else { 0.0 }).to_bits()
                    };
                    assert_eq!(*word, u32::from(brain(pair)) | u32::from(brain(pair + 1)) << 16, "{width} {i}");
                }
                assert!(available().all(|k| columns(k, Form::Bf16) == want));
            }
        }
        for rows in [1, 2, 7] {
            let from = &x.as_slice()[..rows * LANES];
            for k in available() {
                let mut out = vec![1; rows.div_ceil(2) * LANES];
                (k.brain_weave)(from, &mut out);
                for (i, word) in out.iter().enumerate() {
                    let (pair, lane) = (i / LANES * 2, i % LANES);
                    let brain = |row: usize| {
                        half::bf16::from_f32(from.get(row * LANES + lane).copied().unwrap_or(0.0)).to_bits()
                    };
                    assert_eq!(
                        *word,
                        u32::from(brain(pair)) | u32::from(brain(pair + 1)) << 16,
                        "{} {rows} {i}",
                        k.isa
                    );
                }
            }
        }
    }
}
