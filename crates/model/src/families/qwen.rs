//! Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115) and Qwen3 (arXiv 2505.09388).

use super::{
    Family, GgufFamily, Stored, llama,
    rope_gguf::{self, Divisors},
    stored::{b, w},
    window::{self, windows},
};
use crate::{Config, Result, Spec, spec::Biases};
use tensor::ops::Activation;

/// Qwen2 and Qwen2.5: biases on query, key and value.
pub static QWEN2: Family = Family {
    name: "qwen2",
    architectures: &["Qwen2ForCausalLM", "qwen2"],
    assumed: ASSUMED,
    spec: qwen2,
    stored: llama::STORED,
    gguf: Some(GgufFamily {
        architecture: "qwen2",
        keys: llama::KEYS,
        stored: GGUF,
        defaults: r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}"#,
        refuses: |spec, _| {
            let square = spec.blocks.iter().all(|b| b.heads * b.head_dim == spec.dim);
            let refusal = || "llama.cpp computes Qwen2 only where the heads together are as wide as the model".into();
            refuses(spec).or_else(|| (!square).then(refusal))
        },
        read_more: rope_gguf::read,
        write_more: |config, spec, out| {
            window::write_context("qwen2", spec, out);
            rope_gguf::write("qwen2", Divisors::None, config, spec, out)
        },
    }),
};

/// Qwen3: norms on the heads of queries and keys in place of biases.
pub static QWEN3: Family = Family {
    name: "qwen3",
    architectures: &["Qwen3ForCausalLM", "qwen3"],
    assumed: r#"{"head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}"#,
    spec: qwen3,
    stored: STORED3,
    gguf: Some(GgufFamily {
        architecture: "qwen3",
        keys: llama::KEYS,
        stored: GGUF,
        defaults: r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}"#,
        refuses: |spec, _| refuses(spec),
        read_more: rope_gguf::read,
        write_more: |config, spec, out| {
            window::write_context("qwen3", spec, out);
            rope_gguf::write("qwen3", Divisors::None, config, spec, out)
        },
    }),
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

const GGUF: &[Stored] = &[
    w!(Embed, "token_embd.weight"),
    w!(AttnNorm, "blk.{}.attn_norm.weight"),
    w!(Q, "blk.{}.attn_q.weight"),
    b!(Q, "blk.{}.attn_q.bias"),
    w!(K, "blk.{}.attn_k.weight"),
    b!(K, "blk.{}.attn_k.bias"),
    w!(V, "blk.{}.attn_v.weight"),
    b!(V, "blk.{}.attn_v.bias"),
    w!(QNorm, "blk.{}.attn_q_norm.weight"),
    w!(KNorm, "blk.{}.attn_k_norm.weight"),
    w!(O, "blk.{}.attn_output.weight"),
    w!(MlpNorm, "blk.{}.ffn_norm.weight"),
    w!(Gate, "blk.{}.ffn_gate.weight"),
    w!(Up, "blk.{}.ffn_up.weight"),
    w!(Down, "blk.{}.ffn_down.weight"),
    w!(FinalNorm, "output_norm.weight"),
    w!(Head, "output.weight"),
];

/// What llama.cpp's Qwen2 and Qwen3 cannot compute.
fn refuses(spec: &Spec) -> Option<String> {
    if spec.activation != Activation::Silu {
        return Some("llama.cpp computes Qwen with the silu activation only".into());
    }
    if spec.biases.o {
        return Some("llama.cpp computes Qwen without a bias on attention's output".into());
    }
    window::too_narrow(spec)
}

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
