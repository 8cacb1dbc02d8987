//! Factorization: a matrix becomes the product of two thin ones. `svd` keeps what is large in the weights, `asvd` (arXiv
//! 2312.05821) weighs their columns by the size of the inputs, `svd-llm` (arXiv 2403.07378) keeps what is large at the outputs,
//! and `gfwsvd` (arXiv 2505.17974) what counts for the loss: then what different matrices lose adds up, and each gets the rank
//! from which on no number is worth more in another.

use super::{
    Factors, Method, Plan, Rewrite, at, options,
    spectrum::{Outputs, Spectrum, Thin},
};
use crate::{Error, Needs, Result, Stats};
use model::{Model, Site};
use serde::Deserialize;
use std::{collections::BTreeMap, sync::Mutex};
use tensor::{LowRank, Storage, Tensor, Weight};

/// By the weights alone.
pub static SVD: Method = Method {
    name: "svd",
    about: "Makes each matrix the product of two thin ones, nearest to its values.",
    paper: "Eckart and Young, Psychometrika 1, 1936",
    cost: "an eigenvalue problem per matrix",
    build: |o| Factorize::build("svd", o),
};

/// By the weights and the size of each input.
pub static ASVD: Method = Method {
    name: "asvd",
    about: "Makes each matrix the product of two thin ones, columns weighed by the size of their inputs.",
    paper: "arXiv 2312.05821",
    cost: "one pass over the calibration data and an eigenvalue problem per matrix",
    build: |o| Factorize::build("asvd", o),
};

/// By what comes out.
pub static SVD_LLM: Method = Method {
    name: "svd-llm",
    about: "Makes each matrix the product of two thin ones, nearest at its outputs on the calibration data.",
    paper: "arXiv 2403.07378",
    cost: "one pass over the calibration data and an eigenvalue problem per matrix",
    build: |o| Factorize::build("svd-llm", o),
};

/// By what it does to the loss.
pub static GFWSVD: Method = Method {
    name: "gfwsvd",
    about: "Makes each matrix the product of two thin ones, nearest in the loss by its gradients; ranks follow from that.",
    paper: "arXiv 2505.17974",
    cost: "two passes over the calibration data, one with gradients, and two eigenvalue problems per matrix",
    build: |o| Factorize::build("gfwsvd", o),
};

#[derive(Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Factorize {
    #[serde(skip)]
    method: &'static str,
    /// Numbers that remain of each matrix, as a fraction.
    parameters: f64,
    /// Ranks of single sites, in place of what follows from that.
    ranks: BTreeMap<String, usize>,
    /// What the size of an input counts for in `asvd`: this power of it.
    alpha: f64,
    /// Part of the mean square of a gradient that every output counts for beside its own, in `gfwsvd`.
    damping: f64,
}

impl Default for Factorize {
    fn default() -> Self {
        Factorize { method: "svd", parameters: 0.8, ranks: BTreeMap::new(), alpha: 0.5, damping: 0.01 }
    }
}

impl Factorize {
    fn build(method: &'static str, table: toml::Table) -> Result<Plan> {
        let own = Factorize { method, ..options::<Factorize>(method, table)? };
        if !(own.parameters > 0.0
            && own.parameters <= 1.0
            && (0.0..=1.0).contains(&own.alpha)
            && own.damping >= 0.0
            && own.damping.is_finite())
        {
            let reason =
                "`parameters` lies above 0 and is at most 1, `alpha` between 0 and 1, `damping` at 0 or above".into();
            return Err(Error::Options { method: method.into(), reason });
        }
        for site in own.ranks.keys() {
            site.parse::<Site>().map_err(|e| Error::Options { method: method.into(), reason: e.to_string() })?;
        }
        Ok(Plan::EachMatrix(Box::new(own)))
    }

    /// A matrix as a change of it counts, and what to do with its outputs' factor afterwards.
    fn counted(&self, site: Site, weight: &Tensor, stats: &Stats) -> Result<(Tensor, Option<Outputs>)> {
        if self.method != "gfwsvd" {
            return Ok((weight.clone(), None));
        }
        let gradients = stats.gradients.as_ref().filter(|g| g.cols() == weight.rows() && g.rows() > 0);
        let outputs =
            gradients.and_then(|g| Outputs::new(weight.rows(), &g.mean(), self.damping)).ok_or_else(|| unseen(site))?;
        Ok((outputs.evened(weight), Some(outputs)))
    }

    /// What the inputs of a matrix are like, as far as the method asks.
    fn moments(&self, site: Site, cols: usize, stats: &Stats) -> Result<Option<Vec<f64>>> {
        Ok(match self.method {
            "svd" => None,
            "asvd" => {
                let squares = stats.mean_squares(cols).ok_or_else(|| unseen(site))?;
                let mut diagonal = vec![0.0; cols * cols];
                squares.iter().enumerate().for_each(|(j, s)| diagonal[j * cols + j] = f64::from(*s).powf(self.alpha));
                Some(diagonal)
            }
            _ => Some(moments(site, cols, stats)?),
        })
    }

    /// The rank of a matrix; `None` where factors would not be smaller than it is.
    fn rank(&self, site: Site, [rows, cols]: [usize; 2]) -> Option<usize> {
        let even = rows * cols / (rows + cols).max(1);
        let own = self.ranks.get(&site.to_string()).copied();
        let rank = own.unwrap_or((self.parameters * even as f64) as usize).max(1);
        (rank < even).then_some(rank)
    }
}

impl Rewrite for Factorize {
    fn needs(&self) -> Needs {
        let gradients = self.method == "gfwsvd";
        Needs {
            gram: gradients || self.method == "svd-llm",
            squares: self.method == "asvd",
            gradients,
            ..Needs::default()
        }
    }

    fn changes_floats(&self) -> bool {
        true
    }

    fn prepare(
        &self,
        model: &Model,
        look: &mut dyn FnMut(&dyn Rewrite) -> Result<()>,
    ) -> Result<Option<Box<dyn Rewrite>>> {
        if self.method != "gfwsvd" || !self.ranks.is_empty() {
            return Ok(None);
        }
        let survey = Survey { by: self.clone(), seen: Mutex::default() };
        look(&survey)?;
        let seen = survey.seen.into_inner().unwrap_or_default();
        Ok(Some(Box::new(Factorize { ranks: ranks(&seen, self.parameters, model), ..self.clone() })))
    }

    fn factors(&self, site: Site, shape: [usize; 2], storage: Storage) -> Option<Factors> {
        self.rank(site, shape).map(|rank| Factors { rank, storage, rest: None })
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        let cols = weight.cols();
        let Some(rank) = self.rank(site, [weight.rows(), cols]) else {
            return Weight::encode(weight, storage, None).map_err(at(site));
        };
        let moments = self.moments(site, cols, stats)?;
        let (counted, outputs) = self.counted(site, weight, stats)?;
        let mut thin = Spectrum::new(site, &counted, moments.as_deref())?.thin(&counted, rank);
        if let Some(outputs) = outputs {
            thin.up = outputs.back(&thin.up);
        }
        let factors = Factors { rank, storage, rest: None };
        Ok(Weight::LowRank(Box::new(stored(site, weight, thin, factors, moments.as_deref())?)))
    }
}

/// Looks at matrices without changing them.
struct Survey {
    by: Factorize,
    /// What each consists of.
    seen: Mutex<BTreeMap<Site, Vec<f64>>>,
}

impl Rewrite for Survey {
    fn needs(&self) -> Needs {
        self.by.needs()
    }

    fn changes_floats(&self) -> bool {
        true
    }

    fn matrix(&self, site: Site, weight: &Tensor, _: Storage, stats: &Stats) -> Result<Weight> {
        let (counted, _) = self.by.counted(site, weight, stats)?;
        let moments = self.by.moments(site, weight.cols(), stats)?;
        let values = Spectrum::new(site, &counted, moments.as_deref())?.values;
        if let Ok(mut seen) = self.seen.lock() {
            seen.insert(site, values);
        }
        Ok(Weight::from_tensor(weight.clone()))
    }
}

/// The ranks from which on no number is worth more in one matrix than in another, so many numbers remaining in all.
fn ranks(seen: &BTreeMap<Site, Vec<f64>>, parameters: f64, model: &Model) -> BTreeMap<String, usize> {
    let shape = |site: &Site| model.spec.shape(*site).unwrap_or([1, 1]);
    // Beyond this rank a matrix is kept whole, which is better and no larger.
    let most = |site: &Site| (shape(site)[0] * shape(site)[1]) / (shape(site)[0] + shape(site)[1]).max(1);
    let rank = |site: &Site, values: &[f64], least: f64| {
        let each = (shape(site)[0] + shape(site)[1]) as f64;
        values.iter().take_while(|v| **v / each >= least).count().clamp(1, most(site))
    };
    let numbers = |least: f64| -> usize {
        seen.iter().map(|(s, v)| (rank(s, v, least) * (shape(s)[0] + shape(s)[1])).min(shape(s)[0] * shape(s)[1])).sum()
    };
    let allowed = parameters * seen.keys().map(|s| (shape(s)[0] * shape(s)[1]) as f64).sum::<f64>();
    let largest = seen.values().filter_map(|v| v.first()).fold(0.0f64, |m, v| m.max(*v));
    // What the least number that remains is worth, between its bounds.
    let (mut low, mut high) = (0.0, largest);
    for _ in 0..100 {
        let middle = if low == 0.0 { high * 1e-3 } else { (low * high).sqrt() };
        if numbers(middle) as f64 > allowed { low = middle } else { high = middle }
    }
    seen.iter().map(|(site, values)| (site.to_string(), rank(site, values, high))).collect()
}

/// The mean of `x x^T`.
pub(super) fn moments(site: Site, cols: usize, stats: &Stats) -> Result<Vec<f64>> {
    let gram = stats.gram.as_ref().filter(|g| g.cols() == cols && g.rows() > 0);
    gram.map(|g| g.mean()).ok_or_else(|| unseen(site))
}

fn unseen(site: Site) -> Error {
    Error::Site { site, reason: "no calibration data reached it".into() }
}

/// The factors as they are stored; that of the outputs makes up for how the other was rounded.
pub(super) fn stored(
    site: Site,
    weight: &Tensor,
    thin: Thin,
    factors: Factors,
    moments: Option<&[f64]>,
) -> Result<LowRank> {
    let thin = thin.balanced();
    let down = Weight::encode(&thin.down, factors.storage, None).map_err(at(site))?;
    let up = match Thin::refit(weight, &down.to_tensor(), moments) {
        Some(up) => up,
        None => thin.up,
    };
    let up = Weight::encode(&up, factors.outputs(), None).map_err(at(site))?;
    LowRank::new(up, down, None).map_err(|e| Error::Site { site, reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> model::Config {
        let fields = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 20, "max_position_embeddings": 32,
        });
        model::Config::new(std::path::Path::new("config.json"), fields.as_object().unwrap().clone())
    }

    #[test]
    fn ranks_follow_from_the_numbers_that_remain_or_are_named() {
        let text = "parameters = 0.5\nranks = { \"0.q\" = 3, \"0.k\" = 60 }";
        let own: Factorize = toml::from_str(text).unwrap();
        let rank = |name: &str, shape| own.rank(name.parse().unwrap(), shape);
        assert_eq!(rank("0.v", [64, 64]), Some(16));
        assert_eq!(rank("0.q", [64, 64]), Some(3));
        assert_eq!(rank("0.k", [64, 64]), None, "60 of 64 is no saving");
        let site = "0.v".parse().unwrap();
        let factors = own.factors(site, [64, 64], Storage::F16).unwrap();
        assert_eq!(factors.bytes([64, 64]), 2 * 64 * 64 / 2);
        // Nine numbers of worth in one matrix and one in the other: the ranks follow the worth, in the room that there is.
        let model = Model::fresh(config(), 1).unwrap();
        let values = |first: f64| (0..16).map(|i| first * 0.5f64.powi(i)).collect::<Vec<f64>>();
        let seen: BTreeMap<Site, Vec<f64>> =
            [("0.q", values(9.0)), ("0.o", values(1.0))].map(|(s, v)| (s.parse().unwrap(), v)).into();
        let given = ranks(&seen, 0.5, &model);
        assert_eq!(given, [("0.o".to_string(), 2), ("0.q".to_string(), 6)].into());
        let e = Factorize::build("svd", toml::from_str("ranks = { nose = 3 }").unwrap()).err().unwrap();
        assert!(e.to_string().contains("nose"), "{e}");
        let e = Factorize::build("svd", toml::from_str("parameters = 1.5").unwrap()).err().unwrap();
        assert!(e.to_string().contains("at most 1"), "{e}");
    }
}
