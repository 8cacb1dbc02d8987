//! Adapters: low-rank changes of linear maps beside a base that stays as it is stored.
//!
//! LoRA (arXiv 2106.09685) adds `scale B A` to a matrix; DoRA (arXiv 2402.09353) then brings each row of the sum to a
//! length that is learned. Neither touches the base: what an adapter adds to an output is computed beside it.

mod gguf;
mod modules;
mod peft;

pub use gguf::write as write_gguf;
pub use peft::{CONFIG as PEFT_CONFIG, WEIGHTS as PEFT_WEIGHTS, write as write_peft};

use crate::{Error, Model, Result, Site, save};
use rayon::prelude::*;
use std::{collections::BTreeMap, path::Path};
use tensor::{
    Linear, Storage, Tensor, Weight,
    ops::{self, Operand, Target},
    packed::{Form, Packed, Turn},
};

/// The change of one site.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// `A`, `[rank, inputs]`.
    pub down: Tensor,
    /// `B`, `[outputs, rank]`.
    pub up: Tensor,
    /// What `B A` is multiplied by: alpha over the rank, or over its root (rsLoRA, arXiv 2312.03732).
    pub scale: f32,
    /// Lengths of the rows of the changed matrix, `[outputs]` (DoRA).
    pub magnitude: Option<Vec<f32>>,
}

/// The changes of a model, by site.
pub type Adapters = BTreeMap<Site, Adapter>;

/// An adapter that somebody else holds.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// As [`Adapter::down`].
    pub down: &'a Tensor,
    /// As [`Adapter::up`].
    pub up: &'a Tensor,
    /// As [`Adapter::scale`].
    pub scale: f32,
    /// As [`Adapter::magnitude`].
    pub magnitude: Option<&'a [f32]>,
}

impl Adapter {
    /// The same by reference.
    pub fn change(&self) -> Change<'_> {
        Change { down: &self.down, up: &self.up, scale: self.scale, magnitude: self.magnitude.as_deref() }
    }

    /// Rows of `A`.
    pub fn rank(&self) -> usize {
        self.down.rows()
    }
}

/// The adapters of a site as they run: `y = gain * (W x) + bias + up (down x)`.
#[derive(Clone, Debug)]
pub struct Branch {
    /// `[ranks, inputs]`.
    pub(crate) down: Linear,
    /// `[outputs, ranks]`, scale and gain in it.
    pub(crate) up: Linear,
    /// What outputs of the base are multiplied by, where that is not 1.
    pub(crate) gain: Option<Gain>,
}

/// Factors of outputs.
#[derive(Clone, Debug)]
pub(crate) struct Gain {
    /// `[outputs]`.
    pub factors: Vec<f32>,
    /// What brings a bias back to what it was, `[outputs]`.
    pub shift: Vec<f32>,
}

impl Gain {
    pub fn new(factors: Vec<f32>, bias: Option<&[f32]>) -> Gain {
        let shift = match bias {
            Some(bias) => factors.iter().zip(bias).map(|(f, b)| (1.0 - f) * b).collect(),
            None => vec![0.0; factors.len()],
        };
        Gain { factors, shift }
    }
}

impl Branch {
    /// Changes `y`, the output of the base for `x`; `low` is memory that is used again.
    pub(crate) fn run(&self, x: &mut Operand, y: &mut Tensor, low: &mut Operand) {
        ops::products(x, [Target { linear: &self.down, out: low.values_mut() }]);
        if let Some(Gain { factors, shift }) = &self.gain {
            for row in y.as_mut_slice().chunks_exact_mut(factors.len().max(1)) {
                row.iter_mut().zip(factors.iter().zip(shift)).for_each(|(y, (f, s))| *y = *y * f + s);
            }
        }
        ops::add_product(low, &self.up, y);
    }

    /// Bytes in memory as 32-bit floats.
    pub(crate) fn size_bytes(&self) -> usize {
        4 * (self.down.weight.len() + self.up.weight.len() + self.gain.as_ref().map_or(0, |g| g.factors.len()))
    }
}

/// Floats, laid out for products.
pub(crate) fn packed(x: &Tensor, form: Form, turn: Turn) -> Result<Linear> {
    let full = |source| Error::NoRoom { bytes: 4 * x.as_slice().len(), source };
    Ok(Linear::new(Weight::Packed(Packed::of(x, form, turn).map_err(full)?)))
}

/// Other values of the same shape, in the same memory.
pub(crate) fn repack(linear: &mut Linear, x: &Tensor, turn: Turn) -> Result<()> {
    let full = |source| Error::NoRoom { bytes: 4 * x.as_slice().len(), source };
    match &mut linear.weight {
        Weight::Packed(packed) => packed.refill(x, turn).map_err(full),
        _ => Ok(()),
    }
}

/// Lengths of the rows of `W + scale B A`, `[outputs]`.
pub(crate) fn row_norms(weight: &Weight, change: Option<Change<'_>>) -> Vec<f32> {
    let length = |row: &mut Vec<f32>, o: usize| {
        weight.decode_row(o, row);
        if let Some(change) = change {
            for (r, b) in change.up.row(o).iter().enumerate() {
                add_scaled(row, change.scale * b, change.down.row(r));
            }
        }
        row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32
    };
    (0..weight.rows()).into_par_iter().map_init(|| vec![0.0; weight.cols()], length).collect()
}

fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t += factor * f);
}

/// Why an adapter does not fit a site, if it does not.
pub(crate) fn misfit(shape: Option<[usize; 2]>, change: Change<'_>) -> Option<String> {
    let Some([outputs, inputs]) = shape else { return Some("is no matrix of this model".into()) };
    let (down, up) = ([change.down.rows(), change.down.cols()], [change.up.rows(), change.up.cols()]);
    if down[0] == 0 {
        return Some("has rank 0".into());
    }
    if down[1] != inputs || up != [outputs, down[0]] {
        return Some(format!(
            "has A {down:?} and B {up:?}, and the matrix is [{outputs}, {inputs}]; the adapter is of another model"
        ));
    }
    if change.magnitude.is_some_and(|m| m.len() != outputs) {
        return Some(format!("has magnitudes that are not {outputs}"));
    }
    let finite = change.down.is_finite() && change.up.is_finite() && change.scale.is_finite();
    let all = finite && change.magnitude.iter().flat_map(|m| m.iter()).all(|v| v.is_finite());
    (!all).then(|| "holds numbers that are not finite; it is damaged or was trained with too high a rate".into())
}

/// Reads an adapter of `model`: a PEFT directory, or a GGUF file as llama.cpp reads it.
///
/// # Errors
/// If a file is malformed, of another model, or asks for what planish does not compute; the error names it.
pub fn load(model: &Model, path: &Path) -> Result<Adapters> {
    let adapters = if path.is_file() { gguf::read(model, path)? } else { peft::read(model, path)? };
    if adapters.is_empty() {
        return Err(Error::NoModel { path: path.into(), reason: "is an adapter that changes nothing".into() });
    }
    for (site, adapter) in &adapters {
        if let Some(reason) = misfit(model.spec.shape(*site), adapter.change()) {
            return Err(Error::Tensor { path: path.into(), name: site.to_string(), reason });
        }
    }
    Ok(adapters)
}

impl Model {
    /// Lets sets of adapters take part; what several change adds up. Those that were attached before are let go.
    ///
    /// Call it before [`Model::pack`].
    ///
    /// # Errors
    /// If one does not fit its site, or there is no memory for it.
    pub fn attach(&mut self, sets: &[Adapters]) -> Result<()> {
        let mut sites: BTreeMap<Site, Vec<&Adapter>> = BTreeMap::new();
        for (site, adapter) in sets.iter().flatten() {
            sites.entry(*site).or_default().push(adapter);
        }
        self.adapters.clear();
        for (site, adapters) in sites {
            let branch = self.branch(site, &adapters)?;
            self.adapters.insert(site, branch);
        }
        Ok(())
    }

    fn branch(&self, site: Site, adapters: &[&Adapter]) -> Result<Branch> {
        let linear = self.linear(site)?;
        let shape = self.spec.shape(site).filter(|_| site.layer.is_some());
        if let Some(reason) = adapters.iter().find_map(|a| misfit(shape, a.change())) {
            return Err(Error::Site { site, reason });
        }
        let [outputs, inputs] = [linear.weight.rows(), linear.weight.cols()];
        let ranks = adapters.iter().map(|a| a.rank()).sum();
        let (mut down, mut up) = (Vec::with_capacity(ranks * inputs), Tensor::zeros(outputs, ranks));
        let mut total = vec![1.0f32; outputs];
        let mut at = 0;
        for adapter in adapters {
            down.extend_from_slice(adapter.down.as_slice());
            let gains =
                adapter.magnitude.as_ref().map(|m| gains(m, &row_norms(&linear.weight, Some(adapter.change()))));
            for o in 0..outputs {
                let gain = gains.as_ref().map_or(1.0, |g| g[o]);
                total[o] += gain - 1.0;
                for (to, b) in up.row_mut(o)[at..].iter_mut().zip(adapter.up.row(o)) {
                    *to = gain * adapter.scale * b;
                }
            }
            at += adapter.rank();
        }
        let gain = adapters.iter().any(|a| a.magnitude.is_some()).then(|| Gain::new(total, linear.bias.as_deref()));
        let down = packed(&Tensor::from_vec(ranks, inputs, down), Form::F32, Turn::Straight)?;
        Ok(Branch { down, up: packed(&up, Form::F32, Turn::Straight)?, gain })
    }

    /// The same model with its adapters in the matrices, which become floats: those of the base, or brain floats where it
    /// holds codes. Matrices of codes that share a tensor of a GGUF file with one of them become brain floats too.
    ///
    /// # Errors
    /// If a matrix cannot be stored.
    pub fn merged(&self) -> Result<Model> {
        let mut model = self.clone();
        model.adapters.clear();
        for (site, branch) in &self.adapters {
            let linear = self.linear(*site)?;
            let (down, up) = (branch.down.weight.to_tensor(), branch.up.weight.to_tensor());
            let mut values = linear.weight.to_tensor();
            let cols = values.cols().max(1);
            values.as_mut_slice().par_chunks_mut(cols).enumerate().for_each(|(o, row)| {
                if let Some(gain) = &branch.gain {
                    row.iter_mut().for_each(|v| *v *= gain.factors[o]);
                }
                up.row(o).iter().enumerate().for_each(|(r, b)| add_scaled(row, *b, down.row(r)));
            });
            let storage = match linear.weight.storage() {
                coded if coded.is_coded() => Storage::Bf16,
                floats => floats.dense(),
            };
            let weight = Weight::encode(&values, storage, None);
            let weight = weight.map_err(|e| Error::Site { site: *site, reason: e.to_string() })?;
            model.linears.insert(*site, Linear::with_bias(weight, linear.bias.clone()));
        }
        let shared = save::shared(self, true).into_iter().filter(|g| g.iter().any(|s| self.adapters.contains_key(s)));
        for site in shared.flatten() {
            if let Some(linear) = model.linears.get_mut(&site).filter(|l| l.weight.storage().is_coded()) {
                let weight = Weight::encode(&linear.weight.to_tensor(), Storage::Bf16, None);
                linear.weight = weight.map_err(|e| Error::Site { site, reason: e.to_string() })?;
            }
        }
        Ok(model)
    }

    /// Changes the output of a site by its adapters, where it has any.
    pub(crate) fn adapt(&self, site: Site, x: &mut Operand, y: &mut Tensor, low: &mut Operand) {
        if let Some(branch) = self.adapters.get(&site) {
            branch.run(x, y, low);
        }
    }
}

/// Magnitudes over lengths; a row of zeros stays one.
pub(crate) fn gains(magnitude: &[f32], norms: &[f32]) -> Vec<f32> {
    magnitude.iter().zip(norms).map(|(m, n)| if *n > 0.0 { m / n } else { 1.0 }).collect()
}

/// The lengths that DoRA begins with: those of the rows as they are, `[outputs]`.
///
/// # Errors
/// If the model has no such matrix.
pub fn magnitude(model: &Model, site: Site) -> Result<Vec<f32>> {
    Ok(row_norms(&model.linear(site)?.weight, None))
}
