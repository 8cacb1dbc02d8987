//! Mistral (arXiv 2310.06825): Llama's layout with a window in every block of the first version.

use super::{
    Family, GgufFamily, llama,
    rope_gguf::{self, Divisors},
    window,
};
use crate::{Config, Result, Spec};

/// The family.
pub static MISTRAL: Family = Family {
    name: "mistral",
    architectures: &["MistralForCausalLM", "mistral"],
    assumed: r#"{"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}"#,
    spec,
    stored: llama::STORED,
    gguf: Some(GgufFamily {
        // llama.cpp knows Mistral as a Llama without windows; a file that is read back is a Llama.
        architecture: "llama",
        keys: llama::KEYS,
        stored: llama::GGUF,
        defaults: "{}",
        refuses: |spec, config| window::too_narrow(spec).or_else(|| llama::refuses(spec, config)),
        read_more: |_, _| Ok(()),
        write_more: |config, spec, out| {
            window::write_context("llama", spec, out);
            rope_gguf::write("llama", Divisors::Any, config, spec, out)
        },
    }),
};

fn spec(config: &Config) -> Result<Spec> {
    let mut spec = llama::base(config)?;
    let window = config.size_or_none("sliding_window")?;
    spec.blocks.iter_mut().for_each(|b| b.window = window);
    Ok(spec)
}
