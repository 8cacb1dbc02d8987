//! `Model`: the weights of a GPT by site, with the spec that says how they act.

use crate::{Config, Error, Family, Result, Role, Site, Spec, adapter::Branch};
use std::collections::BTreeMap;
use tensor::{Linear, Stored, Weight, ops::KeyValue, packed::Packed};

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
    /// Adapters of products, as they run ([`Model::attach`]).
    pub adapters: BTreeMap<Site, Branch>,
    /// How caches keep keys and values.
    pub key_value: KeyValue,
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

    /// Lays every product's weight out for speed and keeps keys and values as brain floats; inputs of products are
    /// then rounded to match the weights (see `tensor::packed`), so logits are no longer exact. Returns the sites
    /// whose codes no kernel multiplies; they lie in memory as 16-bit floats.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn pack(&mut self) -> Result<Vec<Site>> {
        let bytes = self.matrix_bytes();
        let head = self.spec.resolve(Site::HEAD);
        let looked_up = |site: &Site| *site != head && matches!(site.role, Role::Embed | Role::Position);
        let sites: Vec<Site> = self.linears.keys().filter(|s| !looked_up(s)).copied().collect();
        let taken = sites.iter().filter_map(|site| self.linears.remove(site)).collect::<Vec<Linear>>();
        let (weights, others): (Vec<_>, Vec<_>) = taken.into_iter().map(|l| (l.weight, (l.bias, l.rounding))).unzip();
        let packed = Packed::all(weights).map_err(|source| Error::NoRoom { bytes, source })?;
        let mut widened = Vec::new();
        for ((site, weight), (bias, rounding)) in sites.into_iter().zip(packed).zip(others) {
            let wide = |w: &Weight| matches!(w, Weight::Packed(p) if p.form().is_f16() && w.storage().is_coded());
            if weight.parts().into_iter().any(|(_, part)| wide(part)) {
                widened.push(site);
            }
            self.linears.insert(site, Linear { weight, bias, rounding });
        }
        self.key_value = KeyValue::Bf16;
        Ok(widened)
    }

    /// Tensor payload with scales and adapters, tied tensors once.
    pub fn size_bytes(&self) -> usize {
        let norms: usize =
            self.norms.values().map(|n| 4 * (n.scale.len() + n.shift.as_ref().map_or(0, Vec::len))).sum();
        let adapters: usize = self.adapters.values().map(Branch::size_bytes).sum();
        self.linears.values().map(Linear::size_bytes).sum::<usize>() + norms + adapters
    }

    /// Payload of the matrices alone.
    pub fn matrix_bytes(&self) -> usize {
        self.linears.values().map(|l| l.weight.size_bytes()).sum()
    }

    /// Number of parameters, those of adapters too, tied tensors once.
    pub fn parameters(&self) -> usize {
        let linears: usize =
            self.linears.values().map(|l| l.weight.values() + l.bias.as_ref().map_or(0, Vec::len)).sum();
        let norms: usize = self.norms.values().map(|n| n.scale.len() + n.shift.as_ref().map_or(0, Vec::len)).sum();
        let adapters: usize = self.adapters.values().map(|b| b.size_bytes() / 4).sum();
        linears + norms + adapters
    }

    /// Mean bits per parameter of the payload.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.size_bytes() as f64 / self.parameters().max(1) as f64
    }

    /// A model of some of the blocks, in rising order, with the same edges.
    ///
    /// # Errors
    /// If there is no such block, or the family cannot describe what remains.
    pub fn of_blocks(&self, blocks: &[u16]) -> Result<Model> {
        let layers = self.spec.layers();
        if blocks.is_empty() || !blocks.is_sorted_by(|a, b| a < b) || blocks.iter().any(|b| *b >= layers) {
            return Err(Error::Asked(format!(
                "blocks are listed in rising order, each once, from 0 to {}: not {blocks:?}",
                layers - 1
            )));
        }
        let mut config = self.config.clone();
        let fields = config.fields_mut();
        let count = ["num_hidden_layers", "n_layer"].into_iter().find(|f| fields.contains_key(*f));
        fields.insert(count.unwrap_or("num_hidden_layers").into(), blocks.len().into());
        for value in fields.values_mut() {
            // Lists with an entry for every block, as `layer_types`.
            if let Some(list) = value.as_array_mut().filter(|list| list.len() == usize::from(layers)) {
                let kept = blocks.iter().map(|b| list[usize::from(*b)].clone()).collect();
                *list = kept;
            }
        }
        let mut spec = (self.family.spec)(&config)?;
        if blocks.iter().zip(&spec.blocks).any(|(b, made)| self.spec.blocks[usize::from(*b)] != *made) {
            let reason = "these blocks differ in kind, and the family's configuration cannot say which is which; \
                          take blocks whose kinds alternate as in the original";
            return Err(Error::Asked(reason.into()));
        }
        spec.origin = blocks.iter().map(|b| self.spec.origin[usize::from(*b)]).collect();
        let moved = |site: &Site| match site.layer {
            None => Some(*site),
            Some(layer) => blocks.iter().position(|b| *b == layer).map(|at| Site::of(at as u16, site.role)),
        };
        let linears = self.linears.iter().filter_map(|(s, l)| Some((moved(s)?, l.clone()))).collect();
        let norms = self.norms.iter().filter_map(|(s, n)| Some((moved(s)?, n.clone()))).collect();
        let adapters = self.adapters.iter().filter_map(|(s, b)| Some((moved(s)?, b.clone()))).collect();
        Ok(Model { spec, config, family: self.family, linears, norms, adapters, key_value: self.key_value })
    }

    /// Says that the weights are not read again soon: pages of a mapped file then need no memory.
    pub fn release(&self) {
        for stored in self.stored() {
            stored.release(0..stored.rows());
        }
    }

    /// The stored rows of all matrices that are not packed.
    pub fn stored(&self) -> impl Iterator<Item = &Stored> {
        self.linears.values().flat_map(|l| l.weight.parts()).filter_map(|(_, part)| part.stored())
    }

    /// Does any weight lie on a grid?
    pub fn is_quantized(&self) -> bool {
        self.linears.values().flat_map(|l| l.weight.parts()).any(|(_, part)| part.storage().is_coded())
    }

    /// Is any weight a product of two?
    pub fn is_factored(&self) -> bool {
        self.linears.values().any(|l| l.weight.low_rank().is_some())
    }
}
