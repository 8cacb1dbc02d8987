//! The gradient of causal attention, block by block (arXiv 2205.14135): scores are made again, never kept.
//!
//! A task owns a head of keys and values of one sequence and goes through its queries in rising order, so no sum
//! depends on the number of workers.

use super::AttentionShape;
use crate::{
    Tensor,
    kernels::{Tile, kernels},
    packed::{Form, form::LANES},
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
/// output.
///
/// # Panics
/// If shapes differ, which is the caller's fault.
pub fn attention_gradient(a: Attended<'_>, dout: &Tensor, [dq, dk, dv]: [&mut Tensor; 3]) {
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
        let head = Head { a, dout, first, rows: a.rows[sequence], head, out: shared };
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

/// Tiles of queries that run together: enough that what they add to keys and values is worth its loads and stores.
const TILES: usize = 4;

/// One head of keys and values of one sequence, and the query heads that read it.
struct Head<'a> {
    a: Attended<'a>,
    dout: &'a Tensor,
    first: usize,
    rows: usize,
    head: usize,
    out: [Shared<f32>; 3],
}

/// What a worker uses again from head to head. Panels are `[panel][step][LANES]`, inputs `[tile][step][width]`.
#[derive(Default)]
struct Scratch {
    /// Keys and values as panels of positions, keys as panels of channels.
    keys: Vec<f32>,
    values: Vec<f32>,
    keys_across: Vec<f32>,
    /// Queries and the output's gradient as inputs, and as panels of channels.
    queries: Vec<f32>,
    grads: Vec<f32>,
    queries_across: Vec<f32>,
    grads_across: Vec<f32>,
    /// `[tile of queries][panel of positions][width][LANES]`.
    scores: Vec<f32>,
    changes: Vec<f32>,
    /// Inputs of the products that they enter.
    inputs: Vec<f32>,
    asked: Vec<Asked>,
    /// `[channel panel][width][LANES]`.
    dq: Vec<f32>,
    /// `[tile of positions][channel panel][width][LANES]`.
    dk: Vec<f32>,
    dv: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Head<'_> {
    fn run(&self, s: &mut Scratch) {
        let (shape, rows) = (self.a.shape, self.rows);
        let (hd, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let widths = kernels().floats.widths;
        let width = widths[widths.len() - 1];
        let narrow = widths.iter().copied().rfind(|w| LANES.is_multiple_of(*w)).unwrap_or(1);
        let slices = hd.div_ceil(LANES);
        let own = self.head * hd..(self.head + 1) * hd;
        let key = |t: usize| &self.a.k.row(self.first + t)[own.clone()];
        let value = |t: usize| &self.a.v.row(self.first + t)[own.clone()];
        panels_of_rows(rows, hd, &key, &mut s.keys);
        panels_of_rows(rows, hd, &value, &mut s.values);
        panels_of_columns(rows, hd, &key, &mut s.keys_across);
        let positions = rows.next_multiple_of(LANES);
        for sums in [&mut s.dk, &mut s.dv] {
            sums.clear();
            sums.resize(positions * slices * LANES, 0.0);
        }
        for member in 0..group {
            let head = self.head * group + member;
            let own = head * hd..(head + 1) * hd;
            let query = |t: usize| &self.a.q.row(self.first + t)[own.clone()];
            let grad = |t: usize| &self.dout.row(self.first + t)[own.clone()];
            inputs_of_rows(rows, hd, width, &query, shape.scale, &mut s.queries);
            inputs_of_rows(rows, hd, width, &grad, 1.0, &mut s.grads);
            panels_of_columns(rows, hd, &query, &mut s.queries_across);
            panels_of_columns(rows, hd, &grad, &mut s.grads_across);
            self.ask(head, width, &mut s.asked);
            let tiles = rows.div_ceil(width);
            for tile in (0..tiles).step_by(TILES) {
                self.block(s, head, tile..tiles.min(tile + TILES), [width, narrow]);
            }
        }
        for (out, sums, factor) in [(self.out[1], &s.dk, shape.scale), (self.out[2], &s.dv, 1.0)] {
            for t in 0..rows {
                let at = ((self.first + t) * shape.kv_heads + self.head) * hd;
                // SAFETY: the gradients outlive the section; this task alone writes this head of this sequence.
                let out = unsafe { out.slice(at, hd) };
                for (slice, out) in out.chunks_mut(LANES).enumerate() {
                    let sums = &sums[((t / narrow * slices + slice) * narrow + t % narrow) * LANES..];
                    out.iter_mut().zip(sums).for_each(|(o, v)| *o = v * factor);
                }
            }
        }
    }

    /// What each query sees and is corrected by; those that only fill the last tile see nothing.
    fn ask(&self, head: usize, width: usize, asked: &mut Vec<Asked>) {
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
        asked.resize(self.rows.next_multiple_of(width), Asked { from: 0, to: 0, log_sum: 0.0, delta: 0.0 });
    }

    /// A few tiles of queries against all positions that they see.
    fn block(&self, s: &mut Scratch, head: usize, tiles: Range<usize>, [width, narrow]: [usize; 2]) {
        let (shape, hd) = (self.a.shape, self.a.shape.head_dim);
        let slices = hd.div_ceil(LANES);
        let seen = self.rows.min(tiles.end * width);
        let panels = seen.div_ceil(LANES);
        // Panels before the first that any of them sees are left out.
        let skipped = shape.first_seen(tiles.start * width) / LANES;
        let size = panels * width * LANES;
        for scores in [&mut s.scores, &mut s.changes] {
            scores.clear();
            scores.resize(tiles.len() * size, 0.0);
        }
        for (i, tile) in tiles.clone().enumerate() {
            let from = i * size + skipped * width * LANES;
            for (inputs, weights, out) in [(&s.queries, &s.keys, &mut s.scores), (&s.grads, &s.values, &mut s.changes)]
            {
                let weights = &weights[skipped * hd * LANES..panels * hd * LANES];
                multiply(weights, hd, hd, &inputs[tile * hd * width..], width, &mut out[from..(i + 1) * size]);
            }
            (kernels().attention_gradient)(
                &mut s.scores[from..(i + 1) * size],
                &mut s.changes[from..(i + 1) * size],
                skipped * LANES,
                shape.soft_cap,
                &s.asked[tile * width..(tile + 1) * width],
            );
            self.queries(s, head, tile, skipped..panels, i * size, width);
        }
        let steps = tiles.len() * width;
        for position in (skipped * LANES..panels * LANES).step_by(narrow) {
            let lanes = position % LANES..position % LANES + narrow;
            let at = position / narrow * slices * narrow * LANES;
            for (values, across, out) in
                [(&s.changes, &s.queries_across, &mut s.dk), (&s.scores, &s.grads_across, &mut s.dv)]
            {
                s.inputs.clear();
                for i in 0..tiles.len() {
                    let panel = &values[i * size + position / LANES * width * LANES..][..width * LANES];
                    panel.chunks_exact(LANES).for_each(|row| s.inputs.extend_from_slice(&row[lanes.clone()]));
                }
                let rows = self.rows;
                let held = steps.min(rows - tiles.start * width);
                let weights = &across[tiles.start * width * LANES..];
                let out = &mut out[at..at + slices * narrow * LANES];
                multiply(weights, rows, held, &s.inputs, narrow, out);
            }
        }
    }

    /// The gradients of the queries of a tile.
    fn queries(&self, s: &mut Scratch, head: usize, tile: usize, panels: Range<usize>, at: usize, width: usize) {
        let (shape, hd) = (self.a.shape, self.a.shape.head_dim);
        s.inputs.clear();
        s.inputs.resize(panels.len() * LANES * width, 0.0);
        let changes = &s.changes[at + panels.start * width * LANES..at + panels.end * width * LANES];
        for (panel, inputs) in changes.chunks_exact(width * LANES).zip(s.inputs.chunks_exact_mut(width * LANES)) {
            for (t, row) in panel.as_chunks::<LANES>().0.iter().enumerate() {
                for k in 0..LANES {
                    inputs[k * width + t] = row[k];
                }
            }
        }
        s.dq.clear();
        s.dq.resize(hd.div_ceil(LANES) * width * LANES, 0.0);
        let steps = self.rows.min(panels.end * LANES) - panels.start * LANES;
        multiply(&s.keys_across[panels.start * LANES * LANES..], self.rows, steps, &s.inputs, width, &mut s.dq);
        for t in tile * width..self.rows.min((tile + 1) * width) {
            let at = ((self.first + t) * shape.heads + head) * hd;
            // SAFETY: the gradient outlives the section; this task alone writes this head of this sequence.
            let out = unsafe { self.out[0].slice(at, hd) };
            for (slice, out) in out.chunks_mut(LANES).enumerate() {
                let sums = &s.dq[(slice * width + t - tile * width) * LANES..];
                out.iter_mut().zip(sums).for_each(|(o, v)| *o = v * shape.scale);
            }
        }
    }
}

/// `out += weights inputs`: panels of `stride` steps of which `steps` are multiplied; `out` is
/// `[panels][width][LANES]`.
fn multiply(weights: &[f32], stride: usize, steps: usize, inputs: &[f32], width: usize, out: &mut [f32]) {
    let panels = out.len() / (width * LANES);
    assert!(
        steps <= stride && weights.len() + stride * LANES >= panels * stride * LANES + steps * LANES,
        "weights of a tile"
    );
    assert!(inputs.len() >= steps * width, "inputs of a tile");
    let tile = Tile {
        form: Form::F32,
        weights: weights.as_ptr().cast(),
        panel_bytes: stride * LANES * 4,
        panels,
        length: steps,
        inputs: inputs.as_ptr().cast(),
        width,
        out: out.as_mut_ptr(),
        steps: Tile::block(width),
        add: true,
    };
    // SAFETY: the lengths are asserted above, and the width is one of the table's.
    unsafe { kernels().tile(&tile) }
}

/// Rows as lanes: `[rows / LANES][cols][LANES]`.
fn panels_of_rows<'a>(rows: usize, cols: usize, row: &dyn Fn(usize) -> &'a [f32], out: &mut Vec<f32>) {
    out.clear();
    out.resize(rows.next_multiple_of(LANES) * cols, 0.0);
    for t in 0..rows {
        let panel = &mut out[t / LANES * LANES * cols..];
        panel[t % LANES..].iter_mut().step_by(LANES).zip(row(t)).for_each(|(o, v)| *o = *v);
    }
}

/// Columns as lanes: `[cols / LANES][rows][LANES]`.
fn panels_of_columns<'a>(rows: usize, cols: usize, row: &dyn Fn(usize) -> &'a [f32], out: &mut Vec<f32>) {
    out.clear();
    out.resize(cols.next_multiple_of(LANES) * rows, 0.0);
    for t in 0..rows {
        for (slice, part) in row(t).chunks(LANES).enumerate() {
            out[(slice * rows + t) * LANES..][..part.len()].copy_from_slice(part);
        }
    }
}

/// Rows as the tokens of tiles: `[rows / width][cols][width]`, times a factor.
fn inputs_of_rows<'a>(
    rows: usize,
    cols: usize,
    width: usize,
    row: &dyn Fn(usize) -> &'a [f32],
    factor: f32,
    out: &mut Vec<f32>,
) {
    out.clear();
    out.resize(rows.next_multiple_of(width) * cols, 0.0);
    for t in 0..rows {
        let tile = &mut out[t / width * width * cols..];
        tile[t % width..].iter_mut().step_by(width).zip(row(t)).for_each(|(o, v)| *o = v * factor);
    }
}
