//! compressed-tensors: `weight_packed` (codes of a row as one stream of bits, in words), `weight_scale` and
//! `weight_zero_point` for whole numbers; `weight` of 8-bit whole numbers or floats with `weight_scale`; MXFP4.
//!
//! Layout: the compressors of <https://github.com/vllm-project/compressed-tensors>.

use super::{
    Found, Parts, Written,
    groups::{Groups, code_at, put_code},
    halves, int32, words,
};
use crate::{Dtype, Error, Result, safetensors::Entry};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, path::Path};
use tensor::{
    Bytes, Eight, Rounding, Storage, Tensor, Weight,
    grid::{Grid, Table},
};

const PARTS: [&str; 8] = [
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
];

/// Reads a matrix.
pub fn matrix(parts: &Parts<'_>, inputs: &[Inputs]) -> Result<Option<Found>> {
    let plain = parts.get("weight").map(|w| w.dtype);
    let read = match (parts.get("weight_packed").map(|w| w.dtype), plain) {
        (Some(Dtype::I32), _) => packed(parts)?,
        (Some(Dtype::U8), _) if parts.get("weight_global_scale").is_none() => mxfp4(parts)?,
        (Some(_), _) => {
            let reason = "is in a form that planish does not read (NVFP4 or a sparse one); give the unquantized model";
            return Err(parts.error("weight_packed", reason));
        }
        (None, Some(Dtype::I8)) => bytes(parts)?,
        (None, Some(Dtype::F8E4M3)) => floats(parts, Table::E4m3)?,
        (None, Some(Dtype::F8E5M2)) => floats(parts, Table::E5m2)?,
        _ => return Ok(None),
    };
    let eight = match plain {
        Some(Dtype::I8) => Some(Eight::Int),
        Some(Dtype::F8E4M3) => Some(Eight::Float),
        _ => None,
    };
    let named = |group: &&Inputs| group.targets.iter().any(|t| t == parts.prefix);
    // Targets may be classes of modules or patterns: what a matrix is tells then.
    let group = inputs.iter().find(named).or_else(|| inputs.iter().find(|g| Some(g.to) == eight));
    let scale = match group {
        Some(group) if !group.dynamic => Some(one_scale(parts, "input_scale")?),
        _ => None,
    };
    let rounding = group.map(|group| Rounding { to: group.to, scale, block: 0 });
    Ok(Some(Found { rounding, ..parts.found(read, &PARTS) }))
}

/// How inputs of some matrices are rounded.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Names of matrices, classes of modules or patterns.
    targets: Vec<String>,
    to: Eight,
    /// Has every token a scale of its own?
    dynamic: bool,
}

/// Reads how inputs are rounded from `quantization_config`.
///
/// # Errors
/// If they are rounded in a way that planish does not know.
pub fn inputs(path: &Path, config: &Map<String, Value>) -> Result<Vec<Inputs>> {
    let mut out = Vec::new();
    let groups = config.get("config_groups").and_then(Value::as_object);
    for (name, group) in groups.into_iter().flatten() {
        let Some(about) = group.get("input_activations").and_then(Value::as_object) else { continue };
        let text = |key: &str| about.get(key).and_then(Value::as_str).unwrap_or("none");
        let symmetric = about.get("symmetric").and_then(Value::as_bool).unwrap_or(true);
        let dynamic = about.get("dynamic").and_then(Value::as_bool).unwrap_or(false);
        let to = match (text("type"), about.get("num_bits").and_then(Value::as_u64)) {
            ("int", Some(8)) => Some(Eight::Int),
            ("float", Some(8)) => Some(Eight::Float),
            _ => None,
        };
        let known = if dynamic { "token" } else { "tensor" };
        let Some(to) = to.filter(|_| symmetric && text("strategy") == known) else {
            let reason = format!(
                "{name}: input_activations are {}; planish rounds inputs to 8 bits, symmetric, per token or by one scale",
                Value::Object(about.clone())
            );
            return Err(Error::unsupported(path, "quantization_config", reason, "give the unquantized model"));
        };
        let targets = group.get("targets").and_then(Value::as_array).into_iter().flatten();
        let targets = targets.filter_map(Value::as_str).map(String::from).collect();
        out.push(Inputs { targets, to, dynamic });
    }
    Ok(out)
}

/// A tensor that holds one scale.
fn one_scale(parts: &Parts<'_>, name: &str) -> Result<f32> {
    match parts.floats(name)?.0[..] {
        [scale] if scale > 0.0 => Ok(scale),
        _ => Err(parts.error(name, "must hold one scale above 0")),
    }
}

/// The shape that a packed matrix had.
fn shape(parts: &Parts<'_>) -> Result<[usize; 2]> {
    let view = parts.need("weight_shape")?;
    let sizes: Vec<u64> = match view.dtype {
        Dtype::I64 => view.bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect(),
        Dtype::I32 => words(&view.bytes).map(u64::from).collect(),
        other => return Err(parts.error("weight_shape", format!("is {}; it must be I64", other.name()))),
    };
    match sizes[..] {
        [rows, cols] if rows < 1 << 32 && cols < 1 << 32 => Ok([rows as usize, cols as usize]),
        _ => Err(parts.error("weight_shape", format!("holds {sizes:?}; it must hold rows and columns"))),
    }
}

/// Scales `[rows, groups]`; one for all counts for every row.
fn scales(parts: &Parts<'_>, rows: usize) -> Result<(Vec<f32>, usize)> {
    let (values, shape) = parts.floats("weight_scale")?;
    match shape[..] {
        [] | [1] | [1, 1] => Ok((vec![values[0]; rows], 1)),
        [n] if n == rows => Ok((values, 1)),
        [n, groups] if n == rows && groups > 0 => Ok((values, groups)),
        _ => Err(parts.error("weight_scale", format!("has shape {shape:?} beside {rows} outputs"))),
    }
}

/// Whole numbers as a stream of bits.
fn packed(parts: &Parts<'_>) -> Result<(Weight, Option<String>)> {
    let [rows, cols] = shape(parts)?;
    let (view, [stored_rows, width]) = parts.matrix("weight_packed", Dtype::I32)?;
    if stored_rows != rows || cols == 0 || width == 0 {
        return Err(parts.error("weight_packed", format!("has shape {:?} for {rows} x {cols}", view.shape)));
    }
    // Streams are dense; older files left the rest of a word that a code did not fit into.
    let dense = (2..=8u8).find(|b| (cols * usize::from(*b)).div_ceil(32) == width);
    let per_word = (2..=8u8).find(|b| cols.div_ceil(32 / usize::from(*b)) == width);
    let (bits, step) = match (dense, per_word) {
        (Some(bits), _) => (bits, None),
        (None, Some(bits)) => (bits, Some(32 / usize::from(bits))),
        _ => return Err(parts.error("weight_packed", format!("has {width} words for {cols} inputs"))),
    };
    let (scales, groups) = scales(parts, rows)?;
    let stored: Vec<u32> = words(&view.bytes).collect();
    let mut out = Groups {
        rows,
        cols,
        bits,
        group: cols.div_ceil(groups),
        codes: vec![0; rows * cols],
        scales,
        zeros: vec![1 << (bits - 1); rows * groups],
        order: None,
    };
    let place = |i: usize| step.map_or(i * usize::from(bits), |s| i / s * 32 + i % s * usize::from(bits));
    for (row, codes) in out.codes.chunks_exact_mut(cols).enumerate() {
        for (c, code) in codes.iter_mut().enumerate() {
            *code = code_at(|word| stored[row * width + word], bits, place(c));
        }
    }
    if let Some(zeros) = parts.get("weight_zero_point") {
        let words_down = (0..rows).map(place).max().map_or(0, |p| (p + usize::from(bits)).div_ceil(32));
        if zeros.dtype == Dtype::I32 {
            parts.check("weight_zero_point", zeros, &[words_down, groups])?;
            let stored: Vec<u32> = words(&zeros.bytes).collect();
            for row in 0..rows {
                for group in 0..groups {
                    let code = code_at(|word| stored[word * groups + group], bits, place(row));
                    out.zeros[row * groups + group] = code.into();
                }
            }
        } else {
            signed_zeros(parts, &mut out, groups)?;
        }
    }
    if let Some(order) = parts.get("weight_g_idx") {
        parts.check("weight_g_idx", order, &[cols])?;
        let order: Vec<u32> = words(&order.bytes).collect();
        if let Some(bad) = order.iter().find(|g| **g as usize >= groups) {
            // -1 says that groups follow the columns.
            if *bad != u32::MAX {
                return Err(parts.error("weight_g_idx", format!("names group {bad}, of {groups}")));
            }
        } else if order.iter().enumerate().any(|(c, g)| *g as usize != c / out.group) {
            out.order = Some(order);
        }
    }
    check_groups(parts, &out, groups)?;
    Ok(out.into_weight())
}

/// Zero points of one signed byte each.
fn signed_zeros(parts: &Parts<'_>, out: &mut Groups, groups: usize) -> Result<()> {
    let view = parts.need("weight_zero_point")?;
    if view.dtype != Dtype::I8 || view.bytes.len() != out.rows * groups {
        return Err(parts.error("weight_zero_point", format!("is {} of shape {:?}", view.dtype.name(), view.shape)));
    }
    let middle = 1i16 << (out.bits - 1);
    for (zero, byte) in out.zeros.iter_mut().zip(view.bytes.iter()) {
        *zero = (i16::from(*byte as i8) + middle).max(0) as u16;
    }
    Ok(())
}

fn check_groups(parts: &Parts<'_>, out: &Groups, groups: usize) -> Result<()> {
    if out.per_row() == groups {
        return Ok(());
    }
    Err(parts.error("weight_scale", format!("has {groups} groups, which {} inputs do not divide into", out.cols)))
}

/// Whole numbers of a byte each.
fn bytes(parts: &Parts<'_>) -> Result<(Weight, Option<String>)> {
    let (view, [rows, cols]) = parts.matrix("weight", Dtype::I8)?;
    let (scales, groups) = scales(parts, rows)?;
    let mut out = Groups {
        rows,
        cols,
        bits: 8,
        group: cols.div_ceil(groups).max(1),
        codes: view.bytes.iter().map(|b| b ^ 0x80).collect(),
        scales,
        zeros: vec![128; rows * groups],
        order: None,
    };
    if parts.get("weight_zero_point").is_some() {
        signed_zeros(parts, &mut out, groups)?;
    }
    check_groups(parts, &out, groups)?;
    Ok(out.into_weight())
}

/// Eight-bit floats with a scale per row, for all, or per block of rows and columns.
fn floats(parts: &Parts<'_>, table: Table) -> Result<(Weight, Option<String>)> {
    let view = parts.need("weight")?;
    let [rows, cols] = view.shape[..] else {
        return Err(parts.error("weight", format!("has shape {:?}; it must have two dimensions", view.shape)));
    };
    let (_, scale_shape) = parts.floats("weight_scale")?;
    let by_block = matches!(scale_shape, [r, c] if (*r, *c) != (1, 1) && (*r != rows || *c != 1));
    if by_block {
        let (scales, shape) = parts.floats("weight_scale")?;
        let (down, across) = (rows.div_ceil(shape[0].max(1)).max(1), cols.div_ceil(shape[1].max(1)).max(1));
        if shape.contains(&0) || rows.div_ceil(down) != shape[0] || cols.div_ceil(across) != shape[1] {
            return Err(parts.error("weight_scale", format!("has shape {shape:?} for {rows} x {cols}")));
        }
        let levels = table.levels();
        let value = |(i, code): (usize, &u8)| {
            levels[usize::from(*code)] * scales[i / cols / down * shape[1] + i % cols / across]
        };
        let values: Vec<f32> = view.bytes.iter().enumerate().map(value).collect();
        let reason = "its scales are of blocks of rows and columns";
        return Ok((Weight::from_tensor(Tensor::from_vec(rows, cols, values)), Some(reason.into())));
    }
    let (scales, _) = scales(parts, rows)?;
    let grid = Grid::Levels { table, group: 0 };
    let width = grid.row_bytes(cols);
    let mut out = vec![0u8; rows * width];
    for (row, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
        grid.encode(&grid.block_of(scales[row], 0), &view.bytes[row * cols..(row + 1) * cols], out);
    }
    let weight = Weight::new(Storage::Grid(grid), rows, cols, Bytes::from_vec(out));
    Ok((weight.map_err(|e| parts.error("weight", e.to_string()))?, None))
}

/// Pairs of 4-bit floats, and a power of two for each 32.
fn mxfp4(parts: &Parts<'_>) -> Result<(Weight, Option<String>)> {
    let (view, [rows, half]) = parts.matrix("weight_packed", Dtype::U8)?;
    let cols = 2 * half;
    let scales = parts.need("weight_scale")?;
    if !cols.is_multiple_of(32) || !matches!(scales.dtype, Dtype::U8 | Dtype::F8E8M0) {
        let reason =
            format!("is {} beside {cols} inputs; planish reads a power of two for each 32", scales.dtype.name());
        return Err(parts.error("weight_scale", reason));
    }
    parts.check("weight_scale", scales, &[rows, cols / 32])?;
    let mut out = Vec::with_capacity(rows * cols / 32 * 17);
    for (pairs, exponent) in view.bytes.as_chunks::<16>().0.iter().zip(scales.bytes.iter()) {
        out.push(*exponent);
        // Neighbours share a byte there; here those that lie sixteen apart do.
        let code = |i: usize| pairs[i / 2] >> (4 * (i % 2)) & 15;
        out.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
    }
    let weight = Weight::new(Storage::Grid(Grid::Mxfp4), rows, cols, Bytes::from_vec(out));
    Ok((weight.map_err(|e| parts.error("weight_packed", e.to_string()))?, None))
}

/// Writes a matrix, and the one scale of its inputs where there is one.
pub fn entries(prefix: &str, weight: &Weight, rounding: Option<Rounding>) -> Result<Vec<Entry>, String> {
    let mut entries = matrix_entries(prefix, weight)?;
    if let Some(scale) = rounding.and_then(|r| r.scale) {
        let bytes = Bytes::from_vec(scale.to_le_bytes().to_vec());
        entries.push(Entry { name: format!("{prefix}.input_scale"), dtype: Dtype::F32, shape: vec![1], bytes });
    }
    Ok(entries)
}

fn matrix_entries(prefix: &str, weight: &Weight) -> Result<Vec<Entry>, String> {
    let name = |part: &str| format!("{prefix}.{part}");
    let (rows, cols) = (weight.rows(), weight.cols());
    let Some(stored) = weight.stored() else { return Err("packed weights cannot be written".into()) };
    match weight.grid() {
        Some(Grid::Levels { table: table @ (Table::E4m3 | Table::E5m2), group: 0 }) => {
            let dtype = if table == Table::E4m3 { Dtype::F8E4M3 } else { Dtype::F8E5M2 };
            let codes = (0..rows).flat_map(|r| stored.row(r)[4..][..cols].iter().copied()).collect();
            let scales = (0..rows).flat_map(|r| stored.row(r)[..4].iter().copied()).collect();
            let scales = Entry {
                name: name("weight_scale"),
                dtype: Dtype::F32,
                shape: vec![rows, 1],
                bytes: Bytes::from_vec(scales),
            };
            Ok(vec![
                Entry { name: name("weight"), dtype, shape: vec![rows, cols], bytes: Bytes::from_vec(codes) },
                scales,
            ])
        }
        Some(Grid::Mxfp4) => {
            let blocks = || (0..rows).flat_map(|r| stored.row(r).chunks_exact(17));
            let code = |b: &[u8], i: usize| if i < 16 { b[1 + i] & 15 } else { b[1 + i - 16] >> 4 };
            let pairs = blocks().flat_map(|b| (0..16).map(move |i| code(b, 2 * i) | code(b, 2 * i + 1) << 4)).collect();
            let scales = blocks().map(|b| b[0]).collect();
            let entry = |part: &str, width: usize, bytes: Vec<u8>| Entry {
                name: name(part),
                dtype: Dtype::U8,
                shape: vec![rows, width],
                bytes: Bytes::from_vec(bytes),
            };
            Ok(vec![entry("weight_packed", cols / 2, pairs), entry("weight_scale", cols / 32, scales)])
        }
        _ => whole_numbers(&name, weight),
    }
}

fn whole_numbers(name: &dyn Fn(&str) -> String, weight: &Weight) -> Result<Vec<Entry>, String> {
    let g = Groups::of(weight)?;
    if !g.cols.is_multiple_of(g.group) {
        return Err(format!("groups of {} do not divide {} inputs", g.group, g.cols));
    }
    let (groups, bits) = (g.per_row(), usize::from(g.bits));
    let scales = (0..g.rows * groups).map(|i| g.scales[i]);
    let by_row = g.group >= g.cols;
    let scale = match by_row {
        // A row's scale may be finer than 16 bits.
        true => Entry {
            name: name("weight_scale"),
            dtype: Dtype::F32,
            shape: vec![g.rows, 1],
            bytes: Bytes::from_vec(scales.flat_map(f32::to_le_bytes).collect()),
        },
        false => halves(name("weight_scale"), vec![g.rows, groups], scales),
    };
    if is_bytes(&g) {
        let codes = g.codes.iter().map(|c| c ^ 0x80).collect();
        let shape = vec![g.rows, g.cols];
        return Ok(vec![Entry { name: name("weight"), dtype: Dtype::I8, shape, bytes: Bytes::from_vec(codes) }, scale]);
    }
    let width = (g.cols * bits).div_ceil(32);
    let mut packed = vec![0u32; g.rows * width];
    for (codes, packed) in g.codes.chunks_exact(g.cols).zip(packed.chunks_exact_mut(width)) {
        codes.iter().enumerate().for_each(|(c, code)| put_code(packed, 1, g.bits, c * bits, *code));
    }
    let shape = [g.rows, g.cols].iter().flat_map(|n| (*n as u64).to_le_bytes()).collect();
    let shape = Entry { name: name("weight_shape"), dtype: Dtype::I64, shape: vec![2], bytes: Bytes::from_vec(shape) };
    let mut entries = vec![int32(name("weight_packed"), vec![g.rows, width], packed.into_iter()), scale, shape];
    if !g.is_symmetric() {
        let down = (g.rows * bits).div_ceil(32);
        let mut zeros = vec![0u32; down * groups];
        for row in 0..g.rows {
            for group in 0..groups {
                let code = u8::try_from(g.zero(row, group)).unwrap_or(u8::MAX);
                put_code(&mut zeros[group..], groups, g.bits, row * bits, code);
            }
        }
        entries.push(int32(name("weight_zero_point"), vec![down, groups], zeros.into_iter()));
    }
    Ok(entries)
}

/// Symmetric codes of eight bits with a scale per row are written as bytes.
fn is_bytes(g: &Groups) -> bool {
    g.bits == 8 && g.group >= g.cols && g.is_symmetric()
}

/// How a matrix is told of in the configuration: what is written in `weights`, and the format's name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    bits: u8,
    float: bool,
    symmetric: bool,
    group: Option<usize>,
    format: &'static str,
    /// Are inputs rounded as the weights are, and by one scale?
    inputs: Option<bool>,
}

fn kind(weight: &Weight, rounding: Option<Rounding>) -> Result<Kind, String> {
    let inputs = rounding.map(|r| r.scale.is_some());
    match weight.grid() {
        Some(Grid::Levels { .. }) => {
            Ok(Kind { bits: 8, float: true, symmetric: true, group: None, format: "float-quantized", inputs })
        }
        Some(Grid::Mxfp4) => {
            Ok(Kind { bits: 4, float: true, symmetric: true, group: Some(32), format: "mxfp4-pack-quantized", inputs })
        }
        _ => {
            let g = Groups::of(weight)?;
            let format = if is_bytes(&g) { "int-quantized" } else { "pack-quantized" };
            let group = (g.group < g.cols).then_some(g.group);
            Ok(Kind { bits: g.bits, float: false, symmetric: g.is_symmetric(), group, format, inputs })
        }
    }
}

/// The configuration: a group of matrices for each way to store them.
pub fn config(written: &[Written], floats: &[String]) -> Result<Value, String> {
    let mut kinds: BTreeMap<Kind, Vec<&String>> = BTreeMap::new();
    for Written { name, weight, rounding } in written {
        kinds.entry(kind(weight, *rounding)?).or_default().push(name);
    }
    let alone = kinds.len() == 1;
    let formats: std::collections::BTreeSet<&str> = kinds.keys().map(|k| k.format).collect();
    let format = match formats.len() {
        0 => return Err("no matrix was quantized".into()),
        1 => formats.first().copied().unwrap_or("pack-quantized"),
        _ => "mixed-precision",
    };
    let group = |(i, (kind, names)): (usize, (&Kind, &Vec<&String>))| {
        let number = if kind.float { "float" } else { "int" };
        let strategy = if kind.group.is_some() { "group" } else { "channel" };
        let mut weights = json!({
            "num_bits": kind.bits, "type": number, "symmetric": kind.symmetric, "strategy": strategy,
            "group_size": kind.group, "dynamic": false,
        });
        if kind.format == "mxfp4-pack-quantized" {
            weights["scale_dtype"] = "torch.uint8".into();
        }
        let inputs = kind.inputs.map(|fixed| {
            let strategy = if fixed { "tensor" } else { "token" };
            json!({
                "num_bits": 8, "type": number, "symmetric": true, "strategy": strategy, "group_size": null,
                "dynamic": !fixed,
            })
        });
        let targets = if alone { json!(["Linear"]) } else { json!(names) };
        let about = json!({
            "targets": targets, "weights": weights, "input_activations": inputs, "output_activations": null,
            "format": kind.format,
        });
        (format!("group_{i}"), about)
    };
    let groups: Map<String, Value> = kinds.iter().enumerate().map(group).collect();
    Ok(json!({
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": groups, "ignore": floats, "kv_cache_scheme": null, "global_compression_ratio": null,
    }))
}

/// What most have; the first of several that as many have.
pub fn most_common<T: Clone + PartialEq>(all: &[T]) -> Option<T> {
    let count = |x: &T| all.iter().filter(|y| *y == x).count();
    all.iter().rev().max_by_key(|x| count(x)).cloned()
}
