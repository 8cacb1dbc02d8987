//! Phi-3 and Phi-4 (arXiv 2404.14219, 2412.08905): fused projections, LongRoPE, heads that may turn in part.

use super::{Family, Stored, llama, stored::w};
use crate::{Config, Result, Spec};

/// The family.
pub static PHI3: Family = Family {
    name: "phi3",
    architectures: &["Phi3ForCausalLM", "phi3"],
    assumed: r#"{"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}"#,
    spec,
    stored: STORED,
    gguf: None,
};

const STORED: &[Stored] = &[
    w!(Embed, "model.embed_tokens.weight"),
    w!(AttnNorm, "model.layers.{}.input_layernorm.weight"),
    w!(Q K V, "model.layers.{}.self_attn.qkv_proj.weight"),
    w!(O, "model.layers.{}.self_attn.o_proj.weight"),
    w!(MlpNorm, "model.layers.{}.post_attention_layernorm.weight"),
    w!(Gate Up, "model.layers.{}.mlp.gate_up_proj.weight"),
    w!(Down, "model.layers.{}.mlp.down_proj.weight"),
    w!(FinalNorm, "model.norm.weight"),
    w!(Head, "lm_head.weight"),
];

fn spec(config: &Config) -> Result<Spec> {
    let mut spec = llama::base(config)?;
    let window = config.size_or_none("sliding_window")?;
    spec.blocks.iter_mut().for_each(|b| b.window = window);
    Ok(spec)
}
