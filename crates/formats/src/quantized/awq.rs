//! AWQ's files, in the "gemm" layout: `qweight [inputs, outputs / 8]`, eight codes of four bits to a word in the order 0 2
//! 4 6 1 3 5 7, `qzeros [groups, outputs / 8]` likewise and `scales [groups, outputs]`.
//!
//! Layout: AutoAWQ's `WQLinear_GEMM`.

use super::{Found, Parts, Written, groups::Groups, halves, int32, words};
use crate::{Dtype, Result, safetensors::Entry};
use serde_json::{Value, json};
use tensor::Weight;

/// Which of eight outputs each nibble holds, the lowest first.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

const PARTS: [&str; 3] = ["qweight", "qzeros", "scales"];

/// Reads a matrix.
pub fn matrix(parts: &Parts<'_>) -> Result<Option<Found>> {
    if parts.get("qweight").is_none() {
        return Ok(None);
    }
    let (weight, [inputs, packed]) = parts.matrix("qweight", Dtype::I32)?;
    let (zeros, [groups, _]) = parts.matrix("qzeros", Dtype::I32)?;
    let outputs = packed * 8;
    parts.check("qzeros", zeros, &[groups, packed])?;
    let (scales, _) = parts.floats("scales")?;
    parts.check("scales", parts.need("scales")?, &[groups, outputs])?;
    if groups == 0 || !inputs.is_multiple_of(groups) {
        return Err(parts.error("scales", format!("has {groups} groups, which {inputs} inputs do not divide into")));
    }
    let mut out = Groups {
        rows: outputs,
        cols: inputs,
        bits: 4,
        group: inputs / groups,
        codes: vec![0; outputs * inputs],
        scales: vec![0.0; outputs * groups],
        zeros: vec![0; outputs * groups],
        order: None,
    };
    for (i, word) in words(&weight.bytes).enumerate() {
        let (input, first) = (i / packed, i % packed * 8);
        for (nibble, column) in ORDER.iter().enumerate() {
            out.codes[(first + column) * inputs + input] = (word >> (4 * nibble) & 15) as u8;
        }
    }
    for (i, word) in words(&zeros.bytes).enumerate() {
        let (group, first) = (i / packed, i % packed * 8);
        for (nibble, column) in ORDER.iter().enumerate() {
            out.zeros[(first + column) * groups + group] = (word >> (4 * nibble) & 15) as u16;
        }
    }
    for (i, scale) in scales.into_iter().enumerate() {
        out.scales[i % outputs * groups + i / outputs] = scale;
    }
    Ok(Some(parts.found(out.into_weight(), &PARTS)))
}

/// Writes a matrix.
pub fn entries(prefix: &str, weight: &Weight) -> Result<Vec<Entry>, String> {
    let g = Groups::of(weight)?;
    if g.bits != 4 {
        return Err(format!("AWQ's files hold 4 bits, not {}", g.bits));
    }
    if !g.rows.is_multiple_of(8) || !g.cols.is_multiple_of(g.group) {
        return Err(format!(
            "{} outputs and {} inputs in groups of {} do not fill AWQ's words",
            g.rows, g.cols, g.group
        ));
    }
    let (groups, packed) = (g.per_row(), g.rows / 8);
    let nibbles = |value: &dyn Fn(usize) -> u32, first: usize| -> u32 {
        ORDER.iter().enumerate().map(|(nibble, column)| value(first + column) << (4 * nibble)).sum()
    };
    let weights =
        (0..g.cols * packed).map(|i| nibbles(&|row| u32::from(g.codes[row * g.cols + i / packed]), i % packed * 8));
    let zeros = (0..groups * packed).map(|i| nibbles(&|row| u32::from(g.zero(row, i / packed)), i % packed * 8));
    let scales = (0..groups * g.rows).map(|i| g.scale(i % g.rows, i / g.rows));
    let name = |part: &str| format!("{prefix}.{part}");
    Ok(vec![
        int32(name("qweight"), vec![g.cols, packed], weights),
        int32(name("qzeros"), vec![groups, packed], zeros),
        halves(name("scales"), vec![groups, g.rows], scales),
    ])
}

/// The configuration: one group for all.
pub fn config(written: &[Written], floats: &[String]) -> Result<Value, String> {
    let groups: Vec<i64> = written
        .iter()
        .map(|w| Groups::of(&w.weight).map(|g| if g.group >= g.cols { -1 } else { g.group as i64 }))
        .collect::<Result<_, _>>()?;
    let group = *groups.first().ok_or("no matrix was quantized")?;
    if let Some(at) = groups.iter().position(|g| *g != group) {
        let (name, other) = (&written[at].name, groups[at]);
        return Err(format!("AWQ's files have one group for all: {name} has {other}, others {group}"));
    }
    let kept: Vec<&String> = floats.iter().filter(|n| *n != "lm_head").collect();
    Ok(json!({
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group, "zero_point": true,
        "modules_to_not_convert": if kept.is_empty() { Value::Null } else { json!(kept) },
    }))
}
