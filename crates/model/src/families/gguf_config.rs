//! Between GGUF metadata and the fields of `config.json`, by each family's table of keys.

use crate::{
    Config, Error, Family, Result,
    families::{self, GgufKey, Kind},
};
use formats::gguf::{File, Value, Writer};
use serde_json::{Map, Value as Json, json};

/// The family of a GGUF file.
///
/// # Errors
/// If no family has its architecture.
pub fn family(file: &File) -> Result<&'static Family> {
    let name = file.text("general.architecture")?.unwrap_or("");
    families::of_gguf(name).ok_or_else(|| Error::UnknownFamily {
        path: file.path().into(),
        architecture: name.into(),
        known: families::known(),
    })
}

/// The metadata as a configuration.
///
/// # Errors
/// If a key that the family needs is missing or of another type.
pub fn config(file: &File) -> Result<Config> {
    let family = family(file)?;
    let gguf = family.gguf.as_ref().ok_or_else(|| Error::Asked("this family has no GGUF form".into()))?;
    let mut fields: Map<String, Json> = serde_json::from_str(gguf.defaults)
        .map_err(|e| Error::Asked(format!("the defaults of {}: {e}", family.name)))?;
    for key in gguf.keys {
        let name = format!("{}.{}", gguf.architecture, key.key);
        match read(file, &name, key)? {
            Some(value) => {
                fields.insert(key.field.into(), value);
            }
            None if key.required => {
                return Err(formats::Error::field(file.path(), name, "is missing").into());
            }
            None => {}
        }
    }
    if !fields.contains_key("vocab_size") {
        let rows = file.tensor("token_embd.weight").and_then(|t| t.shape.first().copied());
        let rows = rows.ok_or_else(|| formats::Error::field(file.path(), "token_embd.weight", "is missing"))?;
        fields.insert("vocab_size".into(), json!(rows));
    }
    fields.insert("tie_word_embeddings".into(), json!(file.tensor("output.weight").is_none()));
    // The field speaks of all four projections; biases of some are found with their tensors.
    if ["attn_q", "attn_output"].iter().all(|n| file.tensor(&format!("blk.0.{n}.bias")).is_some()) {
        fields.insert("attention_bias".into(), json!(true));
    }
    if file.tensor("blk.0.ffn_gate.bias").is_some() {
        fields.insert("mlp_bias".into(), json!(true));
    }
    for (field, key) in [("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id")] {
        if let Some(id) = file.count(&format!("tokenizer.ggml.{key}"))? {
            fields.insert(field.into(), json!(id));
        }
    }
    (gguf.read_more)(file, &mut fields)?;
    Ok(Config::new(file.path(), fields))
}

fn read(file: &File, name: &str, key: &GgufKey) -> Result<Option<Json>> {
    Ok(match key.kind {
        Kind::Count => match file.get(name) {
            // Files with one value per block are read where all blocks agree.
            Some(Value::Array(list)) if list.iter().all(|v| Some(v) == list.get(0)) => {
                list.get(0).and_then(|v| v.as_u64()).map(|n| json!(n))
            }
            _ => file.count(name)?.map(|n| json!(n)),
        },
        Kind::Flag => file.flag(name)?.map(|b| json!(b)),
        // The shortest decimal that reads back as the same 32-bit float is what the configuration said.
        Kind::Number => {
            file.number(name)?.map(|x| (x as f32).to_string().parse::<f64>().map_or(json!(x), |x| json!(x)))
        }
    })
}

/// Writes the metadata of a configuration.
///
/// # Errors
/// If a field that llama.cpp needs is missing.
pub fn write(config: &Config, spec: &crate::Spec, family: &Family, out: &mut Writer<'_>) -> Result<()> {
    let gguf = family.gguf.as_ref().ok_or_else(|| {
        Error::Asked(format!("llama.cpp does not compute the family {}, so there is no GGUF of it", family.name))
    })?;
    if let Some(reason) = (gguf.refuses)(spec, config) {
        return Err(Error::Asked(format!("no GGUF is written: {reason}")));
    }
    out.set("general.architecture", Value::String(gguf.architecture.into()));
    for key in gguf.keys {
        let name = format!("{}.{}", gguf.architecture, key.key);
        let value = match (derived(key.field, spec), config.get(key.field)) {
            (Some(Size::Count(n)), _) => Some(Value::U32(n as u32)),
            (Some(Size::Number(x)), _) => Some(Value::F32(x)),
            (None, Some(v)) => match key.kind {
                Kind::Count => v.as_u64().map(|n| Value::U32(n as u32)),
                Kind::Number => v.as_f64().map(|x| Value::F32(x as f32)),
                Kind::Flag => v.as_bool().map(Value::Bool),
            },
            (None, None) => None,
        };
        match value {
            Some(value) => out.set(name, value),
            None if key.required => return Err(config.error(key.field, "is missing; GGUF files need it")),
            None => {}
        }
    }
    (gguf.write_more)(config, spec, out)
}

enum Size {
    Count(usize),
    Number(f32),
}

/// What the spec knows even where a configuration leaves it to a default.
fn derived(field: &str, spec: &crate::Spec) -> Option<Size> {
    let first = spec.blocks.first()?;
    match field {
        "intermediate_size" | "n_inner" => Some(Size::Count(first.hidden)),
        "num_key_value_heads" => Some(Size::Count(first.kv_heads)),
        "head_dim" => Some(Size::Count(first.head_dim)),
        "num_hidden_layers" | "n_layer" => Some(Size::Count(spec.blocks.len())),
        "max_position_embeddings" | "n_positions" => Some(Size::Count(spec.context)),
        "rms_norm_eps" | "layer_norm_eps" | "layer_norm_epsilon" => Some(Size::Number(spec.norm_eps)),
        _ => None,
    }
}
