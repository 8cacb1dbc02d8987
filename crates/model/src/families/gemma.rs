//! Gemma 1, 2 and 3 (arXiv 2403.08295, 2408.00118, 2503.19786): a scaled embedding, norms stored as `w - 1`, and from
//! the second on norms after attention and feed-forward, windows and capped scores.

use super::{
    Family, Layout, Stored, gemma_gguf, llama, rope,
    stored::{b, w},
    window::{sliding, windows},
};
use crate::{Config, Result, Spec, spec::Biases};

/// Gemma 1.
pub static GEMMA: Family = Family {
    name: "gemma",
    architectures: &["GemmaForCausalLM", "gemma"],
    assumed: r#"{"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": true}"#,
    spec: gemma,
    stored: STORED1,
    gguf: Some(gemma_gguf::GEMMA),
};

/// Gemma 2.
pub static GEMMA2: Family = Family {
    name: "gemma2",
    architectures: &["Gemma2ForCausalLM", "gemma2"],
    assumed: r#"{"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": true, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}"#,
    spec: gemma2,
    stored: STORED3,
    gguf: Some(gemma_gguf::GEMMA2),
};

/// Gemma 3, text only.
pub static GEMMA3: Family = Family {
    name: "gemma3",
    architectures: &["Gemma3ForCausalLM", "gemma3_text"],
    assumed: r#"{"head_dim": 256, "max_position_embeddings": 131072, "tie_word_embeddings": true, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "sliding_window": 4096}"#,
    spec: gemma3,
    stored: STORED3,
    gguf: Some(gemma_gguf::GEMMA3),
};

const STORED1: &[Stored] = &[
    w!(Embed, "model.embed_tokens.weight"),
    w!(AttnNorm, "model.layers.{}.input_layernorm.weight").with(Layout::MinusOne),
    w!(Q, "model.layers.{}.self_attn.q_proj.weight"),
    b!(Q, "model.layers.{}.self_attn.q_proj.bias"),
    w!(K, "model.layers.{}.self_attn.k_proj.weight"),
    b!(K, "model.layers.{}.self_attn.k_proj.bias"),
    w!(V, "model.layers.{}.self_attn.v_proj.weight"),
    b!(V, "model.layers.{}.self_attn.v_proj.bias"),
    w!(O, "model.layers.{}.self_attn.o_proj.weight"),
    b!(O, "model.layers.{}.self_attn.o_proj.bias"),
    w!(MlpNorm, "model.layers.{}.post_attention_layernorm.weight").with(Layout::MinusOne),
    w!(Gate, "model.layers.{}.mlp.gate_proj.weight"),
    w!(Up, "model.layers.{}.mlp.up_proj.weight"),
    w!(Down, "model.layers.{}.mlp.down_proj.weight"),
    w!(FinalNorm, "model.norm.weight").with(Layout::MinusOne),
    w!(Head, "lm_head.weight"),
];

/// Gemma 2 and 3; the second has no norms on heads.
const STORED3: &[Stored] = &[
    w!(Embed, "model.embed_tokens.weight"),
    w!(AttnNorm, "model.layers.{}.input_layernorm.weight").with(Layout::MinusOne),
    w!(Q, "model.layers.{}.self_attn.q_proj.weight"),
    b!(Q, "model.layers.{}.self_attn.q_proj.bias"),
    w!(K, "model.layers.{}.self_attn.k_proj.weight"),
    b!(K, "model.layers.{}.self_attn.k_proj.bias"),
    w!(V, "model.layers.{}.self_attn.v_proj.weight"),
    b!(V, "model.layers.{}.self_attn.v_proj.bias"),
    w!(QNorm, "model.layers.{}.self_attn.q_norm.weight").with(Layout::MinusOne),
    w!(KNorm, "model.layers.{}.self_attn.k_norm.weight").with(Layout::MinusOne),
    w!(O, "model.layers.{}.self_attn.o_proj.weight"),
    b!(O, "model.layers.{}.self_attn.o_proj.bias"),
    w!(PostAttnNorm, "model.layers.{}.post_attention_layernorm.weight").with(Layout::MinusOne),
    w!(MlpNorm, "model.layers.{}.pre_feedforward_layernorm.weight").with(Layout::MinusOne),
    w!(Gate, "model.layers.{}.mlp.gate_proj.weight"),
    w!(Up, "model.layers.{}.mlp.up_proj.weight"),
    w!(Down, "model.layers.{}.mlp.down_proj.weight"),
    w!(PostMlpNorm, "model.layers.{}.post_feedforward_layernorm.weight").with(Layout::MinusOne),
    w!(FinalNorm, "model.norm.weight").with(Layout::MinusOne),
    w!(Head, "lm_head.weight"),
];

fn gemma(config: &Config) -> Result<Spec> {
    if config.get("use_bidirectional_attention").and_then(serde_json::Value::as_bool) == Some(true) {
        return Err(config.error("use_bidirectional_attention", "is true; planish computes causal models"));
    }
    let mut spec = llama::base(config)?;
    let bias = config.flag_or("attention_bias", false)?;
    spec.biases = Biases { qkv: bias, o: bias, ..Biases::default() };
    spec.embed_scale = Some((spec.dim as f32).sqrt());
    // Early configurations say `gelu` in hidden_act for what was trained with the tanh form; hidden_activation corrects it.
    let field = if config.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
    spec.activation = llama::activation(config, field, "gelu_pytorch_tanh")?;
    Ok(spec)
}

/// What the second adds: caps, norms after each part, its own scale of the scores.
fn capped(config: &Config) -> Result<Spec> {
    let mut spec = gemma(config)?;
    let scalar = config.number_or("query_pre_attn_scalar", 256.0)?;
    let positive = |field: &str| match config.number_or_none(field)? {
        Some(x) if x <= 0.0 => Err(config.error(field, "must be positive or null")),
        x => Ok(x.map(|x| x as f32)),
    };
    if scalar <= 0.0 {
        return Err(config.error("query_pre_attn_scalar", "must be positive"));
    }
    let cap = positive("attn_logit_softcapping")?;
    for b in &mut spec.blocks {
        b.score_scale = scalar.powf(-0.5) as f32;
        b.score_cap = cap;
    }
    spec.logit_cap = positive("final_logit_softcapping")?;
    spec.post_norms = true;
    Ok(spec)
}

fn gemma2(config: &Config) -> Result<Spec> {
    let mut spec = capped(config)?;
    let windows = windows(config, spec.layers(), config.size_or_none("sliding_window")?, |layer| layer % 2 == 0)?;
    spec.blocks.iter_mut().zip(windows).for_each(|(b, w)| b.window = w);
    Ok(spec)
}

fn gemma3(config: &Config) -> Result<Spec> {
    let mut spec = capped(config)?;
    spec.qk_norm = true;
    let width = config.size_or_none("sliding_window")?;
    // One global block after so many local ones.
    let pattern =
        config.size_or_none("sliding_window_pattern")?.or(config.size_or_none("_sliding_window_pattern")?).unwrap_or(6);
    let local = sliding(config, spec.layers(), |layer| (usize::from(layer) + 1) % pattern != 0)?;
    for (b, local) in spec.blocks.iter_mut().zip(local) {
        b.rope = Some(usize::from(local));
        b.window = if local { width } else { None };
    }
    let head_dim = spec.blocks.first().map_or(0, |b| b.head_dim);
    spec.ropes = vec![
        rope::read(config, global(config), head_dim, spec.context)?,
        rope::read(config, LOCAL, head_dim, spec.context)?,
    ];
    Ok(spec)
}

pub(super) const LOCAL: rope::Place<'_> =
    rope::Place { section: "rope_parameters.sliding_attention", theta: "rope_local_base_freq", default: 10_000.0 };

pub(super) fn global(config: &Config) -> rope::Place<'static> {
    let nested = "rope_parameters.full_attention";
    let section = if config.get(nested).is_some() { nested } else { "rope_scaling" };
    rope::Place { section, theta: "rope_theta", default: 1_000_000.0 }
}
