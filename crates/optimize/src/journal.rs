//! The journal of a long job: finished units in `OUT.partial/` beside OUT, keyed by everything that decides
//! their bytes, so that a killed job goes on where it stopped and ends in the same bytes.

use crate::{Error, Result};
use formats::{
    Dtype, atomic,
    safetensors::{self, Archive, Entry},
};
use model::{Model, Site};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tensor::{Bytes, Linear, Storage, Weight};

/// Name of the file that holds the key.
const KEY: &str = "key";

/// Finished units of one job.
pub struct Journal {
    directory: Option<PathBuf>,
    step: usize,
}

impl Journal {
    /// A journal that keeps nothing, for short jobs.
    pub fn none() -> Journal {
        Journal { directory: None, step: 0 }
    }

    /// Opens or begins the journal of a job beside its output.
    ///
    /// # Errors
    /// If one of another job lies there (`restart` discards it), or the directory cannot be made.
    pub fn open(out: &Path, key: &str, restart: bool) -> Result<Journal> {
        let directory = partial(out);
        if restart {
            remove(&directory)?;
        }
        let key_file = directory.join(KEY);
        match fs::read_to_string(&key_file) {
            Ok(found) if found != key => {
                let at = directory.display();
                return Err(Error::Asked(format!(
                    "{at} holds the unfinished work of another job (other options, inputs or version); finish that one, or give --restart to discard it"
                )));
            }
            Ok(_) => {}
            Err(_) => {
                // What lies there without a key was left by a kill while it was removed: nobody knows of which job.
                remove(&directory)?;
                fs::create_dir_all(&directory).map_err(formats::Error::io(&directory, "make it"))?;
                atomic::write_bytes(&key_file, key.as_bytes())?;
            }
        }
        Ok(Journal { directory: Some(directory), step: 0 })
    }

    /// Goes on to the units of another step.
    pub fn step(&mut self, step: usize) {
        self.step = step;
    }

    /// A directory for what a step keeps by itself; none where nothing is kept.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn folder(&self) -> Result<Option<PathBuf>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        let folder = directory.join(format!("step-{}", self.step));
        fs::create_dir_all(&folder).map_err(formats::Error::io(&folder, "make it"))?;
        Ok(Some(folder))
    }

    /// A directory for the result that is being put together.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn staging(&self) -> Result<Option<PathBuf>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        let staging = directory.join("result");
        if staging.exists() {
            fs::remove_dir_all(&staging).map_err(formats::Error::io(&staging, "empty it"))?;
        }
        fs::create_dir_all(&staging).map_err(formats::Error::io(&staging, "make it"))?;
        Ok(Some(staging))
    }

    /// Forgets everything: the result stands.
    ///
    /// # Errors
    /// If the directory cannot be removed.
    pub fn discard(self) -> Result<()> {
        self.directory.map_or(Ok(()), |d| remove(&d))
    }

    /// Forgets what a job left whose result stands: it was killed between the two.
    ///
    /// # Errors
    /// If the directory cannot be removed.
    pub fn forget(out: &Path, key: &str) -> Result<()> {
        let directory = partial(out);
        match fs::read_to_string(directory.join(KEY)) {
            Ok(found) if found != key => Ok(()),
            _ => remove(&directory),
        }
    }

    fn file(&self, unit: &str) -> Option<PathBuf> {
        self.directory.as_ref().map(|d| d.join(format!("step-{}-{unit}.safetensors", self.step)))
    }

    /// Is a unit finished?
    pub fn holds(&self, unit: &str) -> bool {
        self.file(unit).is_some_and(|f| f.is_file())
    }

    /// Puts the weights of a finished unit into the model; false where it is not finished.
    ///
    /// # Errors
    /// If the file is malformed.
    pub fn read(&self, unit: &str, model: &mut Model) -> Result<bool> {
        let Some(path) = self.file(unit).filter(|f| f.is_file()) else { return Ok(false) };
        let archive = Archive::open(&path)?;
        let bad = |reason: String| formats::Error::field(&path, "sites", reason);
        let text = archive.metadata("sites").unwrap_or("{}");
        let sites: BTreeMap<String, Vec<Kept>> = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        let floats = |name: &str| {
            archive
                .get(name)
                .map(|v| v.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>())
        };
        for (name, parts) in sites {
            let site: Site = name.parse().map_err(|e: model::NoSite| bad(e.to_string()))?;
            let part = |Kept { part, storage, shape: [rows, cols] }: Kept| {
                let name = site.part_name(&part);
                let view = archive.get(&name).ok_or_else(|| bad(format!("lack {name}")))?;
                Weight::new(Storage::parse(&storage)?, rows, cols, view.bytes.clone())
                    .map_err(|e| bad(e.to_string()).into())
            };
            let parts = parts.into_iter().map(part).collect::<Result<_>>()?;
            let weight = Weight::of_parts(parts).map_err(|e| bad(e.to_string()))?;
            let bias = floats(&format!("{name}.bias")).or_else(|| model.linear(site).ok()?.bias.clone());
            model.replace(site, Linear::with_bias(weight, bias))?;
        }
        for (site, norm) in &mut model.norms {
            if let Some(scale) = floats(&format!("{site}.scale")).filter(|s| s.len() == norm.scale.len()) {
                norm.scale = scale;
                norm.shift = floats(&format!("{site}.shift")).or(norm.shift.take());
            }
        }
        Ok(true)
    }

    /// Keeps the weights of a finished unit, and norms that were changed with them.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, unit: &str, model: &Model, sites: &[Site], norms: &[Site]) -> Result<()> {
        let Some(path) = self.file(unit) else { return Ok(()) };
        let floats = |name: String, values: &[f32]| Entry {
            name,
            dtype: Dtype::F32,
            shape: vec![values.len()],
            bytes: Bytes::from_f32(values.to_vec()),
        };
        let mut storages = BTreeMap::new();
        let mut entries = Vec::new();
        for site in sites {
            let linear = model.linear(*site)?;
            let mut kept = Vec::new();
            for (part, w) in linear.weight.parts() {
                let shape = [w.rows(), w.cols()];
                kept.push(Kept { part: part.into(), storage: w.storage().full_name(), shape });
                let (name, bytes) = (site.part_name(part), w.bytes().clone());
                entries.push(Entry { name, dtype: Dtype::U8, shape: vec![bytes.len()], bytes });
            }
            storages.insert(site.to_string(), kept);
            if let Some(bias) = &linear.bias {
                entries.push(floats(format!("{site}.bias"), bias));
            }
        }
        for site in norms {
            let norm = model.norm(*site)?;
            let parts = [("scale", Some(&norm.scale)), ("shift", norm.shift.as_ref())];
            for (part, values) in parts.into_iter().filter_map(|(part, values)| Some((part, values?))) {
                entries.push(floats(format!("{site}.{part}"), values));
            }
        }
        let text = serde_json::to_string(&storages).map_err(|e| Error::Asked(e.to_string()))?;
        Ok(safetensors::write(&path, &entries, &[("sites", text)])?)
    }
}

/// A matrix of a finished unit, or a factor of one.
#[derive(Serialize, Deserialize)]
struct Kept {
    part: String,
    storage: String,
    shape: [usize; 2],
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(formats::Error::io(directory, "remove it")(e).into()),
        _ => Ok(()),
    }
}

/// `OUT.partial`.
pub fn partial(out: &Path) -> PathBuf {
    beside(out, "partial")
}

/// `OUT.ENDING`.
pub fn beside(out: &Path, ending: &str) -> PathBuf {
    let name = out.file_name().map_or_else(|| "out".into(), |n| n.to_string_lossy().into_owned());
    out.with_file_name(format!("{name}.{ending}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kill_left_of_a_finished_or_unknown_job_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let left = partial(&out).join("step-0-block-0.safetensors");
        let begin = |key: &str| {
            Journal::open(&out, key, true).unwrap();
            fs::write(&left, b"of that job").unwrap();
        };
        begin("one");
        Journal::forget(&out, "another").unwrap();
        assert!(left.is_file(), "another job's work was lost");
        assert!(Journal::open(&out, "another", false).is_err_and(|e| e.to_string().contains("--restart")));
        Journal::forget(&out, "one").unwrap();
        assert!(!partial(&out).exists());
        Journal::forget(&out, "one").unwrap();

        // Removed as far as its key: what is left must not be taken for units of the next job.
        begin("one");
        fs::remove_file(partial(&out).join(KEY)).unwrap();
        let journal = Journal::open(&out, "another", false).unwrap();
        assert!(!journal.holds("block-0"));
        journal.discard().unwrap();
        assert!(!partial(&out).exists());
    }
}
