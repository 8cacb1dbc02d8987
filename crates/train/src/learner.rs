//! `Learner`: a model's values, their gradients and moments, and the steps that change them.

use crate::{
    Error, Result,
    checkpoint::{self, Piece},
    codes::Codes,
    holes::Holes,
    optimizer::{Optimizer, Rule},
    ranks::{self, Ranks},
    sums::{self, Do, Sums},
    wire::Wire,
};
use model::{Adapter, Adapters, Aim, Asked, Backward, Bucket, Model, Parameters, Site, Tokens};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};
use tensor::{
    Tensor,
    grid::Grid,
    kernels::Arithmetic,
    ops::{self, KeyValue},
    packed::Form,
};

/// In which numbers products run; values, gradients and moments are 32-bit floats in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// Inputs of products are rounded to brain floats; sums are 32-bit floats.
    Bf16,
    /// Inputs of products are rounded to 16-bit floats, and gradients scaled so that they fit into them, as which they
    /// travel between ranks; sums are 32-bit floats, and so is the arithmetic, as processors have none of their own.
    Fp16,
}

impl Precision {
    /// All, with their names.
    pub const ALL: [(&str, Precision); 3] =
        [("f32", Precision::F32), ("bf16", Precision::Bf16), ("fp16", Precision::Fp16)];

    /// How inputs of products are laid out.
    pub fn form(self) -> Form {
        match self {
            Precision::F32 => Form::F32,
            Precision::Bf16 => Form::Bf16,
            Precision::Fp16 => Form::Half,
        }
    }

    /// How keys and values are kept.
    pub fn key_value(self) -> KeyValue {
        if self == Precision::Bf16 { KeyValue::Bf16 } else { KeyValue::F32 }
    }

    /// How gradients travel between ranks.
    pub(crate) fn wire(self) -> Wire {
        if self == Precision::Fp16 { Wire::Halves } else { Wire::Floats }
    }

    /// Whose peak its products can reach.
    pub fn arithmetic(self) -> Arithmetic {
        match self {
            Precision::F32 | Precision::Fp16 => Arithmetic::F32,
            Precision::Bf16 => Arithmetic::Bf16,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub struct Stepped {
    /// Mean loss of the step's predictions, nats.
    pub loss: f64,
    /// Norm of the gradient before it was clipped; 0 where it was too large for its numbers, and the step skipped.
    pub norm: f64,
    /// Was the step skipped?
    pub skipped: bool,
}

/// The scale of the loss: gradients times it fit into 16-bit floats (arXiv 1710.03740).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scaling {
    /// The scale as it is, a power of two.
    pub scale: f64,
    /// Steps in a row whose gradients fitted.
    pub fitting: u64,
    /// Steps that were skipped, since a gradient was too large.
    pub skipped: u64,
}

impl Scaling {
    /// Steps after which a larger scale is tried.
    const PATIENCE: u64 = 2000;

    fn new(precision: Precision) -> Scaling {
        let scale = if precision == Precision::Fp16 { 65536.0 } else { 1.0 };
        Scaling { scale, fitting: 0, skipped: 0 }
    }

    /// A gradient did not fit; false where a smaller scale is of no use.
    fn shrink(&mut self) -> bool {
        let more = self.scale > 1.0;
        if more {
            (self.scale, self.fitting) = (self.scale / 2.0, 0);
        }
        more
    }

    /// A gradient fitted.
    fn grow(&mut self, precision: Precision) {
        self.fitting += 1;
        if precision == Precision::Fp16 && self.fitting >= Scaling::PATIENCE {
            (self.scale, self.fitting) = ((self.scale * 2.0).min(16_777_216.0), 0);
        }
    }
}

/// A model at school.
pub struct Learner {
    /// Packed: what runs.
    working: Model,
    back: Backward,
    values: Parameters,
    /// What adapters are multiplied by.
    scales: BTreeMap<Site, f32>,
    /// Matrices that learn to be codes.
    codes: Codes,
    /// Which values of matrices with holes there are.
    holes: Holes,
    optimizer: Optimizer,
    precision: Precision,
    scaling: Scaling,
    /// Steps taken.
    steps: u64,
    /// Sums of gradients.
    sums: Sums,
    /// Who else learns.
    ranks: Arc<dyn Ranks>,
}

impl Learner {
    /// Takes over a model's values, all of which learn.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(model: &Model, precision: Precision, rule: Rule) -> Result<Learner> {
        Learner::of(model, Parameters::of(model), BTreeMap::new(), Codes::default(), precision, rule)
    }

    /// Takes over a model's values, of which those of `choice` learn to be codes.
    ///
    /// # Errors
    /// If the model has no such matrix, a row does not divide into blocks, or there is no memory for it.
    pub fn of_codes(model: &Model, choice: &BTreeMap<Site, Grid>, precision: Precision, rule: Rule) -> Result<Learner> {
        let mut values = Parameters::of(model);
        let codes = Codes::new(choice, &mut values)?;
        Learner::of(model, values, BTreeMap::new(), codes, precision, rule)
    }

    /// Takes over adapters, which alone learn: the model stays as it is stored.
    ///
    /// # Errors
    /// If one does not fit the model, or there is no memory for it.
    pub fn of_adapters(model: &Model, adapters: &Adapters, precision: Precision, rule: Rule) -> Result<Learner> {
        let scales = adapters.iter().map(|(site, adapter)| (*site, adapter.scale)).collect();
        Learner::of(model, Parameters::of_adapters(adapters), scales, Codes::default(), precision, rule)
    }

    fn of(
        model: &Model,
        values: Parameters,
        mut scales: BTreeMap<Site, f32>,
        codes: Codes,
        precision: Precision,
        rule: Rule,
    ) -> Result<Learner> {
        let optimizer = Optimizer::new(rule, &values);
        let scaling = Scaling::new(precision);
        let mut working = model.clone();
        working.key_value = precision.key_value();
        // The factors of a matrix run, and learn, as an adapter of what they leave does.
        for (site, linear) in working.linears.iter_mut().filter(|(site, _)| values.downs.contains_key(site)) {
            if let (Some(low), false) = (linear.weight.low_rank(), scales.contains_key(site)) {
                linear.weight = low.without_factors();
                scales.insert(*site, 1.0);
            }
        }
        let back = Backward::new(&working, precision.form());
        let (sums, ranks) = (Sums::new(precision.wire()), ranks::of_process());
        let holes = Holes::of(model);
        let mut learner = Learner {
            working,
            back,
            values,
            scales,
            codes,
            holes,
            optimizer,
            precision,
            scaling,
            steps: 0,
            sums,
            ranks,
        };
        learner.refresh()?;
        Ok(learner)
    }

    /// From here on blocks run again on the way back: the same numbers in less memory.
    pub fn checkpoint_activations(&mut self) {
        self.back.checkpoint_activations();
    }

    /// Gives the working model the values as they are.
    fn refresh(&mut self) -> Result<()> {
        self.holes.keep(&mut self.values);
        for (site, values) in &self.values.matrices {
            let values = match self.codes.levels(&self.values, *site) {
                Some(levels) => {
                    // Not every table of levels has a zero.
                    self.holes.empty(*site, levels);
                    levels
                }
                None => values,
            };
            self.back.refresh(&mut self.working, *site, values)?;
        }
        for (site, scale) in &self.scales {
            if let Some(change) = self.values.change(*site, *scale) {
                self.back.refresh_adapter(&mut self.working, *site, change)?;
            }
        }
        self.values.give_vectors(&mut self.working);
        Ok(())
    }

    /// The adapters as they are; none where all values learn.
    pub fn adapters(&self) -> Adapters {
        let adapter = |(site, scale): (&Site, &f32)| {
            let change = self.values.change(*site, *scale)?;
            let magnitude = change.magnitude.map(<[f32]>::to_vec);
            Some((*site, Adapter { down: change.down.clone(), up: change.up.clone(), scale: *scale, magnitude }))
        };
        self.scales.iter().filter_map(adapter).collect()
    }

    /// Learns other tables beside the model's values, which an aim looks at.
    #[must_use]
    pub fn learning_too(mut self, projections: BTreeMap<Site, Tensor>) -> Learner {
        self.values.projections = projections;
        self.optimizer = Optimizer::new(self.optimizer.rule(), &self.values);
        self
    }

    /// The model that was learned, its matrices stored as those of `like`, or as the codes that they learned to be.
    ///
    /// # Errors
    /// If a matrix cannot be stored.
    pub fn model(&self, like: &Model) -> Result<Model> {
        let mut model = self.values.model(like)?;
        self.codes.give(&self.values, &mut model)?;
        self.holes.give(&mut model)?;
        Ok(model)
    }

    /// The model as it is now, packed as it runs.
    pub(crate) fn working(&self) -> &Model {
        &self.working
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The ranks that learn together.
    pub fn ranks(&self) -> &Arc<dyn Ranks> {
        &self.ranks
    }

    /// Learns with other ranks than those of the process.
    #[must_use]
    pub fn among(self, ranks: Arc<dyn Ranks>) -> Learner {
        Learner { ranks, ..self }
    }

    /// The values.
    pub fn values(&self) -> &Parameters {
        &self.values
    }

    /// The scale of the loss.
    pub fn scaling(&self) -> Scaling {
        self.scaling
    }

    /// Bytes of what the optimizer remembers.
    pub fn optimizer_bytes(&self) -> usize {
        self.optimizer.bytes(&self.values)
    }

    /// Everything that a step depends on, to be saved.
    pub fn pieces(&self) -> impl Iterator<Item = Piece<&[u8]>> {
        checkpoint::pieces("values", &self.values).chain(self.optimizer.pieces(&self.values))
    }

    /// Takes other values; the moments stay.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn set_values(&mut self, values: Parameters) -> Result<()> {
        self.values = values;
        self.refresh()
    }

    /// Goes on from what was saved: `read` fills the pieces and tells the steps taken and the scale.
    ///
    /// # Errors
    /// What `read` says, or if there is no memory for it.
    pub fn restore<T>(&mut self, read: impl FnOnce(Vec<Piece<&mut [u8]>>) -> Result<(u64, Scaling, T)>) -> Result<T> {
        let names = self.values.zeros();
        let mut pieces = checkpoint::pieces_mut("values", &mut self.values);
        pieces.extend(self.optimizer.pieces_mut(&names));
        let (steps, scaling, rest) = read(pieces)?;
        (self.steps, self.scaling) = (steps, scaling);
        self.refresh()?;
        Ok(rest)
    }

    /// The mean loss over batches, nats, without learning from them. Ranks share out the batches.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or another rank failed.
    pub fn loss(&mut self, batches: &[Tokens]) -> Result<f64> {
        let mut own = Vec::new();
        for batch in &batches[ranks::share(batches.len(), &*self.ranks)] {
            own.push(self.back.loss(&self.working, batch)?);
        }
        let sum: f64 = ranks::gathered(&*self.ranks, &own)?.iter().sum();
        let count: usize = batches.iter().map(Tokens::counted).sum();
        Ok(sum / count.max(1) as f64)
    }

    /// Learns from the parts of a batch, which are not in memory together. Ranks share out the parts.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or the loss or a gradient is not finite, or another rank failed; the values are
    /// then as before.
    pub fn step(&mut self, parts: &[Tokens], aim: &mut dyn Aim, rate: f64) -> Result<Stepped> {
        let count: usize = parts.iter().map(Tokens::counted).sum();
        aim.take(&self.values);
        let (gradient, stepped) = loop {
            let Some((mut gradient, loss)) = self.gradient(parts, aim, count)? else {
                return Ok(Stepped { loss: 0.0, norm: 0.0, skipped: false });
            };
            self.precision.wire().spread(&mut gradient, Bucket::all(self.working.spec.layers()), &*self.ranks)?;
            self.holes.keep(&mut gradient);
            self.codes.gradients(&self.values, &mut gradient);
            let norm = norm(&gradient) / self.scaling.scale;
            let stepped = Stepped { loss: loss / count.max(1) as f64, norm, skipped: false };
            if norm.is_finite() || !stepped.loss.is_finite() || !self.scaling.shrink() {
                break (gradient, stepped);
            }
            self.sums.give(gradient);
            // The first batch is tried until its gradient fits: skipped, it would be missing where a model learns most.
            if self.steps > 0 {
                self.steps += 1;
                self.scaling.skipped += 1;
                return Ok(Stepped { norm: 0.0, skipped: true, ..stepped });
            }
        };
        if !stepped.norm.is_finite() || !stepped.loss.is_finite() {
            let what = self.guilty(&gradient, stepped.loss);
            self.sums.give(gradient);
            return Err(Error::NotFinite { step: self.steps + 1, what, from: 0, to: 0 });
        }
        self.steps += 1;
        let numbers = [rate, stepped.norm, 1.0 / self.scaling.scale];
        self.optimizer.step(self.steps - self.scaling.skipped, &mut self.values, &gradient, numbers);
        self.scaling.grow(self.precision);
        self.sums.give(gradient);
        self.refresh()?;
        Ok(stepped)
    }

    /// The summed gradient of the parts, on rank 0 (memory for it on the others), and the summed loss.
    ///
    /// What this rank owes to others it gives in any case: they would wait for it. That it failed they learn when all meet.
    fn gradient(&mut self, parts: &[Tokens], aim: &mut dyn Aim, count: usize) -> Result<Option<(Parameters, f64)>> {
        let factor = (self.scaling.scale / count.max(1) as f64) as f32;
        let plan = sums::plan(parts.len(), self.ranks.rank(), self.ranks.size());
        let (mut losses, mut failed) = (Vec::new(), None);
        let mut plan = &plan[..];
        while let [first, rest @ ..] = plan {
            let (then, later) = rest.split_at(rest.iter().position(|next| next.begins()).unwrap_or(rest.len()));
            let done = match first {
                Do::Learn(part) if failed.is_none() => self.learn(&parts[*part], aim, factor, then),
                Do::Learn(_) => self.carry(None, then).map(|()| 0.0),
                _ => self.carry(Some(*first), then).map(|()| 0.0),
            };
            match (done, first) {
                (Ok(loss), Do::Learn(_)) => losses.push(loss),
                (Ok(_), _) => {}
                (Err(e), _) => failed = failed.or(Some(e)),
            }
            plan = later;
        }
        if let Some(e) = failed {
            self.sums.clear();
            return Err(e);
        }
        let losses = ranks::gathered(&*self.ranks, &losses).inspect_err(|_| self.sums.clear())?;
        let sum = self.sums.pop();
        self.sums.clear();
        let sum = sum.unwrap_or_else(|| self.sums.take(&self.values));
        Ok((!parts.is_empty()).then(|| (sum, losses.iter().sum())))
    }

    /// The gradient of a part; each bucket goes on its way while the others are still made.
    fn learn(&mut self, part: &Tokens, aim: &mut dyn Aim, factor: f32, then: &[Do]) -> Result<f64> {
        let mut top = self.sums.take(&self.values);
        top.slices_mut().for_each(ops::clear);
        let (sums, ranks) = (&mut self.sums, &*self.ranks);
        let (mut told, mut carried) = (0, Ok(()));
        let mut tell = |bucket, top: &mut Parameters| {
            told += 1;
            let done = sums.follow(top, then, bucket, ranks);
            carried = std::mem::replace(&mut carried, Ok(())).and(done);
        };
        let loss = self.back.run_telling(&self.working, part, Asked { aim, factor }, &mut top, &mut tell);
        // A failure in the middle of it leaves buckets that others wait for.
        for bucket in Bucket::all(self.working.spec.layers()).skip(told) {
            self.sums.follow(&mut top, then, bucket, &*self.ranks)?;
        }
        self.sums.settle(top, then);
        carried?;
        Ok(loss?)
    }

    /// Goes on with the newest sum, or with an empty one where none was learned.
    fn carry(&mut self, first: Option<Do>, then: &[Do]) -> Result<()> {
        let newest = first.and_then(|_| self.sums.pop());
        let mut top = newest.unwrap_or_else(|| self.sums.take(&self.values));
        let all: Vec<Do> = first.into_iter().chain(then.iter().copied()).collect();
        for bucket in Bucket::all(self.working.spec.layers()) {
            self.sums.follow(&mut top, &all, bucket, &*self.ranks)?;
        }
        self.sums.settle(top, &all);
        Ok(())
    }

    /// What is not finite.
    fn guilty(&self, gradient: &Parameters, loss: f64) -> String {
        let bad = gradient.names().zip(gradient.slices()).find(|(_, g)| g.iter().any(|v| !v.is_finite()));
        match bad {
            _ if !loss.is_finite() => "the loss".into(),
            Some(((site, name), _)) => format!("the gradient of the {name} of {site}"),
            None => "the norm of the gradient".into(),
        }
    }
}

fn norm(gradient: &Parameters) -> f64 {
    gradient.slices().map(ops::squared_norm).sum::<f64>().sqrt()
}
