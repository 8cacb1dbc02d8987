//! Families as data: how a configuration reads, and how files store each site.
//!
//! One file per family and one line in [`FAMILIES`]. Only this folder holds the tensor names of Hugging Face
//! and GGUF files; the same tables serve loading and saving.

mod gemma;
mod gemma_gguf;
pub(crate) mod gguf_config;
mod gguf_keys;
mod gpt2;
mod gpt_neox;
mod llama;
mod mistral;
mod phi3;
mod qwen;
mod rope;
mod rope_gguf;
pub(crate) mod stored;
mod window;

pub use gguf_keys::{GgufKey, Kind};
pub use stored::{Layout, Part, Stored};

use crate::{Config, Error, Result, Spec};
use formats::gguf;
use serde_json::{Map, Value};

/// One family of GPTs.
pub struct Family {
    /// Its name in reports.
    pub name: &'static str,
    /// Values of `architectures[0]` or `model_type` in `config.json` that it serves.
    pub architectures: &'static [&'static str],
    /// A JSON object of what transformers assumes for fields that a `config.json` leaves out.
    pub assumed: &'static str,
    /// Reads a configuration.
    pub spec: fn(&Config) -> Result<Spec>,
    /// How Hugging Face files store its sites.
    pub stored: &'static [Stored],
    /// How GGUF files describe it; `None` where llama.cpp does not compute this family.
    pub gguf: Option<GgufFamily>,
}

/// A family as GGUF files hold it.
pub struct GgufFamily {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Metadata keys and the configuration fields they stand for.
    pub keys: &'static [GgufKey],
    /// How GGUF files store its sites.
    pub stored: &'static [Stored],
    /// Fields of the configuration that no key carries, for a model that is read from GGUF.
    pub defaults: &'static str,
    /// Why llama.cpp would not compute this very model, if it would not.
    pub refuses: fn(&Spec, &Config) -> Option<String>,
    /// Fields that take more than a key to read, such as rotary scaling.
    pub read_more: fn(&gguf::File, &mut Map<String, Value>) -> Result<()>,
    /// Metadata and tensors that take more than a field to write.
    pub write_more: fn(&Config, &Spec, &mut gguf::Writer<'_>) -> Result<()>,
}

/// Every family, one line each.
pub static FAMILIES: &[&Family] = &[
    &llama::LLAMA,
    &mistral::MISTRAL,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &phi3::PHI3,
    &gpt2::GPT2,
    &gpt_neox::GPT_NEOX,
];

/// The family that serves a configuration.
///
/// # Errors
/// If none does; the message lists what there is.
pub fn find(config: &Config) -> Result<&'static Family> {
    let architecture = config.architecture()?;
    FAMILIES.iter().copied().find(|f| f.architectures.contains(&architecture)).ok_or_else(|| Error::UnknownFamily {
        path: config.path().into(),
        architecture: architecture.into(),
        known: known(),
    })
}

/// The families whose GGUF architecture has that name; several may share one.
pub fn of_gguf(architecture: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|f| f.gguf.as_ref().is_some_and(|g| g.architecture == architecture))
}

/// The names of all architectures, for messages.
pub fn known() -> String {
    let names: Vec<_> = FAMILIES.iter().map(|f| f.architectures[0]).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Role;
    use std::{collections::BTreeSet, path::Path};

    fn config(text: &str) -> Config {
        Config::new(Path::new("config.json"), serde_json::from_str(text).unwrap())
    }

    #[test]
    fn tables_are_well_formed() {
        for family in FAMILIES {
            let empty = config("{}");
            empty.assuming(family.assumed).unwrap();
            for table in [Some(family.stored), family.gguf.as_ref().map(|g| g.stored)].into_iter().flatten() {
                let names: BTreeSet<_> = table.iter().map(|s| s.name).collect();
                assert_eq!(names.len(), table.len(), "{} lists a tensor twice", family.name);
                for stored in table {
                    for (role, _) in stored.sites {
                        assert_eq!(role.is_edge(), stored.is_edge(), "{}: {} of {role:?}", family.name, stored.name);
                    }
                }
                assert!(table.iter().any(|s| s.sites[0].0 == Role::Embed));
            }
            if let Some(gguf) = &family.gguf {
                empty.assuming(gguf.defaults).unwrap();
            }
        }
    }

    #[test]
    fn faults_in_a_configuration_name_their_field() {
        let base = r#""vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2"#;
        let cases = [
            ("Gemma2ForCausalLM", r#""head_dim": 4, "layer_types": ["full_attention"]"#, "layer_types"),
            ("Gemma2ForCausalLM", r#""head_dim": 4, "layer_types": ["full_attention", 7]"#, "layer_types"),
            ("Gemma3ForCausalLM", r#""head_dim": 4, "query_pre_attn_scalar": -1"#, "query_pre_attn_scalar"),
            (
                "GemmaForCausalLM",
                r#""head_dim": 4, "use_bidirectional_attention": true"#,
                "use_bidirectional_attention",
            ),
            ("Phi3ForCausalLM", r#""partial_rotary_factor": 0.25"#, "partial_rotary_factor"),
            (
                "Phi3ForCausalLM",
                r#""rope_scaling": {"type": "longrope", "short_factor": [1]}"#,
                "rope_scaling.long_factor",
            ),
            ("GPTNeoXForCausalLM", r#""rotary_pct": 7"#, "rotary_pct"),
            ("Qwen2ForCausalLM", r#""use_sliding_window": true, "max_window_layers": "all""#, "max_window_layers"),
            ("LlamaForCausalLM", r#""head_dim": 3"#, "head_dim"),
            ("LlamaForCausalLM", r#""rope_theta": 0"#, "rope_theta"),
            ("MistralForCausalLM", r#""sliding_window": "wide""#, "sliding_window"),
        ];
        for (architecture, fields, field) in cases {
            let config = config(&format!(r#"{{"architectures": ["{architecture}"], {base}, {fields}}}"#));
            let family = find(&config).unwrap();
            let error = (family.spec)(&config.assuming(family.assumed).unwrap()).unwrap_err().to_string();
            assert!(error.contains(field), "{architecture}: {error}");
        }
    }
}
