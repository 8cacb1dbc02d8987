//! `Learner`: a model's values, their gradients and moments, and the steps that change them.

use crate::{Error, Result};
use model::{Aim, Backward, Model, Parameters, Tokens};
use serde::{Deserialize, Serialize};
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
    moments: [Parameters; 2],
    /// Steps taken.
    steps: u64,
    rule: Rule,
    /// Sums of gradients of 1, 2, 4 ... parts of a batch: equal ones meet, so that the order in which numbers are added
    /// is a tree that depends on the number of parts alone.
    sums: Vec<(u32, Parameters)>,
    spare: Vec<Parameters>,
}

impl Learner {
    /// Takes over a model's values.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(model: &Model, precision: Precision, rule: Rule) -> Result<Learner> {
        let values = Parameters::of(model);
        let moments = [values.zeros(), values.zeros()];
        let mut working = model.clone();
        working.key_value = if precision == Precision::Bf16 { KeyValue::Bf16 } else { KeyValue::F32 };
        let back = Backward::new(&working, precision.form());
        let mut learner =
            Learner { working, back, values, moments, steps: 0, rule, sums: Vec::new(), spare: Vec::new() };
        learner.refresh()?;
        Ok(learner)
    }

    /// Gives the working model the values as they are.
    fn refresh(&mut self) -> Result<()> {
        for (site, values) in &self.values.matrices {
            self.back.refresh(&mut self.working, *site, values)?;
        }
        self.values.give_vectors(&mut self.working);
        Ok(())
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
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

    /// The mean loss over batches, nats, without learning from them.
    ///
    /// # Errors
    /// If a token is not in the vocabulary.
    pub fn loss(&mut self, batches: &[Tokens]) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for batch in batches {
            sum += self.back.loss(&self.working, batch)?;
            count += batch.counted();
        }
        Ok(sum / count.max(1) as f64)
    }

    /// Learns from the parts of a batch, which are not in memory together.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or the loss or a gradient is not finite; the values are then as before.
    pub fn step(&mut self, parts: &[Tokens], aim: &mut dyn Aim, rate: f64) -> Result<Stepped> {
        let count: usize = parts.iter().map(Tokens::counted).sum();
        let factor = 1.0 / count.max(1) as f32;
        let mut loss = 0.0;
        for part in parts {
            let mut sum = self.spare.pop().unwrap_or_else(|| self.values.zeros());
            sum.slices_mut().for_each(ops::clear);
            loss += self.back.run(&self.working, part, aim, factor, &mut sum)?;
            self.add((0, sum));
        }
        while self.sums.len() > 1 {
            self.meet();
        }
        let Some((_, gradient)) = self.sums.pop() else { return Ok(Stepped { loss: 0.0, norm: 0.0 }) };
        let stepped = Stepped { loss: loss / count.max(1) as f64, norm: norm(&gradient) };
        if !stepped.norm.is_finite() || !stepped.loss.is_finite() {
            let what = self.guilty(&gradient, stepped.loss);
            self.spare.push(gradient);
            return Err(Error::NotFinite { step: self.steps + 1, what, from: 0, to: 0 });
        }
        self.update(&gradient, rate, stepped.norm);
        self.spare.push(gradient);
        self.refresh()?;
        Ok(stepped)
    }

    /// Adds a sum to the tree.
    fn add(&mut self, sum: (u32, Parameters)) {
        self.sums.push(sum);
        while let [.., (a, _), (b, _)] = self.sums[..]
            && a == b
        {
            self.meet();
        }
    }

    /// Adds the last sum to the one before it.
    fn meet(&mut self) {
        let Some((_, last)) = self.sums.pop() else { return };
        if let Some((level, sum)) = self.sums.last_mut() {
            *level += 1;
            for (to, from) in sum.slices_mut().zip(last.slices()) {
                ops::add_slices(to, from);
            }
        }
        self.spare.push(last);
    }

    fn update(&mut self, gradient: &Parameters, rate: f64, norm: f64) {
        self.steps += 1;
        let Rule { beta, eps, decay, clip } = self.rule;
        let correction = |b: f32| (1.0 / (1.0 - f64::from(b).powf(self.steps as f64))) as f32;
        let scale = if clip > 0.0 && norm > f64::from(clip) { (f64::from(clip) / norm) as f32 } else { 1.0 };
        let matrices = self.values.matrices.len();
        let [first, second] = &mut self.moments;
        let values = self.values.slices_mut().zip(gradient.slices()).zip(first.slices_mut().zip(second.slices_mut()));
        for (i, ((values, gradient), (first, second))) in values.enumerate() {
            let decay = if i < matrices { decay } else { 0.0 };
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
