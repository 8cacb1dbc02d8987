//! Single values: which of a matrix remain, and what they become so that its outputs change least.
//!
//! A criterion chooses what remains; then the values that do are solved for, and exchanged for others as long as that brings the
//! outputs nearer to the original's (least squares over a support that changes; compare ALPS, arXiv 2406.07831).

use super::{
    super::{Rewrite, at, gptq},
    rates::{Rates, Survey},
    unseen,
};
use crate::{Error, Needs, Result, Stats};
use model::{Model, Site};
use rayon::prelude::*;
use std::collections::BTreeMap;
use tensor::{Pattern, Sparse, Storage, Tensor, Weight, ops};

/// A method that removes single values.
#[derive(Clone)]
pub struct Values {
    pub method: &'static str,
    /// What remains, where the storage does not say it.
    pub pattern: Option<Pattern>,
    /// Do the values that remain make up for the others?
    pub reconstruct: bool,
    /// Rounds of exchanges.
    pub exchanges: usize,
    /// How the share that goes is spread over matrices.
    pub rates: Rates,
    /// What goes of matrices of which more or less goes than of others.
    pub own: BTreeMap<Site, f64>,
}

/// Part of the mean diagonal of the second moments that is added to it.
const DAMPING: f64 = 0.01;
/// Steps of conjugate gradients after a round of exchanges, and after the last one.
const BETWEEN: usize = 4;
const AT_LAST: usize = 20;
/// Part of the values of a row that a round may exchange.
const AT_ONCE: f64 = 0.05;

impl Rewrite for Values {
    fn needs(&self) -> Needs {
        let loss = self.rates == Rates::Loss;
        Needs {
            gram: self.method != "magnitude" || loss,
            squares: self.rates == Rates::Owl,
            slopes: loss,
            taylor: self.method == "taylor",
            ..Needs::default()
        }
    }

    fn changes_floats(&self) -> bool {
        true
    }

    fn prepare(&self, _: &Model, look: &mut dyn FnMut(&dyn Rewrite) -> Result<()>) -> Result<Option<Box<dyn Rewrite>>> {
        if self.rates == Rates::Even {
            return Ok(None);
        }
        let survey = Survey::new(self);
        look(&survey)?;
        let own = survey.rates();
        Ok(Some(Box::new(Values { own, rates: Rates::Even, ..self.clone() })))
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        let held = if let Storage::Sparse(sparse) = storage { Some(sparse.pattern()) } else { None };
        if let (Some(asked), Some(held)) = (self.pattern, held)
            && asked != held
        {
            let reason = format!("is to be pruned to {asked} and stored as {storage}; name one pattern");
            return Err(Error::Site { site, reason });
        }
        // Rows that the pattern does not divide are stored whole, which is told.
        let Some(pattern) = self.pattern_of(weight, storage) else {
            return Weight::encode(weight, storage, None).map_err(at(site));
        };
        let (pattern, storage) = match (self.own.get(&site), pattern) {
            (Some(own), Pattern::Share { block, .. }) => {
                let pattern = Pattern::Share { gone: (own * 1000.0).round() as u16, block };
                let sparse = held.and_then(|_| Sparse::new(storage.dense(), pattern));
                (pattern, sparse.map_or(storage, Storage::Sparse))
            }
            _ => (pattern, storage),
        };
        let pruned = self.prune(site, weight, pattern, stats)?;
        match storage.is_coded() && self.method != "magnitude" {
            true => gptq::Gptq::default().matrix(site, &pruned, storage, stats),
            false => Weight::encode(&pruned, storage, None).map_err(at(site)),
        }
    }
}

impl Values {
    /// As the method usually works.
    pub fn of(method: &'static str) -> Values {
        let (rates, own) = (Rates::Even, BTreeMap::new());
        Values { method, pattern: None, reconstruct: true, exchanges: 12, rates, own }
    }

    /// What goes of a matrix that is to be stored so, where its rows can be cut so.
    pub fn pattern_of(&self, weight: &Tensor, storage: Storage) -> Option<Pattern> {
        let held = if let Storage::Sparse(sparse) = storage { Some(sparse.pattern()) } else { None };
        held.or(self.pattern).filter(|p| weight.cols().is_multiple_of(p.unit()))
    }

    /// What the method leaves of a matrix, and where.
    pub fn chosen(
        &self,
        site: Site,
        weight: &Tensor,
        pattern: Pattern,
        (gram, stats): (&[f64], &Stats),
    ) -> Result<(Tensor, Vec<Vec<bool>>)> {
        let cols = weight.cols();
        let keep = match self.method {
            "magnitude" => masks(pattern, weight, |_| 1.0),
            "wanda" => masks(pattern, weight, |j| gram[j * cols + j]),
            "taylor" => {
                let mut worth = stats.taylor.as_ref().ok_or_else(|| unseen(site))?.values.clone();
                worth.as_mut_slice().iter_mut().for_each(|w| *w = w.sqrt());
                masks(pattern, &worth, |_| 1.0)
            }
            _ => return gptq::Gptq::default().thin(site, weight, pattern, gram.to_vec()),
        };
        Ok((thinned(weight, &keep), keep))
    }

    fn prune(&self, site: Site, weight: &Tensor, pattern: Pattern, stats: &Stats) -> Result<Tensor> {
        if self.method == "magnitude" {
            return Ok(self.chosen(site, weight, pattern, (&[], stats))?.0);
        }
        let gram = stats.gram.as_ref().filter(|g| g.cols() == weight.cols() && g.rows() > 0);
        let gram = gram.ok_or_else(|| unseen(site))?.mean();
        let (chosen, keep) = self.chosen(site, weight, pattern, (&gram, stats))?;
        if !self.reconstruct {
            return Ok(chosen);
        }
        let problem = Problem::new(weight, gram, pattern);
        let mut answer = problem.answer(chosen, keep);
        problem.settle(&mut answer, if self.exchanges > 0 { BETWEEN } else { AT_LAST });
        if self.exchanges > 0 && !matches!(pattern, Pattern::Share { block, .. } if block != [1, 1]) {
            problem.exchange(&mut answer, self.exchanges);
            // What the slopes lost in precision on the way is found again.
            answer = problem.answer(answer.values, answer.keep);
            problem.settle(&mut answer, AT_LAST);
        }
        Ok(answer.values)
    }
}

/// What remains of each row of a matrix: what is worth most, its squares weighed by column. Rows that share a pattern are weighed
/// together.
pub fn masks(pattern: Pattern, weight: &Tensor, by_column: impl Fn(usize) -> f64 + Sync) -> Vec<Vec<bool>> {
    let cols = weight.cols();
    let groups: Vec<usize> = (0..weight.rows()).step_by(pattern.rows()).collect();
    let masks = groups.par_iter().map(|first| {
        let rows = *first..weight.rows().min(first + pattern.rows());
        let squares = |j: usize| rows.clone().map(|r| f64::from(weight.row(r)[j]).powi(2)).sum::<f64>();
        let worth: Vec<f64> = (0..cols).map(|j| squares(j) * by_column(j)).collect();
        vec![pattern.choose(&worth); rows.len()]
    });
    masks.flatten().collect()
}

/// The matrix without what is not kept.
fn thinned(weight: &Tensor, keep: &[Vec<bool>]) -> Tensor {
    let mut out = weight.clone();
    for (r, keep) in keep.iter().enumerate() {
        out.row_mut(r).iter_mut().zip(keep).filter(|(_, keep)| !**keep).for_each(|(w, _)| *w = 0.0);
    }
    out
}

/// Outputs that are to be kept: rows of `W` under the second moments `H` of the inputs.
struct Problem {
    pattern: Pattern,
    /// `[outputs, inputs]`.
    original: Tensor,
    /// `H` with damping, `[inputs, inputs]`.
    moments: Tensor,
    /// The same to be multiplied by.
    factor: Weight,
    diagonal: Vec<f32>,
}

/// Values on a support.
#[derive(Clone)]
struct Answer {
    values: Tensor,
    keep: Vec<Vec<bool>>,
    /// [`Problem::slopes`] there.
    slopes: Tensor,
    /// What each row costs.
    cost: Vec<f64>,
}

impl Problem {
    fn new(weight: &Tensor, gram: Vec<f64>, pattern: Pattern) -> Problem {
        let cols = weight.cols();
        let mean = (0..cols).map(|j| gram[j * cols + j]).sum::<f64>() / cols.max(1) as f64;
        let damped = gram.into_iter().enumerate();
        let damped = damped.map(|(i, g)| (g + if i % (cols + 1) == 0 { DAMPING * mean + 1e-30 } else { 0.0 }) as f32);
        let moments = Tensor::from_vec(cols, cols, damped.collect());
        let diagonal = (0..cols).map(|j| moments.row(j)[j]).collect();
        Problem { pattern, original: weight.clone(), factor: Weight::from_tensor(moments.clone()), moments, diagonal }
    }

    /// `(W - values) H`: how much less each row would cost, half of it, per unit by which a value grows.
    fn slopes(&self, values: &Tensor) -> Tensor {
        let mut left = self.original.clone();
        left.as_mut_slice().iter_mut().zip(values.as_slice()).for_each(|(w, v)| *w -= v);
        ops::matmul(&left, &self.factor)
    }

    /// Values on a support, before any row was settled.
    fn answer(&self, values: Tensor, keep: Vec<Vec<bool>>) -> Answer {
        let slopes = self.slopes(&values);
        Answer { cost: vec![f64::INFINITY; values.rows()], values, keep, slopes }
    }

    /// Brings the values near to those that cost least on their support, by conjugate gradients, each row by itself.
    fn settle(&self, answer: &mut Answer, steps: usize) {
        let (rows, cols) = (self.original.rows(), self.original.cols());
        let Answer { values, keep, slopes, cost } = answer;
        let mut direction = Tensor::zeros(rows, cols);
        let mut before = vec![0f64; rows];
        for _ in 0..steps {
            let turn = direction.as_mut_slice().par_chunks_mut(cols).zip(slopes.as_slice().par_chunks(cols));
            turn.zip(&*keep).zip(&mut before).for_each(|(((direction, slopes), keep), before)| {
                let there = || slopes.iter().zip(&self.diagonal).zip(keep);
                let square = |((s, d), keep): ((&f32, &f32), &bool)| {
                    if *keep { f64::from(*s).powi(2) / f64::from(*d) } else { 0.0 }
                };
                let size: f64 = there().map(square).sum();
                let by = if *before > 0.0 { (size / *before) as f32 } else { 0.0 };
                let next = direction.iter_mut().zip(there());
                next.for_each(|(p, ((s, d), keep))| *p = if *keep { s / d + by * *p } else { 0.0 });
                *before = size;
            });
            let through = ops::matmul(&direction, &self.factor);
            let rows = values.as_mut_slice().par_chunks_mut(cols).zip(slopes.as_mut_slice().par_chunks_mut(cols));
            let rows = rows.zip(direction.as_slice().par_chunks(cols).zip(through.as_slice().par_chunks(cols)));
            rows.zip(&before).for_each(|(((values, slopes), (direction, through)), size)| {
                let curve: f64 = direction.iter().zip(through).map(|(p, h)| f64::from(*p) * f64::from(*h)).sum();
                if curve > 0.0 {
                    let by = (size / curve) as f32;
                    values.iter_mut().zip(direction).for_each(|(v, p)| *v += by * p);
                    slopes.iter_mut().zip(through).for_each(|(s, h)| *s -= by * h);
                }
            });
        }
        for (r, cost) in cost.iter_mut().enumerate() {
            let left = self.original.row(r).iter().zip(values.row(r));
            *cost = left.zip(slopes.row(r)).map(|((w, v), s)| f64::from(w - v) * f64::from(*s)).sum();
        }
    }

    /// Exchanges values that remain for others, as long as rows cost less for it.
    fn exchange(&self, best: &mut Answer, rounds: usize) {
        let cols = self.original.cols();
        let most = ((self.pattern.kept(cols) as f64 * AT_ONCE) as usize).max(1);
        // A row that came out worse tries fewer of them next time.
        let mut tries = vec![most; self.original.rows()];
        for _ in 0..rounds {
            let mut next = best.clone();
            let rows =
                next.values.as_mut_slice().par_chunks_mut(cols).zip(next.slopes.as_mut_slice().par_chunks_mut(cols));
            rows.zip(&mut next.keep).zip(&tries).for_each(|(((values, slopes), keep), tries)| {
                for (out, into) in self.swaps(values, keep, slopes, *tries) {
                    (keep[out], keep[into]) = (false, true);
                    // What it gains by itself; all are settled together afterwards.
                    self.put(values, slopes, out, 0.0);
                    self.put(values, slopes, into, slopes[into] / self.diagonal[into]);
                }
            });
            if tries.iter().all(|t| *t == 0) {
                break;
            }
            self.settle(&mut next, BETWEEN);
            for (r, tries) in tries.iter_mut().enumerate() {
                if next.cost[r] < best.cost[r] {
                    best.cost[r] = next.cost[r];
                    best.keep[r].clone_from(&next.keep[r]);
                    best.values.row_mut(r).copy_from_slice(next.values.row(r));
                    best.slopes.row_mut(r).copy_from_slice(next.slopes.row(r));
                } else {
                    *tries /= 2;
                }
            }
        }
    }

    /// Gives a value of a row another number; the slopes follow.
    fn put(&self, values: &mut [f32], slopes: &mut [f32], j: usize, value: f32) {
        let by = values[j] - value;
        values[j] = value;
        slopes.iter_mut().zip(self.moments.row(j)).for_each(|(s, h)| *s += by * h);
    }

    /// Exchanges of a row that each by itself make it cheaper, the best ones first: a value that goes and one that comes.
    fn swaps(&self, values: &[f32], keep: &[bool], slopes: &[f32], most: usize) -> Vec<(usize, usize)> {
        let lost = |i: usize| f64::from(values[i]).powi(2) * f64::from(self.diagonal[i]);
        let pair = |i: usize, j: usize| {
            let slope = f64::from(slopes[j]) + f64::from(values[i]) * f64::from(self.moments.row(i)[j]);
            // The value that goes also leaves what its own slope says, which is little once the row has settled.
            let own = 2.0 * f64::from(values[i]) * f64::from(slopes[i]);
            slope * slope / f64::from(self.diagonal[j]) - lost(i) - own
        };
        let mut found: Vec<(f64, usize, usize)> = Vec::new();
        let mut consider = |i: usize, j: usize| {
            let gain = pair(i, j);
            if gain > 0.0 {
                found.push((gain, i, j));
            }
        };
        match self.pattern {
            Pattern::Of { m, .. } => {
                for group in (0..values.len()).step_by(m.into()).map(|first| first..first + usize::from(m)) {
                    for i in group.clone().filter(|i| keep[*i]) {
                        group.clone().filter(|j| !keep[*j]).for_each(|j| consider(i, j));
                    }
                }
            }
            Pattern::Share { .. } => {
                let going = least((0..values.len()).filter(|i| keep[*i]).map(|i| (lost(i), i)), 2 * most);
                let gain = |j: usize| f64::from(slopes[j]).powi(2) / f64::from(self.diagonal[j]);
                let coming = least((0..values.len()).filter(|j| !keep[*j]).map(|j| (-gain(j), j)), 2 * most);
                going.iter().for_each(|(_, i)| coming.iter().for_each(|(_, j)| consider(*i, *j)));
            }
        }
        found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let mut used = vec![false; values.len()];
        let mut chosen = Vec::new();
        for (_, i, j) in found {
            // Neighbours that are exchanged together would count what they have in common twice.
            let unit = if let Pattern::Of { m, .. } = self.pattern { usize::from(m) } else { 1 };
            if chosen.len() < most && !used[i / unit * unit] && !used[j / unit * unit] {
                (used[i / unit * unit], used[j / unit * unit]) = (true, true);
                chosen.push((i, j));
            }
        }
        chosen
    }
}

/// The `count` least of some numbers, each with what it is of, in no order.
fn least(all: impl Iterator<Item = (f64, usize)>, count: usize) -> Vec<(f64, usize)> {
    let mut all: Vec<(f64, usize)> = all.collect();
    if count < all.len() {
        all.select_nth_unstable_by(count, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        all.truncate(count);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::spectrum;
    use model::Role;
    use tensor::ops::Gram;

    fn noise(rows: usize, cols: usize, seed: u64) -> Tensor {
        let value = |i: usize| {
            let u = |k: u64| model::uniform(seed, 3 * i as u64 + k) - 0.5;
            (u(0) + u(1) + u(2)) as f32
        };
        Tensor::from_vec(rows, cols, (0..rows * cols).map(value).collect())
    }

    /// A matrix, and the moments of inputs whose channels hang together.
    fn case() -> (Tensor, Stats) {
        let x = ops::matmul(&noise(600, 24, 5), &Weight::from_tensor(noise(96, 24, 6)));
        let mut gram = Gram::new(96);
        gram.add(&x);
        gram.add(&noise(200, 96, 7));
        (noise(40, 96, 1), Stats { gram: Some(gram), ..Stats::default() })
    }

    fn pruned(method: &'static str, storage: &str, exchanges: usize, reconstruct: bool) -> (Weight, f64) {
        let (w, stats) = case();
        let method = Values { reconstruct, exchanges, ..Values::of(method) };
        let out = method.matrix(Site::of(0, Role::Up), &w, Storage::parse(storage).unwrap(), &stats).unwrap();
        let mut change = w.clone();
        change.as_mut_slice().iter_mut().zip(out.to_tensor().as_slice()).for_each(|(w, q)| *w -= q);
        let gram = stats.gram.map(|g| g.mean());
        (out, spectrum::cost(&change, gram.as_deref()))
    }

    #[test]
    fn each_step_brings_the_outputs_nearer() {
        for storage in ["f32@50%", "f32@2:4", "f32@4:8", "f32@75%"] {
            let (_, magnitude) = pruned("magnitude", storage, 0, false);
            let (_, wanda) = pruned("wanda", storage, 0, false);
            let (_, sweep) = pruned("sparsegpt", storage, 0, false);
            let (_, settled) = pruned("sparsegpt", storage, 0, true);
            let (_, exchanged) = pruned("sparsegpt", storage, 12, true);
            let (_, from_wanda) = pruned("wanda", storage, 12, true);
            println!("{storage}: {magnitude:.3} {wanda:.3} {sweep:.3} {settled:.3} {exchanged:.3} {from_wanda:.3}");
            assert!(wanda < magnitude && sweep < wanda && settled < sweep, "{storage}");
            assert!(exchanged < 0.9 * settled && from_wanda < 0.5 * wanda, "{storage}");
        }
    }

    #[test]
    fn what_is_left_is_what_the_pattern_says_in_blocks_and_in_codes_too() {
        for storage in ["bf16@50%", "f16@2:4", "f32@50%8x1", "f32@25%1x4", "int4g32@2:4", "int3g32@50%"] {
            let Storage::Sparse(sparse) = Storage::parse(storage).unwrap() else { panic!("{storage}") };
            let (out, lost) = pruned("sparsegpt", storage, 4, true);
            let rows = sparse.pattern().rows();
            let values = out.to_tensor();
            for r in 0..40 {
                let there = |r: usize| values.row(r).iter().map(|v| *v != 0.0).collect::<Vec<bool>>();
                assert!(there(r).iter().filter(|v| **v).count() <= sparse.pattern().kept(96), "{storage}");
                let mask = sparse.mask(out.stored().unwrap().row(r), 96);
                assert!(there(r).iter().zip(&mask).all(|(there, mask)| *mask || !there), "{storage}");
                assert_eq!(mask, sparse.mask(out.stored().unwrap().row(r / rows * rows), 96), "{storage}");
            }
            // Codes lose less than the nearest ones to the values that were solved for.
            if storage.starts_with("int") {
                let (w, stats) = case();
                let thin = Values { exchanges: 4, ..Values::of("sparsegpt") };
                let dense = Sparse::new(Storage::F32, sparse.pattern()).map(Storage::Sparse).unwrap();
                let thin = thin.matrix(Site::of(0, Role::Up), &w, dense, &stats).unwrap().to_tensor();
                let nearest = Weight::encode(&thin, Storage::Sparse(sparse), None).unwrap().to_tensor();
                let mut change = w.clone();
                change.as_mut_slice().iter_mut().zip(nearest.as_slice()).for_each(|(w, q)| *w -= q);
                let gram = stats.gram.map(|g| g.mean());
                let nearest = spectrum::cost(&change, gram.as_deref());
                assert!(lost < 0.95 * nearest, "{storage}: {lost} {nearest}");
            }
        }
    }

    #[test]
    fn two_patterns_for_one_matrix_are_an_error() {
        let (w, stats) = case();
        let method = Values { pattern: "2:4".parse().ok(), ..Values::of("wanda") };
        let e = method.matrix(Site::of(0, Role::Up), &w, Storage::parse("bf16@50%").unwrap(), &stats).unwrap_err();
        assert!(e.to_string().contains("2:4") && e.to_string().contains("bf16@50%"), "{e}");
        // Zeros in a storage without holes.
        let dense = method.matrix(Site::of(0, Role::Up), &w, Storage::F32, &stats).unwrap().to_tensor();
        assert_eq!(dense.as_slice().iter().filter(|v| **v == 0.0).count(), 40 * 48);
    }
}
