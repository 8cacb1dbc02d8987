//! Statistics of the inputs of matrices as files: gathered in one pass over the original, used by any number of jobs.
//!
//! `.gguf`: llama.cpp's importance matrix, the mean square of each input under the names of GGUF files; the older `.dat` is
//! read as well. `.safetensors`: of each input that matrices read, `SITE.gram` (F64, the sums of `x x^T` on and below the
//! diagonal, row by row), `SITE.peak` (F32, the largest magnitudes) and `SITE.tokens` (U64), SITE being the one that stands
//! for all its readers ([`reader`]). What is used is always what the file holds, so that it repeats to the bit.

use crate::{
    Error, Needs, Recipe, Result, Stats,
    calibrate::reader,
    data::{self, Document},
    manifest,
    progress::Progress,
    recipe::Built,
    run::Data,
    speed, walk,
};
use formats::{
    Dtype,
    imatrix::{self, Imatrix},
    safetensors::{self, Archive, Entry},
};
use model::{Gpt, Model, Role, Site, Spec, save};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};
use tensor::{
    Bytes, Storage,
    ops::{Gram, Squares},
};
use train::ranks;

/// Key and version of the layout in a `.safetensors` file's metadata.
const LAYOUT: (&str, &str) = ("planish.statistics", "1");

/// What a file can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Mean squares of inputs.
    Imatrix,
    /// Full second moments and peaks.
    Moments,
}

impl Kind {
    /// What a file of that name holds.
    ///
    /// # Errors
    /// If its ending is none of statistics.
    pub fn of(path: &Path) -> Result<Kind> {
        let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase());
        match ending.as_deref() {
            Some("gguf" | "dat") => Ok(Kind::Imatrix),
            Some("safetensors") => Ok(Kind::Moments),
            _ => Err(Error::Data {
                path: path.into(),
                reason: "is no file of statistics by its name: they end in .gguf (llama.cpp's importance matrix), \
                         .safetensors (full second moments) or .dat (an older importance matrix)"
                    .into(),
            }),
        }
    }

    /// What is gathered for it.
    pub fn needs(self) -> Needs {
        match self {
            Kind::Imatrix => Needs { squares: true, ..Needs::default() },
            Kind::Moments => Needs { gram: true, peak: true, ..Needs::default() },
        }
    }

    /// The method that makes most of it.
    pub fn method(self) -> &'static str {
        match self {
            Kind::Imatrix => "imatrix",
            Kind::Moments => "gptq",
        }
    }

    /// Refuses a method that needs what the file cannot hold.
    fn check(self, path: &Path, method: &str, needs: Needs) -> Result<()> {
        let lacks = if needs.outputs {
            "learns from what blocks return, which no file holds: give --data"
        } else if needs.shift && self == Kind::Imatrix {
            "needs how the inputs of the changed model differ from the original's, which no file can hold: give --method imatrix, \
             or --method gptq with statistics in a file that ends in .safetensors"
        } else if needs.shift {
            "needs how the inputs of the changed model differ from the original's, which no file can hold: give --method gptq"
        } else if self == Kind::Imatrix && needs.gram {
            "needs full second moments, and an importance matrix holds their diagonal alone: give --method imatrix, or \
             statistics in a file that ends in .safetensors"
        } else if self == Kind::Imatrix && needs.peak {
            "needs the largest inputs, which an importance matrix does not hold: give statistics in a file that ends in \
             .safetensors"
        } else {
            return Ok(());
        };
        Err(Error::Data { path: path.into(), reason: format!("method {method} {lacks}, or leave out --stats") })
    }
}

/// What was gathered.
#[derive(Clone, Debug)]
pub struct Gathered {
    /// Tokens that were read.
    pub tokens: usize,
    /// Sequences that they came in.
    pub sequences: usize,
    /// Different inputs of matrices.
    pub inputs: usize,
    /// Bytes of the file.
    pub file_bytes: u64,
}

/// Statistics that a file holds, of one model.
pub struct Known {
    path: PathBuf,
    held: Held,
    /// Width of the inputs of each reader that the file has statistics of.
    widths: BTreeMap<Site, usize>,
    /// The hash of the files of the model that they were gathered on, where the file tells.
    model: Option<String>,
}

enum Held {
    Imatrix(BTreeMap<Site, Squares>),
    Moments(Archive),
}

/// The statistics that a recipe names; where the file is not there yet they are gathered and written first.
///
/// # Errors
/// If a method needs what the file cannot hold, the file lacks a matrix that is to be treated, or it is malformed.
pub fn of_recipe(
    gpt: &Gpt,
    recipe: &Recipe,
    built: &[Built],
    data: &Data,
    progress: &dyn Progress,
) -> Result<Option<Known>> {
    let Some(path) = &recipe.stats else { return Ok(None) };
    check(path, built)?;
    if !path.exists() {
        calibrate(gpt, recipe, data, false, path, progress)?;
    }
    let known = Known::open(gpt, path)?;
    known.check(&gpt.model, built)?;
    Ok(Some(known))
}

/// Refuses steps that a file of statistics does not serve.
///
/// # Errors
/// If a method needs what the file cannot hold, or no step looks at any.
pub fn check(path: &Path, built: &[Built]) -> Result<()> {
    let kind = Kind::of(path)?;
    let mut looks = false;
    for (i, step) in built.iter().enumerate().filter(|(_, step)| step.plan.needs().data()) {
        looks = true;
        kind.check(path, step.method, step.plan.needs())?;
        if i > 0 {
            let reason = format!(
                "holds statistics of the original, and method {} is step {} of the recipe, which treats a changed model: leave \
                 out --stats",
                step.method,
                i + 1
            );
            return Err(Error::Data { path: path.into(), reason });
        }
    }
    if !looks {
        let names: Vec<&str> = built.iter().map(|b| b.method).collect();
        let reason = format!("method {} looks at no statistics: leave out --stats", names.join(", "));
        return Err(Error::Data { path: path.into(), reason });
    }
    Ok(())
}

/// Most memory that gathering takes: all sums, and a batch of tokens on its way.
pub fn memory(spec: &Spec, kind: Kind) -> usize {
    let widths = readers(spec).into_keys().filter_map(|site| spec.shape(site)).map(|[_, cols]| cols);
    let widths: Vec<usize> = widths.collect();
    let sums: usize = widths.iter().map(|c| if kind == Kind::Moments { 8 * c * c } else { 8 * c }).sum();
    // The product of one batch, and what the file is made of.
    let largest = widths.iter().max().unwrap_or(&0);
    let written = if kind == Kind::Moments { sums / 2 + 4 * largest * largest } else { sums };
    let widest =
        spec.matrices().into_iter().filter_map(|s| spec.shape(s)).map(|[r, c]| if r == spec.vocab { c } else { r + c });
    sums + written + 4 * walk::BATCH * (4 * spec.dim + 2 * widest.max().unwrap_or(0))
}

/// Refuses to gather what takes more memory than it may.
///
/// # Errors
/// [`Error::Memory`].
pub fn check_memory(spec: &Spec, kind: Kind, limit: Option<u64>) -> Result<()> {
    let needed = memory(spec, kind) as u64;
    let allowed = limit.unwrap_or_else(|| speed::free_memory_bytes() / 5 * 4);
    if needed > allowed { Err(Error::Memory { needed, allowed }) } else { Ok(()) }
}

/// Every site whose inputs have statistics of their own, with one of the matrices that read them.
fn readers(spec: &Spec) -> BTreeMap<Site, Site> {
    let multiplied = |s: &Site| s.role != Role::Position && (s.role != Role::Embed || spec.tied);
    spec.matrices().into_iter().filter(multiplied).map(|s| (reader(s), s)).collect()
}

/// Gathers the statistics that a recipe's text gives, of the part for calibration or, where it is `whole`, of all of it.
///
/// # Errors
/// As [`gather`].
pub fn calibrate(
    gpt: &Gpt,
    recipe: &Recipe,
    data: &Data,
    whole: bool,
    path: &Path,
    progress: &dyn Progress,
) -> Result<Gathered> {
    let parts = [&data.split.calibration, &data.split.solver, &data.split.gate];
    let documents: Vec<Document> = parts.into_iter().take(if whole { 3 } else { 1 }).flatten().cloned().collect();
    gather(gpt, &data::calibration(&documents, recipe, gpt)?, &data.about, path, progress)
}

/// Gathers statistics of a model's inputs in one pass, and writes them. Ranks share out the matrices; the first of them writes.
///
/// # Errors
/// If there is no text, the file's ending is none that is written, or it cannot be written.
pub fn gather(
    gpt: &Gpt,
    calibration: &[Vec<u32>],
    about: &str,
    path: &Path,
    progress: &dyn Progress,
) -> Result<Gathered> {
    let kind = Kind::of(path)?;
    let refused = |reason: &str| Error::Data { path: path.into(), reason: reason.into() };
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("dat")) {
        return Err(refused("is of the older layout, which is read and not written: name a file that ends in .gguf"));
    }
    if calibration.is_empty() {
        return Err(refused("needs calibration text: give --data FILE"));
    }
    let names = if kind == Kind::Imatrix { save::gguf_matrices(&gpt.model)? } else { Vec::new() };
    if kind == Kind::Imatrix && names.is_empty() {
        return Err(refused(
            "needs names that GGUF does not have for this family: name a file that ends in .safetensors",
        ));
    }
    let stats = walk::statistics(&gpt.model, kind.needs(), calibration, progress)?;
    let tokens = calibration.iter().map(Vec::len).sum();
    if ranks::of_process().rank() == 0 {
        match kind {
            Kind::Imatrix => write_imatrix(&names, &stats, calibration, about, path)?,
            Kind::Moments => write_moments(gpt, &stats, tokens, about, path)?,
        }
    }
    let file_bytes = std::fs::metadata(path).map_or(0, |m| m.len());
    Ok(Gathered { tokens, sequences: calibration.len(), inputs: stats.len(), file_bytes })
}

fn write_imatrix(
    names: &[(String, Vec<Site>)],
    stats: &BTreeMap<Site, Stats>,
    calibration: &[Vec<u32>],
    about: &str,
    path: &Path,
) -> Result<()> {
    let tokens: usize = calibration.iter().map(Vec::len).sum();
    let longest = calibration.iter().map(Vec::len).max().unwrap_or(1);
    let entry = |(name, sites): &(String, Vec<Site>)| {
        let squares = stats.get(&reader(sites[0]))?.squares.as_ref()?;
        let sums = squares.sums().iter().map(|s| *s as f32).collect();
        Some((name.clone(), imatrix::Entry { sums, counts: vec![squares.rows() as f32] }))
    };
    let all = Imatrix {
        entries: names.iter().filter_map(entry).collect(),
        datasets: vec![about.strip_prefix("the text of ").unwrap_or(about).into()],
        chunks: tokens.div_ceil(longest) as u32,
        chunk_size: longest as u32,
    };
    Ok(all.write(path)?)
}

fn write_moments(gpt: &Gpt, stats: &BTreeMap<Site, Stats>, tokens: usize, about: &str, path: &Path) -> Result<()> {
    let mut entries = Vec::new();
    let mut put = |site: &Site, part: &str, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>| {
        entries.push(Entry { name: format!("{site}.{part}"), dtype, shape, bytes: Bytes::from_vec(bytes) });
    };
    for (site, stats) in stats {
        if let Some(gram) = &stats.gram {
            let lower = gram.lower();
            put(site, "gram", Dtype::F64, vec![lower.len()], lower.iter().flat_map(|v| v.to_le_bytes()).collect());
            put(site, "tokens", Dtype::U64, vec![1], (gram.rows() as u64).to_le_bytes().to_vec());
        }
        if let Some(peak) = &stats.peak {
            put(site, "peak", Dtype::F32, vec![peak.len()], peak.iter().flat_map(|v| v.to_le_bytes()).collect());
        }
    }
    let metadata = [
        (LAYOUT.0, LAYOUT.1.to_string()),
        ("planish", env!("CARGO_PKG_VERSION").into()),
        ("model", fingerprint(gpt)?),
        ("tokens", tokens.to_string()),
        ("data", about.into()),
    ];
    Ok(safetensors::write(path, &entries, &metadata)?)
}

/// The hash of a model's files.
fn fingerprint(gpt: &Gpt) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for sum in manifest::sums(&gpt.files)?.values() {
        hasher.update(sum.blake3.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

impl Known {
    /// Opens the statistics of a model's inputs.
    ///
    /// # Errors
    /// If the file is malformed, or holds other widths than the model's.
    pub fn open(gpt: &Gpt, path: &Path) -> Result<Known> {
        let spec = &gpt.model.spec;
        let mut known =
            Known { path: path.into(), held: Held::Imatrix(BTreeMap::new()), widths: BTreeMap::new(), model: None };
        if Kind::of(path)? == Kind::Imatrix {
            known.read_imatrix(&gpt.model)?;
            return Ok(known);
        }
        let archive = Archive::open(path)?;
        if archive.metadata(LAYOUT.0) != Some(LAYOUT.1) {
            let reason = format!("has not the mark {} of version {}: it is no file of statistics", LAYOUT.0, LAYOUT.1);
            return Err(formats::Error::field(path, LAYOUT.0, reason).into());
        }
        for site in readers(spec).into_keys() {
            if archive.get(&format!("{site}.gram")).is_some() {
                let cols = spec.shape(site).map_or(0, |[_, cols]| cols);
                moments(path, &archive, site, cols, false)?;
                known.widths.insert(site, cols);
            }
        }
        known.model = archive.metadata("model").map(Into::into);
        known.held = Held::Moments(archive);
        Ok(known)
    }

    fn read_imatrix(&mut self, model: &Model) -> Result<()> {
        let all = Imatrix::read(&self.path)?;
        let mut found = BTreeMap::new();
        for (name, sites) in save::gguf_matrices(model)? {
            let (site, entry) = (reader(sites[0]), all.entries.get(&name));
            let Some(entry) = entry.filter(|e| e.counts.iter().any(|c| *c > 0.0)) else { continue };
            let cols = model.spec.shape(site).map_or(0, |[_, cols]| cols);
            if entry.counts.len() != 1 || entry.sums.len() != cols {
                let reason = format!(
                    "holds {} inputs of {} matrices where {site} of this model reads {cols}: it is of another model",
                    entry.sums.len() / entry.counts.len().max(1),
                    entry.counts.len()
                );
                return Err(formats::Error::field(&self.path, &name, reason).into());
            }
            // Of several stored matrices that read one input the first counts; all hold the same.
            self.widths.insert(site, cols);
            let sums = || entry.sums.iter().map(|s| f64::from(*s)).collect();
            found.entry(site).or_insert_with(|| Squares::from_sums(entry.counts[0].round().max(1.0) as usize, sums()));
        }
        if found.is_empty() {
            let reason = "holds no matrix of this model by the names that GGUF files give them";
            return Err(Error::Data { path: self.path.clone(), reason: reason.into() });
        }
        self.held = Held::Imatrix(found);
        Ok(())
    }

    /// Refuses a job that treats a matrix by data which the file has none of. Tables outside the blocks are not asked for
    /// where it is an importance matrix: llama.cpp leaves them out and rounds them to nearest, and so does planish, which says
    /// so ([`Known::notes`]).
    ///
    /// # Errors
    /// Naming every such matrix.
    pub fn check(&self, model: &Model, built: &[Built]) -> Result<()> {
        let missing = self.missing(model, built).filter(|s| s.layer.is_some() || matches!(self.held, Held::Moments(_)));
        let missing: Vec<String> = missing.map(|s| s.to_string()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let reason = format!(
            "has no statistics of the inputs of {}; gather them on this model, or leave these out with --skip",
            missing.join(", ")
        );
        Err(Error::Data { path: self.path.clone(), reason })
    }

    /// Matrices that are multiplied and to be rounded by data, of which nothing is known.
    fn missing<'a>(&'a self, model: &'a Model, built: &'a [Built]) -> impl Iterator<Item = Site> + 'a {
        let steps = built.iter().filter(|step| step.plan.needs().data());
        let coded = steps
            .flat_map(|step| step.choice.iter())
            .filter(|(_, s)| matches!(s, Storage::Grid(_) | Storage::Sparse(_)));
        let sites: BTreeSet<Site> = coded.map(|(site, _)| *site).collect();
        let known = readers(&model.spec);
        sites.into_iter().filter(move |s| known.contains_key(&reader(*s)) && !self.widths.contains_key(&reader(*s)))
    }

    /// What is to be known that is no fault: matrices that are rounded to nearest, statistics of another model's files.
    ///
    /// # Errors
    /// If the model's files cannot be read.
    pub fn notes(&self, gpt: &Gpt, built: &[Built]) -> Result<Vec<String>> {
        let path = self.path.display();
        let nearest = |site: Site| format!("{site}: {path} has no statistics of its inputs; it is rounded to nearest");
        let mut notes: Vec<String> = self.missing(&gpt.model, built).map(nearest).collect();
        if self.model.is_some() && self.model != Some(fingerprint(gpt)?) {
            notes.push(format!("{path} was gathered on other files than this model's; its shapes fit"));
        }
        Ok(notes)
    }

    /// The statistics of what a site reads; nothing where the file has none.
    ///
    /// # Errors
    /// If a sum is no finite number.
    pub fn of(&self, site: Site) -> Result<Stats> {
        let site = reader(site);
        let Some(cols) = self.widths.get(&site) else { return Ok(Stats::default()) };
        match &self.held {
            Held::Imatrix(all) => Ok(Stats { squares: all.get(&site).cloned(), ..Stats::default() }),
            Held::Moments(archive) => moments(&self.path, archive, site, *cols, true),
        }
    }

    /// The statistics of all, as [`walk::statistics`] returns them.
    ///
    /// # Errors
    /// As [`Known::of`].
    pub fn all(&self) -> Result<BTreeMap<Site, Stats>> {
        self.widths.keys().map(|site| Ok((*site, self.of(*site)?))).collect()
    }
}

/// The statistics of one site in a file of full moments; `whole` reads them, and their shapes alone are checked otherwise.
fn moments(path: &Path, archive: &Archive, site: Site, cols: usize, whole: bool) -> Result<Stats> {
    let part = |part: &str, dtype: Dtype, len: usize| -> Result<&[u8]> {
        let name = format!("{site}.{part}");
        let bad = |reason: String| Error::File(formats::Error::field(path, &name, reason));
        let view = archive.get(&name).ok_or_else(|| bad("is missing; gather the statistics again".into()))?;
        if view.dtype != dtype || view.shape != [len] {
            let (got, held) = (&view.shape, view.dtype);
            return Err(bad(format!(
                "is {held} of shape {got:?}, and a matrix of {cols} inputs asks for {dtype} of [{len}]: it is of another model"
            )));
        }
        Ok(&view.bytes)
    };
    let lower = part("gram", Dtype::F64, cols * (cols + 1) / 2)?.as_chunks::<8>().0;
    let peak = part("peak", Dtype::F32, cols)?.as_chunks::<4>().0;
    let rows = part("tokens", Dtype::U64, 1)?.as_chunks::<8>().0;
    if !whole {
        return Ok(Stats::default());
    }
    let rows = rows.first().map_or(0, |b| u64::from_le_bytes(*b));
    let lower: Vec<f64> = lower.iter().map(|b| f64::from_le_bytes(*b)).collect();
    let peak: Vec<f32> = peak.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let sound = lower.iter().all(|v| v.is_finite()) && peak.iter().all(|v| v.is_finite() && *v >= 0.0);
    let gram = Gram::from_lower(cols, rows as usize, &lower).filter(|_| sound && rows > 0);
    let reason = "are no statistics: a value is not finite, or no token was seen; gather them again";
    let gram = gram.ok_or_else(|| formats::Error::field(path, site.to_string(), reason))?;
    Ok(Stats { gram: Some(gram), peak: Some(peak), ..Stats::default() })
}

pub(crate) mod shared;
#[cfg(test)]
mod tests;
