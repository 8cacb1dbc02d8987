//! Steps of a recipe that teach: the model as it stands learns from the original, as it is or as the codes that it is to be.

use crate::{
    Error, Result,
    course::{self, Whom},
    data::Document,
    journal::Journal,
    lesson::{Codes, Settings, Texts},
    progress::Progress,
    recipe::Step,
};
use model::Model;
use tensor::{Storage, Weight};
use train::{
    checkpoint,
    distil::{Divergence, Guidance},
};

/// What such a step is told.
#[derive(Clone, Debug)]
pub struct Healing {
    /// How it is taught.
    pub settings: Settings,
    /// What it learns from the original.
    pub guidance: Guidance,
}

impl Healing {
    /// Reads a method's options: those of `planish distill`, with the names of a file for `planish train`.
    ///
    /// # Errors
    /// If one is not known or cannot be.
    pub fn read(method: &str, mut options: toml::Table) -> Result<Healing> {
        let bad = |reason: String| Error::Options { method: method.into(), reason };
        let divergence = match options.remove("divergence") {
            None => Divergence::Forward,
            Some(name) => {
                let known = Divergence::ALL.iter().find(|(known, _)| name.as_str() == Some(*known));
                known.ok_or_else(|| bad(format!("`divergence` is forward, reverse or jensen-shannon, not {name}")))?.1
            }
        };
        let mut number = |name: &str, otherwise: f64| match options.remove(name) {
            None => Ok(otherwise),
            Some(toml::Value::Float(x)) => Ok(x),
            Some(toml::Value::Integer(x)) => Ok(x as f64),
            Some(other) => Err(bad(format!("`{name}` is a number, not {other}"))),
        };
        // A model that heals has its original to learn from, which says more than the text does.
        let guidance = Guidance {
            divergence,
            temperature: number("temperature", 1.0)? as f32,
            share: number("share", 1.0)? as f32,
            ..Guidance::default()
        };
        guidance.check().map_err(|e| bad(e.to_string()))?;
        options.entry("steps").or_insert(300.into());
        let settings = options.try_into::<Settings>().map_err(|e| bad(e.message().into()))?;
        Ok(Healing { settings, guidance })
    }

    /// Bytes that it holds beside the two models: values, gradients, two moments, matrices packed straight and across,
    /// and what a part's blocks leave.
    pub fn memory(&self, model: &Model) -> usize {
        let spec = &model.spec;
        let context = self.settings.context.unwrap_or(spec.context.min(1024));
        let tokens = (self.settings.batch * context).min(2048.max(context));
        let kept = |b: &model::BlockSpec| 4 * (4 * spec.dim + 4 * b.heads * b.head_dim + 2 * b.hidden);
        let kept: usize = spec.blocks.iter().map(kept).sum();
        (4 * 4 + 2 * 4) * model.parameters() + tokens * (kept + 16 * spec.dim) + 4 * 3 * 512 * spec.vocab
    }
}

/// Where a step of a job stands.
pub(crate) struct Lessons<'a> {
    /// The model that the job began with.
    pub original: &'a Model,
    /// What may be learned from.
    pub documents: &'a [Document],
    /// Start of all random numbers.
    pub seed: u64,
}

/// Carries out a step: `step` says which matrices learn to be codes, where any do.
///
/// # Errors
/// If the model is quantized already, numbers grow beyond all bounds, or a file cannot be written.
pub(crate) fn heal(
    model: &mut Model,
    step: &Step,
    healing: &Healing,
    lessons: &Lessons<'_>,
    journal: &Journal,
    bar: &dyn Progress,
) -> Result<()> {
    let method = &step.method;
    let mut codes = Codes { storage: step.storage.clone(), sites: step.sites.clone() };
    loosen(model, &mut codes)?;
    // The text is told of by the job.
    let texts = Texts { data: "the calibration data".into(), validation: None, separator: String::new() };
    let mut lesson = healing.settings.lesson(texts, model.spec.context, lessons.seed)?;
    lesson.guidance = Some(healing.guidance.clone());
    lesson.codes = (codes.storage != "keep" || !codes.sites.is_empty()).then_some(codes);
    let folder = journal.folder()?;
    let parts = course::hold_back(lessons.documents.to_vec());
    let parts = [parts.0, parts.1];
    let whom = Whom::Teacher(lessons.original);
    let mut course = course::course(model, whom, &lesson, parts, folder.as_deref(), bar)?;
    let learned = folder.as_ref().map(|f| f.join("learned.safetensors"));
    match learned.as_ref().filter(|path| path.is_file()) {
        Some(path) => {
            let mut values = course.learner.values().zeros();
            let _: String = checkpoint::read(path, checkpoint::pieces_mut("values", &mut values))?;
            course.learner.set_values(values)?;
        }
        None => {
            course.run(bar)?;
            let record = course.record();
            if let (Some(before), Some((at, best))) = (record.before, record.best) {
                bar.note(&format!("{method}: validation loss {before:.4} before, {best:.4} after step {at}"));
            }
            if let Some(path) = &learned {
                checkpoint::write(path, checkpoint::pieces("values", course.learner.values()), method)?;
            }
        }
    }
    *model = course.learner.model(model)?;
    Ok(())
}

/// Lets matrices that are codes learn: as floats on their way to codes, to those that they are where no others are asked for.
fn loosen(model: &mut Model, codes: &mut Codes) -> Result<()> {
    let (asked, _) = codes.grids(&model.spec)?;
    for (site, linear) in &mut model.linears {
        let parts = linear.weight.parts();
        if !parts.iter().any(|(_, part)| part.storage().is_coded()) {
            continue;
        }
        if linear.weight.low_rank().is_some() {
            let reason = "is the product of two matrices of codes, which do not learn; teach before they are rounded";
            return Err(Error::Site { site: *site, reason: reason.into() });
        }
        let storage = linear.weight.storage();
        if !asked.contains_key(site) {
            codes.sites.insert(site.to_string(), storage.dense().full_name());
        }
        let floats = Weight::encode(&linear.weight.to_tensor(), storage.with_values(Storage::F32), None);
        linear.weight = floats.map_err(|e| Error::Site { site: *site, reason: e.to_string() })?;
    }
    Ok(())
}
