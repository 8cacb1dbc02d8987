//! Rotations: orthogonal matrices, folded into neighbouring weights, that spread outliers over all channels. They cancel, so
//! the model computes the same; what is rounded afterwards rounds better. They begin as random Hadamard matrices (QuaRot,
//! arXiv 2404.00456), and learn.
//!
//! Only what folds is turned, so any format holds the result and it runs as fast as before: the residual stream, and what
//! heads attend to. The paper's rotations while the model runs (of queries and keys, and before `down`) are not among them.

mod learn;
mod orthogonal;

use super::{Method, Plan, options};
use crate::{
    Error, Result,
    journal::Journal,
    progress::{self, Progress},
};
use formats::{
    Dtype,
    safetensors::{self, Archive, Entry},
};
use model::{Bases, Changed, Model, Role, Site, Turn};
use orthogonal::orthogonal;
use serde::Deserialize;
use std::collections::BTreeMap;
use tensor::{Bytes, Tensor};

/// The method.
pub static ROTATE: Method = Method {
    name: "rotate",
    about: "Spreads outliers over all channels before another method rounds: --method rotate,gptq. A tied head is untied.",
    paper: "arXiv 2404.00456 (random), 2405.16406 and 2512.24124 (learned)",
    cost: "steps x 64 inputs^3 operations, 4 bytes a parameter on disk; needs no data",
    build: |o| Ok(Plan::Rotated(options::<Rotation>("rotate", o)?)),
};

/// What is turned.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rotation {
    /// The residual stream, which unties a tied head.
    pub residual: bool,
    /// What each head attends to, between `v` and `o`.
    pub values: bool,
    /// Steps that the rotations learn; 0 leaves them random.
    pub steps: usize,
}

impl Default for Rotation {
    fn default() -> Self {
        Rotation { residual: true, values: true, steps: 150 }
    }
}

impl Rotation {
    /// The model with the matrices that it will have, which computes the same; none where it has them already.
    ///
    /// # Errors
    /// If the model cannot be turned so.
    pub fn shape(&self, model: &Model) -> Result<Option<Model>> {
        if !self.residual {
            return Ok(None);
        }
        let refuse = |reason: &str| {
            let reason = format!(
                "the residual stream of this model has no other basis: {reason}; turn what heads attend to alone with --option rotate.residual=false"
            );
            Error::Options { method: "rotate".into(), reason }
        };
        if let Some(reason) = model.rotation_refusal() {
            return Err(refuse(reason));
        }
        if !model.spec.tied {
            return Ok(None);
        }
        Ok(Some(model.untied().map_err(|e| refuse(&e.to_string()))?))
    }

    /// Bytes that turning a model of width `dim` holds beside its matrices.
    pub fn memory(&self, dim: usize) -> usize {
        if self.residual && self.steps > 0 { learn::memory(dim) } else { 64 * dim * dim }
    }

    /// Turns the model, a block at a time, for the matrices that are `asked` for: those that are stored anew later.
    ///
    /// # Errors
    /// If a norm cannot be folded, the journal cannot be written or the job was interrupted.
    pub fn turn(
        &self,
        model: &mut Model,
        asked: &dyn Fn(Site) -> bool,
        seed: u64,
        journal: &Journal,
        progress: &dyn Progress,
    ) -> Result<()> {
        let residual = self.residual.then(|| self.residual(model, asked, seed, journal, progress)).transpose()?;
        let mut bases = Bases { residual, values: BTreeMap::new() };
        let layers = model.spec.layers();
        progress.begin("rotating", u64::from(layers) + 1);
        unit(model, "rotated-edges", journal, |model| Ok(model.rotated_edges(&bases)?))?;
        progress.advance(1);
        for layer in 0..layers {
            progress::check()?;
            unit(model, &format!("rotated-{layer}"), journal, |model| {
                let changed = model.rotated_block(layer, &bases)?;
                if !self.values {
                    return Ok(changed);
                }
                let turn = self.values(model, layer, changed, seed)?;
                bases.values = BTreeMap::from([(layer, turn)]);
                Ok(model.rotated_block(layer, &bases)?)
            })?;
            progress.advance(1);
        }
        Ok(())
    }

    /// The basis of the residual stream: what the journal holds, or what is learned.
    fn residual(
        &self,
        model: &Model,
        asked: &dyn Fn(Site) -> bool,
        seed: u64,
        journal: &Journal,
        progress: &dyn Progress,
    ) -> Result<Turn> {
        let (n, ones) = (model.spec.dim, model.keeps_ones());
        let start = orthogonal(n, ones, seed, 0);
        if self.steps == 0 {
            return Ok(Turn::new(&start));
        }
        let path = journal.folder()?.map(|folder| folder.join("residual.safetensors"));
        if let Some(path) = path.as_ref().filter(|path| path.is_file()) {
            let archive = Archive::open(path)?;
            let bytes = archive.get("residual").map(|view| view.bytes.as_chunks::<4>().0).unwrap_or_default();
            if bytes.len() == n * n {
                return Ok(Turn::new(&Tensor::from_vec(n, n, bytes.iter().map(|b| f32::from_le_bytes(*b)).collect())));
            }
        }
        let stream = learn::Stream::new(model, asked, seed)?;
        progress.begin("learning a rotation", self.steps as u64);
        let learned = learn::learn(start, ones, self.steps, |step, count| stream.draw(step, count), progress)?;
        if let Some(path) = path {
            let bytes = Bytes::from_f32(learned.as_slice().to_vec());
            let entry = Entry { name: "residual".into(), dtype: Dtype::F32, shape: vec![n, n], bytes };
            safetensors::write(&path, &[entry], &[])?;
        }
        Ok(Turn::new(&learned))
    }

    /// The basis of what a block's heads attend to; `changed` is that block in the new basis of the residual stream.
    fn values(&self, model: &Model, layer: u16, changed: Changed, seed: u64) -> Result<Turn> {
        let n = model.spec.blocks[usize::from(layer)].head_dim;
        let draw = u64::from(layer) + 1;
        let start = orthogonal(n, false, seed, draw);
        if self.steps == 0 {
            return Ok(Turn::new(&start));
        }
        let mut rows = Vec::new();
        for (role, transposed) in [(Role::V, true), (Role::O, false)] {
            let site = Site::of(layer, role);
            let linear = changed.linears.get(&site).map_or_else(|| model.linear(site), Ok)?;
            let values = linear.weight.to_tensor();
            let square: f32 = values.as_slice().iter().map(|v| v * v).sum();
            let scale = if square > 0.0 { (values.as_slice().len() as f32 / square).sqrt() } else { 0.0 };
            let values = if transposed { values.transposed() } else { values };
            rows.extend(values.into_vec().into_iter().map(|v| v * scale));
        }
        let rows = Tensor::from_vec(rows.len() / n.max(1), n, rows);
        let seed = seed ^ draw << 48;
        let some = |step, count| Ok(learn::some(&rows, count, seed, step));
        Ok(Turn::new(&learn::learn(start, false, self.steps, some, &progress::Silent)?))
    }
}

/// Makes some parameters anew, or takes them from the journal; from there they are read as they are needed.
fn unit(model: &mut Model, name: &str, journal: &Journal, make: impl FnOnce(&Model) -> Result<Changed>) -> Result<()> {
    if journal.read(name, model)? {
        return Ok(());
    }
    let changed = make(model)?;
    let sites: Vec<Site> = changed.linears.keys().copied().collect();
    let norms: Vec<Site> = changed.norms.keys().copied().collect();
    changed.apply(model)?;
    journal.write(name, model, &sites, &norms)?;
    journal.read(name, model)?;
    Ok(())
}
