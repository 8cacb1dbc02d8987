//! Phi-3 and Phi-4 (arXiv 2404.14219, 2412.08905): fused projections, LongRoPE, heads that may turn in part.

use super::{
    Family, GgufFamily, Stored,
    gguf_keys::{GgufKey, count, number},
    llama,
    rope_gguf::{self, Divisors},
    stored::w,
    window,
};
use crate::{Config, Result, Spec};
use formats::gguf;
use serde_json::{Map, Value, json};
use tensor::ops::Activation;

/// The family.
pub static PHI3: Family = Family {
    name: "phi3",
    architectures: &["Phi3ForCausalLM", "phi3"],
    assumed: r#"{"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}"#,
    spec,
    stored: STORED,
    gguf: Some(GgufFamily {
        architecture: "phi3",
        keys: KEYS,
        stored: GGUF,
        defaults: r#"{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_act": "silu"}"#,
        refuses,
        read_more,
        write_more: |config, spec, out| {
            // llama.cpp reads the window and computes without it, so the context ends where it would matter.
            let window = spec.blocks.iter().filter_map(|b| b.window).min().unwrap_or(0);
            out.set("phi3.attention.sliding_window", gguf::Value::U32(window as u32));
            window::write_context("phi3", spec, out);
            rope_gguf::write("phi3", Divisors::ShortLong, config, spec, out)
        },
    }),
};

const KEYS: &[GgufKey] = &[
    count("context_length", "max_position_embeddings"),
    count("embedding_length", "hidden_size"),
    count("block_count", "num_hidden_layers"),
    count("feed_forward_length", "intermediate_size"),
    count("attention.head_count", "num_attention_heads"),
    count("attention.head_count_kv", "num_key_value_heads").optional(),
    number("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    number("rope.freq_base", "rope_theta").optional(),
    count("vocab_size", "vocab_size").optional(),
];

const GGUF: &[Stored] = &[
    w!(Embed, "token_embd.weight"),
    w!(AttnNorm, "blk.{}.attn_norm.weight"),
    w!(Q K V, "blk.{}.attn_qkv.weight"),
    w!(O, "blk.{}.attn_output.weight"),
    w!(MlpNorm, "blk.{}.ffn_norm.weight"),
    w!(Gate Up, "blk.{}.ffn_up.weight"),
    w!(Down, "blk.{}.ffn_down.weight"),
    w!(FinalNorm, "output_norm.weight"),
    w!(Head, "output.weight"),
];

/// What llama.cpp's Phi-3 cannot compute.
fn refuses(spec: &Spec, _: &Config) -> Option<String> {
    if spec.activation != Activation::Silu {
        return Some("llama.cpp computes Phi-3 with the silu activation only".into());
    }
    if spec.blocks.iter().any(|b| b.heads * b.head_dim != spec.dim) {
        return Some("llama.cpp computes Phi-3 only where the heads together are as wide as the model".into());
    }
    window::too_narrow(spec)
}

fn read_more(file: &gguf::File, fields: &mut Map<String, Value>) -> Result<()> {
    if let Some(window) = file.count("phi3.attention.sliding_window")?.filter(|w| *w > 0) {
        fields.insert("sliding_window".into(), json!(window));
    }
    rope_gguf::read_share(file, "partial_rotary_factor", fields)?;
    rope_gguf::read(file, fields)?;
    // Phi-3's configurations keep this length beside the other sizes.
    let old = fields.get("rope_scaling").and_then(|s| s.get("original_max_position_embeddings")).cloned();
    if let Some(old) = old.or_else(|| fields.get("max_position_embeddings").cloned()) {
        fields.insert("original_max_position_embeddings".into(), old);
    }
    Ok(())
}

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
