//! The gradient of causal attention, block by block (arXiv 2205.14135): scores are made again, never kept.
//!
//! A task owns a head of keys and values of one sequence and goes through its queries in rising order, so no sum
//! depends on the number of workers.

use super::{AttentionShape, Columns};
use crate::{
    Storage, Tensor,
    kernels::{Tile, kernels},
    lines::Lines,
    packed::{Form, InputKind, Inputs, Span, form::LANES, join, pack_rows, regroup},
    threads::{self, Shared},
};
use std::{cell::RefCell, ops::Range};

/// What attention read and wrote, `[tokens, heads * channels]`; every sequence is whole and starts at position 0.
#[derive(Clone, Copy)]
pub struct Attended<'a> {
    /// Queries.
    pub q: &'a Tensor,
    /// Keys.
    pub k: &'a Tensor,
    /// Values.
    pub v: &'a Tensor,
    /// The output.
    pub out: &'a Tensor,
    /// Logarithm of the sum of the exponentials of each query's scores, `[tokens, heads]`.
    pub log_sums: &'a Tensor,
    /// Tokens of each sequence.
    pub rows: &'a [usize],
    /// How they attended.
    pub shape: &'a AttentionShape,
}

/// Of [`super::attention`]: `dq`, `dk` and `dv` become the gradients of queries, keys and values; `dout` is that of the
/// output. Products run as `form` says, [`Form::F32`] or [`Form::Bf16`].
///
/// # Panics
/// If shapes differ, which is the caller's fault.
pub fn attention_gradient(a: Attended<'_>, dout: &Tensor, form: Form, [dq, dk, dv]: [&mut Tensor; 3]) {
    let s = a.shape;
    let tokens: usize = a.rows.iter().sum();
    assert!([a.q, a.k, a.v, a.out, a.log_sums, dout].iter().all(|t| t.rows() == tokens), "tokens of attention");
    dq.reset(tokens, s.heads * s.head_dim);
    dk.reset(tokens, s.kv_heads * s.head_dim);
    dv.reset(tokens, s.kv_heads * s.head_dim);
    let shared = [dq, dk, dv].map(|t| Shared::new(t.as_mut_slice()));
    threads::each(a.rows.len() * s.kv_heads, &|i| {
        let (sequence, head) = (i / s.kv_heads, i % s.kv_heads);
        let first: usize = a.rows[..sequence].iter().sum();
        let head = Head { a, dout, form, first, rows: a.rows[sequence], head, out: shared };
        SCRATCH.with_borrow_mut(|scratch| head.run(scratch));
    });
}

/// A query on its way through a block of scores.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// First position that it sees.
    pub from: usize,
    /// The position after the last one.
    pub to: usize,
    /// Logarithm of the sum of the exponentials of its scores.
    pub log_sum: f32,
    /// Its output times that output's gradient.
    pub delta: f32,
}

/// Queries that run together, a multiple of every width of a tile: enough that what they add to keys and values is worth its
/// loads and stores.
const BLOCK: usize = 96;
/// Panels of positions come in pairs, whose brain floats fill the steps that lie together.
const PAIR: usize = 2;

/// One head of keys and values of one sequence, and the query heads that read it.
struct Head<'a> {
    a: Attended<'a>,
    dout: &'a Tensor,
    form: Form,
    first: usize,
    rows: usize,
    head: usize,
    out: [Shared<f32>; 3],
}

/// What a worker uses again from head to head.
#[derive(Default)]
struct Scratch {
    /// The rows of one head, `[positions, channels]`.
    own: Tensor,
    /// Keys and values as panels of positions, keys as panels of channels.
    keys: Lines<u32>,
    values: Lines<u32>,
    keys_across: Columns,
    /// Queries and the output's gradient as tokens, and their channels as tokens.
    queries: Inputs,
    grads: Inputs,
    queries_across: Inputs,
    grads_across: Inputs,
    /// `[panel of positions][query][LANES]`.
    scores: Lines<f32>,
    changes: Lines<f32>,
    /// The same as panels of brain floats: `[panel][pair of queries][LANES][2]`.
    woven: Lines<u32>,
    /// The same of a tile of queries as tokens whose steps are positions.
    inputs: Lines<u32>,
    pairs: Lines<u32>,
    asked: Vec<Asked>,
    /// `[panel of channels][width][LANES]`.
    dq: Lines<f32>,
    /// `[panel of positions][channel][LANES]`.
    dk: Lines<f32>,
    dv: Lines<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Head<'_> {
    fn run(&self, s: &mut Scratch) {
        let (shape, rows, form) = (self.a.shape, self.rows, self.form);
        let (hd, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let kind = InputKind::of(form, kernels());
        self.gather(self.a.k, self.head, 1.0, &mut s.own);
        panels_of_rows(&s.own, form, &mut s.keys);
        s.keys_across.pack(&s.own, form);
        self.gather(self.a.v, self.head, 1.0, &mut s.own);
        panels_of_rows(&s.own, form, &mut s.values);
        for sums in [&mut s.dk, &mut s.dv] {
            sums.zeros(panels(rows) * hd * LANES);
        }
        for head in self.head * group..(self.head + 1) * group {
            self.gather(self.a.q, head, shape.scale, &mut s.own);
            s.queries.pack(&s.own, kind, kernels());
            s.queries_across.pack_columns(&s.own, kind, kernels());
            self.gather(self.dout, head, 1.0, &mut s.own);
            s.grads.pack(&s.own, kind, kernels());
            s.grads_across.pack_columns(&s.own, kind, kernels());
            self.ask(head, &mut s.asked);
            for from in (0..rows).step_by(BLOCK) {
                self.block(s, head, from..rows.min(from + BLOCK));
            }
        }
        for (out, sums) in [(self.out[1], &s.dk), (self.out[2], &s.dv)] {
            let mut turned = [0u32; LANES * LANES];
            for (panel, sums) in sums.chunks_exact(hd * LANES).take(rows.div_ceil(LANES)).enumerate() {
                let sums: &[u32] = bytemuck::cast_slice(sums);
                for from in (0..hd).step_by(LANES) {
                    let width = LANES.min(hd - from);
                    (kernels().codes.pack_words)(&sums[from * LANES..], LANES, width, &mut turned[..LANES * width]);
                    let turned = bytemuck::cast_slice(&turned[..]).chunks_exact(width);
                    for (t, values) in (panel * LANES..rows).zip(turned).take(LANES) {
                        let at = ((self.first + t) * shape.kv_heads + self.head) * hd + from;
                        // SAFETY: the gradients outlive the section; this task alone writes this head of this sequence.
                        unsafe { out.slice(at, width) }.copy_from_slice(values);
                    }
                }
            }
        }
    }

    /// Copies the rows of one head, times a factor.
    fn gather(&self, from: &Tensor, head: usize, factor: f32, to: &mut Tensor) {
        let hd = self.a.shape.head_dim;
        to.reset(self.rows, hd);
        for t in 0..self.rows {
            let from = &from.row(self.first + t)[head * hd..(head + 1) * hd];
            to.row_mut(t).iter_mut().zip(from).for_each(|(o, v)| *o = v * factor);
        }
    }

    /// What each query sees and is corrected by.
    fn ask(&self, head: usize, asked: &mut Vec<Asked>) {
        let (shape, hd) = (self.a.shape, self.a.shape.head_dim);
        asked.clear();
        asked.extend((0..self.rows).map(|t| {
            let row = self.first + t;
            let (out, dout) = (&self.a.out.row(row)[head * hd..][..hd], &self.dout.row(row)[head * hd..][..hd]);
            Asked {
                from: shape.first_seen(t),
                to: t + 1,
                log_sum: self.a.log_sums.row(row)[head],
                delta: (kernels().dot)(out, dout),
            }
        }));
    }

    /// Some queries against all positions that they see.
    fn block(&self, s: &mut Scratch, head: usize, queries: Range<usize>) {
        let (shape, hd, form) = (self.a.shape, self.a.shape.head_dim, self.form);
        // Panels before the first that any of them sees are left out.
        let seen = shape.first_seen(queries.start) / (PAIR * LANES) * PAIR..panels(self.rows.min(queries.end));
        let size = queries.len() * LANES;
        let panel = form.panel_bytes(hd) / 4;
        for (inputs, weights, out) in [(&s.queries, &s.keys, &mut s.scores), (&s.grads, &s.values, &mut s.changes)] {
            out.resize(seen.len() * size);
            let weights = &weights[seen.start * panel..seen.end * panel];
            for span in &inputs.spans()[inputs.spans_of(queries.clone())] {
                let to = Sums { at: (span.first - queries.start) * LANES, steps: [size, LANES], add: false };
                multiply(form, weights, [panel, form.length(hd)], inputs.words(span, 0), span.width, to, out);
            }
        }
        (kernels().attention_gradient)(
            &mut s.scores,
            &mut s.changes,
            seen.start * LANES,
            shape.soft_cap,
            &s.asked[queries.clone()],
        );
        for span in s.queries.spans_of(queries.clone()) {
            self.queries(s, head, span, queries.clone(), seen.clone());
        }
        let steps = form.length(queries.len());
        for (values, across, out) in
            [(&s.changes, &s.queries_across, &mut s.dk), (&s.scores, &s.grads_across, &mut s.dv)]
        {
            let values: &[u32] = if form == Form::F32 {
                bytemuck::cast_slice(values)
            } else {
                s.woven.resize(seen.len() * steps * LANES);
                for (from, to) in values.chunks_exact(size).zip(s.woven.chunks_exact_mut(steps * LANES)) {
                    (kernels().brain_weave)(from, to);
                }
                &s.woven
            };
            let out = &mut out[seen.start * hd * LANES..seen.end * hd * LANES];
            for span in across.spans() {
                let inputs = across.words(span, form.length(queries.start));
                let to = Sums { at: span.first * LANES, steps: [hd * LANES, LANES], add: true };
                multiply(form, values, [steps * LANES, steps], inputs, span.width, to, out);
            }
        }
    }

    /// The gradients of the queries of a tile.
    fn queries(&self, s: &mut Scratch, head: usize, span: usize, queries: Range<usize>, seen: Range<usize>) {
        let (shape, hd, form) = (self.a.shape, self.a.shape.head_dim, self.form);
        let Span { first, width, .. } = s.queries.spans()[span];
        let at = (first - queries.start) * LANES;
        if form == Form::F32 {
            s.inputs.resize(seen.len() * LANES * width);
            for (panel, inputs) in s.inputs.chunks_exact_mut(LANES * width).enumerate() {
                let rows = &s.changes[panel * queries.len() * LANES + at..];
                (kernels().codes.pack_words)(bytemuck::cast_slice(rows), LANES, width, inputs);
            }
        } else {
            let panels = s.changes.chunks_exact(queries.len() * LANES).map(|panel| &panel[at..at + width * LANES]);
            let words = LANES / 2 * width;
            s.pairs.resize(seen.len() * words);
            s.inputs.resize(seen.len() * words);
            for (panel, pairs) in panels.zip(s.pairs.chunks_exact_mut(words)) {
                (kernels().brain_pairs)(panel, pairs);
            }
            let join = if kernels().floats.together == 1 { regroup::<{ LANES / 2 }> } else { join::<{ LANES / 2 }> };
            join(&s.pairs, width, &mut s.inputs);
        }
        s.dq.resize(hd.div_ceil(LANES) * width * LANES);
        let steps = form.length(self.rows.min(seen.end * LANES) - seen.start * LANES);
        let (weights, stride) = s.keys_across.panels(form.length(seen.start * LANES));
        let to = Sums { at: 0, steps: Tile::block(width), add: false };
        multiply(form, weights, [stride, steps], &s.inputs, width, to, &mut s.dq);
        for t in 0..width {
            let at = ((self.first + first + t) * shape.heads + head) * hd;
            // SAFETY: the gradient outlives the section; this task alone writes this head of this sequence.
            let out = unsafe { self.out[0].slice(at, hd) };
            for (slice, out) in out.chunks_mut(LANES).enumerate() {
                let sums = &s.dq[(slice * width + t) * LANES..];
                out.iter_mut().zip(sums).for_each(|(o, v)| *o = v * shape.scale);
            }
        }
    }
}

/// Panels of so many positions, in pairs.
fn panels(positions: usize) -> usize {
    positions.div_ceil(PAIR * LANES) * PAIR
}

/// Rows as lanes: panels as weights have them, of zeros where there are no rows.
fn panels_of_rows(x: &Tensor, form: Form, out: &mut Lines<u32>) {
    let size = form.panel_bytes(x.cols()) / 4;
    let storage = if form == Form::F32 { Storage::F32 } else { Storage::Bf16 };
    out.zeros(panels(x.rows()) * size);
    for (i, panel) in out.chunks_exact_mut(size).take(x.rows().div_ceil(LANES)).enumerate() {
        pack_rows(x, i * LANES..x.rows().min((i + 1) * LANES), storage, bytemuck::cast_slice_mut(panel));
    }
}

/// Where the sums of a product go.
struct Sums {
    at: usize,
    /// As of [`Tile`].
    steps: [usize; 2],
    add: bool,
}

/// Multiplies as many panels as `out` has room for, each `stride` words of which `steps` steps count.
fn multiply(
    form: Form,
    weights: &[u32],
    [stride, steps]: [usize; 2],
    inputs: &[u32],
    width: usize,
    to: Sums,
    out: &mut [f32],
) {
    let panels = out.len() / to.steps[0];
    assert!(weights.len() + stride >= panels * stride + steps * LANES, "weights of a tile");
    assert!(inputs.len() >= steps.next_multiple_of(kernels().floats.together_of(form)) * width, "inputs of a tile");
    assert!(to.at + (width - 1) * to.steps[1] + LANES <= to.steps[0], "sums of a tile");
    let tile = Tile {
        form,
        weights: weights.as_ptr().cast(),
        panel_bytes: 4 * stride,
        panels,
        length: steps,
        inputs: inputs.as_ptr().cast(),
        next: inputs.as_ptr().cast(),
        width,
        out: out[to.at..].as_mut_ptr(),
        steps: to.steps,
        add: to.add,
    };
    // SAFETY: the lengths are asserted above, and the width is one of the table's.
    unsafe { kernels().tile(&tile) }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{KeyValue, Memory, attention},
        *,
    };

    fn wave(rows: usize, cols: usize, step: f32) -> Tensor {
        // Brain floats hold these values, so that only what lies between is rounded.
        let value = |i: usize| half::bf16::from_f32((i as f32 * step).sin()).to_f32();
        Tensor::from_vec(rows, cols, (0..rows * cols).map(value).collect())
    }

    /// Output, and gradients of queries, keys and values, of two sequences.
    fn run(shape: &AttentionShape, form: Form, [q, k, v, dout]: [&Tensor; 4]) -> (Tensor, [Tensor; 3]) {
        let rows = [101, 37];
        let format = if form == Form::F32 { KeyValue::F32 } else { KeyValue::Bf16 };
        let mut memories = rows.map(|_| Memory::new(format, shape.kv_heads, shape.head_dim));
        memories[0].append(k, v, None, 0, rows[0]);
        memories[1].append(k, v, None, rows[0], rows[0] + rows[1]);
        let (mut out, mut log_sums) = (Tensor::default(), Tensor::default());
        attention(q, &rows, &memories, shape, &mut out, Some(&mut log_sums));
        let mut gradients = [const { None }; 3].map(|g: Option<Tensor>| g.unwrap_or_default());
        let [dq, dk, dv] = &mut gradients;
        let attended = Attended { q, k, v, out: &out, log_sums: &log_sums, rows: &rows, shape };
        attention_gradient(attended, dout, form, [dq, dk, dv]);
        (out, gradients)
    }

    #[test]
    fn is_that_of_finite_differences_and_brain_floats_are_near() {
        for (head_dim, window, soft_cap) in [(8, None, None), (33, Some(7), Some(2.0)), (48, Some(60), None)] {
            let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim, scale: 0.25, window, soft_cap };
            let wide = |step| wave(138, 4 * head_dim, step);
            let narrow = |step| wave(138, 2 * head_dim, step);
            let [q, k, v, dout] = [wide(0.7), narrow(0.3), narrow(0.9), wide(0.11)];
            let (_, exact) = run(&shape, Form::F32, [&q, &k, &v, &dout]);
            let loss = |inputs: [&Tensor; 3]| {
                let [q, k, v] = inputs;
                let (out, _) = run(&shape, Form::F32, [q, k, v, &dout]);
                out.as_slice().iter().zip(dout.as_slice()).map(|(a, b)| f64::from(a * b)).sum::<f64>()
            };
            for (which, at) in
                [(0, 5), (0, 120 * head_dim), (1, 17), (1, 230 * head_dim + 3), (2, 40), (2, 199 * head_dim)]
            {
                let moved = |by: f32| {
                    let mut inputs = [q.clone(), k.clone(), v.clone()];
                    inputs[which].as_mut_slice()[at] += by;
                    let [q, k, v] = &inputs;
                    loss([q, k, v])
                };
                let (slope, got) = ((moved(5e-2) - moved(-5e-2)) / 1e-1, f64::from(exact[which].as_slice()[at]));
                assert!((slope - got).abs() < 2e-3 * (1.0 + slope.abs()), "{head_dim} {which} {at}: {got} {slope}");
            }
            let (_, near) = run(&shape, Form::Bf16, [&q, &k, &v, &dout]);
            for (near, exact) in near.iter().zip(&exact) {
                let pairs =
                    || near.as_slice().iter().zip(exact.as_slice()).map(|(a, b)| [f64::from(*a), f64::from(*b)]);
                let error = pairs().map(|[a, b]| (a - b).powi(2)).sum::<f64>();
                let size = pairs().map(|[_, b]| b * b).sum::<f64>();
                assert!(error.sqrt() < 0.01 * size.sqrt(), "{head_dim}: {error} of {size}");
            }
        }
    }
}
