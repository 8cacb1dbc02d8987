//! GPTQ's files: `qweight [inputs * bits / 32, outputs]` of words whose codes follow each other down a column, `qzeros
//! [groups, outputs * bits / 32]`, `scales [groups, outputs]` and `g_idx [inputs]`, the group of each input.
//!
//! Layout: AutoGPTQ's `qlinear` modules and GPTQModel, which both read. Version 1 keeps codes of zero less one.

use super::{
    Found, Parts, Written,
    groups::{Groups, code_at, put_code},
    halves, int32, words,
};
use crate::{Dtype, Result, safetensors::Entry};
use serde_json::{Map, Value, json};
use tensor::Weight;

const PARTS: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];

/// Reads a matrix.
pub fn matrix(parts: &Parts<'_>, less_one: bool) -> Result<Option<Found>> {
    if parts.get("qweight").is_none() {
        return Ok(None);
    }
    let (weight, [packed, outputs]) = parts.matrix("qweight", Dtype::I32)?;
    let (scales, shape) = parts.floats("scales")?;
    let [groups, columns] = shape[..] else {
        return Err(parts.error("scales", format!("has shape {shape:?}; it must have two dimensions")));
    };
    if columns != outputs || groups == 0 {
        return Err(parts.error("scales", format!("has shape {shape:?} beside {outputs} outputs of qweight")));
    }
    let (zeros, [zero_groups, zero_words]) = parts.matrix("qzeros", Dtype::I32)?;
    // The width of a code is told by how many words the zeros of all outputs take.
    let bits = [2u8, 3, 4, 8].into_iter().find(|b| (outputs * usize::from(*b)).div_ceil(32) == zero_words);
    let bits = bits.filter(|_| zero_groups == groups).ok_or_else(|| {
        parts.error("qzeros", format!("has shape {:?}, which no width of 2, 3, 4 or 8 bits gives", zeros.shape))
    })?;
    let inputs = packed * 32 / usize::from(bits);
    let order = order(parts, inputs, groups)?;
    let weights: Vec<u32> = words(&weight.bytes).collect();
    let zero_codes: Vec<u32> = words(&zeros.bytes).collect();
    let mut out = Groups {
        rows: outputs,
        cols: inputs,
        bits,
        group: if groups == 1 { inputs } else { inputs.div_ceil(groups) },
        codes: vec![0; outputs * inputs],
        scales: vec![0.0; outputs * groups],
        zeros: vec![0; outputs * groups],
        order: None,
    };
    let mask = (1u16 << bits) - 1;
    for row in 0..outputs {
        let column = |word: usize| weights[word * outputs + row];
        for (input, code) in out.codes[row * inputs..(row + 1) * inputs].iter_mut().enumerate() {
            *code = code_at(column, bits, input * usize::from(bits));
        }
        for group in 0..groups {
            let zero = code_at(|word| zero_codes[group * zero_words + word], bits, row * usize::from(bits));
            out.scales[row * groups + group] = scales[group * outputs + row];
            // One less than zero wraps around: the highest code is what GPTQModel writes for it.
            out.zeros[row * groups + group] = if less_one { (u16::from(zero) & mask) + 1 } else { zero.into() };
        }
    }
    out.order = order.filter(|order| order.iter().enumerate().any(|(c, g)| *g as usize != c / out.group));
    if out.order.is_none() && out.per_row() != groups {
        return Err(parts.error("scales", format!("has {groups} groups, which {inputs} inputs do not divide into")));
    }
    Ok(Some(parts.found(out.into_weight(), &PARTS)))
}

/// The group of each input, where the file tells.
fn order(parts: &Parts<'_>, inputs: usize, groups: usize) -> Result<Option<Vec<u32>>> {
    let Some(view) = parts.get("g_idx") else { return Ok(None) };
    if view.dtype != Dtype::I32 {
        return Err(parts.error("g_idx", format!("is {}; it must be I32", view.dtype.name())));
    }
    parts.check("g_idx", view, &[inputs])?;
    let order: Vec<u32> = words(&view.bytes).collect();
    match order.iter().position(|g| *g as usize >= groups) {
        Some(at) => Err(parts.error("g_idx", format!("puts input {at} into group {}, of {groups}", order[at]))),
        None => Ok(Some(order)),
    }
}

/// Writes a matrix: in version 1, which every reader knows, or with zero points as they are.
pub fn entries(prefix: &str, weight: &Weight, plain_zeros: bool) -> Result<Vec<Entry>, String> {
    let g = Groups::of(weight)?;
    let width = usize::from(g.bits);
    if ![2, 3, 4, 8].contains(&g.bits) {
        return Err(format!("GPTQ's files hold 2, 3, 4 or 8 bits, not {}", g.bits));
    }
    if !(g.cols * width).is_multiple_of(32) || !(g.rows * width).is_multiple_of(32) || !g.cols.is_multiple_of(g.group) {
        return Err(format!("{} outputs and {} inputs of {} bits do not fill words of 32", g.rows, g.cols, g.bits));
    }
    let (packed, groups, zero_words) = (g.cols * width / 32, g.per_row(), g.rows * width / 32);
    let mut weights = vec![0u32; packed * g.rows];
    for row in 0..g.rows {
        for (input, code) in g.codes[row * g.cols..(row + 1) * g.cols].iter().enumerate() {
            put_code(&mut weights[row..], g.rows, g.bits, input * width, *code);
        }
    }
    let (mut zeros, mask) = (vec![0u32; groups * zero_words], (1u16 << g.bits) - 1);
    for row in 0..g.rows {
        for group in 0..groups {
            // Less one, the code 0 wraps around to the highest.
            let code = if plain_zeros { g.zero(row, group) } else { g.zero(row, group).wrapping_sub(1) & mask };
            put_code(&mut zeros[group * zero_words..], 1, g.bits, row * width, code as u8);
        }
    }
    let scales = (0..groups).flat_map(|group| (0..g.rows).map(move |row| (row, group)));
    let name = |part: &str| format!("{prefix}.{part}");
    Ok(vec![
        int32(name("qweight"), vec![packed, g.rows], weights.into_iter()),
        int32(name("qzeros"), vec![groups, zero_words], zeros.into_iter()),
        halves(name("scales"), vec![groups, g.rows], scales.map(|(row, group)| g.scale(row, group))),
        int32(name("g_idx"), vec![g.cols], (0..g.cols).map(|c| (c / g.group) as u32)),
    ])
}

/// The configuration: one width and group for all, others by name.
pub fn config(written: &[Written], floats: &[String], plain_zeros: bool) -> Result<Value, String> {
    let kinds: Vec<(u8, i64, bool)> = written.iter().map(|w| kind(&w.weight)).collect::<Result<_, _>>()?;
    let usual = super::compressed::most_common(&kinds).ok_or("no matrix was quantized")?;
    let mut dynamic = Map::new();
    for (Written { name, .. }, kind) in written.iter().zip(&kinds).filter(|(_, kind)| **kind != usual) {
        let other = json!({"bits": kind.0, "group_size": kind.1, "sym": kind.2});
        dynamic.insert(format!("+:^{}$", name.replace('.', r"\.")), other);
    }
    for name in floats.iter().filter(|n| *n != "lm_head") {
        dynamic.insert(format!("-:^{}$", name.replace('.', r"\.")), json!({}));
    }
    let mut config = json!({
        "quant_method": "gptq", "checkpoint_format": if plain_zeros { "gptq_v2" } else { "gptq" }, "bits": usual.0, "group_size": usual.1, "sym": usual.2,
        "desc_act": false, "static_groups": false, "true_sequential": true, "damp_percent": 0.01,
        "lm_head": written.iter().any(|w| w.name == "lm_head"),
        "meta": {"quantizer": [concat!("planish:", env!("CARGO_PKG_VERSION"))]},
    });
    if !dynamic.is_empty() {
        config["dynamic"] = dynamic.into();
    }
    Ok(config)
}

/// Bits, group (-1 for a row) and symmetry.
fn kind(weight: &Weight) -> Result<(u8, i64, bool), String> {
    let g = Groups::of(weight)?;
    Ok((g.bits, if g.group >= g.cols { -1 } else { g.group as i64 }, g.is_symmetric()))
}
