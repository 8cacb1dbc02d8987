//! From a lesson to a course: texts become sequences, and a teacher what is learned from them.

use crate::{Result, data::Document, lesson::Lesson, manifest, progress::Progress};
use model::{Aim, Gpt, Likelihood, Model, Tokens};
use std::path::Path;
use train::{
    Learner, Sequences,
    course::Course,
    distil::{self, About, Cached, Guidance, Teacher, Translated},
};

/// What a teacher said of the text, in a file.
pub(crate) struct Said<'a> {
    path: &'a Path,
    pub about: About,
    teacher: Option<&'a Gpt>,
}

impl<'a> Said<'a> {
    /// # Errors
    /// If there is no teacher and no file that says which one it was.
    pub fn of(
        path: &'a Path,
        gpt: &Gpt,
        teacher: Option<&'a Gpt>,
        lesson: &Lesson,
        taught: &[Document],
    ) -> Result<Said<'a>> {
        let guidance = lesson.guidance.clone().unwrap_or_default();
        let mut text = blake3::Hasher::new();
        text.update(&(lesson.context as u64).to_le_bytes());
        put_documents(&mut text, taught);
        let hash = match teacher {
            Some(teacher) => files(teacher)?,
            None => About::of(path)?.0.teacher,
        };
        let vocab = gpt.model.spec.vocab;
        let about = About {
            teacher: hash,
            text: text.finalize().to_hex().to_string(),
            predictions: taught.iter().map(Document::predicted).sum(),
            vocab,
            top_k: guidance.top_k.unwrap_or(vocab).min(vocab),
            temperature: guidance.temperature,
        };
        Ok(Said { path, about, teacher })
    }
}

/// Whom a model learns from beside the text.
#[derive(Clone, Copy)]
pub(crate) enum Whom<'a> {
    Nobody,
    Teacher(&'a Model),
    /// Student and teacher, whose vocabularies differ.
    Other([&'a Gpt; 2]),
    File(&'a Said<'a>),
}

impl<'a> Whom<'a> {
    /// A teacher beside a student.
    pub fn beside(student: &'a Gpt, teacher: &'a Gpt) -> Whom<'a> {
        let same = student.model.spec.vocab == teacher.model.spec.vocab && same_tokens(student, teacher);
        if same { Whom::Teacher(&teacher.model) } else { Whom::Other([student, teacher]) }
    }
}

/// Have both models the same tokens?
fn same_tokens(a: &Gpt, b: &Gpt) -> bool {
    let (a, b) = (&a.tokenizer, &b.tokenizer);
    a.vocab_size() == b.vocab_size() && (0..a.vocab_size() as u32).all(|id| a.token_of(id) == b.token_of(id))
}

/// A course of a lesson: the first documents are learned, the others measured.
///
/// # Errors
/// If the documents are of no use, a matrix cannot be what it is to learn to be, or there is no memory for it.
pub(crate) fn course<'a>(
    model: &Model,
    whom: Whom<'a>,
    lesson: &Lesson,
    [taught, measured]: [Vec<Document>; 2],
    directory: Option<&'a Path>,
    bar: &dyn Progress,
) -> Result<Course<'a>> {
    let mut sequences = Sequences::new(taught, lesson.context, lesson.seed, &lesson.data)?;
    let validation = match Sequences::new(measured, lesson.context, lesson.seed, &lesson.data) {
        Ok(measured) => measured.once(lesson.plan.part),
        Err(_) => {
            bar.note("the text is too small to keep a part of it for validation: the loss is of the training only");
            Vec::new()
        }
    };
    let mut learner = match (lesson.adapters(model)?, &lesson.codes) {
        (Some(adapters), _) => Learner::of_adapters(model, &adapters, lesson.precision, lesson.rule)?,
        (None, Some(codes)) => {
            let (grids, fallbacks) = codes.grids(&model.spec)?;
            for (site, asked) in fallbacks {
                bar.note(&format!("{site}: a row does not divide into blocks of {asked}; it learns to be otherwise"));
            }
            Learner::of_codes(model, &grids, lesson.precision, lesson.rule)?
        }
        (None, None) => Learner::new(model, lesson.precision, lesson.rule)?,
    };
    if lesson.checkpoint_activations {
        learner.checkpoint_activations();
    }
    let aim: Box<dyn Aim + 'a> = match (whom, &lesson.guidance) {
        // From a teacher that counts for nothing nothing is asked.
        (_, Some(guidance)) if guidance.share == 0.0 => Box::new(Likelihood),
        (Whom::Other([student, teacher]), Some(guidance)) => {
            let tokenizers = [&student.tokenizer, &teacher.tokenizer];
            let translated = Translated::new(teacher.model.clone(), tokenizers, guidance)?;
            let sample = sequences.all(lesson.plan.part);
            bar.note(&translated.report(sample.first().unwrap_or(&Tokens::default()))?);
            Box::new(translated)
        }
        (Whom::Teacher(teacher), Some(guidance)) => {
            if guidance.hidden.is_some() {
                learner = learner.learning_too(distil::projections(&model.spec, &teacher.spec, lesson.seed));
            }
            Box::new(Teacher::new(teacher.clone(), guidance)?.showing(guidance, &model.spec))
        }
        (Whom::File(said), Some(guidance)) => {
            // What was said is of these pieces.
            sequences = sequences.with_kept_cuts();
            let teacher = said.teacher.map(|t| Teacher::new(t.model.clone(), &Guidance::default())).transpose()?;
            Box::new(Cached::open(said.path, &said.about, teacher, guidance)?)
        }
        _ => Box::new(Likelihood),
    };
    Ok(Course::new(learner, sequences, validation, aim, lesson.plan, directory))
}

/// Predictions to measure on that are held back from one text at most: more would take longer than they tell.
const HELD_BACK: usize = 1 << 16;

/// Parts documents into those to learn and those to measure on, by their hash.
pub(crate) fn hold_back(documents: Vec<Document>) -> (Vec<Document>, Vec<Document>) {
    let mut held = 0;
    documents.into_iter().partition(|d| {
        let measure = d.percentile >= 95 && held < HELD_BACK;
        held += if measure { d.predicted() } else { 0 };
        !measure
    })
}

/// The hash of a model's files.
pub(crate) fn files(gpt: &Gpt) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for (name, sum) in manifest::sums(&gpt.files)? {
        hasher.update(name.as_bytes()).update(sum.blake3.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Puts all that is learned from documents into a hash.
pub(crate) fn put_documents(hasher: &mut blake3::Hasher, documents: &[Document]) {
    for Document { ids, learned, .. } in documents {
        hasher.update(&(ids.len() as u64).to_le_bytes());
        ids.iter().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
        let marks: Vec<u8> = learned.iter().flatten().map(|l| u8::from(*l)).collect();
        hasher.update(&(marks.len() as u64).to_le_bytes()).update(&marks);
    }
}
