//! Factorization: a matrix becomes the product of two thin ones. `svd` keeps what is large in the weights, `asvd` (arXiv
//! 2312.05821) weighs their columns by the size of the inputs, `svd-llm` (arXiv 2403.07378) keeps what is large at the outputs.

use super::{
    Factors, Method, Plan, Rewrite, at, options,
    spectrum::{Spectrum, Thin},
};
use crate::{Error, Needs, Result, Stats};
use model::Site;
use serde::Deserialize;
use std::collections::BTreeMap;
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

#[derive(Deserialize)]
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
}

impl Default for Factorize {
    fn default() -> Self {
        Factorize { method: "svd", parameters: 0.8, ranks: BTreeMap::new(), alpha: 0.5 }
    }
}

impl Factorize {
    fn build(method: &'static str, table: toml::Table) -> Result<Plan> {
        let own = Factorize { method, ..options::<Factorize>(method, table)? };
        if !(own.parameters > 0.0 && own.parameters <= 1.0 && (0.0..=1.0).contains(&own.alpha)) {
            let reason = "`parameters` lies above 0 and is at most 1, `alpha` lies between 0 and 1".into();
            return Err(Error::Options { method: method.into(), reason });
        }
        for site in own.ranks.keys() {
            site.parse::<Site>().map_err(|e| Error::Options { method: method.into(), reason: e.to_string() })?;
        }
        Ok(Plan::EachMatrix(Box::new(own)))
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
        Needs { gram: self.method == "svd-llm", squares: self.method == "asvd", ..Needs::default() }
    }

    fn changes_floats(&self) -> bool {
        true
    }

    fn factors(&self, site: Site, shape: [usize; 2], storage: Storage) -> Option<Factors> {
        self.rank(site, shape).map(|rank| Factors { rank, storage, rest: None })
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        let cols = weight.cols();
        let Some(rank) = self.rank(site, [weight.rows(), cols]) else {
            return Weight::encode(weight, storage, None).map_err(at(site));
        };
        let moments = match self.method {
            "svd" => None,
            "asvd" => {
                let squares = stats.mean_squares(cols).ok_or_else(|| unseen(site))?;
                let mut diagonal = vec![0.0; cols * cols];
                squares.iter().enumerate().for_each(|(j, s)| diagonal[j * cols + j] = f64::from(*s).powf(self.alpha));
                Some(diagonal)
            }
            _ => Some(moments(site, cols, stats)?),
        };
        let thin = Spectrum::new(site, weight, moments.as_deref())?.thin(weight, rank);
        let factors = Factors { rank, storage, rest: None };
        Ok(Weight::LowRank(Box::new(stored(site, weight, thin, factors, moments.as_deref())?)))
    }
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
        let e = Factorize::build("svd", toml::from_str("ranks = { nose = 3 }").unwrap()).err().unwrap();
        assert!(e.to_string().contains("nose"), "{e}");
        let e = Factorize::build("svd", toml::from_str("parameters = 1.5").unwrap()).err().unwrap();
        assert!(e.to_string().contains("at most 1"), "{e}");
    }
}
