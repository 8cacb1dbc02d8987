//! GGUF v2 and v3 (little endian): metadata, tensor table, data; in one file or split over several.
//!
//! Layout: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Every count is checked against the
//! bytes that are left before anything is allocated for it. Accepted beyond what ggml writes: gaps between tensors,
//! tensors in any order of offsets, bytes behind the last one.

pub(crate) mod cursor;
mod kind;
mod read;
mod split;
mod value;
mod write;

pub use kind::GgmlType;
pub use value::{Array, Texts, Value};
pub use write::{Data, Writer};

use crate::{Error, Result};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};
use tensor::Bytes;

/// A stored tensor; its bytes lie in the mapped file.
#[derive(Clone, Debug)]
pub struct TensorView {
    /// Its name.
    pub name: String,
    /// Outermost first (GGUF itself writes the innermost first).
    pub shape: Vec<usize>,
    /// Element or block type.
    pub kind: GgmlType,
    /// Blocks, row by row.
    pub bytes: Bytes,
}

/// A GGUF file, or the parts of a split one.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    metadata: Vec<(String, Value)>,
    tensors: Vec<TensorView>,
    places: HashMap<String, usize>,
    files: Vec<PathBuf>,
}

impl File {
    /// Opens a file; of a split one, whose name ends in `-00001-of-00003.gguf`, all parts.
    ///
    /// # Errors
    /// If anything breaks the format's rules or a part is missing.
    pub fn open(path: &Path) -> Result<File> {
        let files = split::parts(path)?;
        let mut file = File {
            path: path.into(),
            metadata: Vec::new(),
            tensors: Vec::new(),
            places: HashMap::new(),
            files: Vec::new(),
        };
        for (i, part) in files.iter().enumerate() {
            let contents = read::read(part)?;
            split::check(part, &contents.metadata, i, files.len())?;
            if i == 0 {
                file.metadata = contents.metadata;
            }
            for t in contents.tensors {
                if file.places.insert(t.name.clone(), file.tensors.len()).is_some() {
                    return Err(Error::field(part, &t.name, "is a tensor that another part holds too"));
                }
                file.tensors.push(t);
            }
        }
        file.files = files;
        split::check_total(&file)?;
        Ok(file)
    }

    /// The file, one part of a split one.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every part.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// All metadata, in the file's order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorView] {
        &self.tensors
    }

    /// A tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorView> {
        self.places.get(name).and_then(|i| self.tensors.get(*i))
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// A text that may be absent.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a text", Value::as_str)
    }

    /// A whole number that may be absent.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn count(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a whole number from 0 on", Value::as_u64)
    }

    /// A number that may be absent.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A switch that may be absent.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A list that may be absent.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn list(&self, key: &str) -> Result<Option<&Array>> {
        self.typed(key, "a list", Value::as_array)
    }

    /// A list of numbers that may be absent.
    ///
    /// # Errors
    /// If the value or its elements are of another type.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.typed(key, "a list of numbers", |v| v.as_array()?.to_f64())
    }

    /// A list of whole numbers that may be absent.
    ///
    /// # Errors
    /// If the value or its elements are of another type, or one is below 0.
    pub fn counts(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.typed(key, "a list of whole numbers from 0 on", |v| v.as_array()?.to_u64())
    }

    /// A list of texts that may be absent.
    ///
    /// # Errors
    /// If the value or its elements are of another type.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.typed(key, "a list of texts", |v| Some(v.as_array()?.as_texts()?.iter().map(String::from).collect()))
    }

    fn typed<'a, T>(&'a self, key: &str, want: &str, get: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => get(v).map(Some).ok_or_else(|| Error::field(&self.path, key, format!("must be {want}"))),
        }
    }
}

#[cfg(test)]
mod tests;
