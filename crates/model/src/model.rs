//! `Model`: the weights of a GPT by site, with the spec that says how they act.

use crate::{Config, Error, Family, Result, Site, Spec};
use std::collections::BTreeMap;
use tensor::{Linear, Weight};

/// The parameters of a normalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct NormWeights {
    /// `[width]`.
    pub scale: Vec<f32>,
    /// `[width]`.
    pub shift: Option<Vec<f32>>,
}

/// A GPT: weights by site. Clones share the stored bytes.
#[derive(Clone)]
pub struct Model {
    /// What the weights mean.
    pub spec: Spec,
    /// The configuration that it was read from.
    pub config: Config,
    /// Which family it is of.
    pub family: &'static Family,
    /// Matrices by site; a tied head is not listed.
    pub linears: BTreeMap<Site, Linear>,
    /// Norms by site.
    pub norms: BTreeMap<Site, NormWeights>,
}

impl Model {
    /// The matrix of a site; a tied head is the embedding.
    ///
    /// # Errors
    /// If the model has no such matrix.
    pub fn linear(&self, site: Site) -> Result<&Linear> {
        let site = self.spec.resolve(site);
        self.linears.get(&site).ok_or_else(|| Error::Site { site, reason: "the model has no such matrix".into() })
    }

    /// The norm of a site.
    ///
    /// # Errors
    /// If the model has no such norm.
    pub fn norm(&self, site: Site) -> Result<&NormWeights> {
        self.norms.get(&site).ok_or_else(|| Error::Site { site, reason: "the model has no such norm".into() })
    }

    /// Puts another weight at a site.
    ///
    /// # Errors
    /// If its shape is not the site's.
    pub fn replace(&mut self, site: Site, linear: Linear) -> Result<()> {
        let site = self.spec.resolve(site);
        let shape = [linear.weight.rows(), linear.weight.cols()];
        if self.spec.shape(site) != Some(shape) {
            return Err(Error::Site { site, reason: format!("a weight of {shape:?} does not fit there") });
        }
        self.linears.insert(site, linear);
        Ok(())
    }

    /// Tensor payload with scales, tied tensors once.
    pub fn size_bytes(&self) -> usize {
        let norms: usize =
            self.norms.values().map(|n| 4 * (n.scale.len() + n.shift.as_ref().map_or(0, Vec::len))).sum();
        self.linears.values().map(Linear::size_bytes).sum::<usize>() + norms
    }

    /// Payload of the matrices alone.
    pub fn matrix_bytes(&self) -> usize {
        self.linears.values().map(|l| l.weight.size_bytes()).sum()
    }

    /// Number of parameters, tied tensors once.
    pub fn parameters(&self) -> usize {
        let linears: usize = self.linears.values().map(|l| l.weight.len() + l.bias.as_ref().map_or(0, Vec::len)).sum();
        let norms: usize = self.norms.values().map(|n| n.scale.len() + n.shift.as_ref().map_or(0, Vec::len)).sum();
        linears + norms
    }

    /// Mean bits per parameter of the payload.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.size_bytes() as f64 / self.parameters().max(1) as f64
    }

    /// Does any weight lie on a grid?
    pub fn is_quantized(&self) -> bool {
        self.linears.values().any(|l| matches!(l.weight, Weight::Quant(_)))
    }
}
