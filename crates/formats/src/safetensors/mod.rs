//! Safetensors: a header of JSON and one block of bytes, in one file or in shards with an index.
//!
//! Layout: <https://github.com/huggingface/safetensors#format>. The rules of the specification are checked one by
//! one: header within the file and below 100 MB, no key twice, offsets without holes or overlap, every byte of the
//! data covered. The tensors stay in the mapped file.

mod header;
mod shards;
mod write;

pub use write::{Entry, View, write, write_views};

use crate::{Dtype, Error, Result};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};
use tensor::Bytes;

/// One stored tensor; its bytes lie in the mapped file.
#[derive(Clone, Debug)]
pub struct TensorView {
    /// Element type.
    pub dtype: Dtype,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// Row-major little-endian elements.
    pub bytes: Bytes,
    /// The file that holds it.
    pub path: Arc<Path>,
}

/// The tensors of a file or of a sharded set.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    tensors: BTreeMap<String, TensorView>,
    metadata: BTreeMap<String, String>,
    files: Vec<PathBuf>,
}

impl Archive {
    /// Opens a file, or in a directory `model.safetensors` or the shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    /// If anything breaks the format's rules, or a shard is missing or lies outside the directory.
    pub fn open(path: &Path) -> Result<Archive> {
        if !path.is_dir() {
            return Archive::single(path);
        }
        let (single, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        if single.is_file() {
            return Archive::single(&single);
        }
        if index.is_file() {
            return shards::open(path, &index);
        }
        let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"];
        if let Some(other) = pickled.iter().find(|name| path.join(name).is_file()) {
            let reason = format!("is not there, only {other}");
            let remedy = "convert the model to safetensors with the program that made it";
            return Err(Error::unsupported(path, "model.safetensors", reason, remedy));
        }
        Err(Error::field(
            path,
            "model.safetensors",
            "is not there, nor model.safetensors.index.json; name the model's folder",
        ))
    }

    fn single(path: &Path) -> Result<Archive> {
        let header::Contents { tensors, metadata } = header::read(path)?;
        Ok(Archive { path: path.into(), tensors, metadata, files: vec![path.into()] })
    }

    /// The file or directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every file that was opened.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// A tensor.
    pub fn get(&self, name: &str) -> Option<&TensorView> {
        self.tensors.get(name)
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorView> {
        &self.tensors
    }

    /// A text of `__metadata__`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// All texts of `__metadata__`; of a sharded set, those of all shards.
    pub fn all_metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

#[cfg(test)]
mod tests;
