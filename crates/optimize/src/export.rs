//! Export: a model for another program, written, read again and compared.

use crate::{
    Error, Result,
    artefact::{self, Target},
    run::file_bytes,
};
use formats::{quantized, tokenizer::GgufVocab};
use model::{Gpt, Model, Site, adapter, load, save, save::Fallback, uniform};
use std::path::{Path, PathBuf};
use tensor::{Linear, Storage, Weight};

/// For whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// llama.cpp.
    Gguf,
    /// transformers, vLLM: plain floats in a Hugging Face directory.
    Safetensors,
    /// transformers, vLLM: codes as another quantizer stores them.
    Quantized(quantized::Format),
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// For whom.
    pub format: Format,
    /// Storage of the matrices; `None` leaves them as they are.
    pub storage: Option<Storage>,
    /// Where it goes.
    pub out: PathBuf,
    /// Replace what lies there?
    pub overwrite: bool,
    /// Fail where a matrix cannot be stored as asked?
    pub strict: bool,
    /// Quantize what is quantized already?
    pub requantize: bool,
}

/// What was written.
pub struct Exported {
    /// Matrices that could not be stored as asked.
    pub fallbacks: Vec<Fallback>,
    /// Tensor payload.
    pub size_bytes: usize,
    /// Bytes of the files.
    pub file_bytes: u64,
    /// Payload bits per parameter.
    pub bits_per_weight: f64,
    /// Largest difference of a logit between what was read again and what was to be written.
    pub difference: f32,
    /// What a user of the file should know.
    pub notes: Vec<String>,
}

/// Writes, reads again and compares.
///
/// # Errors
/// If the format cannot hold the model, the file cannot be written, or what is read again computes something else.
pub fn export(gpt: &Gpt, settings: &Settings) -> Result<Exported> {
    artefact::check_free(&settings.out, settings.overwrite)?;
    let storage = |site: Site| choose(gpt, settings, site);
    for site in gpt.model.spec.matrices() {
        refuse(gpt, settings, site, storage(site))?;
    }
    let (expected, mut fallbacks) = restored(&gpt.model, &storage)?;
    if settings.strict && !fallbacks.is_empty() {
        let list: Vec<String> =
            fallbacks.iter().map(|f| format!("{} ({} in place of {})", f.site, f.got, f.asked)).collect();
        return Err(Error::Gate(format!("--strict: not stored as asked: {}", list.join(", "))));
    }
    let mut notes: Vec<String> = multiplied_out(gpt).into_iter().chain(filled(gpt)).collect();
    match settings.format {
        Format::Gguf => {
            let stored = |site: Site| expected.linear(site).map_or(Storage::F32, |l| l.weight.storage());
            fallbacks.extend(save::gguf(&expected, Some(&gpt.tokenizer), &settings.out, &stored)?);
            notes.extend(widened(gpt, &expected, "GGUF"));
            notes.extend(GgufVocab::of(&gpt.tokenizer, gpt.model.spec.vocab)?.caveats());
        }
        Format::Safetensors => {
            Target::Directory.place(gpt, &expected, &settings.out, settings.overwrite)?;
        }
        Format::Quantized(format) => {
            let target = Target::Quantized(format);
            target.place(gpt, &expected, &settings.out, settings.overwrite)?;
            notes.extend(widened(gpt, &expected, format.name()));
        }
    }
    let again = load::open(&settings.out)?.model;
    let difference = check(difference(&expected, &again)?, &settings.out)?;
    Ok(Exported {
        fallbacks,
        size_bytes: again.size_bytes(),
        file_bytes: file_bytes(&settings.out),
        bits_per_weight: again.bits_per_weight(),
        difference,
        notes,
    })
}

/// Writes an adapter for llama.cpp, reads it again and compares; returns the largest difference of a logit.
///
/// # Errors
/// If the format cannot hold it, the file cannot be written, or what is read again computes something else.
pub fn adapter(gpt: &Gpt, from: &Path, out: &Path, overwrite: bool) -> Result<f32> {
    artefact::check_free(out, overwrite)?;
    let adapters = adapter::load(&gpt.model, from)?;
    adapter::write_gguf(&gpt.model, &adapters, out)?;
    let (mut expected, mut again) = (gpt.model.clone(), gpt.model.clone());
    again.attach(&[adapter::load(&gpt.model, out)?])?;
    expected.attach(&[adapters])?;
    check(difference(&expected, &again)?, out)
}

/// Refuses what computes something else than it should.
fn check(difference: f32, out: &Path) -> Result<f32> {
    // A number that is none is no small one.
    if difference <= 1e-3 {
        return Ok(difference);
    }
    let reason =
        format!("what was read again differs by {difference} in a logit; the file is of no use, please report this");
    Err(Error::Asked(format!("{}: {reason}", out.display())))
}

/// The storage of a site in the export.
fn choose(gpt: &Gpt, settings: &Settings, site: Site) -> Storage {
    let linear = gpt.model.linear(site).ok();
    let now = linear.map_or(Storage::F32, |l| whole(&l.weight));
    let floats = !matches!(now, Storage::Grid(_));
    match (settings.storage, settings.format) {
        // Learned positions stay floats: they are few, and llama.cpp reads them so.
        (Some(Storage::Grid(_)), _) if site == Site::POSITION => Storage::F32,
        (asked, Format::Quantized(format)) => quantized_storage(gpt, site, format, asked.unwrap_or(now)),
        (Some(storage), _) => storage,
        (None, Format::Gguf) => linear.map_or(Storage::F32, |l| artefact::gguf_storage(&l.weight)),
        (None, Format::Safetensors) if floats => now,
        (None, Format::Safetensors) => Storage::F32,
    }
}

/// The storage of a matrix; no format holds the product of two but planish's own, and it is written as 16-bit floats, nor holes,
/// which are filled with zeros.
fn whole(weight: &Weight) -> Storage {
    if weight.low_rank().is_some() { Storage::F16 } else { weight.storage().dense() }
}

/// Tells of products of two matrices, which are multiplied out.
fn multiplied_out(gpt: &Gpt) -> Option<String> {
    let count = gpt.model.linears.values().filter(|l| l.weight.low_rank().is_some()).count();
    (count > 0).then(|| {
        format!(
            "{count} matrices are products of two and were written multiplied out, which is larger and takes more time"
        )
    })
}

/// Tells of matrices with holes, which are filled with zeros.
fn filled(gpt: &Gpt) -> Option<String> {
    let sparse = |l: &&Linear| matches!(l.weight.storage(), Storage::Sparse(_));
    let count = gpt.model.linears.values().filter(sparse).count();
    (count > 0).then(|| format!("{count} matrices have holes and were written with zeros in them, which is larger"))
}

/// The storage of a site in another quantizer's format: as it is or as asked where that has it, floats where not.
fn quantized_storage(gpt: &Gpt, site: Site, format: quantized::Format, wanted: Storage) -> Storage {
    let now = gpt.model.linear(site).map_or(Storage::F32, |l| whole(&l.weight));
    let [rows, cols] = gpt.model.spec.shape(site).unwrap_or([1, 1]);
    let held =
        save::quantized_refusal(&gpt.model, site, format).is_none() && format.refuses(wanted, rows, cols).is_none();
    match (wanted, now) {
        (Storage::Grid(_), _) if held => wanted,
        (Storage::Grid(_), Storage::Grid(_)) => Storage::F32,
        (Storage::Grid(_), now) => now,
        (floats, _) => floats,
    }
}

/// Tells of matrices that lie on a grid that the format does not have and so become floats.
fn widened(gpt: &Gpt, expected: &Model, format: &str) -> Option<String> {
    let grid = |m: &Model, site| m.linear(site).is_ok_and(|l| matches!(l.weight.storage(), Storage::Grid(_)));
    let sites: Vec<Site> = gpt.model.spec.matrices();
    let count = sites.iter().filter(|s| grid(&gpt.model, **s) && !grid(expected, **s)).count();
    (count > 0).then(|| {
        format!(
            "{count} matrices lie on grids that {format} does not have and were written as floats, which is larger; \
             `planish optimize` and `quantize` with --format (or an --out that ends in .gguf) choose among those that it has"
        )
    })
}

fn refuse(gpt: &Gpt, settings: &Settings, site: Site, to: Storage) -> Result<()> {
    let from = whole(&gpt.model.linear(site)?.weight);
    if settings.format == Format::Safetensors && matches!(to, Storage::Grid(_)) {
        return Err(Error::Asked(format!(
            "plain safetensors hold floats, not {to}; take --type bf16, f16 or f32, or --to compressed-tensors"
        )));
    }
    if matches!((from, to), (Storage::Grid(a), Storage::Grid(b)) if a != b) && !settings.requantize {
        let reason = format!(
            "is stored as {from}; storing it as {to} loses a second time: export from the original, or give --requantize"
        );
        return Err(Error::Site { site, reason });
    }
    Ok(())
}

/// The model with every matrix in its new storage, and those that got another one.
fn restored(model: &Model, storage: &dyn Fn(Site) -> Storage) -> Result<(Model, Vec<Fallback>)> {
    let mut out = model.clone();
    let mut fallbacks = Vec::new();
    for site in model.spec.matrices() {
        let linear = model.linear(site)?;
        let asked = storage(site);
        let got = save::fallback(asked, linear.weight.cols());
        if got != asked {
            fallbacks.push(Fallback { site, asked, got });
        }
        if got != linear.weight.storage() || linear.weight.low_rank().is_some() {
            let weight = Weight::encode(&linear.weight.to_tensor(), got, None)
                .map_err(|e| Error::Site { site, reason: e.to_string() })?;
            out.replace(site, Linear { weight, ..linear.clone() })?;
        }
    }
    Ok((out, fallbacks))
}

/// The largest difference of a logit between two models on some tokens.
fn difference(a: &Model, b: &Model) -> Result<f32> {
    let length = a.spec.context.min(48);
    let ids: Vec<u32> = (0..length as u64).map(|i| (uniform(9, i) * a.spec.vocab as f64) as u32).collect();
    let (x, y) = (a.forward(&[&ids], &mut ())?, b.forward(&[&ids], &mut ())?);
    Ok(x.as_slice().iter().zip(y.as_slice()).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max))
}
