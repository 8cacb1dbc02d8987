//! The manifest of an artefact: hashes of everything that went in and came out, and its check.

use crate::{Error, Result};
use model::Model;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

/// What `manifest.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Manifest {
    /// Version of this program.
    pub planish: String,
    /// Instruction set of the kernels; `PLANISH_ISA` reproduces it elsewhere.
    pub instruction_set: String,
    /// Start of all random numbers.
    pub seed: u64,
    /// The gate's verdict.
    pub gate: String,
    /// Files that went in, by name.
    pub inputs: BTreeMap<String, Sum>,
    /// Stored bytes of each site: BLAKE3.
    pub tensors: BTreeMap<String, String>,
    /// Files of the artefact, by name.
    pub outputs: BTreeMap<String, Sum>,
}

/// A file's length and hash.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Sum {
    /// Bytes.
    pub bytes: u64,
    /// BLAKE3 of them.
    pub blake3: String,
}

/// Hashes a file.
///
/// # Errors
/// If it cannot be read.
pub fn sum(path: &Path) -> Result<Sum> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(formats::Error::io(path, "read it"))?;
    let bytes = std::io::copy(&mut file, &mut hasher).map_err(formats::Error::io(path, "read it"))?;
    Ok(Sum { bytes, blake3: hasher.finalize().to_hex().to_string() })
}

/// Hashes files by their names.
///
/// # Errors
/// If one cannot be read.
pub fn sums(files: &[PathBuf]) -> Result<BTreeMap<String, Sum>> {
    files.iter().map(|f| Ok((name(f), sum(f)?))).collect()
}

fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Hashes the stored bytes of every matrix, and of a factorized one those of every factor.
pub fn tensors(model: &Model) -> BTreeMap<String, String> {
    let parts = model.linears.iter().flat_map(|(site, l)| l.weight.parts().into_iter().map(move |part| (*site, part)));
    let hash = |(site, (part, w)): (model::Site, (&str, &tensor::Weight))| {
        (site.part_name(part), blake3::hash(w.bytes()).to_hex().to_string())
    };
    parts.map(hash).collect()
}

/// Where the manifest of an artefact lies: inside a directory, beside a GGUF.
pub fn beside(artefact: &Path, file: &str) -> PathBuf {
    if artefact.is_dir() { artefact.join(file) } else { artefact.with_file_name(format!("{}.{file}", name(artefact))) }
}

/// Checks an artefact against its manifest; returns a line for every fault.
///
/// # Errors
/// If there is no manifest or it is malformed.
pub fn verify(artefact: &Path) -> Result<(Manifest, Vec<String>)> {
    let path = beside(artefact, "manifest.json");
    let object = formats::json::read_object(&path)?;
    let bad =
        |e: serde_json::Error| Error::File(formats::Error::field(&path, "manifest", format!("is malformed: {e}")));
    let manifest: Manifest = serde_json::from_value(serde_json::Value::Object(object)).map_err(bad)?;
    let mut faults = Vec::new();
    for (file, want) in &manifest.outputs {
        let at = path.with_file_name(file);
        match sum(&at) {
            Err(_) => faults.push(format!("{file}: is missing")),
            Ok(got) if got.bytes != want.bytes => {
                faults.push(format!("{file}: has {} bytes where the manifest says {}", got.bytes, want.bytes));
            }
            Ok(got) if got.blake3 != want.blake3 => faults.push(format!("{file}: its bytes were changed")),
            Ok(_) => {}
        }
    }
    if !faults.is_empty()
        && let Ok(opened) = model::load::open(artefact)
    {
        let now = tensors(&opened.model);
        for (site, hash) in &manifest.tensors {
            if now.get(site) != Some(hash) {
                faults.push(format!("{site}: its weights were changed"));
            }
        }
    }
    Ok((manifest, faults))
}
