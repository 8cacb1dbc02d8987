//! Writing a file: the same tensors give the same bytes, whatever their order.

use crate::{Dtype, Error, Result, atomic};
use serde_json::{Map, Value, json};
use std::{collections::HashSet, path::Path};
use tensor::Bytes;

/// Data begins at a multiple of this, so that a map of the file is aligned for every element and vector.
const ALIGN: usize = 64;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// Row-major little-endian elements.
    pub bytes: Bytes,
}

impl Entry {
    /// The same by reference.
    pub fn view(&self) -> View<'_> {
        View { name: &self.name, dtype: self.dtype, shape: self.shape.clone(), bytes: &self.bytes }
    }
}

/// A tensor to be written that somebody else holds.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// Its name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// Row-major little-endian elements.
    pub bytes: &'a [u8],
}

impl View<'_> {
    fn check(&self, path: &Path) -> Result<()> {
        let elements = self.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if elements.and_then(|n| n.checked_mul(self.dtype.size())) != Some(self.bytes.len()) {
            let reason = format!("has shape {:?} of {} but {} bytes", self.shape, self.dtype, self.bytes.len());
            return Err(Error::field(path, self.name, reason));
        }
        if self.name == "__metadata__" {
            return Err(Error::field(path, self.name, "cannot be the name of a tensor"));
        }
        Ok(())
    }
}

/// Writes a file, data aligned to 64 bytes; wide elements first (so that each tensor is aligned), then by name.
///
/// # Errors
/// As [`atomic::write_file`], and if two tensors have one name or bytes do not fit a shape.
pub fn write(path: &Path, entries: &[Entry], metadata: &[(&str, String)]) -> Result<()> {
    write_views(path, &entries.iter().map(Entry::view).collect::<Vec<_>>(), metadata)
}

/// The same of tensors that somebody else holds.
///
/// # Errors
/// As [`write`].
pub fn write_views(path: &Path, views: &[View<'_>], metadata: &[(&str, String)]) -> Result<()> {
    let mut order: Vec<&View<'_>> = views.iter().collect();
    order.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(b.name)));
    let (header, data) = header(path, &order, metadata)?;
    let size = (8 + header.len() + data) as u64;
    atomic::write_file(path, size, |out| {
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(|e| atomic::full_or(path, size, e));
        put(&(header.len() as u64).to_le_bytes())?;
        put(&header)?;
        order.iter().try_for_each(|e| put(e.bytes))
    })
}

/// The header, padded, and the length of the data.
fn header(path: &Path, order: &[&View<'_>], metadata: &[(&str, String)]) -> Result<(Vec<u8>, usize)> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        let mut texts: Vec<_> = metadata.iter().map(|(k, v)| ((*k).to_string(), json!(v))).collect();
        texts.sort_by(|a, b| a.0.cmp(&b.0));
        header.insert("__metadata__".into(), Value::Object(texts.into_iter().collect()));
    }
    let mut names = HashSet::new();
    let mut at = 0;
    for e in order {
        e.check(path)?;
        if !names.insert(e.name) {
            return Err(Error::field(path, e.name, "would be written twice"));
        }
        let end = at + e.bytes.len();
        header.insert(e.name.into(), json!({"dtype": e.dtype.name(), "shape": e.shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize((8 + header.len()).next_multiple_of(ALIGN) - 8, b' ');
    Ok((header, at))
}
