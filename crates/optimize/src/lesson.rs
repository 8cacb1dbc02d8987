//! Lessons: what a model is to learn, and how; as users write it, and as a job takes it.

use crate::{Error, Result, recipe};
use model::{Adapters, Model, Site, Spec, adapter};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};
use tensor::{Storage, grid::Grid};
use train::{Curve, Lora, OptimizerKind, Precision, Rule, Schedule, course::Plan, distil::Guidance};

/// What is to be learned, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lesson {
    /// The text.
    pub data: PathBuf,
    /// Another text to measure on; without it, the twentieth part of the documents by their hash, 65,536 tokens at most.
    pub validation: Option<PathBuf>,
    /// What separates documents.
    pub separator: String,
    /// Longest sequence in tokens.
    pub context: usize,
    /// Are documents joined into one stream, whose pieces may hold several?
    #[serde(default)]
    pub join_documents: bool,
    /// Steps, rates, checkpoints.
    pub plan: Plan,
    /// The optimizer.
    pub rule: Rule,
    /// In which numbers products run.
    pub precision: Precision,
    /// What a teacher adds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guidance: Option<Guidance>,
    /// Adapters that learn in place of the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// An adapter that goes on learning in place of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Storages that its matrices learn to have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codes: Option<Codes>,
    /// A file that holds what the teacher says of the text, or shall.
    #[serde(skip)]
    pub teacher_cache: Option<PathBuf>,
    /// Do blocks run again on the way back, in place of what they leave being kept? The result is the same.
    #[serde(skip)]
    pub checkpoint_activations: bool,
    /// Start of all random numbers.
    pub seed: u64,
}

impl Lesson {
    /// Is it adapters that learn, while the model stays as it is?
    pub fn teaches_adapters(&self) -> bool {
        self.lora.is_some() || self.adapter.is_some()
    }

    /// The adapters that learn, as they begin.
    ///
    /// # Errors
    /// If they do not fit the model, or cannot be read.
    pub fn adapters(&self, model: &Model) -> Result<Option<Adapters>> {
        Ok(match (&self.lora, &self.adapter) {
            (Some(lora), _) => Some(lora.fresh(model, self.seed)?),
            (None, Some(path)) => Some(adapter::load(model, path)?),
            (None, None) => None,
        })
    }
}

/// Storages that matrices learn to have (quantization-aware training), in the words of recipes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Codes {
    /// That of every matrix that `sites` does not name.
    pub storage: String,
    /// Those of single sites or roles; `keep` leaves one as it is.
    pub sites: BTreeMap<String, String>,
}

impl Codes {
    /// The grid of each matrix of a model that learns to be codes, and where rows do not divide into the blocks that were
    /// asked for.
    ///
    /// # Errors
    /// If a storage or a site is not known.
    pub fn grids(&self, spec: &Spec) -> Result<(BTreeMap<Site, Grid>, BTreeMap<Site, Storage>)> {
        let (choice, fallbacks) = recipe::choose(&self.storage, &self.sites, spec, &recipe::Limits::NONE)?;
        let grids = choice.into_iter().filter_map(|(site, storage)| match storage {
            Storage::Grid(grid) => Some((site, grid)),
            _ => None,
        });
        Ok((grids.collect(), fallbacks))
    }
}

/// How a model is taught, as users write it: options of the command line, or a table of a file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Steps of the optimizer.
    pub steps: u64,
    /// Sequences of a step.
    pub batch: usize,
    /// Full sequences that are in memory together, and that one rank learns; as many as have 2,048 tokens where none is given.
    pub part: Option<usize>,
    /// Longest sequence in tokens; the model's context, 1024 at most, where none is given.
    pub context: Option<usize>,
    /// Join documents into one stream, in a seeded order, and cut it: sequences are all full, and may see the end of one
    /// document before the next.
    pub join_documents: bool,
    /// Highest learning rate.
    pub lr: f64,
    /// How it falls: see [`Curve`].
    pub schedule: Curve,
    /// What it falls to, as a part of the highest.
    pub least: f64,
    /// Part of the steps over which it falls, of the schedule `wsd`.
    pub decay_part: f64,
    /// Steps in which it rises; a twentieth where none is given.
    pub warm_up: Option<u64>,
    /// How gradients become steps.
    pub optimizer: OptimizerKind,
    /// Bits of the optimizer's moments, 32 or 8.
    pub optimizer_bits: u8,
    /// Decay of matrices.
    pub weight_decay: f32,
    /// Decay of the first moment; the optimizer's own where none is given.
    pub beta1: Option<f32>,
    /// The same of the second.
    pub beta2: Option<f32>,
    /// Largest norm of the gradient; 0 is none.
    pub clip: f32,
    /// In which numbers products run.
    pub precision: Precision,
    /// Steps between validations; a tenth of all where none is given.
    pub validate_every: Option<u64>,
    /// Validations without a better loss after which it ends; 0 never.
    pub patience: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Keep of each block only its input, and run it again on the way back: less memory, the same result.
    pub checkpoint_activations: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        let Rule { optimizer, bits, decay, clip, .. } = Rule::default();
        Settings {
            steps: 1000,
            batch: 8,
            part: None,
            context: None,
            join_documents: false,
            lr: 1e-4,
            schedule: Curve::Cosine,
            least: 0.1,
            decay_part: 0.2,
            warm_up: None,
            optimizer,
            optimizer_bits: bits,
            weight_decay: decay,
            beta1: None,
            beta2: None,
            clip,
            precision: Precision::Bf16,
            validate_every: None,
            patience: 0,
            checkpoint_every: 50,
            checkpoint_activations: false,
        }
    }
}

/// Predictions that are in memory together unless a sequence is longer.
const PART: usize = 2048;

/// Texts to learn and to measure on.
#[derive(Clone, Debug)]
pub struct Texts {
    /// What is learned.
    pub data: PathBuf,
    /// What is measured, if it is a text of its own.
    pub validation: Option<PathBuf>,
    /// What separates documents.
    pub separator: String,
}

impl Settings {
    /// The optimizer.
    fn rule(&self) -> Result<Rule> {
        let refuse = |said: String| Err(Error::Asked(said));
        let (optimizer, bits) = (self.optimizer, self.optimizer_bits);
        if bits != 32 && bits != 8 {
            return refuse(format!("--optimizer-bits takes 32 or 8, not {bits}"));
        }
        if optimizer == OptimizerKind::Adafactor {
            if bits == 8 {
                return refuse("adafactor remembers too little for --optimizer-bits 8 to save anything".into());
            }
            if self.beta1.or(self.beta2).is_some() {
                return refuse("adafactor has no --beta1 and no --beta2".into());
            }
        }
        let [first, second] = optimizer.beta();
        let beta = [self.beta1.unwrap_or(first), self.beta2.unwrap_or(second)];
        if beta.iter().any(|b| !(0.0..1.0).contains(b)) {
            return refuse("--beta1 and --beta2 take numbers from 0 up to, but not, 1".into());
        }
        Ok(Rule { optimizer, bits, beta, decay: self.weight_decay, clip: self.clip, ..Rule::default() })
    }

    /// The lesson for a model that reads `longest` tokens at most.
    ///
    /// # Errors
    /// If a number cannot be.
    pub fn lesson(&self, texts: Texts, longest: usize, seed: u64) -> Result<Lesson> {
        let refuse = |said: &str| Err(Error::Asked(said.into()));
        if self.steps == 0 || self.batch == 0 || self.part == Some(0) {
            return refuse("--steps, --batch and --part take numbers from 1 on");
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return Err(Error::Asked(format!("--lr takes a number above 0, not {}", self.lr)));
        }
        if !(self.decay_part > 0.0 && self.decay_part <= 1.0) {
            return refuse("--decay-part takes a number above 0 and up to 1");
        }
        let context = self.context.unwrap_or_else(|| longest.min(1024));
        if context < 1 || context > longest {
            return Err(Error::Asked(format!("--context {context} is not from 1 to {longest}, the model's context")));
        }
        let predictions = self.batch.saturating_mul(context);
        Ok(Lesson {
            data: texts.data,
            validation: texts.validation,
            separator: texts.separator,
            context,
            join_documents: self.join_documents,
            plan: Plan {
                schedule: Schedule {
                    rate: self.lr,
                    warm_up: self.warm_up.unwrap_or(self.steps / 20),
                    steps: self.steps,
                    curve: self.schedule,
                    least: self.least,
                    decay_part: self.decay_part,
                },
                predictions,
                part: predictions
                    .min(self.part.map_or(PART.max(context), |sequences| sequences.saturating_mul(context))),
                validate_every: self.validate_every.unwrap_or_else(|| (self.steps / 10).max(1)).max(1),
                patience: self.patience,
                checkpoint_every: self.checkpoint_every.max(1),
            },
            rule: self.rule()?,
            precision: self.precision,
            guidance: None,
            lora: None,
            adapter: None,
            codes: None,
            teacher_cache: None,
            checkpoint_activations: self.checkpoint_activations,
            seed,
        })
    }
}
