//! LQER (arXiv 2402.02446): what rounding leaves is made up for by the product of two thin matrices beside it.
//!
//! Rounding and splitting take turns, as in LoftQ (arXiv 2310.08659): what the factors hold need not be rounded. The first split is
//! that of the rounding's error, or of the matrix itself (SVDQuant, arXiv 2411.05007), and of all turns the best is kept, by what
//! the outputs lose on the calibration data.

use super::{
    Factors, Method, Plan, Rewrite, find, options,
    spectrum::{Spectrum, cost},
    svd::{moments, stored},
};
use crate::{Error, Needs, Result, Stats};
use model::Site;
use serde::Deserialize;
use tensor::{Storage, Tensor, Weight};

/// The method.
pub static LQER: Method = Method {
    name: "lqer",
    about: "Rounds with another method and keeps what that leaves as the product of two thin matrices.",
    paper: "arXiv 2402.02446",
    cost: "the other method's a few times and an eigenvalue problem per matrix each time",
    build: |o| {
        let asked = options::<Asked>("lqer", o)?;
        let bad = |reason: String| Error::Options { method: "lqer".into(), reason };
        if !(1..=4096).contains(&asked.rank) || !(1..=20).contains(&asked.rounds) {
            return Err(bad("`rank` is 1 to 4096, `rounds` 1 to 20".into()));
        }
        let factors = Storage::parse(&asked.factors)?;
        match (find(&asked.method)?.build)(asked.options)? {
            Plan::EachMatrix(inner) if !inner.changes_floats() => {
                Ok(Plan::EachMatrix(Box::new(Lqer { rank: asked.rank, rounds: asked.rounds, factors, inner })))
            }
            _ => {
                Err(bad(format!("`method` rounds matrix by matrix, as gptq, awq or rtn do; {} does not", asked.method)))
            }
        }
    },
};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Asked {
    /// Columns of one factor, rows of the other.
    rank: usize,
    /// How often it is rounded and split again.
    rounds: usize,
    /// How factors are stored.
    factors: String,
    /// What rounds.
    method: String,
    /// Its options.
    options: toml::Table,
}

impl Default for Asked {
    fn default() -> Self {
        Asked { rank: 16, rounds: 2, factors: "int8".into(), method: "gptq".into(), options: toml::Table::new() }
    }
}

struct Lqer {
    rank: usize,
    rounds: usize,
    factors: Storage,
    inner: Box<dyn Rewrite>,
}

impl Rewrite for Lqer {
    fn needs(&self) -> Needs {
        Needs { gram: true, ..self.inner.needs() }
    }

    fn factors(&self, _: Site, [rows, cols]: [usize; 2], storage: Storage) -> Option<Factors> {
        let factors = Factors { rank: self.rank, storage: self.factors, rest: Some(storage) };
        (self.rank < rows.min(cols)).then_some(factors)
    }

    fn balance(&self, stats: &Stats, matrices: &[(Site, Tensor, Storage)]) -> Result<Option<Vec<f32>>> {
        self.inner.balance(stats, matrices)
    }

    fn matrix(&self, site: Site, weight: &Tensor, storage: Storage, stats: &Stats) -> Result<Weight> {
        let rounded = self.inner.matrix(site, weight, storage, stats)?;
        let Some(factors) = self.factors(site, [weight.rows(), weight.cols()], storage) else { return Ok(rounded) };
        let gram = moments(site, weight.cols(), stats)?;
        let (mut best, mut least) = (rounded, f64::INFINITY);
        for start in [Some(best.to_tensor()), None] {
            let mut left = start.map_or_else(|| weight.clone(), |rounded| minus(weight, &rounded));
            for _ in 0..self.rounds {
                let thin = Spectrum::new(site, &left, Some(&gram))?.thin(&left, self.rank);
                let low = stored(site, &left, thin, factors, Some(&gram))?;
                let rest = self.inner.matrix(site, &minus(weight, &low.to_tensor()), storage, stats)?;
                left = minus(weight, &rest.to_tensor());
                let own = cost(&minus(&left, &low.to_tensor()), Some(&gram));
                if own < least {
                    let whole = low.with_rest(rest).map_err(|e| Error::Site { site, reason: e.to_string() })?;
                    (best, least) = (Weight::LowRank(Box::new(whole)), own);
                }
            }
        }
        Ok(best)
    }
}

fn minus(a: &Tensor, b: &Tensor) -> Tensor {
    let mut out = a.clone();
    out.as_mut_slice().iter_mut().zip(b.as_slice()).for_each(|(a, b)| *a -= b);
    out
}
