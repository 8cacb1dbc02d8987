//! The solver: measures what each storage of each site costs in divergence, then allots the bytes.
//!
//! The loss of a recipe is taken as the sum of the losses of its sites, each alone in the whole model: measured
//! at a few widths, and between them read off the error of the site's own outputs. That sum orders recipes
//! well, and the recipe that is chosen is measured itself afterwards.
//!
//! To what a site's values cost comes what its inputs cost, which engines round to eight bits beside codes: at eight bits of
//! weight that is more, and it differs from storage to storage.

use crate::{
    Error, Plan, Result, Rewrite, Stats,
    artefact::Target,
    calibrate::reader,
    data::{Document, batches},
    progress::{self, Progress},
    walk,
};
use formats::quantized::Format;
use model::{Flow, Model, Role, Site};
use rayon::prelude::*;
use std::collections::{BTreeMap, btree_map::Entry};
use tensor::{Eight, Linear, Rounding, Storage, Tensor, Weight, ops};

/// Tokens that every candidate is measured on.
pub const TOKENS: usize = 3072;

/// One way to store a site.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The storage.
    pub storage: Storage,
    /// Bytes of the site.
    pub bytes: usize,
    /// Mean divergence of the model when only this site is stored so, in nats.
    pub kl: f64,
}

/// What a site may become: the candidates that no other beats in both bytes and loss, by rising bytes.
#[derive(Clone, Debug)]
pub struct Sensitivity {
    /// The site, or several that share one tensor of the result and so take one choice.
    pub sites: Vec<Site>,
    /// Its candidates.
    pub candidates: Vec<Candidate>,
}

/// A point of the trade-off front.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Bytes of all matrices.
    pub bytes: usize,
    /// Sum of the sites' losses.
    pub kl: f64,
    /// Storage of each site.
    pub choice: BTreeMap<Site, Storage>,
}

/// Storages that the solver tries for a row of `cols` values: those that the result's format has.
pub fn storages(cols: usize, target: Target) -> Vec<Storage> {
    let gguf = target == Target::Gguf;
    let names: &[&str] = match (cols.is_multiple_of(256), gguf) {
        _ if let Target::Quantized(format) = target => match format {
            Format::CompressedTensors => &["int3g64", "int4g64", "int4g32", "int5g64", "int6g64", "int8", "bf16"],
            Format::Gptq => &["int3g64", "int4g64", "int4g32", "int8g64", "bf16"],
            // One width and one group for all: there is nothing to choose.
            Format::Awq => &["int4g64z"],
        },
        (true, true) => {
            &["iq1_m", "iq2_xxs", "iq2_s", "q2_k", "iq3_xxs", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0", "bf16"]
        }
        (true, false) => &[
            "iq1_m", "iq2_xxs", "iq2_s", "q2_k", "iq3_xxs", "int3g64", "q3_k", "int4g64", "iq4_xs", "q4_k", "int5g64",
            "q5_k", "q6_k", "q8_0", "bf16",
        ],
        (false, true) => &["q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0", "bf16"],
        (false, false) => &[
            "int2g32", "int3g64", "int3g32", "int4g64", "iq4_nl", "q4_0", "int5g64", "q5_0", "q5_1", "int6g32", "q8_0",
            "bf16",
        ],
    };
    let parsed = names.iter().filter_map(|n| Storage::parse(n).ok());
    parsed.filter(|s| s.fits(cols)).collect()
}

/// Bits at which the divergence of the whole model is measured; between and beyond, it follows the error of the
/// site's own outputs.
const ANCHORS: [f64; 3] = [2.0, 3.5, 5.0];

/// Measures every site, `stats` being those of [`walk::statistics`]: the divergence at a few storages, the error of the
/// site's outputs at all.
///
/// # Errors
/// If a site cannot be rewritten, or the job was interrupted.
pub fn sensitivities(
    model: &Model,
    plan: &Plan,
    stats: &BTreeMap<Site, Stats>,
    documents: &[Document],
    target: Target,
    progress: &dyn Progress,
) -> Result<Vec<Sensitivity>> {
    let method = plan.each_matrix()?;
    let floats = |site: &Site| match target {
        Target::Quantized(format) => model::save::quantized_refusal(model, *site, format).is_some(),
        _ => false,
    };
    let sites: Vec<Site> = model.spec.matrices().into_iter().filter(|s| !floats(s)).collect();
    progress.begin("measuring sites", sites.iter().map(|s| weight_of(model, *s)).sum());
    let mut measure = Measure::new(model, documents)?;
    let mut out = Vec::new();
    for site in sites {
        measure.reach(site)?;
        let none = Stats::default();
        let trials = trials(model, site, method, stats.get(&reader(site)).unwrap_or(&none), target)?;
        let mut measured = Vec::new();
        for at in anchors(&trials) {
            progress::check()?;
            let kl = measure.divergence(site, &trials[at].weight, None)?;
            measured.push((trials[at].error, kl));
        }
        let mut of_inputs: BTreeMap<usize, f64> = BTreeMap::new();
        for block in trials.iter().filter_map(|t| rounded_inputs(t.weight.storage(), target)) {
            if let Entry::Vacant(place) = of_inputs.entry(block) {
                progress::check()?;
                let rounding = Rounding { to: Eight::Int, scale: None, block };
                place.insert(measure.divergence(site, &model.linear(site)?.weight, Some(rounding))?);
            }
        }
        let candidate = |t: &Trial| {
            let storage = t.weight.storage();
            let inputs = rounded_inputs(storage, target).and_then(|block| of_inputs.get(&block)).copied();
            let kl = interpolate(&measured, t.error) + inputs.unwrap_or(0.0);
            Candidate { storage, bytes: t.weight.size_bytes(), kl }
        };
        out.push(Sensitivity { sites: vec![site], candidates: trials.iter().map(candidate).collect() });
        progress.advance(weight_of(model, site));
    }
    out = share(out, &target.shared(model));
    out.iter_mut().for_each(|s| s.candidates = undominated(std::mem::take(&mut s.candidates)));
    Ok(out)
}

/// How many neighbouring inputs share a scale when the engine of the result rounds them to eight bits beside this storage:
/// llama.cpp takes as many as a block has, planish's packed products 64. Others do not round them, or say so in their files.
fn rounded_inputs(storage: Storage, target: Target) -> Option<usize> {
    let Storage::Grid(grid) = storage else { return None };
    match target {
        Target::Gguf => Some(if grid.block_len() == 256 { 256 } else { 32 }),
        Target::Directory | Target::Coded => Some(64),
        Target::Quantized(_) => None,
    }
}

/// Joins the sites of each group: a candidate of all costs what it costs each.
fn share(all: Vec<Sensitivity>, groups: &[Vec<Site>]) -> Vec<Sensitivity> {
    let mut out: Vec<Sensitivity> = Vec::new();
    for s in all {
        let group = groups.iter().find(|g| g.contains(&s.sites[0]));
        let joined = group.and_then(|g| out.iter_mut().find(|o| g.contains(&o.sites[0])));
        let Some(joined) = joined else {
            out.push(s);
            continue;
        };
        joined.candidates.retain_mut(|c| match s.candidates.iter().find(|o| o.storage == c.storage) {
            Some(other) => {
                c.bytes += other.bytes;
                c.kl += other.kl;
                true
            }
            None => false,
        });
        joined.sites.extend(s.sites);
    }
    out
}

/// What a site counts in the progress: its values, and a share of the whole model for the forward passes.
fn weight_of(model: &Model, site: Site) -> u64 {
    let own = model.spec.shape(site).map_or(0, |[r, c]| r * c);
    let left = site.layer.map_or(model.spec.layers(), |l| model.spec.layers() - l);
    (own + usize::from(left) * model.spec.parameters() / (4 * model.spec.blocks.len().max(1))) as u64
}

/// A site stored in one way.
struct Trial {
    weight: Weight,
    /// Mean squared error of its outputs on the calibration data, or of its values where nothing is multiplied.
    error: f64,
}

fn trials(model: &Model, site: Site, method: &dyn Rewrite, stats: &Stats, target: Target) -> Result<Vec<Trial>> {
    let dense = model.linear(site)?.weight.to_tensor();
    let moments = stats.gram.as_ref().map(|g| {
        let mean: Vec<f32> = g.mean().iter().map(|v| *v as f32).collect();
        Weight::from_tensor(Tensor::from_vec(g.cols(), g.cols(), mean))
    });
    let squares = stats.squares.as_ref().map(|s| s.mean());
    let trial = |storage: Storage| -> Result<Trial> {
        progress::check()?;
        let weight = walk::rewrite_matrix(method, site, &dense, storage, stats)?;
        let mut off = weight.to_tensor();
        off.as_mut_slice().iter_mut().zip(dense.as_slice()).for_each(|(q, w)| *q -= w);
        // With H the mean of x x^T, the error of the outputs is the sum of e^T H e over rows.
        let moved = match (&moments, &squares) {
            (Some(h), _) => ops::matmul(&off, h),
            (None, Some(h)) => times_columns(&off, h),
            (None, None) => off.clone(),
        };
        let product = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
        let error: f64 = off.as_slice().iter().zip(moved.as_slice()).map(product).sum();
        Ok(Trial { weight, error: error.max(0.0) })
    };
    storages(dense.cols(), target).into_iter().map(trial).collect()
}

/// Rows times a number for each column.
fn times_columns(x: &Tensor, by: &[f32]) -> Tensor {
    let mut out = x.clone();
    for row in 0..out.rows() {
        out.row_mut(row).iter_mut().zip(by).for_each(|(v, b)| *v *= b);
    }
    out
}

/// The trials nearest to the anchors' bits.
fn anchors(trials: &[Trial]) -> Vec<usize> {
    let bits = |t: &Trial| 8.0 * t.weight.size_bytes() as f64 / t.weight.len().max(1) as f64;
    let nearest = |want: f64| {
        let distance = |i: &usize| (bits(&trials[*i]) - want).abs();
        (0..trials.len()).min_by(|a, b| distance(a).total_cmp(&distance(b)))
    };
    let mut at: Vec<usize> = ANCHORS.iter().filter_map(|b| nearest(*b)).collect();
    at.dedup();
    at
}

/// The divergence at an error: straight between measured points in logarithms, proportional beyond them.
fn interpolate(measured: &[(f64, f64)], error: f64) -> f64 {
    const LEAST: f64 = 1e-12;
    let mut points: Vec<(f64, f64)> = measured.iter().map(|(e, k)| (e.max(LEAST).ln(), k.max(LEAST).ln())).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let x = error.max(LEAST).ln();
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return error };
    let y = if x <= first.0 {
        first.1 + (x - first.0)
    } else if x >= last.0 {
        last.1 + (x - last.0)
    } else {
        let after = points.iter().position(|p| p.0 >= x).unwrap_or(points.len() - 1).max(1);
        let (a, b) = (points[after - 1], points[after]);
        a.1 + (b.1 - a.1) * (x - a.0) / (b.0 - a.0).max(LEAST)
    };
    if error == 0.0 { 0.0 } else { y.exp() }
}

/// Keeps the candidates on the lower convex hull of loss over bytes: the only ones that an allotment by
/// marginal gain ever takes.
fn undominated(mut all: Vec<Candidate>) -> Vec<Candidate> {
    all.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.kl.total_cmp(&b.kl)));
    let mut hull: Vec<Candidate> = Vec::new();
    for c in all {
        if hull.last().is_some_and(|l| c.kl >= l.kl || c.bytes == l.bytes) {
            continue;
        }
        let slope = |a: &Candidate, b: &Candidate| (a.kl - b.kl) / (b.bytes - a.bytes) as f64;
        while hull.len() >= 2 && slope(&hull[hull.len() - 2], &hull[hull.len() - 1]) <= slope(&hull[hull.len() - 1], &c)
        {
            hull.pop();
        }
        hull.push(c);
    }
    hull
}

/// Runs a model with one site replaced, from the block of that site on.
struct Measure<'a> {
    model: &'a Model,
    batches: Vec<&'a [Document]>,
    /// The original's flows before block `at`.
    flows: Vec<Flow>,
    at: u16,
    /// The original's final rows that predict something, by batch.
    base: Vec<Tensor>,
}

impl<'a> Measure<'a> {
    fn new(model: &'a Model, documents: &'a [Document]) -> Result<Measure<'a>> {
        let batches: Vec<&[Document]> = batches(documents, 1024).into_iter().map(|r| &documents[r]).collect();
        let mut m = Measure { model, batches, flows: Vec::new(), at: 0, base: Vec::new() };
        m.flows = m.start(model)?;
        for (i, documents) in m.batches.iter().enumerate() {
            let mut flow = m.flows[i].clone();
            run_from(model, &mut flow, 0)?;
            m.base.push(model.final_rows(&flow, &predicting(documents))?);
        }
        Ok(m)
    }

    fn start(&self, model: &Model) -> Result<Vec<Flow>> {
        let flow = |documents: &&[Document]| {
            let ids: Vec<&[u32]> = documents.iter().map(|d| &d.ids[..]).collect();
            Ok(model.start(&ids, &vec![0; ids.len()])?)
        };
        self.batches.iter().map(flow).collect()
    }

    /// Moves the original's flows to before the block of a site.
    fn reach(&mut self, site: Site) -> Result<()> {
        let layers = self.model.spec.layers();
        let to = match (site.layer, site.role) {
            (Some(layer), _) => layer,
            (None, Role::Head) => layers,
            _ => return Ok(()),
        };
        while self.at < to {
            for flow in &mut self.flows {
                self.model.block_once(self.at, flow, &mut ())?;
            }
            self.at += 1;
        }
        Ok(())
    }

    /// Mean divergence of the model when one site has another weight, or rounds its inputs.
    fn divergence(&self, site: Site, weight: &Weight, rounding: Option<Rounding>) -> Result<f64> {
        let mut changed = self.model.clone();
        let bias = self.model.linear(site)?.bias.clone();
        changed.replace(site, Linear { weight: weight.clone(), bias, rounding })?;
        let table = matches!(site.role, Role::Embed | Role::Position);
        let mut flows = if table { self.start(&changed)? } else { self.flows.clone() };
        let (mut sum, mut tokens) = (0.0, 0);
        for ((flow, documents), base) in flows.iter_mut().zip(&self.batches).zip(&self.base) {
            run_from(&changed, flow, if table { 0 } else { self.at })?;
            let rows = changed.final_rows(flow, &predicting(documents))?;
            sum += divergence(self.model, base, &changed, &rows)?;
            tokens += rows.rows();
        }
        Ok(sum / tokens.max(1) as f64)
    }
}

fn run_from(model: &Model, flow: &mut Flow, layer: u16) -> Result<()> {
    for layer in layer..model.spec.layers() {
        model.block_once(layer, flow, &mut ())?;
    }
    Ok(())
}

/// Rows of a batch that predict a token: all but the last of each document.
fn predicting(documents: &[Document]) -> Vec<usize> {
    let mut at = 0;
    let mut rows = Vec::new();
    for d in documents {
        rows.extend(at..at + d.predicted());
        at += d.ids.len();
    }
    rows
}

fn divergence(base: &Model, base_rows: &Tensor, other: &Model, rows: &Tensor) -> Result<f64> {
    let all: Vec<usize> = (0..rows.rows()).collect();
    let mut sum = 0.0;
    for chunk in all.chunks(512) {
        let a = base.head(&base_rows.select_rows(chunk), &mut ())?;
        let b = other.head(&rows.select_rows(chunk), &mut ())?;
        let each: Vec<f64> = (0..chunk.len()).into_par_iter().map(|i| ops::divergence(a.row(i), b.row(i))).collect();
        sum += each.iter().sum::<f64>();
    }
    Ok(sum)
}

/// Allots at most `budget` bytes to the matrices: from the smallest everywhere, the step that saves the most
/// loss for its bytes comes next.
///
/// # Errors
/// If even the smallest storages take more; the message says how much.
pub fn allot(sensitivities: &[Sensitivity], budget: usize) -> Result<Point> {
    let mut at = vec![0usize; sensitivities.len()];
    let mut bytes: usize = sensitivities.iter().map(|s| s.candidates[0].bytes).sum();
    if bytes > budget {
        return Err(Error::Gate(format!(
            "the smallest storage of every site takes {bytes} bytes, more than the {budget} that the size leaves for them"
        )));
    }
    loop {
        let gain = |(i, s): (usize, &Sensitivity)| -> Option<(f64, usize, usize)> {
            let (now, next) = (&s.candidates[at[i]], s.candidates.get(at[i] + 1)?);
            let more = next.bytes - now.bytes;
            (bytes + more <= budget).then(|| ((now.kl - next.kl) / more as f64, i, more))
        };
        let best =
            sensitivities.iter().enumerate().filter_map(gain).max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let Some((_, i, more)) = best else { break };
        at[i] += 1;
        bytes += more;
    }
    Ok(point(sensitivities, &at, bytes))
}

fn point(sensitivities: &[Sensitivity], at: &[usize], bytes: usize) -> Point {
    let chosen = sensitivities.iter().zip(at).map(|(s, i)| (&s.sites, s.candidates[*i]));
    let kl = chosen.clone().map(|(_, c)| c.kl).sum();
    let choice = chosen.flat_map(|(sites, c)| sites.iter().map(move |s| (*s, c.storage))).collect();
    Point { bytes, kl, choice }
}

/// The whole front in about `points` points, by rising bytes.
pub fn front(sensitivities: &[Sensitivity], points: usize) -> Vec<Point> {
    let least: usize = sensitivities.iter().map(|s| s.candidates[0].bytes).sum();
    let most: usize = sensitivities.iter().filter_map(|s| s.candidates.last()).map(|c| c.bytes).sum();
    let budget = |i: usize| least + (most - least) * i / points.max(2).saturating_sub(1);
    let mut out: Vec<Point> = (0..points).filter_map(|i| allot(sensitivities, budget(i)).ok()).collect();
    out.dedup_by_key(|p| p.bytes);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(list: &[(usize, f64)]) -> Vec<Candidate> {
        list.iter().map(|(bytes, kl)| Candidate { storage: Storage::F32, bytes: *bytes, kl: *kl }).collect()
    }

    #[test]
    fn the_hull_keeps_what_an_allotment_may_take() {
        let hull = undominated(candidates(&[(10, 8.0), (20, 7.0), (30, 1.0), (25, 7.5), (40, 0.5), (35, 2.0)]));
        assert_eq!(hull.iter().map(|c| c.bytes).collect::<Vec<_>>(), [10, 30, 40]);
    }

    #[test]
    fn sites_of_one_tensor_take_one_choice() {
        let one =
            |role, list: &[(usize, f64)]| Sensitivity { sites: vec![Site::of(0, role)], candidates: candidates(list) };
        let all = vec![one(Role::Q, &[(10, 3.0)]), one(Role::O, &[(5, 1.0)]), one(Role::K, &[(20, 4.0)])];
        let shared = share(all, &[vec![Site::of(0, Role::Q), Site::of(0, Role::K)]]);
        assert_eq!(shared.len(), 2);
        assert_eq!(shared[0].sites, [Site::of(0, Role::Q), Site::of(0, Role::K)]);
        assert_eq!((shared[0].candidates[0].bytes, shared[0].candidates[0].kl), (30, 7.0));
        assert_eq!(allot(&shared, 100).unwrap().choice.len(), 3);
    }

    #[test]
    fn losses_follow_the_error_between_and_beyond_what_was_measured() {
        let measured = [(1.0, 0.1), (100.0, 40.0)];
        assert!((interpolate(&measured, 1.0) - 0.1).abs() < 1e-9);
        assert!((interpolate(&measured, 10.0) - 2.0).abs() < 1e-9);
        assert!((interpolate(&measured, 0.1) - 0.01).abs() < 1e-9);
        assert!((interpolate(&measured, 200.0) - 80.0).abs() < 1e-9);
        assert_eq!(interpolate(&measured, 0.0), 0.0);
    }

    #[test]
    fn an_allotment_is_close_to_the_best_of_all() {
        let sites: Vec<Sensitivity> = (0..6u16)
            .map(|i| {
                let kl = |b: f64| (1.0 + f64::from(i)) * (-1.3 * b).exp();
                let list: Vec<(usize, f64)> = (2..=8).map(|b| (10 * b, kl(b as f64))).collect();
                Sensitivity { sites: vec![Site::of(i, Role::Q)], candidates: undominated(candidates(&list)) }
            })
            .collect();
        let budget = 6 * 45;
        let got = allot(&sites, budget).unwrap();
        assert!(got.bytes <= budget && got.bytes > budget - 10);
        let mut best = f64::INFINITY;
        for code in 0..7usize.pow(6) {
            let at: Vec<usize> = (0..6).map(|i| code / 7usize.pow(i) % 7).collect();
            let bytes: usize =
                at.iter().zip(&sites).map(|(a, s)| s.candidates[(*a).min(s.candidates.len() - 1)].bytes).sum();
            if bytes <= budget {
                best = best
                    .min(at.iter().zip(&sites).map(|(a, s)| s.candidates[(*a).min(s.candidates.len() - 1)].kl).sum());
            }
        }
        assert!(got.kl <= 1.05 * best, "{} {best}", got.kl);
        assert!(allot(&sites, 100).unwrap_err().to_string().contains("120 bytes"));
        let front = front(&sites, 20);
        assert!(front.windows(2).all(|p| p[0].bytes < p[1].bytes && p[0].kl > p[1].kl));
    }
}
