//! Mistral (arXiv 2310.06825): Llama's layout with a window in every block of the first version.

use super::{Family, llama};
use crate::{Config, Result, Spec};

/// The family.
pub static MISTRAL: Family = Family {
    name: "mistral",
    architectures: &["MistralForCausalLM", "mistral"],
    assumed: r#"{"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}"#,
    spec,
    stored: llama::STORED,
    gguf: None,
};

fn spec(config: &Config) -> Result<Spec> {
    let mut spec = llama::base(config)?;
    let window = config.size_or_none("sliding_window")?;
    spec.blocks.iter_mut().for_each(|b| b.window = window);
    Ok(spec)
}
