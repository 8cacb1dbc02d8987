//! Fine-tuning as a job: a model and a text in, an artefact out that appears whole or not at all.

use crate::{
    Error, Result,
    artefact::{self, Staged, Target},
    course::{self, Said, Whom},
    data::{self, Document},
    journal::Journal,
    lesson::Lesson,
    manifest::{self, Manifest},
    progress::Progress,
    speed::peak_rss_bytes,
};
use model::{Adapters, Gpt, Model, Parameters, adapter};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tensor::limits;
use train::{
    Precision,
    course::Record,
    distil::Policy,
    ranks::{self, Ranks},
};

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
    let documents = data::whole(gpt, &lesson.data, &lesson.separator, lesson.context, data::Purpose::Learning)?;
    let (taught, measured) = match &lesson.validation {
        Some(path) => (documents, data::whole(gpt, path, &lesson.separator, lesson.context, data::Purpose::Learning)?),
        None => course::hold_back(documents),
    };
    let taught = if lesson.join_documents { vec![data::joined(&taught, lesson.seed)] } else { taught };
    let said = lesson.teacher_cache.as_deref().map(|path| Said::of(path, gpt, teacher, lesson, &taught)).transpose()?;
    let teachers = match (&said, teacher) {
        (Some(said), _) => said.about.teacher.clone(),
        (None, Some(teacher)) => course::files(teacher)?,
        (None, None) => String::new(),
    };
    let adapters = lesson.adapters(&gpt.model)?;
    let begun = adapters.as_ref().filter(|_| lesson.adapter.is_some());
    let key = key(gpt, &teachers, lesson, begun, [&taught, &measured])?;
    let parameters = adapters.map_or_else(|| gpt.model.parameters(), |a| Parameters::of_adapters(&a).len());
    let ranks = ranks::of_process();
    compare(&*ranks, &key)?;
    let mut journal = None;
    let found = ranks::decided(&*ranks, || {
        let found = finished(&place.out, &key);
        match found {
            Some(_) => Journal::forget(&place.out, &key)?,
            None => journal = Some(begin(parameters as u64, &key, place)?),
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

    let whom = match (&said, teacher) {
        (Some(said), _) => Whom::File(said),
        (None, Some(teacher)) => Whom::beside(gpt, teacher),
        (None, None) => Whom::Nobody,
    };
    let mut course = course::course(&gpt.model, whom, lesson, [taught, measured], Some(&directory), bar)?;
    if let Some(share) = lesson.guidance.as_ref().and_then(|g| g.on_policy) {
        course.policy = Some(Policy { share, seed: lesson.seed, ends: gpt.ends.clone() });
    }
    gpt.model.release();
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
        let result = match lesson.teaches_adapters() {
            true => Learned::Adapters(course.learner.adapters()),
            false => Learned::Model(Box::new(course.learner.model(&gpt.model)?)),
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

/// Refuses before any work what cannot be done.
fn refuse(gpt: &Gpt, teacher: Option<&Gpt>, lesson: &Lesson, place: &Place) -> Result<()> {
    let other = teacher.filter(|teacher| matches!(Whom::beside(gpt, teacher), Whom::Other(_)));
    if other.is_some()
        && (lesson.teacher_cache.is_some()
            || lesson.guidance.as_ref().is_some_and(|g| !g.is_forward() || g.looks().next().is_some()))
    {
        return Err(Error::Asked(
            "the teacher has another vocabulary, of which only --divergence forward learns, and neither by --teacher-cache nor by --hidden or --relations".into(),
        ));
    }
    if gpt.model.is_quantized() && !lesson.teaches_adapters() {
        return Err(Error::Asked(format!(
            "{} is quantized, and its codes cannot learn; teach adapters of it with --lora rank=16, or the original",
            gpt.path.display()
        )));
    }
    if lesson.codes.is_some() && lesson.teaches_adapters() {
        return Err(Error::Asked(
            "--quantize teaches the model's own matrices to be codes, --lora and --adapter leave them as they are"
                .into(),
        ));
    }
    if Target::of(&place.out) == Target::Gguf && lesson.teaches_adapters() {
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
    Ok(())
}

/// The hash of everything that decides the result's bytes.
fn key(gpt: &Gpt, teacher: &str, lesson: &Lesson, begun: Option<&Adapters>, parts: [&[Document]; 2]) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut put = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    put(env!("CARGO_PKG_VERSION"));
    put(tensor::kernels::kernels().isa);
    put(&course::files(gpt)?);
    put(gpt.given_template().unwrap_or_default());
    put(teacher);
    // Files count by what they hold.
    let what = Lesson { data: PathBuf::new(), validation: None, adapter: None, ..lesson.clone() };
    put(&serde_json::to_string(&what).map_err(|e| Error::Asked(e.to_string()))?);
    parts.into_iter().for_each(|part| course::put_documents(&mut hasher, part));
    for (site, adapter) in begun.into_iter().flatten() {
        hasher.update(site.to_string().as_bytes()).update(&adapter.scale.to_le_bytes());
        let values = [adapter.down.as_slice(), adapter.up.as_slice(), adapter.magnitude.as_deref().unwrap_or_default()];
        values.into_iter().flatten().for_each(|v| _ = hasher.update(&v.to_le_bytes()));
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
            artefact::give_template(gpt, &staging)?;
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
