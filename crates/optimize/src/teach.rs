//! Fine-tuning as a job: a model and a text in, an artefact out that appears whole or not at all.

use crate::{
    Error, Result,
    artefact::{self, Staged, Target},
    data::{self, Cutting, Document},
    journal::Journal,
    manifest::{self, Manifest},
    progress::Progress,
    speed::peak_rss_bytes,
};
use model::{Adapters, Aim, Gpt, Likelihood, Model, Parameters, adapter};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tensor::limits;
use train::{
    Curve, Learner, Lora, OptimizerKind, Precision, Rule, Schedule, Sequences,
    course::{Course, Plan, Record},
    distil::{Guidance, Teacher},
    ranks::{self, Ranks},
};

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
    /// Do blocks run again on the way back, in place of what they leave being kept? The result is the same.
    #[serde(skip)]
    pub checkpoint_activations: bool,
    /// Start of all random numbers.
    pub seed: u64,
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
        let predictions = self.batch * context;
        Ok(Lesson {
            data: texts.data,
            validation: texts.validation,
            separator: texts.separator,
            context,
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
            checkpoint_activations: self.checkpoint_activations,
            seed,
        })
    }
}

/// Where the result goes.
#[derive(Clone, Debug)]
pub struct Place {
    /// A directory.
    pub out: PathBuf,
    /// Replace an existing result?
    pub overwrite: bool,
    /// Discard unfinished work of another job?
    pub restart: bool,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Taught {
    /// Was it there already, from the same job?
    pub already: bool,
    /// How it went.
    pub record: Record,
    /// Predictions a second of this run's steps; 0 where there were none.
    pub tokens_per_second: f64,
    /// Operations of the products of these steps over what this machine can do at most.
    pub share_of_peak: f64,
    /// Most memory that this process held.
    pub peak_rss_bytes: u64,
    /// Scale of the loss at the end, of fp16.
    pub loss_scale: Option<f64>,
    /// Bytes of what the optimizer remembers.
    pub optimizer_bytes: usize,
}

/// Name of the record beside the weights.
const RECORD: &str = "training.json";

/// What `training.json` holds: nothing in it depends on the clock.
#[derive(Serialize, Deserialize)]
struct Kept {
    key: String,
    lesson: Lesson,
    record: Record,
}

/// Teaches a model a text and writes the result. Ranks learn together; the first of them writes.
///
/// # Errors
/// If the data are of no use, numbers grow beyond all bounds, or a file cannot be written. Nothing appears at `out` then;
/// checkpoints stay beside it, and the same call goes on from them.
pub fn run(gpt: &Gpt, teacher: Option<&Gpt>, lesson: &Lesson, place: &Place, bar: &dyn Progress) -> Result<Taught> {
    refuse(gpt, teacher, lesson, place)?;
    let documents = documents(gpt, &lesson.data, lesson)?;
    let (taught, measured) = match &lesson.validation {
        Some(path) => (documents, self::documents(gpt, path, lesson)?),
        None => hold_back(documents),
    };
    let key = key([Some(gpt), teacher], lesson, [&taught, &measured])?;
    let adapters = lesson.lora.as_ref().map(|lora| lora.fresh(&gpt.model, lesson.seed)).transpose()?;
    let parameters = adapters.as_ref().map_or_else(|| gpt.model.parameters(), |a| Parameters::of_adapters(a).len());
    let ranks = ranks::of_process();
    compare(&*ranks, &key)?;
    let mut journal = None;
    let found = ranks::decided(&*ranks, || {
        let found = finished(&place.out, &key);
        if found.is_none() {
            journal = Some(begin(parameters as u64, &key, place)?);
        }
        serde_json::to_vec(&found).map_err(|e| Error::Asked(e.to_string()))
    })?;
    let found: Option<Record> = serde_json::from_slice(&found).map_err(|e| Error::Asked(e.to_string()))?;
    if let Some(record) = found {
        let (tokens_per_second, share_of_peak, peak_rss_bytes) = (0.0, 0.0, peak_rss_bytes());
        let (loss_scale, optimizer_bytes) = (None, 0);
        return Ok(Taught {
            already: true,
            record,
            tokens_per_second,
            share_of_peak,
            peak_rss_bytes,
            loss_scale,
            optimizer_bytes,
        });
    }
    let directory = crate::journal::partial(&place.out);

    let sequences = Sequences::new(&taught, lesson.context, lesson.seed, &lesson.data)?;
    let validation = match Sequences::new(&measured, lesson.context, lesson.seed, &lesson.data) {
        Ok(measured) => measured.once(lesson.plan.part),
        Err(_) => {
            bar.note("the text is too small to keep a part of it for validation: the loss is of the training only");
            Vec::new()
        }
    };
    let mut learner = match &adapters {
        Some(adapters) => Learner::of_adapters(&gpt.model, adapters, lesson.precision, lesson.rule)?,
        None => Learner::new(&gpt.model, lesson.precision, lesson.rule)?,
    };
    if lesson.checkpoint_activations {
        learner.checkpoint_activations();
    }
    drop(adapters);
    gpt.model.release();
    let aim: Box<dyn Aim> = match (teacher, &lesson.guidance) {
        (Some(teacher), Some(guidance)) => Box::new(Teacher::new(teacher.model.clone(), guidance)?),
        _ => Box::new(Likelihood),
    };
    let mut course = Course::new(learner, sequences, validation, aim, lesson.plan, Some(&directory));
    course.run(bar)?;

    let tokens_per_second = course.speed();
    let taught = Taught {
        already: false,
        record: course.record().clone(),
        tokens_per_second,
        share_of_peak: tokens_per_second * operations(&gpt.model, course.learner.values(), lesson.context)
            / (limits::peak(lesson.precision.arithmetic()) * ranks.size() as f64),
        peak_rss_bytes: peak_rss_bytes(),
        loss_scale: (lesson.precision == Precision::Fp16).then(|| course.learner.scaling().scale),
        optimizer_bytes: course.learner.optimizer_bytes(),
    };
    if let Some(journal) = journal {
        let result = match lesson.lora {
            Some(_) => Learned::Adapters(course.learner.adapters()),
            None => Learned::Model(Box::new(course.learner.values().model(&gpt.model)?)),
        };
        drop(course);
        write(gpt, &result, lesson, &key, &taught.record, place, journal)?;
    }
    Ok(taught)
}

/// All ranks have to do the same job.
fn compare(ranks: &dyn Ranks, key: &str) -> Result<()> {
    let isa = tensor::kernels::kernels().isa;
    let said = ranks::meet(ranks, format!("{key} {isa}").as_bytes())?;
    let Some(other) = said.iter().position(|word| word != &said[0]) else { return Ok(()) };
    let name =
        |rank: usize| String::from_utf8_lossy(&said[rank]).split(' ').next_back().unwrap_or_default().to_string();
    Err(Error::Asked(format!(
        "rank {other} ({}) has another model, other data, other options or another instruction set than rank 0 ({}), and \
         would learn something else; give all ranks the same files, and the instruction set that all have with PLANISH_ISA",
        name(other),
        name(0)
    )))
}

/// Opens the journal of a job that is not finished and has so many parameters to learn.
fn begin(parameters: u64, key: &str, place: &Place) -> Result<Journal> {
    artefact::check_free(&place.out, place.overwrite)?;
    // A checkpoint and its successor of values and two moments, the best values, and the result.
    formats::atomic::check_room(&place.out, 4 * parameters * (2 * 3 + 1 + 1))?;
    Journal::open(&place.out, key, place.restart)
}

/// Predictions to measure on that are held back from one text at most: more would take longer than they tell.
const HELD_BACK: usize = 1 << 16;

/// Parts documents into those to learn and those to measure on, by their hash.
fn hold_back(documents: Vec<Document>) -> (Vec<Document>, Vec<Document>) {
    let mut held = 0;
    documents.into_iter().partition(|d| {
        let measure = d.percentile >= 95 && held < HELD_BACK;
        held += if measure { d.predicted() } else { 0 };
        !measure
    })
}

/// Refuses before any work what cannot be done.
fn refuse(gpt: &Gpt, teacher: Option<&Gpt>, lesson: &Lesson, place: &Place) -> Result<()> {
    if let Some(teacher) = teacher {
        let (own, other) = (gpt.tokenizer.vocab_size(), teacher.tokenizer.vocab_size());
        let differs = (0..own as u32).find(|id| gpt.tokenizer.token_of(*id) != teacher.tokenizer.token_of(*id));
        if own != other || differs.is_some() || gpt.model.spec.vocab != teacher.model.spec.vocab {
            let which = differs.map_or(String::new(), |id| format!(", and token {id} differs"));
            return Err(Error::Asked(format!(
                "the student's tokenizer has {own} tokens and the teacher's {other}{which}; a student learns from a teacher \
                 with the same vocabulary, for example one that --student-layers makes of it"
            )));
        }
    }
    if gpt.model.is_quantized() && lesson.lora.is_none() {
        return Err(Error::Asked(format!(
            "{} is quantized, and its codes cannot learn; fine-tune adapters of it with --lora rank=16, or the original",
            gpt.path.display()
        )));
    }
    if Target::of(&place.out) == Target::Gguf && lesson.lora.is_some() {
        return Err(Error::Asked(
            "--out takes a directory here; make a GGUF of it with `planish export MODEL --adapter DIR --to gguf`"
                .into(),
        ));
    }
    if Target::of(&place.out) == Target::Gguf {
        return Err(Error::Asked(
            "--out takes a directory here; make a GGUF of it with `planish export DIR --to gguf --out FILE`".into(),
        ));
    }
    if lesson.context < 1 || lesson.context > gpt.model.spec.context {
        return Err(Error::Asked(format!(
            "--context {} is not from 1 to {}, the model's context",
            lesson.context, gpt.model.spec.context
        )));
    }
    Ok(())
}

/// Whole documents: training cuts them into pieces itself.
fn documents(gpt: &Gpt, path: &Path, lesson: &Lesson) -> Result<Vec<Document>> {
    if path.extension().is_some_and(|e| e == "u16") {
        return Ok(data::read_tokens(path, gpt.tokenizer.vocab_size(), lesson.context)?);
    }
    if path.extension().is_some_and(|e| e == "jsonl") {
        return Ok(train::lines::documents(path, gpt)?);
    }
    let text = data::read_text(path)?;
    let separated = text.contains(lesson.separator.as_str());
    // A text without separators is one stream, whose pieces are split between training and validation.
    let context = if separated { usize::MAX } else { lesson.context + 1 };
    let cutting = Cutting { separator: lesson.separator.clone(), context, blocks: false };
    let mut documents = data::documents(&text, &gpt.tokenizer, &cutting)?;
    if documents.is_empty() {
        return Err(Error::Data { path: path.into(), reason: "holds no document of two tokens or more".into() });
    }
    if separated && let Some(end) = gpt.tokenizer.eos().filter(|_| !gpt.tokenizer.adds_eos()) {
        // Where a document ends is to be learned as well.
        documents.iter_mut().for_each(|d| d.ids.push(end));
    }
    Ok(documents)
}

/// The hash of everything that decides the result's bytes.
fn key(models: [Option<&Gpt>; 2], lesson: &Lesson, parts: [&[Document]; 2]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut put = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    put(env!("CARGO_PKG_VERSION"));
    put(tensor::kernels::kernels().isa);
    for gpt in models.into_iter().flatten() {
        for (name, sum) in manifest::sums(&gpt.files)? {
            put(&name);
            put(&sum.blake3);
        }
    }
    let what = Lesson { data: PathBuf::new(), validation: None, ..lesson.clone() };
    put(&serde_json::to_string(&what).map_err(|e| Error::Asked(e.to_string()))?);
    for Document { ids, learned, .. } in parts.into_iter().flatten() {
        hasher.update(&(ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
        let marks: Vec<u8> = learned.iter().flatten().map(|l| u8::from(*l)).collect();
        hasher.update(&(marks.len() as u64).to_le_bytes()).update(&marks);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// The record of a finished and unchanged result of the same job.
fn finished(out: &Path, key: &str) -> Option<Record> {
    let text = fs::read_to_string(out.join(RECORD)).ok()?;
    let kept: Kept = serde_json::from_str(&text).ok()?;
    let sound = manifest::verify(out).is_ok_and(|(_, faults)| faults.is_empty());
    (kept.key == key && sound).then_some(kept.record)
}

/// What came of a lesson.
enum Learned {
    Model(Box<Model>),
    Adapters(Adapters),
}

fn write(
    gpt: &Gpt,
    learned: &Learned,
    lesson: &Lesson,
    key: &str,
    record: &Record,
    place: &Place,
    journal: Journal,
) -> Result<()> {
    let staging = journal.staging()?.ok_or_else(|| Error::Asked("a job that writes has a journal".into()))?;
    let tensors = match learned {
        Learned::Model(model) => {
            Target::Directory.write(gpt, model, &staging)?;
            manifest::tensors(&Gpt::open(&staging)?.model)
        }
        Learned::Adapters(adapters) => {
            let rslora = lesson.lora.as_ref().is_some_and(|l| l.rslora);
            adapter::write_peft(&gpt.model, adapters, rslora, &gpt.path.to_string_lossy(), &staging)?;
            // What was written is what is read.
            adapter::load(&gpt.model, &staging)?;
            BTreeMap::new()
        }
    };
    let kept = Kept { key: key.into(), lesson: lesson.clone(), record: record.clone() };
    artefact::write_json(&staging.join(RECORD), &kept)?;
    let mut outputs = BTreeMap::new();
    let entries = fs::read_dir(&staging).map_err(formats::Error::io(&staging, "read it"))?;
    for path in entries.flatten().map(|e| e.path()) {
        outputs.extend(manifest::sums(&[path])?);
    }
    let manifest = Manifest {
        planish: env!("CARGO_PKG_VERSION").into(),
        instruction_set: tensor::kernels::kernels().isa.into(),
        seed: lesson.seed,
        gate: "none was asked for".into(),
        inputs: manifest::sums(&gpt.files)?,
        tensors,
        outputs,
    };
    artefact::write_json(&staging.join("manifest.json"), &manifest)?;
    artefact::publish(&Staged { path: staging, fallbacks: Vec::new() }, &place.out, place.overwrite)?;
    journal.discard()
}

/// Operations of the products of one token, forth and back: six for each value that multiplies and learns, four for each
/// that multiplies alone, and those of attention over a full sequence of `context` tokens.
fn operations(model: &Model, learned: &Parameters, context: usize) -> f64 {
    let head = model.spec.resolve(model::Site::HEAD);
    let products = model.linears.iter().filter(|(site, _)| site.layer.is_some() || **site == head);
    let each = if learned.matrices.is_empty() { 4.0 } else { 6.0 };
    let values: f64 = products.map(|(_, linear)| each * linear.weight.len() as f64).sum();
    let adapters = learned.downs.values().chain(learned.ups.values()).map(|t| 6.0 * t.as_slice().len() as f64);
    let attended = |b: &model::BlockSpec| {
        let seen = b.window.map_or(context, |w| w.min(context)) as f64 / 2.0;
        4.0 * seen * (b.heads * b.head_dim) as f64
    };
    // The gradient takes five products where attention takes two.
    values + adapters.sum::<f64>() + model.spec.blocks.iter().map(attended).sum::<f64>() * 3.5
}
