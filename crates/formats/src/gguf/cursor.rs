//! A cursor over the mapped bytes that never trusts a count.

use super::{Array, Texts, Value};
use crate::{Error, Result};
use std::path::Path;

/// Where the reader stands in a file.
pub struct Cursor<'a> {
    /// The file.
    pub path: &'a Path,
    /// All of it.
    pub bytes: &'a [u8],
    /// The next byte.
    pub at: usize,
}

/// The least bytes that a value of a type takes, by the format's number of the type.
fn least(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        // A text has at least its length.
        8 | 10..=12 => Some(8),
        9 => Some(12),
        _ => None,
    }
}

impl<'a> Cursor<'a> {
    /// Bytes not yet read.
    pub fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// A broken rule at this place.
    pub fn bad(&self, field: &str, reason: impl AsRef<str>) -> Error {
        Error::malformed(self.path, self.at as u64, field, reason)
    }

    /// The next bytes.
    pub fn take(&mut self, len: u64, field: &str) -> Result<&'a [u8]> {
        if len > self.left() {
            let want = (self.at as u64).saturating_add(len);
            return Err(Error::truncated(self.path, field, want, self.bytes.len() as u64));
        }
        let from = self.at;
        self.at += len as usize;
        Ok(&self.bytes[from..self.at])
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, field)?);
        Ok(out)
    }

    /// The next 4 bytes as a number.
    pub fn u32(&mut self, field: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    /// The next 8 bytes as a number.
    pub fn u64(&mut self, field: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// A text: its length, then its bytes.
    pub fn text(&mut self, field: &str) -> Result<&'a str> {
        let len = self.u64(field)?;
        let start = self.at;
        let bytes = self.take(len, field)?;
        std::str::from_utf8(bytes).map_err(|e| {
            let at = (start + e.valid_up_to()) as u64;
            Error::malformed(self.path, at, field, "is not UTF-8")
        })
    }

    /// A value of a type.
    pub fn value(&mut self, kind: u32, field: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(field)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(field)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(field)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(field)?)),
            4 => Value::U32(self.u32(field)?),
            5 => Value::I32(i32::from_le_bytes(self.array(field)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(field)?)),
            7 => {
                let byte = u8::from_le_bytes(self.array(field)?);
                Value::Bool(self.truth(byte, field)?)
            }
            8 => Value::String(self.text(field)?.into()),
            9 => Value::Array(self.list(field)?),
            10 => Value::U64(self.u64(field)?),
            11 => Value::I64(i64::from_le_bytes(self.array(field)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(field)?)),
            other => return Err(self.bad(field, format!("has the unknown value type {other}"))),
        })
    }

    fn truth(&self, byte: u8, field: &str) -> Result<bool> {
        match byte {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.bad(field, format!("holds {other} where true or false (1 or 0) belongs"))),
        }
    }

    fn list(&mut self, field: &str) -> Result<Array> {
        let kind = self.u32(field)?;
        let count = self.u64(field)?;
        let least = least(kind).ok_or_else(|| self.bad(field, format!("has the unknown element type {kind}")))?;
        if count > self.left() / least {
            let want = (self.at as u64).saturating_add(count.saturating_mul(least));
            return Err(Error::truncated(self.path, field, want, self.bytes.len() as u64));
        }
        if kind == 9 {
            let remedy = "ggml does not read it either: write the list flat";
            return Err(Error::unsupported(self.path, field, "is a list of lists", remedy));
        }
        if kind == 8 {
            let mut texts = Texts::default();
            for i in 0..count {
                match self.text(field) {
                    Ok(text) => texts.push(text),
                    // The place in the list is worth the words only when something is wrong.
                    Err(Error::Malformed { at, reason, .. }) => {
                        return Err(Error::malformed(self.path, at, format!("{field}[{i}]"), reason));
                    }
                    Err(other) => return Err(other),
                }
            }
            return Ok(Array::Texts(texts));
        }
        let bytes = self.take(count * least, field)?;
        self.numbers(kind, bytes, field)
    }

    fn numbers(&self, kind: u32, bytes: &[u8], field: &str) -> Result<Array> {
        /// Little-endian numbers of one type.
        macro_rules! all {
            ($ty:ty) => {
                bytes.as_chunks().0.iter().map(|b| <$ty>::from_le_bytes(*b)).collect()
            };
        }
        Ok(match kind {
            0 => Array::U8(bytes.into()),
            1 => Array::I8(all!(i8)),
            2 => Array::U16(all!(u16)),
            3 => Array::I16(all!(i16)),
            4 => Array::U32(all!(u32)),
            5 => Array::I32(all!(i32)),
            6 => Array::F32(all!(f32)),
            7 => Array::Bool(bytes.iter().map(|b| self.truth(*b, field)).collect::<Result<_>>()?),
            10 => Array::U64(all!(u64)),
            11 => Array::I64(all!(i64)),
            _ => Array::F64(all!(f64)),
        })
    }
}
