//! Where tensors come from: safetensors (with planish's own storage) or GGUF, behind one lookup by name.

use crate::{Error, Result, Site};
use formats::{Dtype, gguf, safetensors::Archive};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tensor::{Bytes, Storage, Weight};

/// Key of the safetensors metadata that tells how sites are stored: JSON of site to storage.
pub const STORAGE_KEY: &str = "planish.storage";

/// An opened file of tensors.
pub enum Source {
    /// One or more safetensors files.
    Safetensors(Archive),
    /// A GGUF file.
    Gguf(gguf::File),
}

/// A tensor as it is stored.
pub struct Raw {
    /// Outermost first.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub storage: Storage,
    /// Its bytes.
    pub bytes: Bytes,
}

impl Source {
    /// The file or directory.
    pub fn path(&self) -> &Path {
        match self {
            Source::Safetensors(a) => a.path(),
            Source::Gguf(f) => f.path(),
        }
    }

    /// Every file that was opened.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Source::Safetensors(a) => a.files().to_vec(),
            Source::Gguf(f) => f.files().to_vec(),
        }
    }

    /// Names of all tensors.
    pub fn names(&self) -> Vec<String> {
        match self {
            Source::Safetensors(a) => a.tensors().keys().cloned().collect(),
            Source::Gguf(f) => f.tensors().iter().map(|t| t.name.clone()).collect(),
        }
    }

    /// The name under which a file holds a tensor: base checkpoints leave out the first part.
    pub fn stored_name(&self, name: &str) -> Option<String> {
        let has = |n: &str| match self {
            Source::Safetensors(a) => a.get(n).is_some(),
            Source::Gguf(f) => f.tensor(n).is_some(),
        };
        let short = name.split_once('.').map(|(_, rest)| rest);
        [Some(name), short].into_iter().flatten().find(|n| has(n)).map(String::from)
    }

    /// A tensor by the name that [`Source::stored_name`] returned.
    ///
    /// # Errors
    /// If it is absent or of a type that planish does not compute.
    pub fn raw(&self, name: &str) -> Result<Raw> {
        match self {
            Source::Safetensors(a) => {
                let view = a.get(name).ok_or_else(|| self.error(name, "is missing"))?;
                let storage = match view.dtype {
                    Dtype::F32 => Storage::F32,
                    Dtype::F16 => Storage::F16,
                    Dtype::Bf16 => Storage::Bf16,
                    other => {
                        return Err(self.error(name, format!("is {}; weights are F32, F16 or BF16", other.name())));
                    }
                };
                Ok(Raw { shape: view.shape.clone(), storage, bytes: view.bytes.clone() })
            }
            Source::Gguf(f) => {
                let view = f.tensor(name).ok_or_else(|| self.error(name, "is missing"))?;
                let storage = view.kind.storage().ok_or_else(|| {
                    let reason = format!("is {}, a block type that planish does not compute yet", view.kind.name());
                    self.error(name, reason)
                })?;
                Ok(Raw { shape: view.shape.clone(), storage, bytes: view.bytes.clone() })
            }
        }
    }

    /// How planish's own artefacts store sites: site to storage.
    ///
    /// # Errors
    /// If the metadata is malformed.
    pub fn own_storage(&self) -> Result<BTreeMap<Site, Storage>> {
        let Source::Safetensors(archive) = self else { return Ok(BTreeMap::new()) };
        let Some(text) = archive.metadata(STORAGE_KEY) else { return Ok(BTreeMap::new()) };
        let bad = |reason: String| self.error(STORAGE_KEY, reason);
        let map: BTreeMap<String, String> =
            serde_json::from_str(text).map_err(|e| bad(format!("is malformed: {e}")))?;
        let read = |(site, storage): (String, String)| {
            let site = site.parse::<Site>().map_err(|e| bad(e.to_string()))?;
            Ok((site, Storage::parse(&storage).map_err(|e| bad(e.to_string()))?))
        };
        map.into_iter().map(read).collect()
    }

    /// The weight of a site in planish's own storage.
    ///
    /// # Errors
    /// If its tensor is absent or has the wrong size.
    pub fn own_weight(&self, site: Site, storage: Storage, [rows, cols]: [usize; 2]) -> Result<Weight> {
        let name = own_name(site);
        let Source::Safetensors(archive) = self else { return Err(self.error(&name, "is missing")) };
        let view = archive.get(&name).ok_or_else(|| self.error(&name, "is missing; download the artefact again"))?;
        let weight = Weight::new(storage, rows, cols, view.bytes.clone());
        weight.map_err(|e| self.error(&name, e.to_string()))
    }

    /// An error about a tensor of this source.
    pub fn error(&self, name: &str, reason: impl Into<String>) -> Error {
        Error::Tensor { path: self.path().into(), name: name.into(), reason: reason.into() }
    }
}

/// The name of a site's tensor in planish's own storage.
pub fn own_name(site: Site) -> String {
    format!("planish.{site}")
}
