//! Writing GGUF v3; tensors are produced one by one, so that a model larger than memory can be written.

use super::{Array, GgmlType, Value};
use crate::{Error, Result, atomic};
use std::{collections::HashSet, path::Path};
use tensor::Bytes;

/// Tensors begin at multiples of this; readers assume it where `general.alignment` is not set.
const ALIGN: u64 = 32;
/// llama.cpp refuses longer names.
const LONGEST_NAME: usize = 63;

/// Makes the bytes of a tensor when its turn comes.
pub type Data<'a> = Box<dyn Fn() -> Result<Bytes> + 'a>;

/// A file to be written.
#[derive(Default)]
pub struct Writer<'a> {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Entry<'a>>,
}

struct Entry<'a> {
    name: String,
    shape: Vec<usize>,
    kind: GgmlType,
    data: Data<'a>,
}

impl<'a> Writer<'a> {
    /// An empty file.
    pub fn new() -> Writer<'a> {
        Writer::default()
    }

    /// Adds a metadata value, in place of one that the key already has.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.metadata.iter_mut().find(|(k, _)| *k == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key, value)),
        }
    }

    /// Adds a tensor; `shape` is outermost first.
    pub fn tensor(&mut self, name: impl Into<String>, shape: Vec<usize>, kind: GgmlType, data: Data<'a>) {
        self.tensors.push(Entry { name: name.into(), shape, kind, data });
    }

    /// Writes the file.
    ///
    /// # Errors
    /// As [`atomic::write_file`]; if a name is unfit or stands twice, a shape does not suit its type, or a
    /// tensor's bytes do not have the length of its shape.
    pub fn write(&self, path: &Path) -> Result<()> {
        let sizes = self.check(path)?;
        let head = self.head(&sizes);
        let data: u64 = sizes.iter().map(|s| s.next_multiple_of(ALIGN)).sum();
        let size = head.len() as u64 + data;
        atomic::write_file(path, size, |out| {
            let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(|e| atomic::full_or(path, size, e));
            put(&head)?;
            for (t, want) in self.tensors.iter().zip(&sizes) {
                let bytes = (t.data)()?;
                if bytes.len() as u64 != *want {
                    let reason = format!("has {} bytes where its shape asks for {want}", bytes.len());
                    return Err(Error::field(path, &t.name, reason));
                }
                put(&bytes)?;
                put(&[0; ALIGN as usize][..(want.next_multiple_of(ALIGN) - want) as usize])?;
            }
            Ok(())
        })
    }

    /// The bytes of each tensor, once everything fits the format's rules.
    fn check(&self, path: &Path) -> Result<Vec<u64>> {
        if self.metadata.iter().any(|(key, _)| key.is_empty() || key == "general.alignment") {
            return Err(Error::field(
                path,
                "metadata",
                "has an empty key or sets the alignment, which is the writer's own",
            ));
        }
        let mut names = HashSet::new();
        let mut sizes = Vec::with_capacity(self.tensors.len());
        for t in &self.tensors {
            let bad = |reason: String| Error::field(path, &t.name, reason);
            if t.name.is_empty() || t.name.len() > LONGEST_NAME {
                return Err(bad(format!("is a name of {} bytes; 1 to {LONGEST_NAME} are allowed", t.name.len())));
            }
            if !names.insert(t.name.as_str()) {
                return Err(bad("would be written twice".into()));
            }
            if !(1..=4).contains(&t.shape.len()) {
                return Err(bad(format!("has {} dimensions; 1 to 4 are allowed", t.shape.len())));
            }
            let size = t.kind.bytes_of(&t.shape).filter(|s| *s <= i64::MAX as u64 / 2);
            sizes.push(size.ok_or_else(|| bad(format!("of shape {:?} cannot be stored as {}", t.shape, t.kind)))?);
        }
        Ok(sizes)
    }

    /// Magic, counts, metadata and tensor table, padded to the data.
    fn head(&self, sizes: &[u64]) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut out, key);
            out.extend(value.type_id().to_le_bytes());
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for (t, size) in self.tensors.iter().zip(sizes) {
            put_text(&mut out, &t.name);
            out.extend((t.shape.len() as u32).to_le_bytes());
            for d in t.shape.iter().rev() {
                out.extend((*d as u64).to_le_bytes());
            }
            out.extend(t.kind.0.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = offset.saturating_add(size.next_multiple_of(ALIGN));
        }
        out.resize(out.len().next_multiple_of(ALIGN as usize), 0);
        out
    }
}

fn put_text(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend_from_slice(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_text(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Array(list) => put_list(out, list),
    }
}

fn put_list(out: &mut Vec<u8>, list: &Array) {
    out.extend(list.type_id().to_le_bytes());
    out.extend((list.len() as u64).to_le_bytes());
    match list {
        Array::Texts(texts) => texts.iter().for_each(|t| put_text(out, t)),
        numbers => numbers.iter().for_each(|v| put_value(out, &v)),
    }
}
