//! JSON files within bounds: size, depth and unique keys are checked, and complaints name the place.
//!
//! A byte-order mark before UTF-8 is accepted and skipped. The tree of a file takes at most some 30 times the
//! file's bytes (a digit and a comma become a [`Value`]); so sizes are limited by what the files are for.

use crate::{Error, Result, error::check_kind};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, error::Category};
use std::{fmt, fs::File, io::Read, path::Path};

/// The largest JSON file that is read: tokenizers of large vocabularies take some 40 MB.
pub const LARGEST: u64 = 256 << 20;

/// Reads a JSON file whose outermost value is an object.
///
/// # Errors
/// If it is missing, too large, of another kind, no JSON, has a key twice or is no object.
pub fn read_object(path: &Path) -> Result<Map<String, Value>> {
    match read(path)? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::malformed(path, 0, "the outermost value", "is not an object")),
    }
}

/// Reads a JSON file of at most [`LARGEST`] bytes.
///
/// # Errors
/// As [`read_object`].
pub fn read(path: &Path) -> Result<Value> {
    read_within(path, LARGEST)
}

/// Reads a JSON file of at most `limit` bytes.
///
/// # Errors
/// As [`read_object`].
pub fn read_within(path: &Path, limit: u64) -> Result<Value> {
    // Asked before opening: to open a named pipe would wait for a writer.
    let meta = std::fs::metadata(path).map_err(Error::io(path, "read it"))?;
    if !meta.is_file() {
        return Err(Error::malformed(path, 0, "the path", "is not a regular file"));
    }
    let too_large = |size: u64| {
        let reason = format!("has {size} bytes; a JSON file of its purpose has at most {limit}");
        Error::unsupported(path, "the file", reason, "check that it is the file that was meant")
    };
    if meta.len() > limit {
        return Err(too_large(meta.len()));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io(path, "open it"))?;
    // A file that grows while it is read must not grow the buffer without end.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io(path, "read it"))?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    parse(path, &bytes)
}

/// Parses JSON that was read from `path`.
///
/// # Errors
/// As [`read_object`].
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Value> {
    check_kind(path, &bytes[..bytes.len().min(64)], "a JSON file")?;
    if bytes.iter().all(|b| b.is_ascii_whitespace() || *b == 0) {
        return Err(Error::truncated(path, "the JSON value", 2, bytes.len() as u64));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = Unique::deserialize(&mut reader).and_then(|v| reader.end().map(|()| v));
    value.map(|v| v.0).map_err(|e| fault(path, bytes, 0, &e))
}

/// Tells what is wrong in JSON that stands at byte `start` of a file.
pub(crate) fn fault(path: &Path, bytes: &[u8], start: u64, e: &serde_json::Error) -> Error {
    let at = start + offset(bytes, e.line(), e.column());
    if e.classify() == Category::Eof {
        return Error::truncated(path, "the JSON value", at + 1, start + bytes.len() as u64);
    }
    Error::malformed(path, at, "the JSON text", format!("is not valid: {e}"))
}

fn offset(bytes: &[u8], line: usize, column: usize) -> u64 {
    let before: usize = bytes.split(|b| *b == b'\n').take(line.saturating_sub(1)).map(|l| l.len() + 1).sum();
    (before + column.saturating_sub(1)) as u64
}

/// A value in which no object has a key twice.
pub(crate) struct Unique(pub(crate) Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(v.into()))
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(v)) = seq.next_element()? {
            list.push(v);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> std::result::Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let Unique(value) = access.next_value()?;
            if map.insert(key.clone(), value).is_some() {
                return Err(A::Error::custom(format!("the key {key:?} stands twice")));
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_name_file_place_and_reason() {
        let path = Path::new("config.json");
        let cases: &[(&[u8], &str)] = &[
            (b"{\"a\": 1, \"a\": 2}", "\"a\" stands twice"),
            (b"{\"a\": ", "truncated"),
            (b"", "truncated"),
            (b"{\"a\": 1} x", "not valid"),
            (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"{\"a\": 01}", "not valid"),
            (b"\xff\xfe{\0}\0", "UTF-16"),
            (b"\xff", "not valid"),
            (b"{\"a\": NaN}", "line 1 column 7"),
        ];
        for (bytes, want) in cases {
            let e = parse(path, bytes).unwrap_err().to_string();
            assert!(e.contains("config.json") && e.contains(want), "{e}");
        }
        let e = parse(path, b"{\n \"a\": truk}").unwrap_err().to_string();
        assert!(e.contains("byte 11") && e.contains("line 2 column"), "{e}");
        let deep = "[".repeat(100_000);
        assert!(parse(path, deep.as_bytes()).unwrap_err().to_string().contains("recursion"));
        assert_eq!(parse(path, b"\xef\xbb\xbf{\"a\": [1, -2, 0.5, null, true]}").unwrap()["a"][1], -2);
    }
}
