//! The walker: it alone loops over blocks. Stage by stage it gathers statistics, rewrites the weights that
//! read them, and runs those products once with the result, so that what follows is calibrated on what the
//! changed model really computes.

use crate::{
    Block, BlockRewrite, Error, Gather, Needs, Result, Rewrite, Stats, Texts,
    calibrate::reader,
    data::batches,
    gradients::Gradients,
    journal::Journal,
    methods::Factors,
    progress::{self, Progress},
    recipe::Built,
    stats::{Known, shared},
};
use model::{Flow, Model, Point, Site, Stage, Tap};
use std::collections::{BTreeMap, BTreeSet};
use tensor::{Linear, LowRank, Storage, Tensor, Weight, ops::Gram};
use train::ranks;

/// Tokens of a batch of calibration data.
pub const BATCH: usize = 2048;

/// Where a step knows the inputs of matrices from.
#[derive(Clone, Copy)]
pub enum Inputs<'a> {
    /// From texts that run through the model as it changes; they may be empty where the method needs no data.
    Texts(&'a [Vec<u32>]),
    /// From what was gathered before.
    Known(&'a Known),
}

/// Runs one step of a method over the model; `gradients` are empty where it needs none.
///
/// # Errors
/// If a weight cannot be treated as asked, or the job was interrupted.
pub fn walk(
    model: &mut Model,
    step: &Built,
    (inputs, gradients): (Inputs<'_>, &Gradients),
    seed: u64,
    journal: &mut Journal,
    progress: &dyn Progress,
) -> Result<()> {
    let needs = step.plan.needs();
    let (calibration, known) = match inputs {
        Inputs::Texts(texts) => (texts, None),
        Inputs::Known(known) => (&[][..], Some(known)),
    };
    if needs.data() && calibration.is_empty() && known.is_none() {
        return Err(Error::Asked(format!("method {} needs calibration data: give --data FILE", step.method)));
    }
    let mut walker = Walker {
        base: model.clone(),
        method: step.plan.each_matrix()?,
        blocks: step.plan.each_block(),
        needs,
        choice: &step.choice,
        calibration: if needs.data() { calibration } else { &[] },
        known,
        gradients,
        seed,
        journal,
        progress,
    };
    walker.run(model)
}

/// Shows a method every matrix that is chosen, with its statistics, in the model as it is.
///
/// # Errors
/// As [`walk`], or what the method says.
pub fn look(
    model: &Model,
    choice: &BTreeMap<Site, Storage>,
    method: &dyn Rewrite,
    (inputs, gradients): (Inputs<'_>, &Gradients),
    seed: u64,
    progress: &dyn Progress,
) -> Result<()> {
    let (calibration, known) = match inputs {
        Inputs::Texts(texts) => (texts, None),
        Inputs::Known(known) => (&[][..], Some(known)),
    };
    let (base, needs) = (model.clone(), method.needs());
    let mut journal = Journal::none();
    let journal = &mut journal;
    let mut walker =
        Walker { base, method, blocks: None, needs, choice, calibration, known, gradients, seed, journal, progress };
    walker.run(&mut model.clone())
}

struct Walker<'a> {
    /// The model as it was before this step.
    base: Model,
    method: &'a dyn Rewrite,
    /// What rewrites blocks, where that is another.
    blocks: Option<&'a dyn BlockRewrite>,
    needs: Needs,
    choice: &'a BTreeMap<Site, Storage>,
    calibration: &'a [Vec<u32>],
    known: Option<&'a Known>,
    gradients: &'a Gradients,
    seed: u64,
    journal: &'a mut Journal,
    progress: &'a dyn Progress,
}

impl Walker<'_> {
    fn run(&mut self, model: &mut Model) -> Result<()> {
        let layers = model.spec.layers();
        self.progress.begin("rewriting blocks", u64::from(layers) + 2);
        self.edge(model, "embed", &[Site::EMBED, Site::POSITION])?;
        self.progress.advance(1);
        let mut flows = self.start(model)?;
        let mut originals = if self.needs.original() { self.start(&self.base)? } else { Vec::new() };
        for layer in 0..layers {
            progress::check()?;
            let before = self.journal.holds(&block_name(layer));
            self.block(model, layer, &mut flows, &mut originals)?;
            if before { self.progress.done_before(1) } else { self.progress.advance(1) }
        }
        if !model.spec.tied {
            let mut stats = self.head_stats(model, &flows)?;
            let shifted = originals.iter().filter(|_| self.method.needs().shift);
            for (flow, original) in flows.iter().zip(shifted) {
                let rows: Vec<usize> = (0..flow.tokens()).collect();
                stats.add_shift(&model.final_rows(flow, &rows)?, &self.base.final_rows(original, &rows)?);
            }
            self.unit(model, "head", &[(Site::HEAD, stats)])?;
        }
        self.progress.advance(1);
        Ok(())
    }

    fn start(&self, model: &Model) -> Result<Vec<Flow>> {
        let flow = |range: std::ops::Range<usize>| {
            let sequences: Vec<&[u32]> = self.calibration[range].iter().map(|s| &s[..]).collect();
            Ok(model.start(&sequences, &vec![0; sequences.len()])?)
        };
        batches(self.calibration, BATCH).into_iter().map(flow).collect()
    }

    /// The tables that tokens are looked up in. A tied one is the head as well: its statistics are those of
    /// the head's inputs in the model as it was.
    fn edge(&mut self, model: &mut Model, name: &str, sites: &[Site]) -> Result<()> {
        let mut units = Vec::new();
        for site in sites.iter().filter(|s| self.choice.contains_key(s)) {
            let tied = *site == Site::EMBED && model.spec.tied && self.method.needs().data();
            units.push((*site, if tied && !self.journal.holds(name) { self.tied_stats()? } else { Stats::default() }));
        }
        self.unit(model, name, &units)
    }

    fn tied_stats(&self) -> Result<Stats> {
        if let Some(known) = self.known {
            return known.of(Site::EMBED);
        }
        let mut flows = self.start(&self.base)?;
        for flow in &mut flows {
            progress::check()?;
            for layer in 0..self.base.spec.layers() {
                self.base.block_once(layer, flow, &mut ())?;
            }
            flow.rest();
        }
        self.head_stats(&self.base, &flows)
    }

    fn head_stats(&self, model: &Model, flows: &[Flow]) -> Result<Stats> {
        if let Some(known) = self.known.filter(|_| self.method.needs().data()) {
            return known.of(Site::HEAD);
        }
        let mut stats = Stats::default();
        if self.method.needs().data() {
            for flow in flows {
                let rows: Vec<usize> = (0..flow.tokens()).collect();
                stats.add(self.method.needs(), &model.final_rows(flow, &rows)?);
            }
        }
        Ok(stats)
    }

    /// `originals` are the flows of the model as it was, where the method looks at them.
    fn block(&mut self, model: &mut Model, layer: u16, flows: &mut [Flow], originals: &mut [Flow]) -> Result<()> {
        let name = block_name(layer);
        let done = self.journal.read(&name, model)?;
        let matrices = if done { Vec::new() } else { self.together(model, layer)? };
        let texts = (!matrices.is_empty()).then(|| Texts::before(flows));
        for flow in flows.iter_mut() {
            model.enter(layer, flow)?;
        }
        for original in originals.iter_mut() {
            self.base.enter(layer, original)?;
        }
        let mut balanced = Vec::new();
        for stage in Stage::ALL {
            if !done {
                balanced.extend(self.stage(model, layer, stage, flows, originals)?);
            }
            for original in originals.iter_mut() {
                advance(&self.base, layer, stage, original)?;
            }
            for flow in flows.iter_mut() {
                advance(model, layer, stage, flow)?;
            }
        }
        if let Some(texts) = texts {
            self.rewrite_block(model, layer, &matrices, texts.after(originals), flows)?;
        }
        if !done {
            let sites: Vec<Site> = self.choice.keys().filter(|s| s.layer == Some(layer)).copied().collect();
            self.journal.write(&name, model, &sites, &balanced)?;
        }
        Ok(())
    }

    /// The matrices of a block that are rewritten together, as they are.
    fn together(&self, model: &Model, layer: u16) -> Result<Vec<(Site, Tensor, Storage)>> {
        let own = self.choice.iter().filter(|(site, _)| self.blocks.is_some() && site.layer == Some(layer));
        own.map(|(site, storage)| Ok((*site, model.linear(*site)?.weight.to_tensor(), *storage))).collect()
    }

    /// Rewrites matrices of a block together and runs it once more with the result.
    fn rewrite_block(
        &self,
        model: &mut Model,
        layer: u16,
        matrices: &[(Site, Tensor, Storage)],
        texts: Texts<'_>,
        flows: &mut [Flow],
    ) -> Result<()> {
        let Some(method) = self.blocks else { return Ok(()) };
        let block = Block { layer, model, matrices, texts, seed: self.seed };
        let weights = method.block(&block)?;
        let inputs = block.texts.inputs();
        for (site, weight) in weights {
            let bias = model.linear(site)?.bias.clone();
            model.replace(site, Linear::with_bias(weight, bias))?;
        }
        for (flow, inputs) in flows.iter_mut().zip(inputs) {
            flow.stand_at(&inputs);
            model.enter(layer, flow)?;
            for stage in Stage::ALL {
                advance(model, layer, stage, flow)?;
            }
        }
        Ok(())
    }

    /// Rewrites the weights of one stage, whose inputs stand in the flows. Returns the norm that was changed with them.
    fn stage(
        &self,
        model: &mut Model,
        layer: u16,
        stage: Stage,
        flows: &mut [Flow],
        originals: &[Flow],
    ) -> Result<Option<Site>> {
        let sites: Vec<Site> =
            stage.roles().iter().map(|r| Site::of(layer, *r)).filter(|s| self.choice.contains_key(s)).collect();
        if sites.is_empty() {
            return Ok(None);
        }
        let method = self.blocks.map_or(self.method, |blocks| blocks.first());
        let mut stats = match self.known.filter(|_| method.needs().data()) {
            Some(known) => known.of(sites[0])?,
            None => self.gather(method.needs(), sites[0], flows, originals),
        };
        let norm = self.balance(method, model, layer, stage, &sites, &mut stats)?;
        if norm.is_some() {
            for flow in flows.iter_mut() {
                model.norm_again(layer, stage, flow)?;
            }
        }
        for site in sites {
            progress::check()?;
            self.rewrite(method, model, site, &stats)?;
        }
        Ok(norm)
    }

    /// What the inputs of a stage are in the flows: all its products read the same, so one gathering serves them.
    fn gather(&self, needs: Needs, site: Site, flows: &[Flow], originals: &[Flow]) -> Stats {
        let mut gather = Gather::new(needs, vec![site]);
        for flow in flows {
            gather.at(Point::Input(site), flow.input());
        }
        let mut stats = gather.stats.remove(&site).unwrap_or_default();
        for (flow, original) in flows.iter().zip(originals.iter().filter(|_| needs.shift)) {
            stats.add_shift(flow.input(), original.input());
        }
        stats
    }

    /// Lets a norm take over a part of the scale of its outputs, where the method asks for it and all matrices that read them
    /// are treated.
    fn balance(
        &self,
        method: &dyn Rewrite,
        model: &mut Model,
        layer: u16,
        stage: Stage,
        sites: &[Site],
        stats: &mut Stats,
    ) -> Result<Option<Site>> {
        let readers = stage.roles().iter().filter(|r| model.linears.contains_key(&Site::of(layer, **r))).count();
        let Some(norm) = stage.norm().map(|role| Site::of(layer, role)).filter(|_| readers == sites.len()) else {
            return Ok(None);
        };
        let matrices: Vec<(Site, Tensor, Storage)> = sites
            .iter()
            .map(|s| Ok((*s, model.linear(*s)?.weight.to_tensor(), self.choice[s])))
            .collect::<Result<_>>()?;
        let Some(by) = method.balance(stats, &matrices)? else { return Ok(None) };
        for (site, mut matrix, _) in matrices {
            let cols = matrix.cols().max(1);
            for row in matrix.as_mut_slice().chunks_exact_mut(cols) {
                row.iter_mut().zip(&by).for_each(|(w, s)| *w *= s);
            }
            let bias = model.linear(site)?.bias.clone();
            model.replace(site, Linear::with_bias(Weight::from_tensor(matrix), bias))?;
        }
        if let Some(norm) = model.norms.get_mut(&norm) {
            norm.scale.iter_mut().zip(&by).for_each(|(v, s)| *v /= s);
            norm.shift.iter_mut().flatten().zip(&by).for_each(|(v, s)| *v /= s);
        }
        stats.divide(&by);
        Ok(Some(norm))
    }

    /// Rewrites some weights, or takes them from the journal.
    fn unit(&mut self, model: &mut Model, name: &str, units: &[(Site, Stats)]) -> Result<()> {
        let units: Vec<&(Site, Stats)> = units.iter().filter(|(s, _)| self.choice.contains_key(s)).collect();
        if units.is_empty() || self.journal.read(name, model)? {
            return Ok(());
        }
        for (site, stats) in &units {
            self.rewrite(self.method, model, *site, stats)?;
        }
        let sites: Vec<Site> = units.iter().map(|(s, _)| *s).collect();
        self.journal.write(name, model, &sites, &[])
    }

    fn rewrite(&self, method: &dyn Rewrite, model: &mut Model, site: Site, stats: &Stats) -> Result<()> {
        let storage = self.choice[&site];
        let old = model.linear(site)?;
        let dense = old.weight.to_tensor();
        if !dense.is_finite() {
            return Err(Error::Site {
                site,
                reason: "holds values that are infinite or not numbers; the model is damaged".into(),
            });
        }
        let gradients = self.gradients.outputs.get(&site).filter(|_| method.needs().gradients).cloned();
        let taylor = self.gradients.taylor.get(&site).filter(|_| method.needs().taylor).cloned();
        let slopes = self.gradients.slopes.get(&site).filter(|_| method.needs().slopes).cloned();
        let own = method.needs().backward().then(|| Stats { gradients, slopes, taylor, ..stats.clone() });
        let stats = own.as_ref().unwrap_or(stats);
        let weight = match old.weight.low_rank().filter(|_| !method.changes_floats()) {
            Some(low) => rewrite_factors(method, site, low, storage, stats)?,
            None if method.changes_floats() => method.matrix_of(&model.spec, site, &dense, storage, stats)?,
            None => rewrite_matrix(method, site, &dense, storage, stats)?,
        };
        let bias = old.bias.clone();
        model.replace(site, Linear::with_bias(weight, bias))?;
        Ok(())
    }
}

/// Rounds what factors leave, or the factors themselves where that is nothing.
fn rewrite_factors(method: &dyn Rewrite, site: Site, low: &LowRank, storage: Storage, stats: &Stats) -> Result<Weight> {
    let misfit = |e: tensor::Misfit| Error::Site { site, reason: e.to_string() };
    let low = match low.rest() {
        Some(rest) => low.with_rest(rewrite_matrix(method, site, &rest.to_tensor(), storage, stats)?),
        None => {
            let down = rewrite_matrix(method, site, &low.down().to_tensor(), storage, stats)?;
            let between = stats.through(&down.to_tensor());
            let outputs = Factors { rank: low.rank(), storage, rest: None }.outputs();
            LowRank::new(rewrite_matrix(method, site, &low.up().to_tensor(), outputs, &between)?, down, None)
        }
    };
    Ok(Weight::LowRank(Box::new(low.map_err(misfit)?)))
}

/// Runs a stage of one flow among many, which keeps nothing but what the next stage needs.
fn advance(model: &Model, layer: u16, stage: Stage, flow: &mut Flow) -> Result<()> {
    let mut memory = model.memory(layer, flow);
    model.advance(layer, stage, flow, &mut memory, &mut ())?;
    flow.rest();
    Ok(())
}

/// Rewrites one matrix; one outside the blocks of which nothing is known, such as a table that is looked up, is rounded to
/// nearest.
pub fn rewrite_matrix(
    method: &dyn Rewrite,
    site: Site,
    dense: &Tensor,
    storage: Storage,
    stats: &Stats,
) -> Result<Weight> {
    let unknown = site.layer.is_none() && stats.is_empty();
    if unknown || !(method.changes_floats() || matches!(storage, Storage::Grid(_) | Storage::Sparse(_))) {
        return Weight::encode(dense, storage, None).map_err(|e| Error::Site { site, reason: e.to_string() });
    }
    method.matrix(site, dense, storage, stats)
}

/// How much each block changes what goes through it: 1 less the cosine between a token's residual stream before and after it, a
/// mean over tokens (arXiv 2403.03853).
///
/// # Errors
/// If the job was interrupted.
pub fn influence(model: &Model, calibration: &[Vec<u32>], progress: &dyn Progress) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; usize::from(model.spec.layers())];
    let tokens: usize = calibration.iter().map(Vec::len).sum();
    progress.begin("measuring the influence of layers", tokens as u64);
    for range in batches(calibration, BATCH) {
        progress::check()?;
        let sequences: Vec<&[u32]> = calibration[range].iter().map(|s| &s[..]).collect();
        let mut flow = model.start(&sequences, &vec![0; sequences.len()])?;
        for (layer, sum) in (0..model.spec.layers()).zip(&mut sums) {
            let before = flow.residual().clone();
            model.block_once(layer, &mut flow, &mut ())?;
            for token in 0..before.rows() {
                let [a, b] = [before.row(token), flow.residual().row(token)];
                let dot =
                    |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                *sum += 1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE);
            }
        }
        progress.advance(flow.tokens() as u64);
    }
    Ok(sums.into_iter().map(|sum| sum / tokens.max(1) as f64).collect())
}

/// The second moments of the residual stream before and after every block, each token brought to one length, as norms bring it.
///
/// # Errors
/// If the job was interrupted.
pub fn residual_moments(model: &Model, calibration: &[Vec<u32>], progress: &dyn Progress) -> Result<Gram> {
    let mut moments = Gram::new(model.spec.dim);
    let tokens: usize = calibration.iter().map(Vec::len).sum();
    progress.begin("gathering what the residual stream varies in", tokens as u64);
    for range in batches(calibration, BATCH) {
        progress::check()?;
        let sequences: Vec<&[u32]> = calibration[range].iter().map(|s| &s[..]).collect();
        let mut flow = model.start(&sequences, &vec![0; sequences.len()])?;
        for layer in 0..=model.spec.layers() {
            let mut stream = flow.residual().clone();
            for row in stream.as_mut_slice().chunks_exact_mut(model.spec.dim.max(1)) {
                let square: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
                let by = (model.spec.dim as f64 / square.max(f64::MIN_POSITIVE)).sqrt() as f32;
                row.iter_mut().for_each(|x| *x *= by);
            }
            moments.add(&stream);
            if layer < model.spec.layers() {
                model.block_once(layer, &mut flow, &mut ())?;
            }
        }
        progress.advance(flow.tokens() as u64);
    }
    Ok(moments)
}

/// Statistics of the inputs of every matrix of a model in one pass, one entry for all that read the same ([`reader`]). Ranks share
/// out the matrices; the first of them has all statistics then, the others their own.
///
/// # Errors
/// If the job was interrupted.
pub fn statistics(
    model: &Model,
    needs: Needs,
    calibration: &[Vec<u32>],
    progress: &dyn Progress,
) -> Result<BTreeMap<Site, Stats>> {
    let sites: BTreeSet<Site> = model.spec.matrices().into_iter().chain([Site::HEAD]).map(reader).collect();
    let mut sites: Vec<Site> = sites.into_iter().collect();
    // In the order in which they are read.
    sites.sort_by_key(|site| (site.layer.unwrap_or(u16::MAX), *site));
    let ranks = ranks::of_process();
    let own = sites[ranks::share(sites.len(), &*ranks)].to_vec();
    let last = own.last().map_or(0, |site| site.layer.map_or(model.spec.layers(), |layer| layer + 1));
    let head = own.contains(&Site::HEAD);
    let mut gather = Gather::new(needs, own);
    progress.begin("gathering statistics", calibration.iter().map(|s| s.len() as u64).sum());
    for range in batches(calibration, BATCH) {
        progress::check()?;
        let sequences: Vec<&[u32]> = calibration[range].iter().map(|s| &s[..]).collect();
        let mut flow = model.start(&sequences, &vec![0; sequences.len()])?;
        for layer in 0..last {
            model.block_once(layer, &mut flow, &mut gather)?;
        }
        if head {
            let rows: Vec<usize> = (0..flow.tokens()).collect();
            gather.at(Point::Input(Site::HEAD), &model.final_rows(&flow, &rows)?);
        }
        progress.advance(flow.tokens() as u64);
    }
    let mut stats = shared::collect(gather.stats, &sites, &*ranks)?;
    if model.spec.tied
        && let Some(s) = stats.remove(&Site::HEAD)
    {
        stats.insert(Site::EMBED, s);
    }
    Ok(stats)
}

/// As what the journal keeps a block.
fn block_name(layer: u16) -> String {
    format!("block-{layer}")
}
