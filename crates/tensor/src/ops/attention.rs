//! Causal attention over a memory of keys and values.
//!
//! Keys and values are kept as panels, so scores and mixtures run on the same kernel as every other product:
//! a score is summed over the head's channels in order, a mixture over positions in order.

use crate::{
    Tensor,
    kernels::{PANEL, PanelProduct, kernels},
    threads::Shared,
};
use rayon::prelude::*;

/// What distinguishes one family's attention from another's.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// How many positions back a query sees, itself included; `None` is all.
    pub window: Option<usize>,
    /// Cap on the scores: `cap tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

/// Keys and values of one sequence in one block.
#[derive(Clone, Debug)]
pub struct Memory {
    head_dim: usize,
    len: usize,
    /// Per head: panels of `PANEL` positions, `[head_dim, PANEL]` each.
    keys: Vec<Vec<f32>>,
    /// Per head and per `PANEL` channels: `[positions, PANEL]`, padded with zero channels.
    values: Vec<Vec<f32>>,
}

impl Memory {
    /// An empty memory.
    pub fn new(kv_heads: usize, head_dim: usize) -> Memory {
        let slices = kv_heads * head_dim.div_ceil(PANEL);
        Memory { head_dim, len: 0, keys: vec![Vec::new(); kv_heads], values: vec![Vec::new(); slices] }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Does it hold nothing?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets every position from `len` on.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        self.len = len;
        let panel = PANEL * self.head_dim;
        for keys in &mut self.keys {
            keys.truncate(len.div_ceil(PANEL) * panel);
        }
        for values in &mut self.values {
            values.truncate(len * PANEL);
        }
    }

    /// Bytes held.
    pub fn size_bytes(&self) -> usize {
        self.keys.iter().chain(&self.values).map(|v| 4 * v.len()).sum()
    }

    /// Appends rows `from..to` of keys and values, both `[tokens, kv_heads * head_dim]`.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor, from: usize, to: usize) {
        let (hd, slices) = (self.head_dim, self.head_dim.div_ceil(PANEL));
        for row in from..to {
            let lane = self.len % PANEL;
            for (head, store) in self.keys.iter_mut().enumerate() {
                if lane == 0 {
                    store.resize(store.len() + PANEL * hd, 0.0);
                }
                let panel = store.len() - PANEL * hd;
                for (c, v) in keys.row(row)[head * hd..(head + 1) * hd].iter().enumerate() {
                    store[panel + c * PANEL + lane] = *v;
                }
            }
            for (i, store) in self.values.iter_mut().enumerate() {
                let (head, slice) = (i / slices, i % slices);
                let channels = &values.row(row)[head * hd..(head + 1) * hd];
                let part = &channels[slice * PANEL..hd.min((slice + 1) * PANEL)];
                store.extend_from_slice(part);
                store.resize(store.len() + PANEL - part.len(), 0.0);
            }
            self.len += 1;
        }
    }
}

/// The rows of one sequence in a batch, and its memory, which already holds their keys and values.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// First row of the batch.
    pub row: usize,
    /// Rows.
    pub rows: usize,
    /// Keys and values; the last row's is the last of them.
    pub memory: &'a Memory,
}

/// Queries that one task attends with.
const QUERIES: usize = 48;

/// Attends with every query of `q` `[tokens, heads * head_dim]` over its own sequence.
pub fn attention(q: &Tensor, segments: &[Segment<'_>], shape: &AttentionShape) -> Tensor {
    let mut out = Tensor::zeros(q.rows(), shape.heads * shape.head_dim);
    let shared = Shared::new(out.as_mut_slice());
    let tasks: Vec<(usize, usize, usize)> = (0..segments.len())
        .flat_map(|s| (0..segments[s].rows).step_by(QUERIES).map(move |first| (s, first)))
        .flat_map(|(s, first)| (0..shape.heads).map(move |head| (s, first, head)))
        .collect();
    tasks.into_par_iter().for_each_init(Block::default, |block, (s, first, head)| {
        let segment = &segments[s];
        let queries = QUERIES.min(segment.rows - first);
        block.attend(q, segment, first, queries, head, shape);
        let slices = shape.head_dim.div_ceil(PANEL);
        for i in 0..queries {
            let at = (segment.row + first + i) * out_cols(shape) + head * shape.head_dim;
            // SAFETY: `out` outlives the loop; this task alone writes this head's channels of these rows.
            let row = unsafe { shared.slice(at, shape.head_dim) };
            for (slice, part) in row.chunks_mut(PANEL).enumerate() {
                let from = (slice * queries + i) * PANEL;
                part.copy_from_slice(&block.mixed[from..from + part.len()]);
            }
        }
        debug_assert_eq!(block.mixed.len(), slices * queries * PANEL);
    });
    out
}

fn out_cols(shape: &AttentionShape) -> usize {
    shape.heads * shape.head_dim
}

/// Scratch of one worker.
#[derive(Default)]
struct Block {
    /// `[queries, positions]`.
    scores: Vec<f32>,
    /// `[queries, PANEL]`.
    part: Vec<f32>,
    /// Per `PANEL` channels: `[queries, PANEL]`.
    mixed: Vec<f32>,
}

impl Block {
    fn attend(
        &mut self,
        q: &Tensor,
        s: &Segment<'_>,
        first: usize,
        queries: usize,
        head: usize,
        shape: &AttentionShape,
    ) {
        let kv_head = head / (shape.heads / shape.kv_heads);
        let position = s.memory.len - s.rows + first;
        let visible = position + queries;
        let lowest = shape.window.map_or(0, |w| (position + 1).saturating_sub(w)) / PANEL * PANEL;
        let width = (visible - lowest).next_multiple_of(PANEL);
        self.scores.clear();
        self.scores.resize(queries * width, 0.0);
        self.score(q, s, first, queries, head, kv_head, (lowest, width), shape);
        for i in 0..queries {
            let row = &mut self.scores[i * width..(i + 1) * width];
            let last = position + i;
            let from = shape.window.map_or(0, |w| (last + 1).saturating_sub(w)).max(lowest) - lowest;
            softmax_between(row, from, last + 1 - lowest, shape);
        }
        let slices = shape.head_dim.div_ceil(PANEL);
        self.mixed.clear();
        self.mixed.resize(slices * queries * PANEL, 0.0);
        for slice in 0..slices {
            let values = &s.memory.values[kv_head * slices + slice];
            let product = PanelProduct {
                x: &self.scores,
                x_stride: width,
                tokens: queries,
                depth: visible - lowest,
                panel: &values[lowest * PANEL..],
            };
            (kernels().panel)(&product, &mut self.mixed[slice * queries * PANEL..(slice + 1) * queries * PANEL]);
        }
    }

    /// Raw scores of positions `lowest..lowest + width` for each query.
    #[expect(clippy::too_many_arguments, reason = "the coordinates of one block of scores")]
    fn score(
        &mut self,
        q: &Tensor,
        s: &Segment<'_>,
        first: usize,
        queries: usize,
        head: usize,
        kv_head: usize,
        (lowest, width): (usize, usize),
        shape: &AttentionShape,
    ) {
        let hd = shape.head_dim;
        let x = &q.as_slice()[(s.row + first) * q.cols() + head * hd..];
        for p in 0..width / PANEL {
            let panel = &s.memory.keys[kv_head][(lowest / PANEL + p) * PANEL * hd..];
            self.part.clear();
            self.part.resize(queries * PANEL, 0.0);
            let product = PanelProduct { x, x_stride: q.cols(), tokens: queries, depth: hd, panel };
            (kernels().panel)(&product, &mut self.part);
            for i in 0..queries {
                let to = i * width + p * PANEL;
                self.scores[to..to + PANEL].copy_from_slice(&self.part[i * PANEL..(i + 1) * PANEL]);
            }
        }
    }
}

/// Softmax of `row[from..to]`; zero elsewhere, so that unseen positions add nothing to the mixture.
fn softmax_between(row: &mut [f32], from: usize, to: usize, shape: &AttentionShape) {
    row[..from].fill(0.0);
    row[to..].fill(0.0);
    let row = &mut row[from..to];
    row.iter_mut().for_each(|v| *v *= shape.scale);
    if let Some(cap) = shape.soft_cap {
        (kernels().soft_cap)(row, cap);
    }
    let max = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let sum = (kernels().exp_sum)(row, max);
    let factor = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(rows: usize, cols: usize, step: f32) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i as f32 * step).sin()).collect())
    }

    fn naive(q: &Tensor, k: &Tensor, v: &Tensor, s: &AttentionShape) -> Tensor {
        let mut out = Tensor::zeros(q.rows(), q.cols());
        let (hd, past) = (s.head_dim, k.rows() - q.rows());
        for t in 0..q.rows() {
            for h in 0..s.heads {
                let kv = h / (s.heads / s.kv_heads) * hd;
                let last = past + t;
                let from = s.window.map_or(0, |w| (last + 1).saturating_sub(w));
                let score = |j: usize| {
                    let dot: f32 = (0..hd).map(|c| q.row(t)[h * hd + c] * k.row(j)[kv + c]).sum();
                    let x = dot * s.scale;
                    s.soft_cap.map_or(x, |cap| cap * (x / cap).tanh()).exp()
                };
                let e: Vec<f32> = (from..=last).map(score).collect();
                let sum: f32 = e.iter().sum();
                for c in 0..hd {
                    out.row_mut(t)[h * hd + c] =
                        e.iter().enumerate().map(|(i, e)| e / sum * v.row(from + i)[kv + c]).sum();
                }
            }
        }
        out
    }

    #[test]
    fn agrees_with_its_definition_and_does_not_depend_on_how_it_is_cut() {
        for (hd, window, soft_cap) in [(8, None, None), (40, Some(7), Some(2.0)), (64, Some(60), None)] {
            let s = AttentionShape { heads: 4, kv_heads: 2, head_dim: hd, scale: 0.3, window, soft_cap };
            let n = 101;
            let (q, k, v) = (wave(n, 4 * hd, 0.7), wave(n, 2 * hd, 0.3), wave(n, 2 * hd, 0.9));
            let mut memory = Memory::new(2, hd);
            memory.append(&k, &v, 0, n);
            let all = attention(&q, &[Segment { row: 0, rows: n, memory: &memory }], &s);
            for (a, b) in all.as_slice().iter().zip(naive(&q, &k, &v, &s).as_slice()) {
                assert!((a - b).abs() < 1e-5, "{hd} {window:?}: {a} {b}");
            }
            let mut step = Memory::new(2, hd);
            for t in 0..n {
                step.append(&k, &v, t, t + 1);
                let one = attention(&q.select_rows(&[t]), &[Segment { row: 0, rows: 1, memory: &step }], &s);
                assert_eq!(one.as_slice(), all.row(t), "position {t}");
            }
            step.truncate(50);
            step.append(&k, &v, 50, 51);
            let again = attention(&q.select_rows(&[50]), &[Segment { row: 0, rows: 1, memory: &step }], &s);
            assert_eq!(again.as_slice(), all.row(50));
        }
    }
}
