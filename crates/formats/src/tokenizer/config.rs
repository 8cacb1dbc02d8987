//! What a tokenizer_config.json says beyond the tokenizer.json: named special tokens, BOS and EOS, chat template.
//!
//! The rules are those of transformers 5: `tokenizer_config.json` wins over `special_tokens_map.json`; an explicit
//! `add_bos_token` or `add_eos_token` replaces the post-processor.

use serde_json::{Map, Value};

const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What a configuration says, as far as it concerns text and ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Settings {
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub unk: Option<String>,
    pub pad: Option<String>,
    /// Every special token that has a name, in the order of transformers.
    pub specials: Vec<String>,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub chat_template: Option<String>,
}

impl Settings {
    /// Reads both files' objects; either may be empty.
    pub fn read(config: &Map<String, Value>, special_map: &Map<String, Value>) -> Settings {
        let named = |key: &str| {
            let value = config.get(key).filter(|v| !v.is_null());
            value.or_else(|| special_map.get(key)).and_then(content)
        };
        let mut specials: Vec<String> = NAMED.iter().filter_map(|key| named(key)).collect();
        for key in ["additional_special_tokens", "extra_special_tokens"] {
            let value = config.get(key).or_else(|| special_map.get(key));
            match value {
                Some(Value::Array(list)) => specials.extend(list.iter().filter_map(content)),
                Some(Value::Object(map)) => specials.extend(map.values().filter_map(content)),
                _ => {}
            }
        }
        specials.retain(|token| !token.is_empty());
        Settings {
            bos: named("bos_token"),
            eos: named("eos_token"),
            unk: named("unk_token"),
            pad: named("pad_token"),
            specials,
            add_bos: config.get("add_bos_token").and_then(Value::as_bool),
            add_eos: config.get("add_eos_token").and_then(Value::as_bool),
            chat_template: config.get("chat_template").and_then(template),
        }
    }
}

/// A token is written as its text or as an object with `content`.
fn content(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(map) => map.get("content")?.as_str().map(str::to_string),
        _ => None,
    }
}

/// A chat template, or the one named `default` of several.
fn template(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => {
            let name = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
            let entry = list.iter().find(name)?;
            entry.get("template")?.as_str().map(str::to_string)
        }
        _ => None,
    }
}
