//! Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115) and Qwen3 (arXiv 2505.09388).

use super::{Family, Stored, llama, stored::{b, w}, window::windows};
use crate::{Config, Result, Spec, spec::Biases};

/// Qwen2 and Qwen2.5: biases on query, key and value.
pub static QWEN2: Family = Family {
    name: "qwen2",
    architectures: &["Qwen2ForCausalLM", "qwen2"],
    assumed: ASSUMED,
    spec: qwen2,
    stored: llama::STORED,
    gguf: None,
};

/// Qwen3: norms on the heads of queries and keys in place of biases.
pub static QWEN3: Family = Family {
    name: "qwen3",
    architectures: &["Qwen3ForCausalLM", "qwen3"],
    assumed: r#"{"head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}"#,
    spec: qwen3,
    stored: STORED3,
    gguf: None,
};

const ASSUMED: &str = r#"{"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}"#;

const STORED3: &[Stored] = &[
    w!(Embed, "model.embed_tokens.weight"),
    w!(AttnNorm, "model.layers.{}.input_layernorm.weight"),
    w!(Q, "model.layers.{}.self_attn.q_proj.weight"),
    b!(Q, "model.layers.{}.self_attn.q_proj.bias"),
    w!(K, "model.layers.{}.self_attn.k_proj.weight"),
    b!(K, "model.layers.{}.self_attn.k_proj.bias"),
    w!(V, "model.layers.{}.self_attn.v_proj.weight"),
    b!(V, "model.layers.{}.self_attn.v_proj.bias"),
    w!(QNorm, "model.layers.{}.self_attn.q_norm.weight"),
    w!(KNorm, "model.layers.{}.self_attn.k_norm.weight"),
    w!(O, "model.layers.{}.self_attn.o_proj.weight"),
    b!(O, "model.layers.{}.self_attn.o_proj.bias"),
    w!(MlpNorm, "model.layers.{}.post_attention_layernorm.weight"),
    w!(Gate, "model.layers.{}.mlp.gate_proj.weight"),
    w!(Up, "model.layers.{}.mlp.up_proj.weight"),
    w!(Down, "model.layers.{}.mlp.down_proj.weight"),
    w!(FinalNorm, "model.norm.weight"),
    w!(Head, "lm_head.weight"),
];

fn qwen2(config: &Config) -> Result<Spec> {
    let mut spec = windowed(config)?;
    spec.biases = Biases { qkv: true, ..Biases::default() };
    Ok(spec)
}

fn qwen3(config: &Config) -> Result<Spec> {
    let mut spec = windowed(config)?;
    let bias = config.flag_or("attention_bias", false)?;
    spec.biases = Biases { qkv: bias, o: bias, ..Biases::default() };
    spec.qk_norm = true;
    Ok(spec)
}

/// Blocks from `max_window_layers` on slide, and only where `use_sliding_window` says so.
fn windowed(config: &Config) -> Result<Spec> {
    let mut spec = llama::base(config)?;
    if !config.flag_or("use_sliding_window", false)? {
        return Ok(spec);
    }
    let from = config.get("max_window_layers").and_then(serde_json::Value::as_u64);
    let from = from.ok_or_else(|| config.error("max_window_layers", "must be a whole number from 0 on"))?;
    let width = config.size_or_none("sliding_window")?;
    let windows = windows(config, spec.layers(), width, |layer| u64::from(layer) >= from)?;
    spec.blocks.iter_mut().zip(windows).for_each(|(b, w)| b.window = w);
    Ok(spec)
}
