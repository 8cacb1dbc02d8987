//! Reading one file: its header, entry by entry, against the bytes that are there.

use super::TensorView;
use crate::{
    Dtype, Error, Result,
    error::check_kind,
    json::{self, Unique},
};
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;
use std::{collections::BTreeMap, fmt, path::Path, sync::Arc};
use tensor::Bytes;

/// The longest header that the format allows.
const LONGEST_HEADER: u64 = 100_000_000;

/// What a file holds.
pub struct Contents {
    /// The tensors by name.
    pub tensors: BTreeMap<String, TensorView>,
    /// The texts of `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Contents> {
    let bytes = Bytes::map(path).map_err(Error::io(path, "open it"))?;
    check_kind(path, &bytes[..bytes.len().min(64)], "a safetensors file")?;
    let got = bytes.len() as u64;
    let length = bytes.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let length = length.ok_or_else(|| Error::truncated(path, "the header's length", 8, got))?;
    if length > LONGEST_HEADER {
        return Err(Error::malformed(path, 0, "the header's length", format!("is {length}, above {LONGEST_HEADER}")));
    }
    let data_start = 8 + length;
    if data_start > got {
        return Err(Error::truncated(path, "the header", data_start, got));
    }
    let header = &bytes[8..data_start as usize];
    if header.first() != Some(&b'{') {
        return Err(Error::malformed(path, 8, "the header", "does not begin with '{'"));
    }
    let data = bytes.slice(data_start as usize..bytes.len()).unwrap_or_else(|| Bytes::from_vec(Vec::new()));
    let mut reading = Reading {
        file: path.into(),
        data,
        contents: Contents { tensors: BTreeMap::new(), metadata: BTreeMap::new() },
        fault: None,
    };
    let mut reader = serde_json::Deserializer::from_slice(header);
    let parsed = reader.deserialize_map(&mut reading).and_then(|()| reader.end());
    match (reading.fault, parsed) {
        (Some(fault), _) => return Err(fault),
        (None, Err(e)) => return Err(json::fault(path, header, 8, &e)),
        (None, Ok(())) => {}
    }
    check_cover(path, &reading.contents.tensors, &reading.data, data_start)?;
    Ok(reading.contents)
}

/// Takes the header's entries one by one, so that its JSON is never held as a whole.
struct Reading {
    file: Arc<Path>,
    data: Bytes,
    contents: Contents,
    /// A fault in words of its own, to be told instead of the parser's.
    fault: Option<Error>,
}

impl<'de> Visitor<'de> for &mut Reading {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> std::result::Result<(), A::Error> {
        let mut has_metadata = false;
        while let Some(name) = access.next_key::<String>()? {
            let Unique(value) = access.next_value()?;
            let twice = if name == "__metadata__" {
                let twice = std::mem::replace(&mut has_metadata, true);
                self.take_metadata(value).map(|()| twice)
            } else {
                self.take_tensor(&name, &value)
            };
            let field = || {
                if name == "__metadata__" { name.clone() } else { format!("tensor {name:?}") }
            };
            match twice {
                Ok(false) => {}
                Ok(true) => self.fault = Some(Error::malformed(&self.file, 8, field(), "stands twice in the header")),
                Err(fault) => self.fault = Some(fault),
            }
            if self.fault.is_some() {
                return Err(A::Error::custom("the entry is at fault"));
            }
        }
        Ok(())
    }
}

impl Reading {
    fn take_metadata(&mut self, value: Value) -> Result<()> {
        let bad = || Error::malformed(&self.file, 8, "__metadata__", "is not an object of texts");
        let Value::Object(map) = value else {
            return Err(bad());
        };
        for (key, value) in map {
            let Value::String(text) = value else {
                return Err(bad());
            };
            self.contents.metadata.insert(key, text);
        }
        Ok(())
    }

    /// Takes the entry of one tensor; tells whether there was one of its name.
    fn take_tensor(&mut self, name: &str, entry: &Value) -> Result<bool> {
        let bad = |reason: String| Error::malformed(&self.file, 8, format!("tensor {name:?}"), reason);
        let fields = entry.as_object().ok_or_else(|| bad("is not described by an object".into()))?;
        if let Some(odd) = fields.keys().find(|k| !["dtype", "shape", "data_offsets"].contains(&k.as_str())) {
            return Err(bad(format!("has the unknown field {odd:?}")));
        }
        let dtype = fields.get("dtype").and_then(Value::as_str).ok_or_else(|| bad("has no `dtype`".into()))?;
        let dtype = Dtype::parse(dtype).ok_or_else(|| {
            let remedy = "convert it to F32, F16 or BF16, or ask whether a newer planish knows it";
            Error::unsupported(
                &self.file,
                format!("tensor {name:?}"),
                format!("has the unknown dtype {dtype:?}"),
                remedy,
            )
        })?;
        let list = |key: &str| -> Option<Vec<u64>> { fields.get(key)?.as_array()?.iter().map(Value::as_u64).collect() };
        let shape = list("shape").ok_or_else(|| bad("has no `shape` of whole numbers".into()))?;
        let offsets = list("data_offsets").filter(|o| o.len() == 2 && o[0] <= o[1]);
        let offsets = offsets.ok_or_else(|| bad("has no `data_offsets` of two rising whole numbers".into()))?;
        let (from, to) = (offsets[0], offsets[1]);
        // A 0 must not hide that the other dimensions overflow, in whatever order they are multiplied.
        let whole = shape.iter().try_fold(1u64, |n, d| n.checked_mul((*d).max(1)));
        let elements = if shape.contains(&0) { whole.map(|_| 0) } else { whole };
        let size = elements.and_then(|n| n.checked_mul(dtype.size() as u64));
        if size != Some(to - from) {
            return Err(bad(format!("has shape {shape:?} of {dtype} but {} bytes", to - from)));
        }
        let got = self.data.len() as u64;
        let short = || Error::truncated(&self.file, format!("tensor {name:?}, in the data,"), to, got);
        if to > got {
            return Err(short());
        }
        let bytes = self.data.slice(from as usize..to as usize).ok_or_else(short)?;
        let shape = shape.iter().map(|d| *d as usize).collect();
        let view = TensorView { dtype, shape, bytes, path: self.file.clone() };
        Ok(self.contents.tensors.insert(name.into(), view).is_some())
    }
}

/// Checks that the tensors cover the data without holes or overlap: what no tensor covers could be another file.
fn check_cover(path: &Path, tensors: &BTreeMap<String, TensorView>, data: &Bytes, start: u64) -> Result<()> {
    let base = data.as_ptr() as usize;
    let range = |view: &TensorView| {
        let from = (view.bytes.as_ptr() as usize).saturating_sub(base) as u64;
        (from, from + view.bytes.len() as u64)
    };
    let mut ranges: Vec<(u64, u64, &str)> = tensors.iter().map(|(n, v)| (range(v).0, range(v).1, n.as_str())).collect();
    ranges.sort_unstable();
    let mut at = 0;
    for (from, to, name) in ranges {
        if from != at {
            let what = if from < at { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(Error::malformed(path, start + from, format!("tensor {name:?}"), what));
        }
        at = to;
    }
    let end = data.len() as u64;
    if at != end {
        return Err(Error::malformed(
            path,
            start + at,
            "the data",
            format!("has {} bytes that no tensor covers", end - at),
        ));
    }
    Ok(())
}
