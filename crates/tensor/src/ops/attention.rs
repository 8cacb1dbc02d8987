//! Causal attention over a memory of keys and values, chunk by chunk (arXiv 2205.14135): no score outlives its chunk.
//!
//! Queries of the heads that share keys run side by side in one tile. Chunks are counted from the start of the
//! text, so a query's sums depend on its position alone.

use super::{
    memory::{CHUNK, Memory, Widened},
    passes::MANY,
};
use crate::{
    Tensor,
    kernels::{Softening, Tile, kernels},
    lines::Lines,
    packed::{Form, form::LANES, join, put_together, regroup},
    threads::{self, Shared},
};
use std::cell::RefCell;

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

impl AttentionShape {
    /// First position that a query at `position` sees.
    pub(super) fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }
}

/// Attends with every query of `q` `[tokens, heads * head_dim]` over its own sequence; `out` takes its shape.
///
/// Sequence `i` has `rows[i]` rows of the batch, and its memory already holds their keys and values. `log_sums`, where it
/// is wanted, becomes the logarithm of the sum of the exponentials of each query's scores, `[tokens, heads]`.
pub fn attention(
    q: &Tensor,
    rows: &[usize],
    memories: &[Memory],
    shape: &AttentionShape,
    out: &mut Tensor,
    log_sums: Option<&mut Tensor>,
) {
    out.reset(q.rows(), shape.heads * shape.head_dim);
    let shared = Shared::new(out.as_mut_slice());
    let log_sums = log_sums.map(|sums| {
        sums.reset(q.rows(), shape.heads);
        Shared::new(sums.as_mut_slice())
    });
    let group = shape.heads / shape.kv_heads;
    let form = memories.first().map_or(Form::F32, |m| m.panels().form);
    let widths = kernels().floats.widths_of(form);
    let widest = widths[widths.len() - 1];
    // Few queries are shared out among the workers; how they are cut does not touch their sums.
    let width = widest.min((q.rows() * shape.heads).div_ceil(threads::count())).max(1);
    let tiles = |rows: usize| (rows * group).div_ceil(width) * shape.kv_heads;
    let run = |mut i: usize| {
        let mut row = 0;
        for (memory, rows) in memories.iter().zip(rows) {
            if i < tiles(*rows) {
                let (head, first) = (i % shape.kv_heads, i / shape.kv_heads * width);
                let count = width.min(rows * group - first);
                let block = Block { q, row, rows: *rows, memory, shape, head, first, count };
                return SCRATCH.with_borrow_mut(|scratch| block.attend(scratch, shared, log_sums));
            }
            i -= tiles(*rows);
            row += rows;
        }
    };
    threads::each(rows.iter().map(|r| tiles(*r)).sum(), &run);
}

/// Queries of one sequence whose heads share keys and values: query `i` is that of row `i / group` and head
/// `i % group`.
struct Block<'a> {
    q: &'a Tensor,
    /// First row of the sequence in the batch.
    row: usize,
    /// Its rows.
    rows: usize,
    memory: &'a Memory,
    shape: &'a AttentionShape,
    head: usize,
    first: usize,
    count: usize,
}

/// What a worker uses again from block to block.
#[derive(Default)]
struct Scratch {
    /// Packed queries, then packed probabilities.
    queries: Lines<u32>,
    probabilities: Lines<u32>,
    /// One head's query, scaled, and its brain floats.
    query: Vec<f32>,
    pairs: Lines<u32>,
    /// `[CHUNK / LANES][width][LANES]`.
    scores: Lines<f32>,
    /// `[slices][width][LANES]`.
    mixed: Lines<f32>,
    softmax: Vec<Softening>,
    highest: Vec<f32>,
    widened: Widened,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Writes a query as token `t` of the inputs of a tile of `width` tokens: a word is a float, or two brain floats.
fn put(form: Form, out: &mut [u32], width: usize, t: usize, values: &[f32], pairs: &mut [u32]) {
    if form == Form::F32 {
        let words = out[t..].iter_mut().step_by(width);
        words.zip(values).for_each(|(o, v)| *o = v.to_bits());
    } else {
        let pairs = &mut pairs[..values.len().div_ceil(2)];
        (kernels().brain_pairs)(values, pairs);
        if kernels().floats.together == 1 {
            out[t..].iter_mut().step_by(width).zip(pairs).for_each(|(o, v)| *o = *v);
        } else {
            put_together(pairs, t, width, out);
        }
    }
}

impl Block<'_> {
    /// Row of the batch and query head of query `i`.
    fn place(&self, i: usize) -> (usize, usize) {
        let group = self.shape.heads / self.shape.kv_heads;
        let i = self.first + i;
        (self.row + i / group, self.head * group + i % group)
    }

    /// Position of query `i` in its text.
    fn position(&self, i: usize) -> usize {
        let past = self.memory.len() - self.rows;
        past + self.place(i).0 - self.row
    }

    fn attend(&self, s: &mut Scratch, out: Shared<f32>, log_sums: Option<Shared<f32>>) {
        let (hd, panels) = (self.shape.head_dim, self.memory.panels());
        let floats = &kernels().floats;
        let width = floats.widths_of(panels.form).iter().copied().find(|w| *w >= self.count).unwrap_or(self.count);
        let together = floats.together_of(panels.form);
        s.queries.zeros(panels.key_steps().next_multiple_of(together) * width);
        s.pairs.resize(hd.max(CHUNK / 2 * width));
        for i in 0..self.count {
            let (row, head) = self.place(i);
            s.query.clear();
            s.query.extend(self.q.row(row)[head * hd..(head + 1) * hd].iter().map(|v| v * self.shape.scale));
            put(panels.form, &mut s.queries, width, i, &s.query, &mut s.pairs);
        }
        s.mixed.zeros(panels.slices() * width * LANES);
        s.softmax.clear();
        let unseen = Softening { from: 0, to: 0, highest: f32::NEG_INFINITY, sum: 0.0, shrink: 1.0 };
        s.softmax.resize(self.count, unseen);
        s.highest.resize(self.count, 0.0);
        s.probabilities.zeros(panels.value_steps() * width);
        let first = self.shape.first_seen(self.position(0)) / CHUNK;
        for chunk in first..=self.position(self.count - 1) / CHUNK {
            self.chunk(s, chunk, width);
        }
        for i in 0..self.count {
            let (row, head) = self.place(i);
            let Softening { highest, sum, .. } = s.softmax[i];
            let factor = 1.0 / sum;
            if let Some(log_sums) = log_sums {
                // SAFETY: as below.
                let log_sum = unsafe { log_sums.slice(row * self.shape.heads + head, 1) };
                log_sum[0] = highest + sum.ln();
            }
            // SAFETY: `out` outlives the section; this task alone writes this head of this row.
            let out = unsafe { out.slice((row * self.shape.heads + head) * hd, hd) };
            for (slice, out) in out.chunks_mut(LANES).enumerate() {
                let mixed = &s.mixed[(slice * width + i) * LANES..];
                out.iter_mut().zip(mixed).for_each(|(o, v)| *o = v * factor);
            }
        }
    }

    /// Adds what the queries see of one chunk.
    fn chunk(&self, s: &mut Scratch, chunk: usize, width: usize) {
        let panels = self.memory.panels();
        let mut widened = std::mem::take(&mut s.widened);
        let (keys, values) = self.memory.chunk(chunk, self.head, &mut widened);
        s.scores.resize(CHUNK * width);
        let tile = Tile {
            form: panels.form,
            weights: keys.as_ptr(),
            panel_bytes: panels.key_panel(),
            panels: CHUNK / LANES,
            length: panels.key_steps(),
            inputs: s.queries.as_ptr().cast(),
            next: s.queries.as_ptr().cast(),
            width,
            out: s.scores.as_mut_ptr(),
            steps: Tile::block(width),
            add: false,
        };
        // SAFETY: a chunk of keys holds so many panels, and the queries and scores are of this width.
        unsafe { run_tile(tile, self.rows >= MANY) }
        self.soften(s, chunk, width);
        let tile = Tile {
            weights: values.as_ptr(),
            panel_bytes: panels.value_panel(),
            panels: panels.slices(),
            length: panels.value_steps(),
            inputs: s.probabilities.as_ptr().cast(),
            next: s.probabilities.as_ptr().cast(),
            out: s.mixed.as_mut_ptr(),
            add: true,
            ..tile
        };
        // SAFETY: a chunk of values holds so many panels, and the probabilities and mixtures are of this width.
        unsafe { run_tile(tile, self.rows >= MANY) }
        s.widened = widened;
    }

    /// Turns the scores of a chunk into the inputs of the product with its values, relative to the highest score of
    /// each query so far.
    fn soften(&self, s: &mut Scratch, chunk: usize, width: usize) {
        let start = chunk * CHUNK;
        for (i, query) in s.softmax.iter_mut().enumerate() {
            let position = self.position(i);
            query.to = (position + 1).saturating_sub(start).min(CHUNK);
            query.from = self.shape.first_seen(position).saturating_sub(start).min(query.to);
        }
        (kernels().floats.soften)(&mut s.scores, width, self.shape.soft_cap, &mut s.softmax, &mut s.highest);
        for (i, query) in s.softmax.iter().enumerate().filter(|(_, q)| q.shrink != 1.0) {
            for slice in s.mixed.chunks_exact_mut(width * LANES) {
                slice[i * LANES..(i + 1) * LANES].iter_mut().for_each(|v| *v *= query.shrink);
            }
        }
        if self.count < width {
            // The tokens that only fill the tile have had scores of zero.
            for panel in s.scores.chunks_exact_mut(width * LANES) {
                panel[self.count * LANES..].fill(0.0);
            }
        }
        if self.memory.panels().form == Form::F32 {
            for (panel, inputs) in s.probabilities.chunks_exact_mut(LANES * width).enumerate() {
                let rows = &s.scores[panel * LANES * width..];
                (kernels().codes.pack_words)(bytemuck::cast_slice(rows), LANES, width, inputs);
            }
        } else {
            (kernels().brain_pairs)(&s.scores, &mut s.pairs);
            if kernels().floats.together == 1 {
                regroup::<{ LANES / 2 }>(&s.pairs, width, &mut s.probabilities);
            } else {
                join::<{ LANES / 2 }>(&s.pairs, width, &mut s.probabilities);
            }
        }
    }
}

/// Bytes of panels that are run side by side: a head so narrow has its keys in the cache.
const NARROW: usize = 1 << 10;

/// Runs a tile panel by panel: keys and values come from memory in one run, which prefetchers follow at twice the
/// speed of several panels side by side. Narrow ones, which no prefetcher has to find, and those that many queries have brought
/// into the caches run side by side.
///
/// # Safety
/// As of [`crate::kernels::Kernels::tile`].
unsafe fn run_tile(tile: Tile, many: bool) {
    if many || tile.panel_bytes <= NARROW {
        // SAFETY: the caller's.
        return unsafe { kernels().tile(&tile) };
    }
    for i in 0..tile.panels {
        // SAFETY: the caller's tile holds so many panels and their sums.
        unsafe {
            let weights = tile.weights.add(i * tile.panel_bytes);
            kernels().tile(&Tile { weights, panels: 1, out: tile.out.add(i * tile.steps[0]), ..tile });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::KeyValue, *};

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
            for (format, bound) in
                [(KeyValue::F32, 1e-5), (KeyValue::Bf16, 1e-2), (KeyValue::Int8, 2e-2), (KeyValue::Int4, 0.12)]
            {
                let s = AttentionShape { heads: 4, kv_heads: 2, head_dim: hd, scale: 0.3, window, soft_cap };
                let n = 101;
                let (q, k, v) = (wave(n, 4 * hd, 0.7), wave(n, 2 * hd, 0.3), wave(n, 2 * hd, 0.9));
                let attend = |q: &Tensor, rows: usize, memory: &Memory| {
                    let mut out = Tensor::default();
                    attention(q, &[rows], std::slice::from_ref(memory), &s, &mut out, None);
                    out
                };
                let mut memory = Memory::new(format, 2, hd);
                memory.append(&k, &v, None, 0, n);
                let all = attend(&q, n, &memory);
                for (a, b) in all.as_slice().iter().zip(naive(&q, &k, &v, &s).as_slice()) {
                    assert!((a - b).abs() < bound, "{format} {hd} {window:?}: {a} {b}");
                }
                let mut step = Memory::new(format, 2, hd);
                for t in 0..n {
                    step.append(&k, &v, None, t, t + 1);
                    assert_eq!(attend(&q.select_rows(&[t]), 1, &step).as_slice(), all.row(t), "{format} position {t}");
                }
                step.truncate(50);
                step.append(&k, &v, None, 50, 51);
                assert_eq!(attend(&q.select_rows(&[50]), 1, &step).as_slice(), all.row(50));
            }
        }
    }
}
