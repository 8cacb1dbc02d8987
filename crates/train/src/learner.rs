//! `Learner`: a model's values, their gradients and moments, and the steps that change them.

use crate::{
    Error, Result,
    ranks::{self, Ranks},
    sums::{self, Do, Sums},
};
use model::{Adapter, Adapters, Aim, Asked, Backward, Bucket, Model, Parameters, Site, Tokens};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};
use tensor::{
    kernels::Arithmetic,
    ops::{self, AdamW, KeyValue},
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
}

impl Precision {
    /// All, with their names.
    pub const ALL: [(&str, Precision); 2] = [("f32", Precision::F32), ("bf16", Precision::Bf16)];

    fn form(self) -> Form {
        match self {
            Precision::F32 => Form::F32,
            Precision::Bf16 => Form::Bf16,
        }
    }

    /// Whose peak its products can reach.
    pub fn arithmetic(self) -> Arithmetic {
        match self {
            Precision::F32 => Arithmetic::F32,
            Precision::Bf16 => Arithmetic::Bf16,
        }
    }
}

/// What AdamW does beside the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// Decay of the moments.
    pub beta: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Weight decay; of matrices only.
    pub decay: f32,
    /// Largest norm of the whole gradient, which is shortened to it; 0 is none.
    pub clip: f32,
}

impl Default for Rule {
    fn default() -> Rule {
        Rule { beta: [0.9, 0.999], eps: 1e-8, decay: 0.01, clip: 1.0 }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub struct Stepped {
    /// Mean loss of the step's predictions, nats.
    pub loss: f64,
    /// Norm of the gradient before it was clipped.
    pub norm: f64,
}

/// A model at school.
pub struct Learner {
    /// Packed: what runs.
    working: Model,
    back: Backward,
    values: Parameters,
    /// What adapters are multiplied by.
    scales: BTreeMap<Site, f32>,
    moments: [Parameters; 2],
    /// Steps taken.
    steps: u64,
    rule: Rule,
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
        Learner::of(model, Parameters::of(model), BTreeMap::new(), precision, rule)
    }

    /// Takes over adapters, which alone learn: the model stays as it is stored.
    ///
    /// # Errors
    /// If one does not fit the model, or there is no memory for it.
    pub fn of_adapters(model: &Model, adapters: &Adapters, precision: Precision, rule: Rule) -> Result<Learner> {
        let scales = adapters.iter().map(|(site, adapter)| (*site, adapter.scale)).collect();
        Learner::of(model, Parameters::of_adapters(adapters), scales, precision, rule)
    }

    fn of(
        model: &Model,
        values: Parameters,
        scales: BTreeMap<Site, f32>,
        precision: Precision,
        rule: Rule,
    ) -> Result<Learner> {
        let moments = [values.zeros(), values.zeros()];
        let mut working = model.clone();
        working.key_value = if precision == Precision::Bf16 { KeyValue::Bf16 } else { KeyValue::F32 };
        let back = Backward::new(&working, precision.form());
        let (sums, ranks) = (Sums::default(), ranks::of_process());
        let mut learner = Learner { working, back, values, scales, moments, steps: 0, rule, sums, ranks };
        learner.refresh()?;
        Ok(learner)
    }

    /// From here on blocks run again on the way back: the same numbers in less memory.
    pub fn checkpoint_activations(&mut self) {
        self.back.checkpoint_activations();
    }

    /// Gives the working model the values as they are.
    fn refresh(&mut self) -> Result<()> {
        for (site, values) in &self.values.matrices {
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

    /// Values and both moments, to be saved.
    pub fn state(&self) -> [&Parameters; 3] {
        [&self.values, &self.moments[0], &self.moments[1]]
    }

    /// Takes other values; the moments stay.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn set_values(&mut self, values: Parameters) -> Result<()> {
        self.values = values;
        self.refresh()
    }

    /// Goes on from a state that was saved.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn restore(&mut self, [values, first, second]: [Parameters; 3], steps: u64) -> Result<()> {
        (self.values, self.moments, self.steps) = (values, [first, second], steps);
        self.refresh()
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
        let Some((mut gradient, loss)) = self.gradient(parts, aim, count)? else {
            return Ok(Stepped { loss: 0.0, norm: 0.0 });
        };
        if self.ranks.size() > 1 {
            sums::spread(&mut gradient, Bucket::all(self.working.spec.layers()), &*self.ranks)?;
        }
        let stepped = Stepped { loss: loss / count.max(1) as f64, norm: norm(&gradient) };
        if !stepped.norm.is_finite() || !stepped.loss.is_finite() {
            let what = self.guilty(&gradient, stepped.loss);
            self.sums.give(gradient);
            return Err(Error::NotFinite { step: self.steps + 1, what, from: 0, to: 0 });
        }
        self.update(&gradient, rate, stepped.norm);
        self.sums.give(gradient);
        self.refresh()?;
        Ok(stepped)
    }

    /// The summed gradient of the parts, on rank 0 (memory for it on the others), and the summed loss.
    ///
    /// What this rank owes to others it gives in any case: they would wait for it. That it failed they learn when all meet.
    fn gradient(&mut self, parts: &[Tokens], aim: &mut dyn Aim, count: usize) -> Result<Option<(Parameters, f64)>> {
        let factor = 1.0 / count.max(1) as f32;
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

    fn update(&mut self, gradient: &Parameters, rate: f64, norm: f64) {
        self.steps += 1;
        let Rule { beta, eps, decay, clip } = self.rule;
        let correction = |b: f32| (1.0 / (1.0 - f64::from(b).powf(self.steps as f64))) as f32;
        let scale = if clip > 0.0 && norm > f64::from(clip) { (f64::from(clip) / norm) as f32 } else { 1.0 };
        let tables = self.values.tables();
        let [first, second] = &mut self.moments;
        let values = self.values.slices_mut().zip(gradient.slices()).zip(first.slices_mut().zip(second.slices_mut()));
        for (i, ((values, gradient), (first, second))) in values.enumerate() {
            let decay = if i < tables { decay } else { 0.0 };
            let corrections = beta.map(correction);
            let step = AdamW { rate: rate as f32, beta, eps, decay, corrections, scale };
            ops::adamw(step, values, gradient, first, second);
        }
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
