//! The solver: measures what each storage of each site costs in divergence, then allots the bytes.
//!
//! The loss of a recipe is taken as the sum of the losses of its sites, each measured alone on the whole
//! model; that sum orders recipes well, and the recipe that is chosen is measured itself afterwards.

use crate::{
    Error, Plan, Result, Rewrite, Stats,
    data::{Document, batches},
    progress::{self, Progress},
    walk,
};
use model::{Flow, Model, Role, Site};
use rayon::prelude::*;
use std::collections::BTreeMap;
use tensor::{Linear, Storage, Tensor, grid::Grid, ops};

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
    /// The site.
    pub site: Site,
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

/// Storages that the solver tries for a row of `cols` values; `gguf` keeps to those that GGUF files have.
pub fn storages(cols: usize, gguf: bool) -> Vec<Storage> {
    let mut all: Vec<Grid> = Grid::GGUF.iter().copied().filter(|g| g.fits(cols)).collect();
    if !gguf {
        let own = [(2, 32), (3, 32), (3, 64), (4, 32), (4, 64), (5, 32), (5, 64), (6, 32), (8, 32)];
        all.extend(own.iter().filter_map(|(bits, group)| Grid::int(*bits, *group, false)));
        all.extend(Grid::int(2, 32, true));
    }
    let mut storages: Vec<Storage> = all.into_iter().map(Storage::Grid).collect();
    storages.push(Storage::Bf16);
    storages
}

/// Measures every candidate of every site.
///
/// # Errors
/// If a site cannot be rewritten, or the job was interrupted.
pub fn sensitivities(
    model: &Model,
    plan: &Plan,
    calibration: &[Vec<u32>],
    documents: &[Document],
    gguf: bool,
    progress: &dyn Progress,
) -> Result<Vec<Sensitivity>> {
    let Plan::EachMatrix(method) = plan;
    let stats = walk::statistics(model, method.needs(), calibration)?;
    let sites = model.spec.matrices();
    let trials: usize = sites.iter().map(|s| model.spec.shape(*s).map_or(0, |[_, c]| storages(c, gguf).len())).sum();
    progress.begin("measuring sites", trials as u64);
    let mut measure = Measure::new(model, documents)?;
    let mut out = Vec::new();
    for site in sites {
        measure.reach(site)?;
        let site_stats = stats.get(&site).cloned().unwrap_or_default();
        let mut candidates = Vec::new();
        for storage in storages(model.linear(site)?.weight.cols(), gguf) {
            progress::check()?;
            candidates.push(measure.candidate(site, storage, method.as_ref(), &site_stats)?);
            progress.advance(1);
        }
        out.push(Sensitivity { site, candidates: undominated(candidates) });
    }
    Ok(out)
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

    fn candidate(&self, site: Site, storage: Storage, method: &dyn Rewrite, stats: &Stats) -> Result<Candidate> {
        let old = self.model.linear(site)?;
        let weight = walk::rewrite_matrix(method, site, &old.weight.to_tensor(), storage, stats)?;
        let bytes = weight.size_bytes();
        let mut changed = self.model.clone();
        changed.replace(site, Linear { weight, bias: old.bias.clone() })?;
        let table = matches!(site.role, Role::Embed | Role::Position);
        let mut flows = if table { self.start(&changed)? } else { self.flows.clone() };
        let (mut sum, mut tokens) = (0.0, 0);
        for ((flow, documents), base) in flows.iter_mut().zip(&self.batches).zip(&self.base) {
            run_from(&changed, flow, if table { 0 } else { self.at })?;
            let rows = changed.final_rows(flow, &predicting(documents))?;
            sum += divergence(self.model, base, &changed, &rows)?;
            tokens += rows.rows();
        }
        Ok(Candidate { storage, bytes, kl: sum / tokens.max(1) as f64 })
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
    let chosen = sensitivities.iter().zip(at).map(|(s, i)| (s.site, s.candidates[*i]));
    let kl = chosen.clone().map(|(_, c)| c.kl).sum();
    Point { bytes, kl, choice: chosen.map(|(s, c)| (s, c.storage)).collect() }
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
    fn an_allotment_is_close_to_the_best_of_all() {
        let sites: Vec<Sensitivity> = (0..6u16)
            .map(|i| {
                let kl = |b: f64| (1.0 + f64::from(i)) * (-1.3 * b).exp();
                let list: Vec<(usize, f64)> = (2..=8).map(|b| (10 * b, kl(b as f64))).collect();
                Sensitivity { site: Site::of(i, Role::Q), candidates: undominated(candidates(&list)) }
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
