//! Gemma 1, 2 and 3 in GGUF files. Their norms are stored there as `w`, not as `w - 1`.

use super::{
    GgufFamily, Stored,
    gemma::{LOCAL, global},
    gguf_keys::{GgufKey, count, number},
    llama,
    rope_gguf::{self, Divisors},
    stored::w,
};
use crate::{Config, Result, Spec};
use formats::gguf::{self, Array, Value as Meta};
use serde_json::{Map, Value, json};
use tensor::ops::Activation;

/// Gemma 1.
pub(super) const GEMMA: GgufFamily = GgufFamily {
    architecture: "gemma",
    keys: llama::KEYS,
    stored: STORED,
    defaults: r#"{"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh"}"#,
    refuses: |spec, _| refuses(spec).or_else(|| untied(spec)),
    read_more: rope_gguf::read,
    write_more: |config, spec, out| rope_gguf::write("gemma", Divisors::None, config, spec, out),
};

/// Gemma 2.
pub(super) const GEMMA2: GgufFamily = GgufFamily {
    architecture: "gemma2",
    keys: KEYS2,
    stored: STORED,
    // Caps and window are what llama.cpp assumes where a file is silent.
    defaults: r#"{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}"#,
    refuses: |spec, _| {
        let uncapped = spec.logit_cap.is_none() || spec.blocks.iter().any(|b| b.score_cap.is_none());
        let uncapped =
            uncapped.then(|| "llama.cpp always caps the scores and logits of Gemma 2, and this model does not".into());
        refuses(spec).or_else(|| untied(spec)).or_else(|| scaled_otherwise(spec, GEMMA2_27B_BLOCKS)).or(uncapped)
    },
    read_more: |file, fields| {
        read_scale(fields, GEMMA2_27B_BLOCKS);
        read_pattern(file, "gemma2", fields)?;
        rope_gguf::read(file, fields)
    },
    write_more: |config, spec, out| {
        let local: Vec<bool> = spec.blocks.iter().map(|b| b.window.is_some()).collect();
        write_windows("gemma2", 2, spec, &local, out);
        rope_gguf::write("gemma2", Divisors::None, config, spec, out)
    },
};

/// Gemma 3, text only.
pub(super) const GEMMA3: GgufFamily = GgufFamily {
    architecture: "gemma3",
    keys: KEYS3,
    stored: STORED,
    defaults: r#"{"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 10000.0}"#,
    refuses: |spec, _| {
        let capped = spec.blocks.iter().any(|b| b.score_cap.is_some());
        let capped =
            capped.then(|| "llama.cpp computes Gemma 3 without caps on the scores, and this model has one".into());
        refuses(spec).or_else(|| scaled_otherwise(spec, GEMMA3_27B_BLOCKS)).or(capped)
    },
    read_more: |file, fields| {
        read_scale(fields, GEMMA3_27B_BLOCKS);
        read_pattern(file, "gemma3", fields)?;
        rope_gguf::read(file, fields)
    },
    write_more: write_gemma3,
};

/// llama.cpp tells the 27B models, which scale their scores otherwise, by their number of blocks.
const GEMMA2_27B_BLOCKS: usize = 46;
const GEMMA3_27B_BLOCKS: usize = 62;

const KEYS2: &[GgufKey] = &[
    count("context_length", "max_position_embeddings"),
    count("embedding_length", "hidden_size"),
    count("block_count", "num_hidden_layers"),
    count("feed_forward_length", "intermediate_size"),
    count("attention.head_count", "num_attention_heads"),
    count("attention.head_count_kv", "num_key_value_heads").optional(),
    count("attention.key_length", "head_dim").optional(),
    count("attention.value_length", "head_dim").optional(),
    number("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    number("rope.freq_base", "rope_theta").optional(),
    count("attention.sliding_window", "sliding_window").optional(),
    number("attn_logit_softcapping", "attn_logit_softcapping").optional(),
    number("final_logit_softcapping", "final_logit_softcapping").optional(),
    count("vocab_size", "vocab_size").optional(),
];

const KEYS3: &[GgufKey] = &[
    count("context_length", "max_position_embeddings"),
    count("embedding_length", "hidden_size"),
    count("block_count", "num_hidden_layers"),
    count("feed_forward_length", "intermediate_size"),
    count("attention.head_count", "num_attention_heads"),
    count("attention.head_count_kv", "num_key_value_heads").optional(),
    count("attention.key_length", "head_dim").optional(),
    count("attention.value_length", "head_dim").optional(),
    number("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    number("rope.freq_base", "rope_theta").optional(),
    number("rope.freq_base_swa", "rope_local_base_freq").optional(),
    number("final_logit_softcapping", "final_logit_softcapping").optional(),
    count("vocab_size", "vocab_size").optional(),
];

/// The third has all of them, the others a part.
const STORED: &[Stored] = &[
    w!(Embed, "token_embd.weight"),
    w!(AttnNorm, "blk.{}.attn_norm.weight"),
    w!(Q, "blk.{}.attn_q.weight"),
    w!(K, "blk.{}.attn_k.weight"),
    w!(V, "blk.{}.attn_v.weight"),
    w!(QNorm, "blk.{}.attn_q_norm.weight"),
    w!(KNorm, "blk.{}.attn_k_norm.weight"),
    w!(O, "blk.{}.attn_output.weight"),
    w!(PostAttnNorm, "blk.{}.post_attention_norm.weight"),
    w!(MlpNorm, "blk.{}.ffn_norm.weight"),
    w!(Gate, "blk.{}.ffn_gate.weight"),
    w!(Up, "blk.{}.ffn_up.weight"),
    w!(Down, "blk.{}.ffn_down.weight"),
    w!(PostMlpNorm, "blk.{}.post_ffw_norm.weight"),
    w!(FinalNorm, "output_norm.weight"),
    w!(Head, "output.weight"),
];

fn refuses(spec: &Spec) -> Option<String> {
    if spec.activation != Activation::GeluTanh {
        return Some("llama.cpp computes Gemma with the gelu_pytorch_tanh activation only".into());
    }
    (spec.biases.qkv || spec.biases.o).then(|| "llama.cpp computes Gemma without biases in attention".into())
}

fn untied(spec: &Spec) -> Option<String> {
    (!spec.tied).then(|| {
        "llama.cpp takes the embedding as the head of this architecture, and this model has a head of its own".into()
    })
}

/// What llama.cpp takes the scores' scale from.
fn scalar(blocks: usize, large: usize, dim: usize, heads: usize, head_dim: usize) -> usize {
    if blocks == large { dim / heads.max(1) } else { head_dim }
}

fn scaled_otherwise(spec: &Spec, large: usize) -> Option<String> {
    let differs = |b: &crate::spec::BlockSpec| {
        let scalar = scalar(spec.blocks.len(), large, spec.dim, b.heads, b.head_dim);
        (b.score_scale * (scalar as f32).sqrt() - 1.0).abs() > 1e-6
    };
    let reason = || {
        "llama.cpp scales the scores by the width of a head, and this model's query_pre_attn_scalar is another".into()
    };
    spec.blocks.iter().any(differs).then(reason)
}

fn read_scale(fields: &mut Map<String, Value>, large: usize) {
    let size = |name: &str| fields.get(name).and_then(Value::as_u64).map_or(0, |n| n as usize);
    let (dim, heads) = (size("hidden_size"), size("num_attention_heads"));
    let head_dim = if fields.contains_key("head_dim") { size("head_dim") } else { dim / heads.max(1) };
    let scalar = scalar(size("num_hidden_layers"), large, dim, heads, head_dim);
    fields.insert("query_pre_attn_scalar".into(), json!(scalar));
}

/// Which blocks slide: a list, or one global block after so many.
fn read_pattern(file: &gguf::File, arch: &str, fields: &mut Map<String, Value>) -> Result<()> {
    let key = format!("{arch}.attention.sliding_window");
    let width = file.count(&key)?;
    let pattern = format!("{key}_pattern");
    let layers = fields.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0).min(u64::from(u16::MAX));
    let local: Vec<bool> = match file.get(&pattern) {
        Some(Meta::Array(Array::Bool(list))) => list.clone(),
        Some(Meta::Array(_)) => file.counts(&pattern)?.unwrap_or_default().into_iter().map(|n| n != 0).collect(),
        _ => {
            let usual = if arch == "gemma2" { 2 } else { 6 };
            let n = file.count(&pattern)?.unwrap_or(usual);
            (0..layers).map(|layer| n == 0 || (layer + 1) % n != 0).collect()
        }
    };
    // Gemma 3 slides only where a file tells how far.
    let slides = arch == "gemma2" || width.is_some_and(|w| w > 0);
    if let Some(width) = width.filter(|w| *w > 0) {
        fields.insert("sliding_window".into(), json!(width));
    }
    let kind = |local: &bool| if slides && *local { "sliding_attention" } else { "full_attention" };
    fields.insert("layer_types".into(), json!(local.iter().map(kind).collect::<Vec<_>>()));
    Ok(())
}

/// Writes the width of the windows, and the list of blocks that slide where it is not the usual one.
fn write_windows(arch: &str, usual: usize, spec: &Spec, local: &[bool], out: &mut gguf::Writer<'_>) {
    // A window as wide as the context is none.
    let width = spec.blocks.iter().find_map(|b| b.window).unwrap_or(spec.context);
    out.set(format!("{arch}.attention.sliding_window"), Meta::U32(width as u32));
    if local.iter().enumerate().any(|(layer, local)| *local != ((layer + 1) % usual != 0)) {
        out.set(format!("{arch}.attention.sliding_window_pattern"), Meta::Array(Array::Bool(local.to_vec())));
    }
}

fn write_gemma3(config: &Config, spec: &Spec, out: &mut gguf::Writer<'_>) -> Result<()> {
    let place = global(config);
    let scaled = [(place.kind(config)?, &["default", "linear"][..]), (LOCAL.kind(config)?, &["default"][..])];
    if let Some((kind, _)) = scaled.iter().find(|(kind, known)| !known.contains(kind)) {
        return Err(config.error(
            "rope_scaling",
            format!("is {kind:?}, which llama.cpp does not compute for Gemma 3, so no GGUF is written"),
        ));
    }
    if let Some(rope) = spec.ropes.first() {
        rope_gguf::write_at("gemma3", Divisors::None, config, place, rope, out)?;
    }
    let local: Vec<bool> = spec.blocks.iter().map(|b| b.rope == Some(1)).collect();
    if local.contains(&true) {
        out.set("gemma3.rope.freq_base_swa", Meta::F32(LOCAL.theta(config)? as f32));
        write_windows("gemma3", 6, spec, &local, out);
    }
    Ok(())
}
