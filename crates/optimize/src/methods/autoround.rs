//! AutoRound (arXiv 2309.05516): which way each weight rounds, and how far the levels of its scales reach, are learned block by
//! block by the signs of gradients, so that the block returns what the original's does.
//!
//! A weight is moved by up to half a step of its levels before it is rounded, and the ends of each sub-block's levels are
//! multiplied by factors of their own; gradients pass the rounding straight through. The changed model's block learns on what
//! the changed model gives it, against what the original's block returns to the original.
//!
//! Sub-blocks whose scales are whole multiples of a block's keep the scales that fit, and there, as from five bits on, little is
//! left to gain: `gptaq` does more for K-quants.
//!
//! Matrices outside of blocks are rewritten by `gptq`, which needs to know their inputs alone; a table that tokens are only looked
//! up in is rounded to nearest, as by any method.

use super::{Method, Plan, Rewrite, gptaq, gptq::Gptq, options, rtn::Rtn};
use crate::{Batch, Block, BlockRewrite, Error, Result, progress};
use model::{BlockBackward, Model, Parameters, Site, Spec};
use serde::Deserialize;
use std::collections::BTreeMap;
use tensor::{
    Storage, Tensor, Weight,
    grid::{Grid, Moved, Scales},
};
use train::Precision;

/// The method.
pub static AUTOROUND: Method = Method {
    name: "autoround",
    about: "Learns block by block which way each weight rounds and where scales end; head and tied embedding by gptq.",
    paper: "arXiv 2309.05516",
    cost: "200 steps of 8 texts through each block, forth and back; 32 bytes a weight of one block and 12 x dim a token",
    build: |o| Ok(Plan::EachBlock(Box::new(AutoRound::read(o)?))),
};

#[derive(Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Steps of each block.
    steps: usize,
    /// Texts of a step.
    batch: usize,
    /// How far a step goes at the beginning, in steps between levels, and in parts of the levels' ends; `1 / steps` where
    /// nothing is said. It falls to nothing by a straight line.
    lr: Option<f64>,
    /// Do the ends of the levels learn as well, where each sub-block has a scale of its own?
    minmax: bool,
    /// What weights and scales are before they learn.
    start: Start,
    /// In which numbers products run.
    precision: Precision,
}

impl Default for Options {
    fn default() -> Self {
        Options { steps: 200, batch: 8, lr: None, minmax: true, start: Start::Range, precision: Precision::F32 }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Start {
    /// The paper's: rounded to nearest on levels that reach the largest weights; sub-blocks that share a scale of scales have
    /// those that fit best.
    Range,
    /// Rounded to nearest on the scales that fit best.
    Rtn,
    /// What `gptq` makes of the block.
    Gptq,
    /// What `gptaq` makes of it.
    Gptaq,
}

struct AutoRound {
    options: Options,
    outside: Gptq,
    first: Box<dyn Rewrite>,
}

impl AutoRound {
    fn read(table: toml::Table) -> Result<AutoRound> {
        let options = options::<Options>("autoround", table)?;
        let bad = |reason: &str| Error::Options { method: "autoround".into(), reason: reason.into() };
        if options.steps == 0 || options.batch == 0 {
            return Err(bad("`steps` and `batch` are at least 1"));
        }
        if options.lr.is_some_and(|lr| !(lr > 0.0 && lr <= 0.5)) {
            return Err(bad("`lr` must be above 0 and at most 0.5, half a step between levels"));
        }
        if options.precision == Precision::Fp16 {
            return Err(bad("`precision` is f32 or bf16: fp16 has no scale of the loss here"));
        }
        let first: Box<dyn Rewrite> = match options.start {
            Start::Range | Start::Rtn => Box::new(Rtn {}),
            Start::Gptq => Box::new(Gptq::default()),
            Start::Gptaq => Box::new(gptaq::read(toml::Table::new())?),
        };
        Ok(AutoRound { options, outside: Gptq::default(), first })
    }
}

impl BlockRewrite for AutoRound {
    fn outside(&self) -> &dyn Rewrite {
        &self.outside
    }

    fn first(&self) -> &dyn Rewrite {
        self.first.as_ref()
    }

    fn block(&self, block: &Block<'_>) -> Result<BTreeMap<Site, Weight>> {
        let mut lesson = Lesson::new(&self.options, block)?;
        if lesson.matrices.is_empty() || block.texts.is_empty() {
            return Ok(BTreeMap::new());
        }
        // Where nothing is gained, what the block began with stays; the paper's start is never stored, so it is made here.
        let gained = lesson.learn()?;
        if gained || self.options.start == Start::Range { lesson.codes() } else { Ok(BTreeMap::new()) }
    }

    fn memory(&self, spec: &Spec, longest: usize) -> usize {
        let weights = |layer: u16| -> usize {
            let own = spec.matrices().into_iter().filter(|site| site.layer == Some(layer));
            own.filter_map(|site| spec.shape(site)).map(|[rows, cols]| rows * cols).sum()
        };
        let kept = |b: &model::BlockSpec| 4 * (12 * spec.dim + 10 * b.heads * b.head_dim + 5 * b.hidden);
        let kept = spec.blocks.iter().map(kept).max().unwrap_or(0);
        40 * (0..spec.layers()).map(weights).max().unwrap_or(0) + self.options.batch * longest * kept
    }

    fn passes(&self, mean: f64, total: usize) -> f64 {
        3.0 * (self.options.steps * self.options.batch) as f64 * mean + 3.0 * total as f64
    }
}

/// Most and least of what the ends of levels are multiplied by.
const FACTORS: [f32; 2] = [0.5, 1.5];

/// How near to the next level a weight begins that `gptq` rounded another way than the nearest.
const REACH: f32 = 0.5;

/// One matrix that learns how to be rounded.
struct Matrix {
    site: Site,
    grid: Grid,
    /// What is moved and then rounded.
    x: Tensor,
    /// Scales before they learn.
    scales: Scales,
    /// Has each sub-block a scale of its own? Whole multiples of a block's scale stay as they fit: moving one moves all.
    free: bool,
    now: Choice,
    best: Choice,
}

/// What is learned of a matrix.
#[derive(Clone)]
struct Choice {
    /// What values are moved by, in steps, -0.5 to 0.5.
    by: Tensor,
    /// What the lowest and the highest level of each sub-block are multiplied by; where these have no offset of their own the
    /// second is that of the scale.
    ends: [Vec<f32>; 2],
}

impl Matrix {
    fn new(options: &Options, site: Site, dense: &Tensor, grid: Grid, start: &Weight) -> Matrix {
        let free = grid.block_len_in(dense.cols()) == grid.sub_len_in(dense.cols());
        let range = options.start == Start::Range && free;
        let scales = match range {
            true => grid.range_scales(dense),
            false => grid.scales_of(start.bytes(), dense.rows(), dense.cols()),
        };
        let x = match options.start {
            Start::Range | Start::Rtn => dense.clone(),
            _ => grid.held_to(&start.to_tensor(), dense, &scales, REACH),
        };
        let ends = vec![1.0; scales.scale.len()];
        let now = Choice { by: Tensor::zeros(x.rows(), x.cols()), ends: [ends.clone(), ends] };
        Matrix { site, grid, x, scales, free, best: now.clone(), now }
    }

    /// The scales of a choice.
    fn scales(&self, choice: &Choice, into: &mut Scales) {
        into.clone_from(&self.scales);
        let [low, high] = &choice.ends;
        if !self.free {
            return;
        }
        if !self.grid.has_offsets() {
            into.scale.iter_mut().zip(high).for_each(|(s, h)| *s *= h);
            return;
        }
        let highest = self.highest();
        for ((scale, offset), (low, high)) in into.scale.iter_mut().zip(&mut into.offset).zip(low.iter().zip(high)) {
            let top = (*offset + *scale * highest) * high;
            *offset *= low;
            *scale = (top - *offset) / highest;
        }
    }

    fn highest(&self) -> f32 {
        ((1u32 << self.grid.code_bits()) - 1) as f32
    }

    /// A step of `lr` against the signs of the gradients of what is learned; `gradient` is of the levels.
    fn step(&mut self, gradient: &mut Tensor, lr: f32, options: &Options, scales: &mut Scales, slopes: &mut Scales) {
        self.scales(&self.now, scales);
        slopes.clone_from(scales);
        let moved = Moved { x: &self.x, by: Some(&self.now.by) };
        self.grid.levels_gradient(moved, scales, gradient, slopes);
        for (by, slope) in self.now.by.as_mut_slice().iter_mut().zip(gradient.as_slice()) {
            *by = (*by - lr * sign(*slope)).clamp(-0.5, 0.5);
        }
        if !options.minmax || !self.free {
            return;
        }
        let most = if options.start == Start::Range { 1.0 } else { FACTORS[1] };
        let (has_offsets, highest) = (self.grid.has_offsets(), self.highest());
        for sub in 0..self.scales.scale.len() {
            let (scale, offset) = (self.scales.scale[sub], self.scales.offset[sub]);
            let (of_scale, of_offset) = (slopes.scale[sub], slopes.offset[sub]);
            let of_ends = match has_offsets {
                true => [offset * (of_offset - of_scale / highest), (offset + scale * highest) * of_scale / highest],
                false => [0.0, scale * of_scale],
            };
            for (ends, slope) in self.now.ends.iter_mut().zip(of_ends) {
                ends[sub] = (ends[sub] - lr * sign(slope)).clamp(FACTORS[0], most);
            }
        }
    }
}

/// -1, 0 or 1.
fn sign(x: f32) -> f32 {
    if x > 0.0 {
        1.0
    } else if x < 0.0 {
        -1.0
    } else {
        0.0
    }
}

/// A block at school.
struct Lesson<'a> {
    options: &'a Options,
    block: &'a Block<'a>,
    working: Model,
    back: BlockBackward,
    matrices: Vec<Matrix>,
    gradient: Parameters,
    batch: Batch,
    /// What the outputs miss, `[tokens, dim]`.
    missed: Tensor,
    levels: Tensor,
    scales: Scales,
    slopes: Scales,
}

/// Which choice runs.
#[derive(Clone, Copy)]
enum Run {
    Now,
    Best,
}

impl<'a> Lesson<'a> {
    fn new(options: &'a Options, block: &'a Block<'a>) -> Result<Lesson<'a>> {
        let mut working = block.model.clone();
        working.key_value = options.precision.key_value();
        let back = BlockBackward::new(&working, options.precision.form());
        let (mut matrices, mut gradient) = (Vec::new(), Parameters::default());
        for (site, dense, storage) in block.matrices {
            let Storage::Grid(grid) = *storage else { continue };
            let start = &block.model.linear(*site)?.weight;
            if start.storage() != *storage || !grid.fits(dense.cols()) {
                continue;
            }
            if grid.span() > 1 {
                let reason = format!(
                    "{storage} rounds eight columns together, which autoround does not learn; take gptq or gptaq"
                );
                return Err(Error::Site { site: *site, reason });
            }
            matrices.push(Matrix::new(options, *site, dense, grid, start));
            gradient.matrices.insert(*site, Tensor::zeros(dense.rows(), dense.cols()));
        }
        Ok(Lesson {
            options,
            block,
            working,
            back,
            matrices,
            gradient,
            batch: Batch::default(),
            missed: Tensor::default(),
            levels: Tensor::default(),
            scales: Scales::default(),
            slopes: Scales::default(),
        })
    }

    /// Gives the working model the levels of what is learned.
    fn refresh(&mut self, run: Run) -> Result<()> {
        for matrix in &self.matrices {
            let choice = match run {
                Run::Now => &matrix.now,
                Run::Best => &matrix.best,
            };
            matrix.scales(choice, &mut self.scales);
            self.levels.reset(matrix.x.rows(), matrix.x.cols());
            let moved = Moved { x: &matrix.x, by: Some(&choice.by) };
            matrix.grid.levels(moved, &self.scales, &mut self.levels);
            self.back.refresh(&mut self.working, matrix.site, &self.levels)?;
        }
        Ok(())
    }

    /// The summed squares of what the outputs of some texts miss, text by text; what they miss is left.
    fn errors(&mut self, which: &[usize]) -> Result<Vec<f64>> {
        self.block.texts.lay(which, &mut self.batch);
        let Batch { rows, inputs, outputs } = &self.batch;
        self.missed.copy_from(self.back.forward(&self.working, self.block.layer, rows, inputs)?);
        self.missed.as_mut_slice().iter_mut().zip(outputs.as_slice()).for_each(|(m, o)| *m -= o);
        let mut row = 0;
        let of_text = |rows: &usize| {
            let own = row..row + rows;
            row += rows;
            own.flat_map(|row| self.missed.row(row)).map(|m| f64::from(*m) * f64::from(*m)).sum()
        };
        Ok(rows.iter().map(of_text).collect())
    }

    /// The same of every text, with one choice.
    fn errors_of_all(&mut self, run: Run) -> Result<Vec<f64>> {
        self.refresh(run)?;
        let mut all = Vec::new();
        let order: Vec<usize> = (0..self.block.texts.len()).collect();
        for which in order.chunks(self.options.batch) {
            progress::check()?;
            all.extend(self.errors(which)?);
        }
        Ok(all)
    }

    /// Learns; what is best stays in each matrix. Was anything gained, over all texts?
    fn learn(&mut self) -> Result<bool> {
        let before = self.errors_of_all(Run::Now)?;
        let (steps, mut least) = (self.options.steps, f64::INFINITY);
        let lr = self.options.lr.unwrap_or(1.0 / steps as f64);
        for step in 0..=steps {
            progress::check()?;
            let which = self.which(step);
            self.refresh(Run::Now)?;
            let error: f64 = self.errors(&which)?.iter().sum();
            // Texts differ in how hard they are: what counts is how much less is missed than before.
            let part = error / which.iter().map(|text| before[*text]).sum::<f64>().max(f64::MIN_POSITIVE);
            if part < least {
                least = part;
                self.matrices.iter_mut().for_each(|m| m.best.clone_from(&m.now));
            }
            if step < steps {
                self.step((lr * (1.0 - step as f64 / steps as f64)) as f32)?;
            }
        }
        let after = self.errors_of_all(Run::Best)?;
        Ok(after.iter().sum::<f64>() < before.iter().sum())
    }

    /// The texts of a step: all in a seeded order, and then all in another.
    fn which(&self, step: usize) -> Vec<usize> {
        let texts = self.block.texts.len();
        let seed = self.block.seed.wrapping_add(u64::from(self.block.layer) << 32);
        let batch = self.options.batch.min(texts);
        let mut which = Vec::with_capacity(batch);
        let mut order: (usize, Vec<usize>) = (usize::MAX, Vec::new());
        for place in step * batch..(step + 1) * batch {
            let round = place / texts;
            if order.0 != round {
                let key = |text: usize| model::uniform(seed, (round * texts + text) as u64).to_bits();
                let mut all: Vec<usize> = (0..texts).collect();
                all.sort_by_key(|text| (key(*text), *text));
                order = (round, all);
            }
            which.push(order.1[place % texts]);
        }
        which
    }

    /// One step back and against the signs.
    fn step(&mut self, lr: f32) -> Result<()> {
        let scale = 2.0 / self.missed.as_slice().len() as f32;
        self.missed.as_mut_slice().iter_mut().for_each(|m| *m *= scale);
        self.gradient.matrices.values_mut().for_each(|g| tensor::ops::clear(g.as_mut_slice()));
        self.back.backward(&self.working, self.block.layer, &self.missed, &mut self.gradient)?;
        for matrix in &mut self.matrices {
            let gradient = self.gradient.matrix(matrix.site)?;
            matrix.step(gradient, lr, self.options, &mut self.scales, &mut self.slopes);
        }
        Ok(())
    }

    /// The best codes of each matrix.
    fn codes(&self) -> Result<BTreeMap<Site, Weight>> {
        let mut scales = Scales::default();
        let encode = |matrix: &Matrix| {
            matrix.scales(&matrix.best, &mut scales);
            let moved = Moved { x: &matrix.x, by: Some(&matrix.best.by) };
            let weight = matrix.grid.encode_levels(moved, &scales).map_err(super::at(matrix.site))?;
            Ok((matrix.site, weight))
        };
        self.matrices.iter().map(encode).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Stats, Texts, builtin,
        data::{self, Cutting, SEPARATOR},
    };
    use model::{Flow, Gpt, Role};
    use tensor::{Linear, threads};

    const LAYER: u16 = 1;

    /// The sample and some stories on their way, before its second block.
    fn before(texts: usize) -> (Model, Vec<Flow>) {
        let gpt = Gpt::open(&builtin::unpack().unwrap()).unwrap();
        let cutting = Cutting { separator: SEPARATOR.into(), context: 96, blocks: false };
        let documents = data::documents(&builtin::text(11), &gpt.tokenizer, &cutting).unwrap();
        let sequences: Vec<&[u32]> = documents[..texts].iter().map(|d| &d.ids[..]).collect();
        let start = |part: &[&[u32]]| {
            let mut flow = gpt.model.start(part, &vec![0; part.len()]).unwrap();
            gpt.model.block_once(0, &mut flow, &mut ()).unwrap();
            flow
        };
        let flows = sequences.chunks(7).map(start).collect();
        (gpt.model, flows)
    }

    fn after(model: &Model, flows: &[Flow]) -> Vec<Flow> {
        let one = |flow: &Flow| {
            let mut flow = flow.clone();
            model.block_once(LAYER, &mut flow, &mut ()).unwrap();
            flow
        };
        flows.iter().map(one).collect()
    }

    fn with(model: &Model, weights: &BTreeMap<Site, Weight>) -> Model {
        let mut model = model.clone();
        for (site, weight) in weights {
            model.replace(*site, Linear::new(weight.clone())).unwrap();
        }
        model
    }

    /// The summed squares of what the block's outputs miss.
    fn missed(model: &Model, flows: &[Flow], outputs: &[Flow]) -> f64 {
        let of = |(a, b): (&Flow, &Flow)| -> f64 {
            let pairs = a.residual().as_slice().iter().zip(b.residual().as_slice());
            pairs.map(|(a, b)| f64::from(a - b) * f64::from(a - b)).sum()
        };
        after(model, flows).iter().zip(outputs).map(of).sum()
    }

    fn method(options: &str) -> AutoRound {
        AutoRound::read(options.parse().unwrap()).unwrap()
    }

    /// What a method makes of the matrices of the block that a storage can hold, and what it begins with.
    fn learned(
        method: &AutoRound,
        model: &Model,
        flows: &[Flow],
        outputs: &[Flow],
        storage: Storage,
    ) -> [BTreeMap<Site, Weight>; 2] {
        let Storage::Grid(grid) = storage else { panic!("{storage} is no grid") };
        let own = model.linears.iter().filter(|(site, l)| site.layer == Some(LAYER) && grid.fits(l.weight.cols()));
        let matrices: Vec<(Site, Tensor, Storage)> =
            own.map(|(site, l)| (*site, l.weight.to_tensor(), storage)).collect();
        let roles = [Role::Q, Role::O, Role::Up, Role::Down];
        let mut gather = crate::Gather::new(method.first().needs(), roles.map(|r| Site::of(LAYER, r)).to_vec());
        for flow in flows {
            model.block_once(LAYER, &mut flow.clone(), &mut gather).unwrap();
        }
        let none = Stats::default();
        let first = |(site, dense, _): &(Site, Tensor, Storage)| {
            let same = match site.role {
                Role::K | Role::V => Role::Q,
                Role::Gate => Role::Up,
                other => other,
            };
            let stats = gather.stats.get(&Site::of(LAYER, same)).unwrap_or(&none);
            (*site, method.first().matrix(*site, dense, storage, stats).unwrap())
        };
        let first: BTreeMap<Site, Weight> = matrices.iter().map(first).collect();
        let texts = Texts::before(flows).after(outputs);
        let begun = with(model, &first);
        let block = Block { layer: LAYER, model: &begun, matrices: &matrices, texts, seed: 5 };
        let mut learned = first.clone();
        learned.extend(method.block(&block).unwrap());
        [learned, first]
    }

    #[test]
    fn a_block_that_learns_to_round_misses_less_on_every_grid_and_clearly_where_scales_learn_too() {
        let (model, flows) = before(40);
        let outputs = after(&model, &flows);
        let plain = Grid::GGUF.iter().filter(|grid| grid.span() == 1);
        let mut storages: Vec<Storage> = plain.map(|g| Storage::Grid(*g)).collect();
        let others = ["int3g32", "int2g32a", "int4g64z", "int4", "nf4", "fp8_e4m3"];
        storages.extend(others.map(|n| Storage::parse(n).unwrap()));
        let method = method("steps = 40\nbatch = 4\nstart = 'rtn'");
        let mut bad = Vec::new();
        for storage in storages {
            let [learned, rounded] = learned(&method, &model, &flows, &outputs, storage);
            assert!(learned.values().all(|w| w.storage() == storage) && !learned.is_empty(), "{storage}");
            let [learned, rounded] = [learned, rounded].map(|w| missed(&with(&model, &w), &flows, &outputs));
            println!("{storage}: {:.3} of what rounding misses", learned / rounded);
            // Little is left to learn where scales are fine and stay as they fit, or levels are many.
            let Storage::Grid(grid) = storage else { continue };
            let open = grid.code_bits() < 5 && grid.block_len_in(256) == grid.sub_len_in(256);
            if learned > if open { 0.95 * rounded } else { rounded } {
                bad.push((storage.name(), learned / rounded));
            }
        }
        assert!(bad.is_empty(), "{bad:?}");
    }

    #[test]
    fn every_start_and_switch_gains_and_threads_change_nothing() {
        let (model, flows) = before(40);
        let outputs = after(&model, &flows);
        let storage = Storage::parse("int3g32").unwrap();
        let rounded = {
            let [_, rounded] = learned(&method("steps = 1\nstart = 'rtn'"), &model, &flows, &outputs, storage);
            missed(&with(&model, &rounded), &flows, &outputs)
        };
        for options in ["", "start = 'rtn'", "start = 'gptq'", "minmax = false", "precision = 'bf16'"] {
            let method = method(&format!("steps = 40\nbatch = 4\n{options}"));
            let run = || learned(&method, &model, &flows, &outputs, storage);
            let [many, first] = run();
            let [alone, _] = threads::limited(1, run);
            let bytes =
                |all: &BTreeMap<Site, Weight>| -> Vec<Vec<u8>> { all.values().map(|w| w.bytes().to_vec()).collect() };
            assert!(bytes(&many) == bytes(&alone), "{options}: threads change the codes");
            let [error, begun] = [many, first].map(|w| missed(&with(&model, &w), &flows, &outputs));
            println!("{options:?}: {:.3} of what rounding misses, {:.3} before", error / rounded, begun / rounded);
            // GPTQ leaves little to learn in so few steps.
            let most = if options.contains("gptq") { 1.0 } else { 0.5 };
            assert!(error < 0.5 * rounded && error <= most * begun, "{options}: {error}, {begun} before, {rounded}");
        }
    }

    #[test]
    fn options_that_make_no_sense_are_told() {
        let wrong = |options: &str| AutoRound::read(options.parse().unwrap()).err().unwrap().to_string();
        for (options, says) in [
            ("steps = 0", "at least 1"),
            ("batch = 0", "at least 1"),
            ("lr = 0.7", "`lr`"),
            ("lr = nan", "`lr`"),
            ("start = 'awq'", "unknown variant `awq`"),
            ("precision = 'fp16'", "f32 or bf16"),
            ("iters = 200", "unknown field `iters`"),
        ] {
            let told = wrong(options);
            assert!(told.contains("autoround") && told.contains(says), "{options}: {told}");
        }
    }
}
