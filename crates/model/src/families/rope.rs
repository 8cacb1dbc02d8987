//! Rotary frequencies from a configuration, with the scalings that models are published with.

use crate::{
    Config, Result, Spec,
    spec::{LongRope, RopeSpec},
};
use formats::gguf::{self, GgmlType};
use serde_json::{Map, Value, json};
use tensor::{Bytes, Weight};

/// Reads `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` for heads that turn `rotated` channels.
pub fn read(config: &Config, rotated: usize, context: usize) -> Result<RopeSpec> {
    let section = if config.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
    let theta = match config.number_or_none(&format!("{section}.rope_theta"))? {
        Some(theta) => theta,
        None => config.number_or("rope_theta", 10_000.0)?,
    };
    read_with(config, section, theta, rotated, context)
}

/// The same with the section and the base given.
pub fn read_with(config: &Config, section: &str, theta: f64, rotated: usize, context: usize) -> Result<RopeSpec> {
    if theta <= 0.0 {
        return Err(config.error("rope_theta", "must be positive"));
    }
    let field = |name: &str| format!("{section}.{name}");
    let kind = match config.get(&field("rope_type")) {
        Some(_) => config.text_or(&field("rope_type"), "default")?,
        None => config.text_or(&field("type"), "default")?,
    };
    let base = frequencies(theta, rotated);
    let plain = |inverse_frequencies, scale| RopeSpec { rotated, inverse_frequencies, scale, long: None };
    let factor = || match config.number_or_none(&field("factor"))? {
        Some(f) if f > 0.0 => Ok(f),
        _ => Err(config.error(&field("factor"), "must be a positive number")),
    };
    match kind {
        "default" | "mrope" => Ok(plain(base, 1.0)),
        "linear" => {
            let factor = factor()? as f32;
            Ok(plain(base.iter().map(|f| f / factor).collect(), 1.0))
        }
        // Up to the trained length, dynamic scaling is none.
        "dynamic" => Ok(plain(base, 1.0)),
        "llama3" => Ok(plain(llama3(config, section, &base, factor()?)?, 1.0)),
        "yarn" => yarn(config, section, theta, rotated, context, factor()?),
        "longrope" | "su" => longrope(config, section, &base, rotated, context),
        other => Err(config.error(
            &field("rope_type"),
            format!("is {other:?}; planish knows default, linear, dynamic, llama3, yarn and longrope"),
        )),
    }
}

/// `theta^(-2 i / rotated)` in the `f32` arithmetic that models are trained with.
fn frequencies(theta: f64, rotated: usize) -> Vec<f32> {
    (0..rotated / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / rotated as f32)).collect()
}

/// Llama 3's scaling: long wavelengths are stretched, short ones kept, those between blended.
fn llama3(config: &Config, section: &str, base: &[f32], factor: f64) -> Result<Vec<f32>> {
    let field = |name: &str| format!("{section}.{name}");
    let low = config.number_or(&field("low_freq_factor"), 1.0)?;
    let high = config.number_or(&field("high_freq_factor"), 4.0)?;
    let old = config.number_or(&field("original_max_position_embeddings"), 8192.0)?;
    let scaled = base.iter().map(|f| {
        let wavelength = 2.0 * std::f64::consts::PI / f64::from(*f);
        if wavelength < old / high {
            *f
        } else if wavelength > old / low {
            (f64::from(*f) / factor) as f32
        } else {
            let smooth = (old / wavelength - low) / (high - low);
            ((1.0 - smooth) * f64::from(*f) / factor + smooth * f64::from(*f)) as f32
        }
    });
    Ok(scaled.collect())
}

/// YaRN (arXiv 2309.00071).
fn yarn(config: &Config, section: &str, theta: f64, rotated: usize, context: usize, factor: f64) -> Result<RopeSpec> {
    let field = |name: &str| format!("{section}.{name}");
    let old = config.number_or(&field("original_max_position_embeddings"), context as f64)?;
    let fast = config.number_or(&field("beta_fast"), 32.0)?;
    let slow = config.number_or(&field("beta_slow"), 1.0)?;
    let mscale = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
    let scale = match config.number_or_none(&field("attention_factor"))? {
        Some(scale) => scale,
        None => match (config.number_or_none(&field("mscale"))?, config.number_or_none(&field("mscale_all_dim"))?) {
            (Some(a), Some(b)) if a != 0.0 && b != 0.0 => mscale(factor, a) / mscale(factor, b),
            _ => mscale(factor, 1.0),
        },
    };
    let dim = rotated as f64;
    let turns = |n: f64| dim * (old / (n * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (turns(fast), turns(slow));
    if config.flag_or(&field("truncate"), true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let base = frequencies(theta, rotated);
    let mix = |(i, f): (usize, &f32)| {
        let ramp = (((i as f64 - low) / (high - low)).clamp(0.0, 1.0)) as f32;
        let keep = 1.0 - ramp;
        (f / factor as f32) * (1.0 - keep) + f * keep
    };
    let inverse_frequencies = base.iter().enumerate().map(mix).collect();
    Ok(RopeSpec { rotated, inverse_frequencies, scale: scale as f32, long: None })
}

/// LongRoPE (arXiv 2402.13753): one list of factors up to the trained length, another beyond.
fn longrope(config: &Config, section: &str, base: &[f32], rotated: usize, context: usize) -> Result<RopeSpec> {
    let field = |name: &str| format!("{section}.{name}");
    let old = match config.size_or_none("original_max_position_embeddings")? {
        Some(n) => n,
        None => config.size_or(&field("original_max_position_embeddings"), context)?,
    };
    let list = |name: &str| match config.numbers(&field(name))? {
        Some(list) if list.len() == base.len() => {
            Ok(base.iter().zip(&list).map(|(f, s)| f / *s as f32).collect::<Vec<f32>>())
        }
        _ => Err(config.error(&field(name), format!("must be a list of {} numbers", base.len()))),
    };
    let stretch = match config.number_or_none(&field("factor"))? {
        Some(f) if config.get("original_max_position_embeddings").is_none() => f,
        _ => context as f64 / old as f64,
    };
    let scale = match config.number_or_none(&field("attention_factor"))? {
        Some(scale) => scale,
        None if stretch <= 1.0 => 1.0,
        None => (1.0 + stretch.ln() / (old as f64).ln()).sqrt(),
    };
    let long = Some(LongRope { beyond: old, inverse_frequencies: list("long_factor")? });
    Ok(RopeSpec { rotated, inverse_frequencies: list("short_factor")?, scale: scale as f32, long })
}

/// Reads the rotary scaling of a GGUF file: a linear factor, YaRN, or divisors of the frequencies.
pub fn read_gguf(file: &gguf::File, fields: &mut Map<String, Value>) -> Result<()> {
    let arch = file.text("general.architecture")?.unwrap_or("").to_string();
    let key = |k: &str| format!("{arch}.rope.scaling.{k}");
    let mut scaling = Map::new();
    if let Some(old) = file.count(&key("original_context_length"))? {
        scaling.insert("original_max_position_embeddings".into(), json!(old));
    }
    let factor = file.number(&key("factor"))?;
    match (file.text(&key("type"))?, factor) {
        (Some("linear"), Some(f)) => {
            scaling.extend([("rope_type".into(), json!("linear")), ("factor".into(), json!(f))]);
        }
        (Some("yarn"), Some(f)) => {
            scaling.extend([("rope_type".into(), json!("yarn")), ("factor".into(), json!(f))]);
        }
        _ => {}
    }
    if let Some(divisors) = floats(file, "rope_freqs.weight")? {
        // Llama 3 files carry the ready divisors; LongRoPE with one list and no factor says the same.
        scaling.extend([
            ("rope_type".into(), json!("longrope")),
            ("short_factor".into(), json!(divisors)),
            ("long_factor".into(), json!(divisors)),
            ("attention_factor".into(), json!(1.0)),
        ]);
    }
    let lists = (floats(file, "rope_factors_short.weight")?, floats(file, "rope_factors_long.weight")?);
    if let (Some(short), Some(long)) = lists {
        scaling.extend([("rope_type".into(), json!("longrope")), ("short_factor".into(), json!(short)), ("long_factor".into(), json!(long))]);
        if let Some(f) = file.number(&key("attn_factor"))? {
            scaling.insert("attention_factor".into(), json!(f));
        }
    }
    if scaling.contains_key("rope_type") {
        fields.insert("rope_scaling".into(), Value::Object(scaling));
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

/// Writes the rotary scaling as llama.cpp reads it.
pub fn write_gguf(config: &Config, spec: &Spec, out: &mut gguf::Writer<'_>) -> Result<()> {
    let section = if config.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
    let field = |name: &str| format!("{section}.{name}");
    let Some(arch) = super::find(config)?.gguf.as_ref().map(|g| g.architecture) else { return Ok(()) };
    let Some(rope) = spec.ropes.first() else { return Ok(()) };
    out.set(format!("{arch}.rope.dimension_count"), gguf::Value::U32(rope.rotated as u32));
    let theta = match config.number_or_none(&field("rope_theta"))? {
        Some(theta) => theta,
        None => config.number_or("rope_theta", 10_000.0)?,
    };
    if config.get("rope_theta").is_none() {
        out.set(format!("{arch}.rope.freq_base"), gguf::Value::F32(theta as f32));
    }
    let kind = match config.get(&field("rope_type")) {
        Some(_) => config.text_or(&field("rope_type"), "default")?,
        None => config.text_or(&field("type"), "default")?,
    };
    let key = |k: &str| format!("{arch}.rope.scaling.{k}");
    let old = match config.size_or_none("original_max_position_embeddings")? {
        Some(n) => Some(n),
        None => config.size_or_none(&field("original_max_position_embeddings"))?,
    };
    let divisors = |f: &[f32]| frequencies(theta, rope.rotated).iter().zip(f).map(|(b, f)| b / f).collect::<Vec<f32>>();
    let list = |out: &mut gguf::Writer<'_>, name: &str, values: Vec<f32>| {
        let shape = vec![values.len()];
        out.tensor(name, shape, GgmlType::F32, Box::new(move || Ok(Bytes::from_f32(values.clone()))));
    };
    match kind {
        "linear" | "yarn" => {
            out.set(key("type"), gguf::Value::String(kind.into()));
            out.set(key("factor"), gguf::Value::F32(config.number_or(&field("factor"), 1.0)? as f32));
        }
        "llama3" => list(out, "rope_freqs.weight", divisors(&rope.inverse_frequencies)),
        "longrope" | "su" => {
            if let Some(long) = &rope.long {
                if long.inverse_frequencies == rope.inverse_frequencies && rope.scale == 1.0 {
                    list(out, "rope_freqs.weight", divisors(&rope.inverse_frequencies));
                } else {
                    list(out, "rope_factors_long.weight", divisors(&long.inverse_frequencies));
                    list(out, "rope_factors_short.weight", divisors(&rope.inverse_frequencies));
                    out.set(key("attn_factor"), gguf::Value::F32(rope.scale));
                }
            }
        }
        _ => {}
    }
    if let Some(old) = old.filter(|_| kind != "default") {
        out.set(key("original_context_length"), gguf::Value::U32(old as u32));
    }
    Ok(())
}
