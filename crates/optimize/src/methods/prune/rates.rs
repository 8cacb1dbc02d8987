//! How much of each matrix goes, where it is not as much of every one.

use super::{unseen, values::Values};
use crate::{
    Needs, Result, Stats,
    methods::{Rewrite, spectrum},
};
use model::Site;
use serde::Deserialize;
use std::{collections::BTreeMap, sync::Mutex};
use tensor::{Pattern, Storage, Tensor, Weight};

/// How the share that goes is spread over matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rates {
    /// As much of each.
    #[default]
    Even,
    /// Less of matrices with more outliers among weights times inputs (OWL, arXiv 2310.05175).
    Owl,
    /// So that the next value costs the loss as much in each: errors of outputs, weighed by the squares of their gradients.
    Loss,
}

/// A score is an outlier's where it is so many times the mean.
const OUTLIER: f64 = 5.0;
/// So far from the mean rate OWL goes.
const AROUND: f64 = 0.08;
/// Shares beside the mean one at which costs are measured, and between which rates may lie.
const MEASURED: [f64; 5] = [-0.2, -0.1, 0.0, 0.1, 0.2];

/// Looks at matrices without changing them.
pub struct Survey<'a> {
    by: &'a Values,
    seen: Mutex<BTreeMap<Site, Seen>>,
}

struct Seen {
    values: usize,
    /// Share that goes of each matrix, where all are alike.
    asked: f64,
    /// OWL: its part of outliers. Loss: logarithms of its costs at shares beside the one that was asked for.
    told: Vec<f64>,
}

impl<'a> Survey<'a> {
    pub fn new(by: &'a Values) -> Survey<'a> {
        Survey { by, seen: Mutex::default() }
    }

    /// The share of each matrix that goes; as much in all as was asked for.
    pub fn rates(self) -> BTreeMap<Site, f64> {
        let seen = self.seen.into_inner().unwrap_or_default();
        let all: usize = seen.values().map(|s| s.values).sum();
        let mean =
            |of: &dyn Fn(&Seen) -> f64| seen.values().map(|s| of(s) * s.values as f64).sum::<f64>() / all.max(1) as f64;
        let asked = mean(&|s| s.asked);
        if self.by.rates == Rates::Owl {
            let ratios = || seen.values().filter_map(|s| s.told.first().copied());
            let (low, high) = (ratios().fold(f64::INFINITY, f64::min), ratios().fold(0.0, f64::max));
            let place = |s: &Seen| 2.0 * AROUND * (s.told[0] - low) / (high - low).max(f64::MIN_POSITIVE);
            let middle = mean(&place);
            return seen.iter().map(|(site, s)| (*site, (asked - place(s) + middle).clamp(0.01, 0.99))).collect();
        }
        spread(&seen, asked * all as f64)
    }
}

/// Rates at which the next value costs as much in each matrix, in steps of a hundredth; `goes` values go in all.
fn spread(seen: &BTreeMap<Site, Seen>, goes: f64) -> BTreeMap<Site, f64> {
    const STEP: f64 = 0.01;
    let least = |s: &Seen| (s.asked + MEASURED[0]).clamp(0.01, 0.99);
    let most = |s: &Seen| (s.asked + MEASURED[MEASURED.len() - 1]).clamp(0.01, 0.99);
    let mut rates: BTreeMap<Site, f64> = seen.iter().map(|(site, s)| (*site, least(s))).collect();
    let mut gone: f64 = seen.values().map(|s| least(s) * s.values as f64).sum();
    let next = |site: &Site, rate: f64| {
        let s = &seen[site];
        (rate + STEP < most(s) + 1e-9).then(|| (cost(s, rate + STEP) - cost(s, rate)) / s.values as f64)
    };
    while gone < goes {
        let worth = rates.iter().filter_map(|(site, rate)| Some((next(site, *rate)?, *site)));
        let Some((_, site)) = worth.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))) else { break };
        let rate = rates.entry(site).or_default();
        // The last step goes only as far as was asked.
        let by = STEP.min((goes - gone) / seen[&site].values as f64);
        *rate += by;
        gone += by * seen[&site].values as f64;
    }
    rates
}

/// What going without that share of a matrix costs, between those that were measured.
fn cost(s: &Seen, rate: f64) -> f64 {
    let at = |i: usize| (s.asked + MEASURED[i]).clamp(0.01, 0.99);
    let i = (1..MEASURED.len() - 1).find(|i| rate <= at(*i)).unwrap_or(MEASURED.len() - 1);
    let (from, to) = (at(i - 1), at(i));
    let part = if to > from { (rate - from) / (to - from) } else { 1.0 };
    (s.told[i - 1] + part * (s.told[i] - s.told[i - 1])).exp()
}

impl Rewrite for Survey<'_> {
    fn needs(&self) -> Needs {
        self.by.needs()
    }

    fn changes_floats(&self) -> bool {
        true
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        let as_it_is = || Ok(Weight::from_tensor(weight.clone()));
        let Some(Pattern::Share { gone, block }) = self.by.pattern_of(weight, storage) else { return as_it_is() };
        let asked = f64::from(gone) / 1000.0;
        let told = match self.by.rates {
            Rates::Even => return as_it_is(),
            Rates::Owl => vec![outliers(weight, &stats.mean_squares(weight.cols()).ok_or_else(|| unseen(site))?)],
            Rates::Loss => {
                let gram = stats.gram.as_ref().filter(|g| g.cols() == weight.cols() && g.rows() > 0);
                let gram = gram.ok_or_else(|| unseen(site))?.mean();
                let slopes = stats.slopes.as_ref().filter(|g| g.cols() == weight.rows() && g.rows() > 0);
                let root: Vec<f32> = slopes.ok_or_else(|| unseen(site))?.mean().into_iter().map(f32::sqrt).collect();
                let one = |by: &f64| -> Result<f64> {
                    let share = ((asked + by).clamp(0.01, 0.99) * 1000.0).round() as u16;
                    let (mut change, _) =
                        self.by.chosen(site, weight, Pattern::Share { gone: share, block }, (&gram, stats))?;
                    for (r, root) in root.iter().enumerate() {
                        change.row_mut(r).iter_mut().zip(weight.row(r)).for_each(|(c, w)| *c = (*c - w) * root);
                    }
                    Ok(spectrum::cost(&change, Some(&gram)).max(f64::MIN_POSITIVE).ln())
                };
                MEASURED.iter().map(one).collect::<Result<_>>()?
            }
        };
        if let Ok(mut seen) = self.seen.lock() {
            seen.insert(site, Seen { values: weight.rows() * weight.cols(), asked, told });
        }
        as_it_is()
    }
}

/// The part of weights times the size of their inputs that lies far above the mean.
fn outliers(weight: &Tensor, squares: &[f32]) -> f64 {
    let roots: Vec<f64> = squares.iter().map(|s| f64::from(*s).sqrt()).collect();
    let scores =
        || (0..weight.rows()).flat_map(|r| weight.row(r).iter().zip(&roots).map(|(w, x)| f64::from(w.abs()) * x));
    let count = (weight.rows() * weight.cols()).max(1) as f64;
    let mean = scores().sum::<f64>() / count;
    scores().filter(|score| *score > OUTLIER * mean).count() as f64 / count
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Role;

    #[test]
    fn cheap_matrices_give_more_and_in_all_as_much_goes_as_was_asked() {
        let seen = |told: [f64; 5], values| Seen { values, asked: 0.5, told: told.map(f64::ln).to_vec() };
        let all = BTreeMap::from([
            (Site::of(0, Role::Q), seen([1.0, 2.0, 4.0, 8.0, 16.0], 1000)),
            (Site::of(0, Role::K), seen([10.0, 20.0, 40.0, 80.0, 160.0], 1000)),
            (Site::of(0, Role::V), seen([4.0, 8.0, 16.0, 32.0, 64.0], 4000)),
        ]);
        let rates = spread(&all, 3000.0);
        let gone: f64 = rates.iter().map(|(site, rate)| rate * all[site].values as f64).sum();
        assert!((gone - 3000.0).abs() < 1e-6, "{rates:?}");
        let of = |role| rates[&Site::of(0, role)];
        // A value of the largest costs as much as one of the first.
        assert!((of(Role::Q) - of(Role::V)).abs() < 0.02 && of(Role::K) < of(Role::Q) - 0.15, "{rates:?}");
        assert!((cost(&all[&Site::of(0, Role::Q)], 0.55) - 32f64.sqrt()).abs() < 1e-9);
    }
}
