//! Products of activations with weights, packed or as they are stored.
//!
//! A weight that is not packed is decoded to floats panel by panel and multiplied in `f32`: what its storage says,
//! exactly. A packed one is multiplied as its form says, its inputs rounded to match.

use super::{
    Activation,
    passes::{MANY, passes},
    source::{Decode, Source, Wanted},
};
use crate::{
    Linear, LowRank, Rounding, Tensor, Weight,
    kernels::kernels,
    lines::Lines,
    packed::{InputKind, Inputs, Span, form::LANES},
    threads::{self, Shared},
};
use std::{cell::RefCell, ops::Range};

/// The input of products: its values, and what the products' kernels read, made once for all of them.
#[derive(Clone, Debug, Default)]
pub struct Operand {
    x: Tensor,
    packed: Vec<Made>,
    fresh: usize,
    /// What stands between the factors of a product of low rank.
    low: Option<Box<Operand>>,
}

/// What kernels of a kind read of inputs that were rounded first.
#[derive(Clone, Debug, Default)]
struct Made {
    rounding: Option<Rounding>,
    inputs: Inputs,
}

impl Made {
    fn is(&self, wanted: Wanted) -> bool {
        self.inputs.kind() == Some(wanted.kind) && self.rounding == wanted.rounding
    }
}

impl Operand {
    /// An input with these values.
    pub fn new(x: Tensor) -> Operand {
        Operand { x, ..Operand::default() }
    }

    /// The values, `[tokens, inputs]`.
    pub fn values(&self) -> &Tensor {
        &self.x
    }

    /// The values, to be written anew.
    pub fn values_mut(&mut self) -> &mut Tensor {
        self.fresh = 0;
        &mut self.x
    }

    /// Makes what a product reads, unless it is there.
    fn prepare(&mut self, wanted: Wanted) {
        if self.packed[..self.fresh].iter().any(|made| made.is(wanted)) {
            return;
        }
        // Memory that held this kind before fits best.
        let at = self.packed[self.fresh..].iter().position(|made| made.is(wanted)).map(|i| i + self.fresh);
        let at = at.unwrap_or(self.fresh);
        if at == self.packed.len() {
            self.packed.push(Made::default());
        }
        self.packed.swap(at, self.fresh);
        let made = &mut self.packed[self.fresh];
        made.rounding = wanted.rounding;
        match wanted.rounding {
            None => made.inputs.pack(&self.x, wanted.kind, kernels()),
            Some(rounding) => {
                let mut rounded = self.x.clone();
                rounding.apply(&mut rounded);
                made.inputs.pack(&rounded, wanted.kind, kernels());
            }
        }
        self.fresh += 1;
    }

    fn inputs(&self, wanted: Wanted) -> Option<&Inputs> {
        self.packed[..self.fresh].iter().find(|made| made.is(wanted)).map(|made| &made.inputs)
    }

    /// Tiles of tokens that a product's kernels take one after the other.
    fn passes(&self, wanted: Wanted) -> usize {
        self.inputs(wanted).map_or(0, |inputs| inputs.spans().len())
    }
}

/// Where a product goes.
pub struct Target<'a> {
    /// The map.
    pub linear: &'a Linear,
    /// Its output, `[tokens, outputs]`.
    pub out: &'a mut Tensor,
}

/// What becomes of what a product's output held before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Forget,
    Keep,
}

/// Applies a linear map to an input and adds the result to `out`.
///
/// # Panics
/// If sizes differ, which is the caller's fault.
pub fn add_product(x: &mut Operand, linear: &Linear, out: &mut Tensor) {
    assert_eq!((out.rows(), out.cols()), (x.x.rows(), linear.weight.rows()), "what a product is added to");
    match &linear.weight {
        Weight::LowRank(low) => low_rank(x, linear, low, out, Before::Keep),
        _ => run_products(x, [Product::of(linear, out)], Before::Keep),
    }
}

/// Applies linear maps to one input.
///
/// # Panics
/// If the inner sizes differ, which is the caller's fault.
pub fn products<const N: usize>(x: &mut Operand, targets: [Target<'_>; N]) {
    if targets.iter().all(|target| target.linear.weight.low_rank().is_none()) {
        return run_products(x, targets.map(|t| Product::of(t.linear, t.out)), Before::Forget);
    }
    for Target { linear, out } in targets {
        match &linear.weight {
            Weight::LowRank(low) => low_rank(x, linear, low, out, Before::Forget),
            _ => run_products(x, [Product::of(linear, out)], Before::Forget),
        }
    }
}

/// The product of what the factors leave, if that is anything, and then, added to it, that of the factors. These read inputs that are
/// not rounded: what a rounding would spoil is what they are there for (SVDQuant, arXiv 2411.05007).
fn low_rank(x: &mut Operand, linear: &Linear, weight: &LowRank, out: &mut Tensor, before: Before) {
    let bias = linear.bias.as_deref();
    if weight.rank() == 0 {
        return match weight.rest() {
            Some(rest) => {
                run_products(x, [Product { rounding: linear.rounding, ..Product::plain(rest, bias, out) }], before)
            }
            None => only_bias(x.x.rows(), weight.up().rows(), bias, out, before),
        };
    }
    let mut low = x.low.take().unwrap_or_default();
    run_products(x, [Product::plain(weight.down(), None, low.values_mut())], Before::Forget);
    let before = match weight.rest() {
        Some(rest) => {
            run_products(x, [Product { rounding: linear.rounding, ..Product::plain(rest, None, out) }], before);
            Before::Keep
        }
        None => before,
    };
    run_products(&mut low, [Product::plain(weight.up(), bias, out)], before);
    x.low = Some(low);
}

/// The outputs of a matrix of zeros.
fn only_bias(tokens: usize, rows: usize, bias: Option<&[f32]>, out: &mut Tensor, before: Before) {
    if before == Before::Forget {
        out.reset(tokens, rows);
        super::clear(out.as_mut_slice());
    }
    (0..tokens).for_each(|token| add_slice(out.row_mut(token), bias));
}

/// A product of a matrix that is not of low rank.
struct Product<'a> {
    weight: &'a Weight,
    bias: Option<&'a [f32]>,
    rounding: Option<Rounding>,
    out: &'a mut Tensor,
}

impl<'a> Product<'a> {
    fn of(linear: &'a Linear, out: &'a mut Tensor) -> Product<'a> {
        Product { rounding: linear.rounding, ..Product::plain(&linear.weight, linear.bias.as_deref(), out) }
    }

    /// Of inputs as they are.
    fn plain(weight: &'a Weight, bias: Option<&'a [f32]>, out: &'a mut Tensor) -> Product<'a> {
        Product { weight, bias, rounding: None, out }
    }
}

fn run_products<const N: usize>(x: &mut Operand, products: [Product<'_>; N], before: Before) {
    let tokens = x.x.rows();
    let jobs = products.map(|product| {
        let source = Source::of(product.weight, product.rounding, tokens);
        assert_eq!(x.x.cols(), product.weight.cols(), "inner sizes of a product");
        if before == Before::Forget {
            product.out.reset(tokens, source.rows());
        }
        (source, product.bias, Shared::new(product.out.as_mut_slice()))
    });
    let run = |job: usize, first: usize, panels: usize, inputs: &Inputs| {
        let (source, bias, out) = &jobs[job];
        let spans = inputs.spans();
        SCRATCH.with_borrow_mut(|s| {
            source.decode(first, panels, &mut s.decode);
            let (rows, row) = (source.rows(), first * LANES);
            // The last panel may have lanes without a row.
            let whole = if row + panels * LANES <= rows { panels } else { panels - 1 };
            let mut tile = source.tile(first, &s.decode);
            (tile.steps, tile.add) = ([LANES, rows], before == Before::Keep);
            passes(source.form(), source.length(), whole, spans, &mut |panels, span, steps| {
                // SAFETY: `out` outlives the section; this task alone writes these rows' outputs of these tokens.
                let out = unsafe { out.at(span.first * rows + row + panels.start * LANES) };
                // SAFETY: as above, and these panels have a row for every lane.
                unsafe { tile.part(panels, steps, inputs.tile(span), span.width, out) }
            });
            for span in spans {
                let at = row + whole * LANES;
                if whole < panels {
                    source.run(inputs, span, first + whole, panels - whole, &s.decode, &mut s.first);
                    for (t, y) in s.first.as_chunks::<LANES>().0.iter().enumerate() {
                        // SAFETY: as above.
                        let out = unsafe { out.slice((span.first + t) * rows + at, rows - at) };
                        match before {
                            Before::Forget => out.copy_from_slice(&y[..rows - at]),
                            Before::Keep => add_slice(out, Some(&y[..rows - at])),
                        }
                    }
                }
                if let Some(bias) = bias {
                    let bias = &bias[row..rows.min(row + panels * LANES)];
                    for t in span.first..span.first + span.width {
                        // SAFETY: as above.
                        add_slice(unsafe { out.slice(t * rows + row, bias.len()) }, Some(bias));
                    }
                }
            }
        });
    };
    let sources = jobs.each_ref().map(|j| &j.0);
    let wanted = sources.each_ref().map(|s| s.wanted());
    let plain = |w: &Wanted| w.rounding.is_none() && w.kind == wanted[0].kind;
    if tokens >= MANY_BLOCKS * BLOCK && sources.iter().all(|s| s.is_packed_floats()) && wanted.iter().all(plain) {
        return each_block(&x.x, wanted[0].kind, sources, &run);
    }
    wanted.iter().for_each(|w| x.prepare(*w));
    let x = &*x;
    let most = wanted.iter().map(|w| x.passes(*w)).max().unwrap_or(0);
    Cut::new(tokens, most, sources).each(&|job, first, panels| {
        x.inputs(wanted[job]).into_iter().for_each(|inputs| run(job, first, panels, inputs));
    });
}

/// Tokens of a task where there are many, a multiple of every width of a tile.
const BLOCK: usize = 96;
/// Blocks from which on tokens are shared out.
const MANY_BLOCKS: usize = 6;

/// Runs `task(job, first panel, panels, inputs)` for blocks of tokens. A task packs its inputs itself: they stay in the
/// second-level cache while the panels pass over them.
fn each_block<const N: usize>(
    x: &Tensor,
    kind: InputKind,
    sources: [&Source<'_>; N],
    task: &(dyn Fn(usize, usize, usize, &Inputs) + Sync),
) {
    let (tokens, blocks) = (x.rows(), x.rows().div_ceil(BLOCK));
    // Where there are more workers than blocks, several share one and its panels; no sum depends on it.
    let parts = (threads::TASKS * threads::count()).div_ceil(blocks);
    threads::each(blocks * parts, &|i| {
        let (block, part) = (i / parts, i % parts);
        INPUTS.with_borrow_mut(|inputs| {
            inputs.pack_rows(x, block * BLOCK..tokens.min((block + 1) * BLOCK), kind, kernels());
            for (job, source) in sources.iter().enumerate() {
                let panels = source.rows().div_ceil(LANES);
                // An even number: kernels run panels in pairs.
                let share = panels.div_ceil(parts).next_multiple_of(2);
                let (first, end) = (panels.min(part * share), panels.min((part + 1) * share));
                if first < end {
                    task(job, first, end - first, inputs);
                }
            }
        });
    });
}

/// `out = activation(gate(x)) * up(x)`, without either product in memory.
///
/// # Panics
/// If sizes or kinds of inputs (see [`InputKind`]) differ, which is the caller's fault.
pub fn gated(x: &mut Operand, activation: Activation, gate: &Linear, up: &Linear, out: &mut Tensor) {
    assert!(x.x.cols() == gate.weight.cols() && x.x.cols() == up.weight.cols(), "inner sizes of a product");
    assert_eq!(gate.weight.rows(), up.weight.rows(), "outputs of gate and up");
    let rows = gate.weight.rows();
    out.reset(x.x.rows(), rows);
    let sources = [gate, up].map(|linear| Source::of(&linear.weight, linear.rounding, x.x.rows()));
    assert_eq!(sources[0].wanted(), sources[1].wanted(), "kinds of the inputs of gate and up");
    sources.iter().for_each(|s| x.prepare(s.wanted()));
    let shared = Shared::new(out.as_mut_slice());
    let x = &*x;
    Cut::new(x.x.rows(), x.passes(sources[0].wanted()), [&sources[0]]).each(&|_, first, panels| {
        let inputs = sources.each_ref().map(|s| x.inputs(s.wanted()));
        let [Some(left), Some(right)] = inputs else { return };
        SCRATCH.with_borrow_mut(|s| {
            let Scratch { decode, decode_second, first: a, second: b } = s;
            sources[0].decode(first, panels, decode);
            sources[1].decode(first, panels, decode_second);
            for (span, other) in left.spans().iter().zip(right.spans()) {
                sources[0].run(left, span, first, panels, decode, a);
                sources[1].run(right, other, first, panels, decode_second, b);
                for (sums, bias) in [(&mut *a, &gate.bias), (&mut *b, &up.bias)] {
                    let Some(bias) = bias else { continue };
                    each_sum(first..first + panels, rows, span, |_, row, at| {
                        add_slice(&mut sums[at.clone()], Some(&bias[row..row + at.len()]));
                    });
                }
                activation.apply_slice(a);
                a.iter_mut().zip(b.iter()).for_each(|(a, b)| *a *= b);
                each_sum(first..first + panels, rows, span, |token, row, at| {
                    // SAFETY: `out` outlives the section; this task alone writes these rows' outputs.
                    unsafe { shared.slice(token * rows + row, at.len()) }.copy_from_slice(&a[at]);
                });
            }
        });
    });
}

/// Runs `run(token, first row, place)` for the sums of a tile of panels, which lie as [`Source::run`] leaves them: a panel has
/// [`LANES`] rows, or what is left of them.
fn each_sum(panels: Range<usize>, rows: usize, span: &Span, mut run: impl FnMut(usize, usize, Range<usize>)) {
    for t in 0..span.width {
        for (i, panel) in panels.clone().enumerate() {
            let (row, at) = (panel * LANES, (i * span.width + t) * LANES);
            run(span.first + t, row, at..at + LANES.min(rows - row));
        }
    }
}

fn add_slice(x: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        x.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
    }
}

/// `y = x W^T`: `[tokens, inputs]` and `[outputs, inputs]` give `[tokens, outputs]`.
///
/// Each output is one sum in rising input order with `f32` accumulation, whatever the batch.
///
/// # Panics
/// If the inner sizes differ, which is the caller's fault.
pub fn matmul(x: &Tensor, w: &Weight) -> Tensor {
    let linear = Linear::new(w.clone());
    let mut y = Tensor::default();
    products(&mut Operand::new(x.clone()), [Target { linear: &linear, out: &mut y }]);
    y
}

/// What a worker uses again from task to task.
#[derive(Default)]
struct Scratch {
    decode: Decode,
    decode_second: Decode,
    first: Lines<f32>,
    second: Lines<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// Inputs that a worker packs for itself.
    static INPUTS: RefCell<Inputs> = RefCell::default();
}

/// Products cut into tasks of neighbouring panels.
struct Cut<const N: usize> {
    jobs: [Job; N],
    /// Bytes of all of them.
    bytes: usize,
    workers: usize,
    /// Are there so few multiplications that no other worker should hear of them?
    small: bool,
}

/// One of the products of a cut.
#[derive(Clone, Copy)]
struct Job {
    panels: usize,
    panel_bytes: usize,
    /// Panels that are multiplied with all tokens before the next ones are.
    group: usize,
}

/// Bytes of weights that stay in the second-level cache while all tokens pass over them.
const RESIDENT: usize = 128 << 10;
/// The same for few tokens, whose second pass should not push out what is read ahead.
const READ_AHEAD: usize = 80 << 10;
/// Products of fewer multiplications are done before another worker has heard of them.
const SMALL: usize = 1 << 15;
/// Tasks of a worker, in 32nds of its share. Each begins with memory that no prefetcher reads yet, and writes beside
/// what other workers write, so the first one is long, and the last ones so short that all workers end together.
const ROUNDS: [usize; 5] = [20, 6, 3, 2, 1];
/// Panels that some kernels run together: a task is a multiple of it where there are enough.
const TOGETHER: usize = 4;

impl<const N: usize> Cut<N> {
    /// `passes`: how often the tokens' tiles pass over a weight.
    fn new(tokens: usize, passes: usize, sources: [&Source<'_>; N]) -> Cut<N> {
        let jobs = sources.map(|s| {
            let (panels, panel_bytes) = (s.rows().div_ceil(LANES), s.panel_bytes().max(1));
            let group = match s.is_read_in_place() {
                true if passes == 1 => panels,
                _ => (if tokens < MANY { READ_AHEAD } else { RESIDENT } / panel_bytes).clamp(1, 16),
            };
            Job { panels, panel_bytes, group: group.max(1) }
        });
        let bytes: usize = jobs.iter().map(|j| j.panels * j.panel_bytes).sum();
        Cut { jobs, bytes, workers: threads::count(), small: tokens * bytes < SMALL }
    }

    /// Runs `task(job, first panel, panels)` until every panel of every job is done once.
    fn each(&self, task: &(dyn Fn(usize, usize, usize) + Sync)) {
        if self.small || self.workers == 1 {
            for (job, j) in self.jobs.iter().enumerate() {
                (0..j.panels).step_by(j.group).for_each(|first| task(job, first, j.group.min(j.panels - first)));
            }
            return;
        }
        threads::each_in_turn(self.workers * ROUNDS.len(), &|i| self.share(i, task));
    }

    /// Task `i`: a run of bytes over all jobs.
    fn share(&self, i: usize, task: &(dyn Fn(usize, usize, usize) + Sync)) {
        let (from, to) = (self.bound(i), self.bound(i + 1));
        let mut start = 0;
        for (job, j) in self.jobs.iter().enumerate() {
            let unit = if j.panels < 4 * TOGETHER { 1 } else { TOGETHER };
            // The first panel that begins at this byte or after it, in whole units.
            let panel = |at: usize| at.saturating_sub(start).div_ceil(j.panel_bytes * unit).saturating_mul(unit);
            let (first, end) = (panel(from).min(j.panels), panel(to).min(j.panels));
            for first in (first..end).step_by(j.group) {
                task(job, first, j.group.min(end - first));
            }
            start += j.panels * j.panel_bytes;
        }
    }

    /// The byte at which task `i` begins.
    fn bound(&self, i: usize) -> usize {
        let (round, place) = (i / self.workers, i % self.workers);
        let before: usize = ROUNDS[..round].iter().sum();
        let whole: usize = ROUNDS.iter().sum();
        let parts = before * self.workers + place * ROUNDS.get(round).unwrap_or(&0);
        (self.bytes as u128 * parts as u128 / (whole * self.workers) as u128) as usize
    }
}

/// The same product as plain loops: the twin that tests hold [`matmul`] to.
pub fn matmul_naive(x: &Tensor, w: &Weight) -> Tensor {
    let dense = w.to_tensor();
    let mut y = Tensor::zeros(x.rows(), w.rows());
    for t in 0..x.rows() {
        for o in 0..w.rows() {
            y.row_mut(t)[o] = x.row(t).iter().zip(dense.row(o)).map(|(a, b)| a * b).sum();
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Storage, grid::Grid};

    fn wave(rows: usize, cols: usize, step: f32) -> Tensor {
        Tensor::from_vec(rows, cols, (0..rows * cols).map(|i| (i as f32 * step).sin()).collect())
    }

    #[test]
    fn agrees_with_plain_loops_in_every_storage() {
        let mut storages = vec![Storage::F32, Storage::F16, Storage::Bf16];
        storages.extend(Grid::GGUF.iter().map(|g| Storage::Grid(*g)));
        storages.push(Storage::Grid(Grid::Int { bits: 3, group: 32, zero: crate::grid::Zero::Middle }));
        for storage in storages {
            for (tokens, outputs) in [(1, 1), (3, 70), (40, 33)] {
                let (x, w) = (wave(tokens, 768, 0.13), wave(outputs, 768, 0.71));
                let w = Weight::encode(&w, storage, None).unwrap();
                let (got, want) = (matmul(&x, &w), matmul_naive(&x, &w));
                for (a, b) in got.as_slice().iter().zip(want.as_slice()) {
                    assert!((a - b).abs() < 2e-4 * (1.0 + b.abs()), "{storage} {a} {b}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let (x, w) = (wave(37, 600, 0.13), Weight::from_tensor(wave(50, 600, 0.7)));
        let all = matmul(&x, &w);
        for t in [0, 11, 36] {
            assert_eq!(matmul(&x.select_rows(&[t]), &w).as_slice(), all.row(t));
        }
    }
}
