//! Where tensors come from: safetensors (with planish's own storage) or GGUF, behind one lookup by name.

use crate::{Error, Result, Site};
use formats::{Dtype, gguf, safetensors::Archive};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tensor::{Bytes, Storage, Weight, entropy};

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

    /// How planish's own artefacts store sites.
    ///
    /// # Errors
    /// If the metadata is malformed.
    pub fn own_storage(&self) -> Result<BTreeMap<Site, Own>> {
        let Source::Safetensors(archive) = self else { return Ok(BTreeMap::new()) };
        let Some(text) = archive.metadata(STORAGE_KEY) else { return Ok(BTreeMap::new()) };
        let bad = |reason: String| self.error(STORAGE_KEY, reason);
        let map: BTreeMap<String, String> =
            serde_json::from_str(text).map_err(|e| bad(format!("is malformed: {e}")))?;
        let mut own: BTreeMap<Site, Own> = BTreeMap::new();
        for (name, storage) in map {
            let (storage, coded) = match storage.strip_suffix(CODED) {
                Some(storage) => (storage, true),
                None => (storage.as_str(), false),
            };
            let storage = Held { storage: Storage::parse(storage).map_err(|e| bad(e.to_string()))?, coded };
            let factor = name.rsplit_once('.').and_then(|(site, part)| {
                Some((site.parse::<Site>().ok()?, FACTORS.iter().position(|name| *name == part)?))
            });
            match (name.parse::<Site>(), factor) {
                (Ok(site), _) => own.entry(site).or_default().whole = Some(storage),
                (_, Some((site, factor))) => own.entry(site).or_default().factors[factor] = Some(storage),
                (Err(e), None) => return Err(bad(e.to_string())),
            }
        }
        Ok(own)
    }

    /// The weight of a site in planish's own storage, and the names of its tensors.
    ///
    /// # Errors
    /// If a tensor is absent or has the wrong size.
    pub fn own_weight(&self, site: Site, own: &Own, [rows, cols]: [usize; 2]) -> Result<(Weight, Vec<String>)> {
        let mut names = Vec::new();
        let mut weight = |part: &str, held: Held, shape: &dyn Fn(&[usize]) -> [usize; 2]| {
            let name = own_name(site, part);
            let Source::Safetensors(archive) = self else { return Err(self.error(&name, "is missing")) };
            let view =
                archive.get(&name).ok_or_else(|| self.error(&name, "is missing; download the artefact again"))?;
            let [rows, cols] = shape(&view.shape);
            names.push(name.clone());
            if held.coded {
                return entropy::unpack(held.storage, rows, cols, &view.bytes)
                    .map_err(|e| self.error(&name, e.to_string()));
            }
            let weight = Weight::new(held.storage, rows, cols, view.bytes.clone());
            weight.map_err(|e| self.error(&name, e.to_string()))
        };
        let parts = match (own.whole, own.factors) {
            (Some(storage), [None, None, None]) => vec![weight("", storage, &|_| [rows, cols])?],
            (None, [Some(up), Some(down), rest]) => {
                let down = weight(FACTORS[1], down, &|shape| [shape.first().copied().unwrap_or(0), cols])?;
                let rank = down.rows();
                let up = weight(FACTORS[0], up, &|_| [rows, rank])?;
                let rest = rest.map(|rest| weight(FACTORS[2], rest, &|_| [rows, cols])).transpose()?;
                [Some(up), Some(down), rest].into_iter().flatten().collect()
            }
            _ => return Err(self.error(STORAGE_KEY, format!("has neither {site} as one matrix nor both its factors"))),
        };
        let weight = Weight::of_parts(parts).map_err(|e| self.error(STORAGE_KEY, format!("has {site}: {e}")))?;
        Ok((weight, names))
    }

    /// An error about a tensor of this source.
    pub fn error(&self, name: &str, reason: impl Into<String>) -> Error {
        Error::Tensor { path: self.path().into(), name: name.into(), reason: reason.into() }
    }
}

/// How planish's own storage holds a site: as one matrix, or as factors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Own {
    whole: Option<Held>,
    factors: [Option<Held>; 3],
}

/// How a part is stored, and whether its bytes are entropy-coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    storage: Storage,
    coded: bool,
}

/// What follows a storage whose bytes are entropy-coded (`tensor::entropy`).
pub const CODED: &str = "+rans";

/// Names of the factors of a matrix of low rank, as `tensor::Weight::parts` has them.
const FACTORS: [&str; 3] = ["up", "down", "rest"];

/// The name of a part's tensor in planish's own storage.
pub fn own_name(site: Site, part: &str) -> String {
    format!("planish.{}", site.part_name(part))
}
