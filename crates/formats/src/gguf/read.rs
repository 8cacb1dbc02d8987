//! Reading one file: header, metadata, tensor table; then the tensors are cut from the data.

use super::{GgmlType, TensorView, Value, cursor::Cursor};
use crate::{Error, Result, error::check_kind};
use std::{collections::HashSet, path::Path};
use tensor::Bytes;

/// Where the data of a file without `general.alignment` is aligned.
const DEFAULT_ALIGN: u64 = 32;
/// The longest key, as the format says.
const LONGEST_KEY: usize = 65_535;
/// The longest tensor name: the format says 64, and some builds of ggml write more.
const LONGEST_NAME: usize = 256;
/// The least bytes of a key with its value: length, type, a byte (an empty key is told as such later).
const LEAST_KEY: u64 = 8 + 4 + 1;
/// The least bytes of a tensor's entry: length, dimensions, type, offset (an empty one is told as such later).
const LEAST_INFO: u64 = 8 + 4 + 4 + 8;

/// What a file holds.
pub struct Contents {
    /// Keys and values in the file's order.
    pub metadata: Vec<(String, Value)>,
    /// Tensors in the file's order.
    pub tensors: Vec<TensorView>,
}

/// Reads one file.
pub fn read(path: &Path) -> Result<Contents> {
    let bytes = Bytes::map(path).map_err(Error::io(path, "open it"))?;
    check_kind(path, &bytes[..bytes.len().min(64)], "a GGUF file")?;
    let mut c = Cursor { path, bytes: &bytes, at: 0 };
    check_version(&mut c)?;
    let tensors = c.u64("the number of tensors")?;
    let keys = c.u64("the number of keys")?;
    for (count, least, what) in
        [(tensors, LEAST_INFO, "the number of tensors"), (keys, LEAST_KEY, "the number of keys")]
    {
        if count > c.left() / least {
            return Err(c.bad(what, format!("is {count}, more than the {} bytes behind it have room for", c.left())));
        }
    }
    let metadata = read_metadata(&mut c, keys)?;
    let infos = read_infos(&mut c, tensors)?;
    let align = match metadata.iter().find(|(k, _)| k == "general.alignment") {
        None => DEFAULT_ALIGN,
        Some((_, Value::U32(a))) if a.is_power_of_two() && *a >= 8 => u64::from(*a),
        Some(_) => {
            return Err(Error::malformed(path, 24, "general.alignment", "is not a power of two from 8 on, in 32 bits"));
        }
    };
    let start = (c.at as u64).next_multiple_of(align);
    check_overlap(path, start, &infos)?;
    let tensors = infos.into_iter().map(|i| place(path, &bytes, start, align, i)).collect::<Result<_>>()?;
    Ok(Contents { metadata, tensors })
}

fn check_version(c: &mut Cursor<'_>) -> Result<()> {
    if c.take(4, "the magic")? != b"GGUF" {
        return Err(Error::malformed(c.path, 0, "the magic", "is not GGUF"));
    }
    let version = c.u32("the version")?;
    let (reason, remedy) = match version {
        2 | 3 => return Ok(()),
        1 => ("is 1".to_string(), "planish reads 2 and 3: convert it anew with a current llama.cpp"),
        _ if (1..=3).contains(&version.swap_bytes()) => {
            ("is big endian".to_string(), "planish reads little endian: run gguf-py's `gguf_convert_endian.py` on it")
        }
        other => (format!("is {other}"), "planish reads 2 and 3: a newer planish may know it, or the file is damaged"),
    };
    Err(Error::unsupported(c.path, "byte 4: the version", reason, remedy))
}

fn read_metadata(c: &mut Cursor<'_>, keys: u64) -> Result<Vec<(String, Value)>> {
    let mut metadata = Vec::new();
    let mut seen = HashSet::new();
    for i in 0..keys {
        let key = c.text(&format!("key {i}"))?;
        if key.is_empty() || key.len() > LONGEST_KEY {
            return Err(c.bad(&format!("key {i}"), format!("has {} bytes; a key has 1 to {LONGEST_KEY}", key.len())));
        }
        let field = format!("key {key:?}");
        if !seen.insert(key) {
            return Err(c.bad(&field, "stands twice"));
        }
        let kind = c.u32(&field)?;
        let value = c.value(kind, &field)?;
        metadata.push((key.to_string(), value));
    }
    Ok(metadata)
}

struct Info {
    name: String,
    shape: Vec<usize>,
    kind: GgmlType,
    offset: u64,
    size: u64,
}

fn read_infos(c: &mut Cursor<'_>, tensors: u64) -> Result<Vec<Info>> {
    let mut infos = Vec::new();
    let mut seen = HashSet::new();
    for i in 0..tensors {
        let name = c.text(&format!("the name of tensor {i}"))?;
        if name.is_empty() || name.len() > LONGEST_NAME {
            let reason = format!("has {} bytes; it may have 1 to {LONGEST_NAME}", name.len());
            return Err(c.bad(&format!("the name of tensor {i}"), reason));
        }
        if !seen.insert(name) {
            return Err(c.bad(&format!("tensor {name:?}"), "stands twice"));
        }
        infos.push(read_info(c, name)?);
    }
    Ok(infos)
}

fn read_info(c: &mut Cursor<'_>, name: &str) -> Result<Info> {
    let field = format!("tensor {name:?}");
    let dims = c.u32(&field)?;
    if !(1..=4).contains(&dims) {
        return Err(c.bad(&field, format!("has {dims} dimensions; there may be 1 to 4")));
    }
    let mut shape = Vec::with_capacity(dims as usize);
    for _ in 0..dims {
        shape.push(c.u64(&field)? as usize);
    }
    shape.reverse();
    let kind = GgmlType(c.u32(&field)?);
    if !kind.is_known() {
        let (reason, remedy) = if kind.is_dropped() {
            ("which ggml has dropped", "convert the model anew with a current llama.cpp")
        } else {
            ("which is unknown", "a newer planish may know it, or the file is damaged")
        };
        let reason = format!("has the type {}, {reason}", kind.0);
        return Err(Error::unsupported(c.path, format!("byte {}: {field}", c.at - 4), reason, remedy));
    }
    let offset = c.u64(&field)?;
    let size = kind.bytes_of(&shape).ok_or_else(|| {
        c.bad(
            &field,
            format!("cannot have the shape {shape:?} as {kind}, whose rows are multiples of {}", kind.block_len()),
        )
    })?;
    Ok(Info { name: name.into(), shape, kind, offset, size })
}

/// Checks that no two tensors share bytes.
fn check_overlap(path: &Path, start: u64, infos: &[Info]) -> Result<()> {
    let mut order: Vec<&Info> = infos.iter().filter(|i| i.size > 0).collect();
    order.sort_by_key(|i| i.offset);
    for pair in order.windows(2) {
        if pair[0].offset.saturating_add(pair[0].size) > pair[1].offset {
            let reason = format!("overlaps tensor {:?}", pair[0].name);
            let at = start.saturating_add(pair[1].offset);
            return Err(Error::malformed(path, at, format!("tensor {:?}", pair[1].name), reason));
        }
    }
    Ok(())
}

/// Cuts a tensor from the data.
fn place(path: &Path, bytes: &Bytes, start: u64, align: u64, info: Info) -> Result<TensorView> {
    let field = format!("tensor {:?}", info.name);
    if !info.offset.is_multiple_of(align) {
        let reason = format!("has the offset {}, no multiple of the alignment {align}", info.offset);
        return Err(Error::malformed(path, start, field, reason));
    }
    let got = bytes.len() as u64;
    let from = start.saturating_add(info.offset);
    let to = from.saturating_add(info.size);
    let short = || Error::truncated(path, &field, to, got);
    // A tensor without values may stand at the very end, where the padding of the last one is missing.
    let from = if info.size == 0 { from.min(got) } else { from };
    let to = if info.size == 0 { from } else { to };
    if to > got {
        return Err(short());
    }
    let data = bytes.slice(from as usize..to as usize).ok_or_else(short)?;
    Ok(TensorView { name: info.name, shape: info.shape, kind: info.kind, bytes: data })
}
