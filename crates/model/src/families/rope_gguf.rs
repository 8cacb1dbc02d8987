//! Rotary embeddings in GGUF files, as llama.cpp reads them.

use super::rope::{self, Place};
use crate::{
    Config, Result, Spec,
    spec::{RopeSpec, Stretch, inverse_frequencies},
};
use formats::gguf::{self, GgmlType, Value as Meta};
use serde_json::{Map, Value, json};
use tensor::{Bytes, Weight};

/// Which tensors with divisors of the frequencies llama.cpp reads for an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Divisors {
    /// None.
    None,
    /// A short and a long list.
    ShortLong,
    /// One list for every length, or a short and a long one.
    Any,
}

/// YaRN's own factor on cosines and sines, which llama.cpp multiplies into what a file gives.
fn yarn_magnitude(factor: f64) -> f64 {
    1.0 + 0.1 * factor.max(1.0).ln()
}

/// Reads the rotary scaling of a GGUF file into `rope_scaling`.
///
/// # Errors
/// If a key or tensor is malformed.
pub fn read(file: &gguf::File, fields: &mut Map<String, Value>) -> Result<()> {
    let arch = file.text("general.architecture")?.unwrap_or("").to_string();
    let key = |k: &str| format!("{arch}.rope.scaling.{k}");
    let mut scaling = Map::new();
    if let Some(old) = file.count(&key("original_context_length"))? {
        scaling.insert("original_max_position_embeddings".into(), json!(old));
    }
    let factor = match file.number(&key("factor"))? {
        Some(factor) => Some(factor),
        None => file.number(&format!("{arch}.rope.scale_linear"))?,
    };
    let magnitude = file.number(&key("attn_factor"))?;
    // A factor without a kind is linear.
    match (file.text(&key("type"))?.unwrap_or("linear"), factor) {
        ("linear", Some(f)) if f != 0.0 && f != 1.0 => {
            scaling.extend([("rope_type".into(), json!("linear")), ("factor".into(), json!(f))]);
        }
        ("yarn", Some(f)) if f != 0.0 => {
            scaling.extend([("rope_type".into(), json!("yarn")), ("factor".into(), json!(f))]);
            if let Some(m) = magnitude {
                scaling.insert("attention_factor".into(), json!(m * yarn_magnitude(f)));
            }
        }
        _ => {}
    }
    let one = floats(file, "rope_freqs.weight")?;
    let two = (floats(file, "rope_factors_short.weight")?, floats(file, "rope_factors_long.weight")?);
    // One list for every length is LongRoPE with the same list twice.
    if let (Some(short), Some(long)) = (one.clone().or(two.0), one.or(two.1)) {
        scaling.extend([
            ("rope_type".into(), json!("longrope")),
            ("short_factor".into(), json!(short)),
            ("long_factor".into(), json!(long)),
            ("attention_factor".into(), json!(magnitude.unwrap_or(1.0))),
        ]);
    }
    if scaling.contains_key("rope_type") {
        fields.insert("rope_scaling".into(), Value::Object(scaling));
    }
    Ok(())
}

/// Reads how many channels of a head turn, where the field for it is a share.
///
/// # Errors
/// If the key is malformed.
pub fn read_share(file: &gguf::File, field: &str, fields: &mut Map<String, Value>) -> Result<()> {
    let arch = file.text("general.architecture")?.unwrap_or("");
    let number = |name: &str| fields.get(name).and_then(Value::as_f64);
    let Some(turned) = file.count(&format!("{arch}.rope.dimension_count"))? else { return Ok(()) };
    if let (Some(dim), Some(heads)) = (number("hidden_size"), number("num_attention_heads")) {
        fields.insert(field.into(), json!(turned as f64 * heads / dim));
    }
    Ok(())
}

fn floats(file: &gguf::File, name: &str) -> Result<Option<Vec<f32>>> {
    let Some(t) = file.tensor(name) else { return Ok(None) };
    let len = t.shape.iter().product();
    let weight = t.kind.storage().and_then(|s| Weight::new(s, 1, len, t.bytes.clone()).ok());
    let weight = weight.ok_or_else(|| formats::Error::field(file.path(), name, "is no list of floats"))?;
    Ok(Some(weight.to_tensor().into_vec()))
}

/// Writes the first rotary embedding of a model that keeps its parameters at the usual place.
///
/// # Errors
/// As [`write_at`].
pub fn write(arch: &str, divisors: Divisors, config: &Config, spec: &Spec, out: &mut gguf::Writer<'_>) -> Result<()> {
    let Some(rope) = spec.ropes.first() else { return Ok(()) };
    write_at(arch, divisors, config, rope::usual(config), rope, out)
}

/// Writes a rotary embedding as llama.cpp reads it for the architecture `arch`.
///
/// # Errors
/// If llama.cpp does not compute this scaling for that architecture.
pub fn write_at(
    arch: &str,
    divisors: Divisors,
    config: &Config,
    place: Place<'_>,
    rope: &RopeSpec,
    out: &mut gguf::Writer<'_>,
) -> Result<()> {
    let theta = place.theta(config)?;
    out.set(format!("{arch}.rope.dimension_count"), Meta::U32(rope.rotated as u32));
    out.set(format!("{arch}.rope.freq_base"), Meta::F32(theta as f32));
    let key = |k: &str| format!("{arch}.rope.scaling.{k}");
    let field = |name: &str| format!("{}.{name}", place.section);
    let kind = place.kind(config)?;
    let refuse = || {
        let reason =
            format!("is {kind:?} in a form that llama.cpp does not compute for {arch} models, so no GGUF is written");
        config.error(&field("rope_type"), reason)
    };
    let base = inverse_frequencies(theta, rope.rotated);
    let list = |out: &mut gguf::Writer<'_>, name: &str, frequencies: &[f32]| {
        let values: Vec<f32> = base.iter().zip(frequencies).map(|(b, f)| b / f).collect();
        let data = Box::new(move || Ok(Bytes::from_f32(values.clone())));
        out.tensor(name, vec![frequencies.len()], GgmlType::F32, data);
    };
    let other = match rope.longer.as_ref().map(|l| (l.beyond, &l.frequencies)) {
        Some((beyond, Stretch::Fixed(other))) if *other != rope.inverse_frequencies => Some((beyond, other)),
        _ => None,
    };
    match (kind, other) {
        // Dynamic scaling begins beyond the context that the file states.
        ("default" | "mrope" | "dynamic", _) => {}
        ("linear", _) => {
            out.set(key("type"), Meta::String("linear".into()));
            out.set(key("factor"), Meta::F32(config.number_or(&field("factor"), 1.0)? as f32));
        }
        ("yarn", _) if usual_yarn(config, &field)? => {
            let factor = config.number_or(&field("factor"), 1.0)?;
            let old = config.size_or_none(&field("original_max_position_embeddings"))?;
            out.set(key("type"), Meta::String("yarn".into()));
            out.set(key("factor"), Meta::F32(factor as f32));
            out.set(key("attn_factor"), Meta::F32((f64::from(rope.scale) / yarn_magnitude(factor)) as f32));
            if let Some(old) = old {
                out.set(key("original_context_length"), Meta::U32(old as u32));
            }
        }
        (_, Some((beyond, other))) if divisors != Divisors::None => {
            out.set(key("type"), Meta::String("longrope".into()));
            out.set(key("original_context_length"), Meta::U32(beyond as u32));
            out.set(key("attn_factor"), Meta::F32(rope.scale));
            list(out, "rope_factors_long.weight", other);
            list(out, "rope_factors_short.weight", &rope.inverse_frequencies);
        }
        (_, None) if divisors == Divisors::Any => {
            list(out, "rope_freqs.weight", &rope.inverse_frequencies);
            out.set(key("attn_factor"), Meta::F32(rope.scale));
        }
        _ => return Err(refuse()),
    }
    Ok(())
}

/// Is the ramp the one that llama.cpp has built in?
fn usual_yarn(config: &Config, field: &dyn Fn(&str) -> String) -> Result<bool> {
    let fast = config.number_or(&field("beta_fast"), 32.0)?;
    let slow = config.number_or(&field("beta_slow"), 1.0)?;
    Ok(fast == 32.0 && slow == 1.0 && config.flag_or(&field("truncate"), true)?)
}
