//! The same model in another basis: orthogonal matrices are multiplied into neighbouring weights and cancel (arXiv 2404.00456,
//! 2405.16406). Outliers of single channels are spread over all, so that weights and inputs round better; nothing is computed
//! differently when the model runs.
//!
//! A norm's scale first moves into the matrices that read it: only a norm without one passes a rotation on. A tied head is
//! then another matrix than the embedding.

use crate::{Error, Model, NormWeights, Result, Role, Site, Stage};
use std::collections::BTreeMap;
use tensor::{
    Linear, Tensor, Weight,
    ops::{self, NormKind},
};

/// An orthogonal matrix that rows are multiplied by.
#[derive(Clone)]
pub struct Turn {
    /// Its transpose: what a product with its rows multiplies by.
    by: Weight,
}

impl Turn {
    /// Of an orthogonal matrix `[n, n]`.
    pub fn new(matrix: &Tensor) -> Turn {
        Turn { by: Weight::from_tensor(matrix.transposed()) }
    }

    /// Rows of `n` values times the matrix; longer rows are several of `n` values each.
    fn rows(&self, x: &Tensor) -> Tensor {
        let (rows, cols, n) = (x.rows(), x.cols(), self.by.cols());
        let parts = Tensor::from_vec(rows * cols / n.max(1), n, x.as_slice().to_vec());
        Tensor::from_vec(rows, cols, ops::matmul(&parts, &self.by).into_vec())
    }

    /// The transposed matrix times columns.
    fn columns(&self, x: &Tensor) -> Tensor {
        self.rows(&x.transposed()).transposed()
    }
}

/// The bases that a model is brought to.
#[derive(Clone, Default)]
pub struct Bases {
    /// Of the residual stream, `[dim, dim]`; where the norm subtracts the mean it must leave the vector of ones as it is.
    pub residual: Option<Turn>,
    /// Of what each head of a block attends to, `[head_dim, head_dim]`.
    pub values: BTreeMap<u16, Turn>,
}

/// Parameters of a model that are made anew.
#[derive(Default)]
pub struct Changed {
    /// Matrices.
    pub linears: BTreeMap<Site, Linear>,
    /// Norms.
    pub norms: BTreeMap<Site, NormWeights>,
}

impl Changed {
    /// Puts them into the model.
    ///
    /// # Errors
    /// If one does not fit.
    pub fn apply(self, model: &mut Model) -> Result<()> {
        self.linears.into_iter().try_for_each(|(site, linear)| model.replace(site, linear))?;
        model.norms.extend(self.norms);
        Ok(())
    }
}

impl Model {
    /// Why the residual stream has no other basis in which the model is the same, if so.
    pub fn rotation_refusal(&self) -> Option<&'static str> {
        if self.spec.post_norms {
            return Some("what blocks return is scaled channel by channel before it joins the residual stream");
        }
        if self.is_factored() {
            return Some("matrices are factorized; rotate before that");
        }
        (!self.adapters.is_empty())
            .then_some("adapters are of the old basis; merge them first (planish export --merge)")
    }

    /// The model with a head of its own, which computes the same.
    ///
    /// # Errors
    /// If the family's configuration cannot say so.
    pub fn untied(&self) -> Result<Model> {
        let mut model = self.clone();
        if !self.spec.tied {
            return Ok(model);
        }
        model.config.fields_mut().insert("tie_word_embeddings".into(), false.into());
        model.spec.tied = (self.family.spec)(&model.config)?.tied;
        if model.spec.tied || !self.family.stored.iter().any(|s| s.sites.iter().any(|(role, _)| *role == Role::Head)) {
            return Err(Error::Site { site: Site::HEAD, reason: "this family has none beside the embedding".into() });
        }
        model.linears.insert(Site::HEAD, Linear::new(self.linear(Site::EMBED)?.weight.clone()));
        Ok(model)
    }

    /// The parameters outside of blocks, in another basis.
    ///
    /// # Errors
    /// If a norm cannot be folded.
    pub fn rotated_edges(&self, bases: &Bases) -> Result<Changed> {
        let mut changed = Changed::default();
        let Some(turn) = &bases.residual else { return Ok(changed) };
        for site in [Site::EMBED, Site::POSITION] {
            if let Some(table) = self.linears.get(&site) {
                changed.linears.insert(site, Linear::new(Weight::from_tensor(turn.rows(&table.weight.to_tensor()))));
            }
        }
        self.read_rotated(turn, Site::FINAL_NORM, &[Site::HEAD], &mut changed)?;
        Ok(changed)
    }

    /// The parameters of a block, in another basis.
    ///
    /// # Errors
    /// If a norm cannot be folded.
    pub fn rotated_block(&self, layer: u16, bases: &Bases) -> Result<Changed> {
        let mut changed = Changed::default();
        if let Some(turn) = &bases.residual {
            for stage in Stage::ALL {
                let Some(norm) = stage.norm().map(|role| Site::of(layer, role)) else { continue };
                let readers = stage.roles().iter().map(|role| Site::of(layer, *role));
                let readers: Vec<Site> = readers.filter(|s| self.linears.contains_key(s)).collect();
                self.read_rotated(turn, norm, &readers, &mut changed)?;
            }
            for site in [Role::O, Role::Down].map(|role| Site::of(layer, role)) {
                self.renew(site, &mut changed, |weight| turn.columns(weight), |bias| turn.rows(bias))?;
            }
        }
        if let Some(turn) = bases.values.get(&layer) {
            // Of a head's outputs, which are rows of the matrix.
            let heads = |weight: &Tensor| turn.rows(&weight.transposed()).transposed();
            self.renew(Site::of(layer, Role::V), &mut changed, heads, |bias| turn.rows(bias))?;
            self.renew(Site::of(layer, Role::O), &mut changed, |weight| turn.rows(weight), Tensor::clone)?;
        }
        Ok(changed)
    }

    /// Replaces a matrix, as it was changed so far, and its bias.
    fn renew(
        &self,
        site: Site,
        changed: &mut Changed,
        weight: impl Fn(&Tensor) -> Tensor,
        bias: impl Fn(&Tensor) -> Tensor,
    ) -> Result<()> {
        let old = changed.linears.remove(&site).map_or_else(|| self.linear(site).cloned(), Ok)?;
        let new = Weight::from_tensor(weight(&old.weight.to_tensor()));
        let row = |b: Vec<f32>| bias(&Tensor::from_vec(1, b.len(), b)).into_vec();
        changed.linears.insert(site, Linear::with_bias(new, old.bias.map(row)));
        Ok(())
    }

    /// Moves a norm's scale and shift into the matrices that read it, and turns their inputs.
    fn read_rotated(&self, turn: &Turn, norm: Site, readers: &[Site], changed: &mut Changed) -> Result<()> {
        let NormWeights { scale, shift } = self.norm(norm)?;
        let zeros = shift.as_ref().map(|s| vec![0.0; s.len()]);
        let mut plain = NormWeights { scale: vec![1.0; scale.len()], shift: zeros };
        let by_bias = readers.iter().all(|site| self.spec.has_bias(*site));
        if let Some(shift) = shift.as_ref().filter(|shift| !by_bias && shift.iter().any(|s| *s != 0.0)) {
            let kept: Vec<f32> = shift.iter().zip(scale).map(|(s, g)| if *s == 0.0 { 0.0 } else { s / g }).collect();
            if kept.iter().any(|v| !v.is_finite()) {
                let reason =
                    "shifts a channel that it scales by nothing, and what reads it has no bias to take the shift over";
                return Err(Error::Site { site: norm, reason: reason.into() });
            }
            plain.shift = Some(turn.rows(&Tensor::from_vec(1, kept.len(), kept)).into_vec());
        }
        for site in readers {
            let old = self.linear(*site)?;
            let mut weight = old.weight.to_tensor();
            let mut bias = old.bias.clone();
            if let (Some(shift), Some(bias), true) = (shift, &mut bias, by_bias) {
                let dot = |row: &[f32]| row.iter().zip(shift).map(|(w, s)| f64::from(*w) * f64::from(*s)).sum::<f64>();
                bias.iter_mut().enumerate().for_each(|(i, b)| *b = (f64::from(*b) + dot(weight.row(i))) as f32);
            }
            for row in weight.as_mut_slice().chunks_exact_mut(scale.len().max(1)) {
                row.iter_mut().zip(scale).for_each(|(w, g)| *w *= g);
            }
            changed.linears.insert(*site, Linear::with_bias(Weight::from_tensor(turn.rows(&weight)), bias));
        }
        changed.norms.insert(norm, plain);
        Ok(())
    }

    /// Must a basis of the residual stream leave the vector of ones as it is? Norms that subtract the mean know it by that.
    pub fn keeps_ones(&self) -> bool {
        self.spec.norm == NormKind::Layer
    }
}
