//! The walker: it alone loops over blocks. Stage by stage it gathers statistics, rewrites the weights that
//! read them, and runs those products once with the result, so that what follows is calibrated on what the
//! changed model really computes.

use crate::{
    Block, BlockRewrite, Error, Gather, Needs, Result, Rewrite, Stats, Texts,
    data::batches,
    journal::Journal,
    progress::{self, Progress},
    recipe::Built,
};
use model::{Flow, Model, Point, Role, Site, Stage, Tap};
use std::collections::BTreeMap;
use tensor::{Linear, Storage, Tensor, Weight};

/// Tokens of a batch of calibration data.
const BATCH: usize = 2048;

/// Runs one step of a method over the model. `calibration` may be empty where the method needs no data.
///
/// # Errors
/// If a weight cannot be treated as asked, or the job was interrupted.
pub fn walk(
    model: &mut Model,
    step: &Built,
    calibration: &[Vec<u32>],
    seed: u64,
    journal: &mut Journal,
    progress: &dyn Progress,
) -> Result<()> {
    let needs = step.plan.needs();
    if needs.data() && calibration.is_empty() {
        return Err(Error::Asked(format!("method {} needs calibration data: give --data FILE", step.method)));
    }
    let mut walker = Walker {
        base: model.clone(),
        method: step.plan.each_matrix()?,
        blocks: step.plan.each_block(),
        needs,
        choice: &step.choice,
        calibration: if needs.data() { calibration } else { &[] },
        seed,
        journal,
        progress,
    };
    walker.run(model)
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
            self.block(model, layer, &mut flows, &mut originals)?;
            self.progress.advance(1);
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
        let name = format!("block-{layer}");
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
            model.replace(site, Linear { weight, bias })?;
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
        // All products of a stage read the same input, so one gathering serves them.
        let mut gather = Gather::new(method.needs(), vec![sites[0]]);
        for flow in flows.iter() {
            gather.at(Point::Input(sites[0]), flow.input());
        }
        let mut stats = gather.stats.remove(&sites[0]).unwrap_or_default();
        for (flow, original) in flows.iter().zip(originals.iter().filter(|_| method.needs().shift)) {
            stats.add_shift(flow.input(), original.input());
        }
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
            model.replace(site, Linear { weight: Weight::from_tensor(matrix), bias })?;
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
        let weight = rewrite_matrix(method, site, &dense, storage, stats)?;
        let bias = old.bias.clone();
        model.replace(site, Linear { weight, bias })?;
        Ok(())
    }
}

/// Runs a stage of one flow among many, which keeps nothing but what the next stage needs.
fn advance(model: &Model, layer: u16, stage: Stage, flow: &mut Flow) -> Result<()> {
    let mut memory = model.memory(layer, flow);
    model.advance(layer, stage, flow, &mut memory, &mut ())?;
    flow.rest();
    Ok(())
}

/// Rewrites one matrix; a looked-up table without statistics is rounded to nearest.
pub fn rewrite_matrix(
    method: &dyn Rewrite,
    site: Site,
    dense: &Tensor,
    storage: Storage,
    stats: &Stats,
) -> Result<Weight> {
    let looked_up = matches!(site.role, Role::Embed | Role::Position) && stats.gram.is_none();
    if looked_up || !matches!(storage, Storage::Grid(_)) {
        return Weight::encode(dense, storage, None).map_err(|e| Error::Site { site, reason: e.to_string() });
    }
    method.matrix(site, dense, storage, stats)
}

/// Statistics of every site of a model in one pass, as the solver needs them.
///
/// # Errors
/// If the job was interrupted.
pub fn statistics(model: &Model, needs: Needs, calibration: &[Vec<u32>]) -> Result<BTreeMap<Site, Stats>> {
    // Of the products that read one input, the first of each stage stands for all.
    let mut sites: Vec<Site> = (0..model.spec.layers())
        .flat_map(|l| [Role::Q, Role::O, Role::Up, Role::Down].map(|r| Site::of(l, r)))
        .collect();
    sites.push(Site::HEAD);
    let mut gather = Gather::new(needs, sites);
    for range in batches(calibration, BATCH) {
        progress::check()?;
        let sequences: Vec<&[u32]> = calibration[range].iter().map(|s| &s[..]).collect();
        let mut flow = model.start(&sequences, &vec![0; sequences.len()])?;
        for layer in 0..model.spec.layers() {
            model.block_once(layer, &mut flow, &mut gather)?;
        }
        let rows: Vec<usize> = (0..flow.tokens()).collect();
        gather.at(Point::Input(Site::HEAD), &model.final_rows(&flow, &rows)?);
    }
    let mut stats = gather.stats;
    for layer in 0..model.spec.layers() {
        for (from, to) in [(Role::Q, Role::K), (Role::Q, Role::V), (Role::Up, Role::Gate)] {
            if let Some(s) = stats.get(&Site::of(layer, from)).cloned() {
                stats.insert(Site::of(layer, to), s);
            }
        }
    }
    if model.spec.tied
        && let Some(s) = stats.remove(&Site::HEAD)
    {
        stats.insert(Site::EMBED, s);
    }
    Ok(stats)
}
