//! Artefacts: a directory or a GGUF file with the recipe that made it, its manifest, its proof and its report.

use crate::{
    Error, Result,
    gate::Proof,
    manifest::{self, Manifest, beside},
    recipe::{Built, Recipe},
    report::{Difference, Report},
    run::Data,
};
use formats::{atomic, gguf::GgmlType, quantized::Format};
use model::{Gpt, Model, Role, Site, save, save::Fallback};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tensor::{Storage, Weight};

/// The files beside the weights.
const COMPANIONS: [&str; 4] = ["planish.toml", "manifest.json", "proof.json", "report.html"];
/// Files of the original that a directory artefact takes over as they are.
const TAKEN_OVER: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE",
];

/// What kind of result is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A Hugging Face directory with planish's own storage.
    Directory,
    /// The same with entropy-coded codes, which are unfolded when it is read.
    Coded,
    /// A GGUF file.
    Gguf,
    /// A Hugging Face directory as another quantizer's readers want it.
    Quantized(Format),
}

/// A result that was put together but is not yet in its place.
pub struct Staged {
    /// The directory or file.
    pub path: PathBuf,
    /// Sites that could not be stored as asked.
    pub fallbacks: Vec<Fallback>,
}

impl Target {
    /// The kind that a name asks for.
    pub fn of(out: &Path) -> Target {
        if out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) { Target::Gguf } else { Target::Directory }
    }

    /// The kind that a recipe asks for, and where it says nothing a name.
    ///
    /// # Errors
    /// If the recipe names no format that there is, or asks for what the format does not have.
    pub fn of_recipe(recipe: &Recipe, out: &Path) -> Result<Target> {
        let quantizer = recipe.quantizer()?;
        Ok(match (quantizer, recipe.format.as_deref()) {
            (Some(format), _) => Target::Quantized(format),
            (None, Some("gguf")) => Target::Gguf,
            (None, Some("rans")) => Target::Coded,
            (None, Some(_)) => Target::Directory,
            (None, None) => Target::of(out),
        })
    }

    /// The kind of file that a model is of, to be written like it.
    ///
    /// # Errors
    /// If `out` has the name of another kind.
    pub fn like(gpt: &Gpt, out: &Path) -> Result<Target> {
        let named = Target::of(out);
        let target = match gpt.format {
            Some(format) => Target::Quantized(format),
            None if gpt.path.is_dir() => Target::Directory,
            None => Target::Gguf,
        };
        if (named == Target::Gguf) != (target == Target::Gguf) {
            let what = if target == Target::Gguf { "a file that ends in .gguf" } else { "a directory" };
            return Err(Error::Asked(format!("{}: the model is {what}; name one", out.display())));
        }
        Ok(target)
    }

    /// Writes a model to its place, without proof or manifest.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn place(self, gpt: &Gpt, model: &Model, out: &Path, overwrite: bool) -> Result<Vec<Fallback>> {
        if self == Target::Gguf {
            let keep = |site| model.linear(site).map_or(Storage::F32, |l| gguf_storage(&l.weight));
            return Ok(save::gguf(model, Some(&gpt.tokenizer), out, &keep)?);
        }
        let beside = crate::journal::partial(out);
        if beside.exists() {
            fs::remove_dir_all(&beside).map_err(formats::Error::io(&beside, "remove it"))?;
        }
        fs::create_dir_all(&beside).map_err(formats::Error::io(&beside, "make it"))?;
        let staged = self.write(gpt, model, &beside)?;
        publish(&staged, out, overwrite)?;
        Ok(staged.fallbacks)
    }

    /// Matrices that share one tensor of the result and so must be stored alike.
    pub fn shared(self, model: &Model) -> Vec<Vec<Site>> {
        match self {
            Target::Directory | Target::Coded => Vec::new(),
            Target::Gguf => save::shared(model, true),
            Target::Quantized(_) => save::shared(model, false),
        }
    }

    /// Refuses before any work what cannot be written afterwards.
    ///
    /// # Errors
    /// If the format cannot hold a storage or its readers do not compute the model.
    pub fn check(self, model: &Model, built: &[Built]) -> Result<()> {
        if self == Target::Gguf
            && let Some(reason) = save::gguf_refusal(model)
        {
            return Err(Error::Asked(reason));
        }
        let codes = |b: &Built| b.choice.values().any(|s| matches!(s, Storage::Grid(_)));
        if let Target::Quantized(format) = self
            && !built.is_empty()
            && !built.iter().any(codes)
        {
            let why =
                model.spec.blocks.first().and_then(|_| save::quantized_refusal(model, Site::of(0, Role::Q), format));
            return Err(Error::Asked(why.unwrap_or_else(|| "no matrix would be quantized; name a storage".into())));
        }
        if !matches!(self, Target::Directory | Target::Coded)
            && let Some(step) = built.iter().find(|step| step.makes_factors(model))
        {
            return Err(Error::Asked(format!(
                "{} makes products of two matrices, which only a directory of planish's own holds as such; write one, and \
                 `planish export` multiplies them out for others",
                step.method
            )));
        }
        for (group, step) in self.shared(model).iter().flat_map(|g| built.iter().map(move |b| (g, b))) {
            if group.iter().any(|s| step.choice.get(s) != step.choice.get(&group[0])) {
                let names: Vec<String> = group.iter().map(Site::to_string).collect();
                let reason =
                    format!("shares one tensor of the result with {}; give them one storage", names.join(", "));
                return Err(Error::Site { site: group[0], reason });
            }
        }
        for (site, storage) in built.iter().flat_map(|b| &b.choice) {
            if let Some(reason) = self.refuses(model, *site, *storage) {
                return Err(Error::Site { site: *site, reason });
            }
        }
        Ok(())
    }

    /// Why the format cannot hold a site so, if it cannot.
    fn refuses(self, model: &Model, site: Site, storage: Storage) -> Option<String> {
        match (self, storage) {
            (Target::Gguf, _) if GgmlType::of(storage).is_none() => {
                Some(format!("{storage} is not a GGUF type; take --storage q4_k, q6_k, q4_0 ... or write a directory"))
            }
            (Target::Quantized(format), Storage::Grid(_)) => {
                let [rows, cols] = model.spec.shape(site)?;
                let remedy = format!("--skip {site} leaves it as it is");
                format.refuses(storage, rows, cols).map(|reason| format!("{storage}: {reason}; {remedy}"))
            }
            (Target::Quantized(format), Storage::Sparse(_)) => {
                Some(format!("{storage}: {} has no holes; write a directory of planish's own", format.name()))
            }
            _ => None,
        }
    }

    /// Writes the model into a staging directory.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(self, gpt: &Gpt, model: &Model, staging: &Path) -> Result<Staged> {
        match self {
            Target::Directory | Target::Coded => {
                match self {
                    Target::Coded => save::coded_directory(model, staging)?,
                    _ => save::directory(model, staging)?,
                }
                take_over(gpt, staging)?;
                Ok(Staged { path: staging.into(), fallbacks: Vec::new() })
            }
            Target::Quantized(format) => {
                save::quantized(model, staging, format)?;
                take_over(gpt, staging)?;
                Ok(Staged { path: staging.into(), fallbacks: Vec::new() })
            }
            Target::Gguf => {
                let path = staging.join("model.gguf");
                let keep = |site| model.linear(site).map_or(Storage::F32, |l| gguf_storage(&l.weight));
                let fallbacks = save::gguf(model, Some(&gpt.tokenizer), &path, &keep)?;
                Ok(Staged { path, fallbacks })
            }
        }
    }
}

/// What a weight becomes in a GGUF file when nothing else is asked: itself, or 16-bit floats, as the product of factors does.
/// Holes are filled with zeros.
pub fn gguf_storage(weight: &Weight) -> Storage {
    let storage = weight.storage().dense();
    if GgmlType::of(storage).is_some() && weight.low_rank().is_none() { storage } else { Storage::F16 }
}

/// Writes the tokenizer's files of a directory artefact.
fn take_over(gpt: &Gpt, to: &Path) -> Result<()> {
    if gpt.path.is_dir() {
        // What numbers tokens is written anew where they have other numbers.
        let numbers =
            |name: &&str| !matches!(*name, "tokenizer.json" | "tokenizer_config.json" | "generation_config.json");
        for name in TAKEN_OVER.iter().filter(|name| gpt.kept.is_none() || numbers(name)) {
            let from = gpt.path.join(name);
            if from.is_file() {
                let bytes = fs::read(&from).map_err(formats::Error::io(&from, "read it"))?;
                atomic::write_bytes(&to.join(name), &bytes)?;
            }
        }
        if gpt.kept.is_none() {
            return give_template(gpt, to);
        }
        if let Some(generation) = &gpt.generation {
            write_json(&to.join("generation_config.json"), generation)?;
        }
    }
    atomic::write_bytes(&to.join("tokenizer.json"), gpt.tokenizer.json().as_bytes())?;
    write_json(&to.join("tokenizer_config.json"), gpt.tokenizer.config_json())?;
    give_template(gpt, to)
}

/// Writes the chat template where it was given beside the model.
///
/// # Errors
/// If it cannot be written.
pub fn give_template(gpt: &Gpt, to: &Path) -> Result<()> {
    let template = gpt.given_template().map(|t| atomic::write_bytes(&to.join("chat_template.jinja"), t.as_bytes()));
    Ok(template.transpose().map(|_| ())?)
}

/// Writes a value as readable JSON.
///
/// # Errors
/// If it cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Asked(format!("{}: {e}", path.display())))?;
    Ok(atomic::write_bytes(path, (text + "\n").as_bytes())?)
}

/// Writes recipe, proof, report and manifest beside staged weights.
///
/// # Errors
/// If one cannot be written.
#[expect(clippy::too_many_arguments, reason = "everything that an artefact tells of itself")]
pub fn finish(
    gpt: &Gpt,
    after: &Gpt,
    recipe: &Recipe,
    data: &Data,
    proof: &Proof,
    differences: &[Difference],
    report: &Report,
    staged: &Staged,
    key: &str,
) -> Result<()> {
    let at = |name: &str| beside(&staged.path, name);
    let text = format!(
        "# Made by planish {}; `planish run` replays it.\n# key {key}\n{}",
        env!("CARGO_PKG_VERSION"),
        recipe.to_text()?
    );
    atomic::write_bytes(&at("planish.toml"), text.as_bytes())?;
    write_json(&at("proof.json"), proof)?;
    atomic::write_bytes(&at("report.html"), report.html(gpt, after, recipe, proof, differences).as_bytes())?;
    let mut inputs = manifest::sums(&gpt.files)?;
    let hash = data.hash.clone();
    inputs.extend(manifest::sums(recipe.stats.as_slice())?);
    inputs.insert("data (tokens)".into(), manifest::Sum { bytes: 0, blake3: hash });
    let mut outputs = BTreeMap::new();
    let directory = if staged.path.is_dir() { &staged.path } else { staged.path.parent().unwrap_or(&staged.path) };
    let entries = fs::read_dir(directory).map_err(formats::Error::io(directory, "read it"))?;
    for path in entries.flatten().map(|e| e.path()) {
        outputs.extend(manifest::sums(&[path])?);
    }
    let manifest = Manifest {
        planish: env!("CARGO_PKG_VERSION").into(),
        instruction_set: tensor::kernels::kernels().isa.into(),
        seed: recipe.seed,
        gate: proof.gate.result.clone(),
        inputs,
        tensors: manifest::tensors(&after.model),
        outputs,
    };
    write_json(&at("manifest.json"), &manifest)
}

/// Refuses to write over something that is there.
///
/// # Errors
/// If `out` exists and may not be replaced.
pub fn check_free(out: &Path, overwrite: bool) -> Result<()> {
    if out.exists() && !overwrite {
        return Err(Error::Asked(format!(
            "{} exists; give another --out, or --overwrite to replace it",
            out.display()
        )));
    }
    Ok(())
}

/// The proof of a finished result of the same job, if that is what lies there.
///
/// # Errors
/// If its proof is malformed.
pub fn finished(out: &Path, key: &str) -> Result<Option<Proof>> {
    if !out.exists() {
        return Ok(None);
    }
    let recipe = fs::read_to_string(beside(out, "planish.toml")).unwrap_or_default();
    if !recipe.lines().any(|l| l.strip_prefix("# key ") == Some(key)) {
        return Ok(None);
    }
    // Only an unchanged result is done; a damaged one is made again.
    match manifest::verify(out) {
        Ok((_, faults)) if faults.is_empty() => {}
        _ => return Ok(None),
    }
    let path = beside(out, "proof.json");
    let object = formats::json::read_object(&path)?;
    let proof = serde_json::from_value(serde_json::Value::Object(object));
    proof.map(Some).map_err(|e| formats::Error::field(&path, "proof", e.to_string()).into())
}

/// Moves a staged result to its place: a directory in one rename, a GGUF after its companions.
///
/// # Errors
/// If it cannot be moved; a replaced result is put back then.
pub fn publish(staged: &Staged, out: &Path, overwrite: bool) -> Result<()> {
    let parent = match out.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    if staged.path.is_dir() {
        publish_directory(&staged.path, out, overwrite)?;
    } else {
        rename_companions(staged, out)?;
        fs::rename(&staged.path, out).map_err(formats::Error::io(out, "move the finished file there"))?;
    }
    Ok(atomic::sync_directory(&parent)?)
}

fn publish_directory(from: &Path, out: &Path, overwrite: bool) -> Result<()> {
    atomic::sync_directory(from)?;
    let old = out.with_file_name(format!(".{}.old", out.file_name().map(|n| n.to_string_lossy()).unwrap_or_default()));
    let replaced = overwrite && out.exists();
    if replaced {
        let _ = fs::remove_dir_all(&old);
        fs::rename(out, &old).map_err(formats::Error::io(out, "move the old result aside"))?;
    }
    let moved = fs::rename(from, out).map_err(formats::Error::io(out, "move the finished result there"));
    if moved.is_err() && replaced {
        let _ = fs::rename(&old, out);
    }
    moved?;
    if replaced {
        fs::remove_dir_all(&old)
            .or_else(|_| fs::remove_file(&old))
            .map_err(formats::Error::io(&old, "remove the old result"))?;
    }
    Ok(())
}

/// The manifest of a GGUF names its files as they will be called.
fn rename_companions(staged: &Staged, out: &Path) -> Result<()> {
    let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let (from, to) = (name(&staged.path), name(out));
    let path = beside(&staged.path, "manifest.json");
    let text = fs::read_to_string(&path).map_err(formats::Error::io(&path, "read it"))?;
    let mut manifest: Manifest = serde_json::from_str(&text).map_err(|e| Error::Asked(e.to_string()))?;
    manifest.outputs = manifest.outputs.into_iter().map(|(n, s)| (n.replacen(&from, &to, 1), s)).collect();
    write_json(&path, &manifest)?;
    for companion in COMPANIONS {
        let target = beside(out, companion);
        fs::rename(beside(&staged.path, companion), &target).map_err(formats::Error::io(&target, "move it there"))?;
    }
    Ok(())
}
