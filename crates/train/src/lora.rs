//! Adapters that begin to learn: which sites get one, of which rank, and what they begin with.

use crate::{Error, Result};
use model::{Adapter, Adapters, Model, ROLES, Role, Site, Spec, adapter, uniform};
use serde::{Deserialize, Serialize};
use std::str::FromStr;
use tensor::Tensor;

/// Adapters that are asked for: `rank=16,alpha=32,sites=q+v+0.down,dora,rslora`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lora {
    /// Rows of each `A`.
    pub rank: usize,
    /// What `B A` is multiplied by is this over the rank.
    pub alpha: f32,
    /// Roles (`q`) or single sites (`3.q`); all linear maps of the blocks where none is named.
    pub sites: Vec<String>,
    /// Do the lengths of rows learn as well (DoRA, arXiv 2402.09353)?
    pub dora: bool,
    /// Is alpha divided by the root of the rank (rsLoRA, arXiv 2312.03732)?
    pub rslora: bool,
}

/// Linear maps of a block.
const LINEAR: [Role; 7] = [Role::Q, Role::K, Role::V, Role::O, Role::Gate, Role::Up, Role::Down];
/// Ranks from which on an adapter is no longer a small one of anything.
const LARGEST: usize = 4096;

impl FromStr for Lora {
    type Err = Error;

    fn from_str(text: &str) -> Result<Lora> {
        let bad =
            |said: String| Error::Asked(format!("--lora {said}; it reads like rank=16,alpha=32,sites=q+v,dora,rslora"));
        let mut lora = Lora { rank: 0, alpha: 0.0, sites: Vec::new(), dora: false, rslora: false };
        let mut alpha = None;
        for word in text.split(',').map(str::trim) {
            match word.split_once('=') {
                None if word == "dora" => lora.dora = true,
                None if word == "rslora" => lora.rslora = true,
                Some(("rank", number)) => {
                    let rank = number.parse().ok().filter(|r| (1..=LARGEST).contains(r));
                    lora.rank = rank.ok_or_else(|| bad(format!("has rank {number:?}, not 1 to {LARGEST}")))?;
                }
                Some(("alpha", number)) => {
                    let positive = number.parse().ok().filter(|a: &f32| *a > 0.0 && a.is_finite());
                    alpha = Some(positive.ok_or_else(|| bad(format!("has alpha {number:?}, not a number above 0")))?);
                }
                Some(("sites", names)) => lora.sites = names.split('+').map(|n| n.trim().to_string()).collect(),
                _ => return Err(bad(format!("has {word:?}"))),
            }
        }
        if lora.rank == 0 {
            return Err(bad("has no rank".into()));
        }
        lora.alpha = alpha.unwrap_or(2.0 * lora.rank as f32);
        Ok(lora)
    }
}

impl Lora {
    /// What `B A` is multiplied by.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The sites that are adapted.
    ///
    /// # Errors
    /// If a name is none of a linear map in the blocks.
    pub fn sites(&self, spec: &Spec) -> Result<Vec<Site>> {
        let of_role = |role: Role| (0..spec.layers()).map(move |layer| Site::of(layer, role));
        let present = |site: &Site| spec.shape(*site).is_some();
        let mut sites: Vec<Site> = Vec::new();
        for name in &self.sites {
            let role = ROLES.iter().find(|(role, n)| n == name && LINEAR.contains(role)).map(|(role, _)| *role);
            let site = name.parse::<Site>().ok().filter(|s| LINEAR.contains(&s.role));
            let named: Vec<Site> = match (role, site) {
                (Some(role), _) => of_role(role).filter(present).collect(),
                (None, Some(site)) => [site].into_iter().filter(present).collect(),
                _ => Vec::new(),
            };
            if named.is_empty() {
                let known: Vec<&str> =
                    LINEAR.iter().filter(|r| of_role(**r).any(|s| present(&s))).map(|r| r.name()).collect();
                return Err(Error::Asked(format!(
                    "--lora has the site {name:?}; this model's are {}, or of one block like 0.{}",
                    known.join("+"),
                    known[0]
                )));
            }
            sites.extend(named);
        }
        if self.sites.is_empty() {
            sites.extend(LINEAR.into_iter().flat_map(of_role).filter(present));
        }
        sites.sort();
        sites.dedup();
        Ok(sites)
    }

    /// Adapters that change nothing yet: `A` is drawn evenly between plus and minus one over the root of its inputs
    /// (arXiv 1502.01852, as PEFT draws it), by seed and site, `B` is zero.
    ///
    /// # Errors
    /// If a site cannot be adapted, or its matrix is no larger than the rank.
    pub fn fresh(&self, model: &Model, seed: u64) -> Result<Adapters> {
        let mut adapters = Adapters::new();
        for site in self.sites(&model.spec)? {
            let [outputs, inputs] = model.spec.shape(site).unwrap_or([0, 0]);
            if self.rank >= outputs.min(inputs) {
                return Err(Error::Asked(format!(
                    "--lora rank={} is no less than the sizes of {site}, {outputs} by {inputs}; take a smaller one",
                    self.rank
                )));
            }
            let name = site.to_string().bytes().fold(seed, |own, byte| uniform(own, byte.into()).to_bits());
            let bound = 1.0 / (inputs as f64).sqrt();
            let values = (0..self.rank * inputs).map(|i| (bound * (2.0 * uniform(name, i as u64) - 1.0)) as f32);
            let down = Tensor::from_vec(self.rank, inputs, values.collect());
            let magnitude = self.dora.then(|| adapter::magnitude(model, site)).transpose()?;
            let up = Tensor::zeros(outputs, self.rank);
            adapters.insert(site, Adapter { down, up, scale: self.scale(), magnitude });
        }
        Ok(adapters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_faults_are_named() {
        let lora: Lora = "rank=8,sites=q+0.down,dora".parse().unwrap();
        assert_eq!((lora.rank, lora.alpha, lora.scale()), (8, 16.0, 2.0));
        assert!(lora.dora && !lora.rslora && lora.sites == ["q", "0.down"]);
        let rooted: Lora = "rslora, rank=16, alpha=8".parse().unwrap();
        assert_eq!(rooted.scale(), 2.0);
        for (text, says) in [
            ("", "\"\""),
            ("alpha=3", "no rank"),
            ("rank=0", "rank \"0\""),
            ("rank=1e9", "rank"),
            ("rank=4,alpha=nan", "alpha"),
            ("rank=4,alpha=-1", "alpha"),
            ("rank=4,lora", "\"lora\""),
        ] {
            let error = text.parse::<Lora>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
