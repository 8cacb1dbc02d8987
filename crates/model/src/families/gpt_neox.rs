//! GPT-NeoX (arXiv 2204.06745) and Pythia (arXiv 2304.01373): attention and feed-forward in parallel, a part of each
//! head turns, query, key and value interleaved head by head.

use super::{
    Family, Layout, Stored,
    llama::{activation, layers},
    rope,
    stored::{b, w},
};
use crate::{
    Config, Result, Spec,
    spec::{Biases, BlockSpec},
};
use tensor::ops::NormKind;

/// The family.
pub static GPT_NEOX: Family = Family {
    name: "gpt_neox",
    architectures: &["GPTNeoXForCausalLM", "gpt_neox"],
    assumed: r#"{"rotary_pct": 0.25, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "use_parallel_residual": true}"#,
    spec,
    stored: STORED,
    gguf: None,
};

const STORED: &[Stored] = &[
    w!(Embed, "gpt_neox.embed_in.weight"),
    w!(AttnNorm, "gpt_neox.layers.{}.input_layernorm.weight"),
    b!(AttnNorm, "gpt_neox.layers.{}.input_layernorm.bias"),
    w!(Q K V, "gpt_neox.layers.{}.attention.query_key_value.weight").with(Layout::HeadByHead),
    b!(Q K V, "gpt_neox.layers.{}.attention.query_key_value.bias").with(Layout::HeadByHead),
    w!(O, "gpt_neox.layers.{}.attention.dense.weight"),
    b!(O, "gpt_neox.layers.{}.attention.dense.bias"),
    w!(MlpNorm, "gpt_neox.layers.{}.post_attention_layernorm.weight"),
    b!(MlpNorm, "gpt_neox.layers.{}.post_attention_layernorm.bias"),
    w!(Up, "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight"),
    b!(Up, "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias"),
    w!(Down, "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
    b!(Down, "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias"),
    w!(FinalNorm, "gpt_neox.final_layer_norm.weight"),
    b!(FinalNorm, "gpt_neox.final_layer_norm.bias"),
    w!(Head, "embed_out.weight"),
];

fn spec(config: &Config) -> Result<Spec> {
    let dim = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    if dim % heads != 0 {
        return Err(config.error("num_attention_heads", format!("is {heads}; it must divide hidden_size = {dim}")));
    }
    let head_dim = dim / heads;
    let context = config.size_or("max_position_embeddings", 2048)?;
    let block = BlockSpec {
        heads,
        kv_heads: heads,
        head_dim,
        hidden: config.size("intermediate_size")?,
        window: None,
        rope: Some(0),
        score_scale: 1.0 / (head_dim as f32).sqrt(),
        score_cap: None,
    };
    let layers = layers(config, "num_hidden_layers")?;
    let place = rope::Place { theta: "rotary_emb_base", ..rope::usual(config) };
    let bias = config.flag_or("attention_bias", true)?;
    Ok(Spec {
        vocab: config.size("vocab_size")?,
        dim,
        context,
        blocks: vec![block; layers.into()],
        origin: (0..layers).collect(),
        norm: NormKind::Layer,
        norm_eps: config.number_or("layer_norm_eps", 1e-5)? as f32,
        learned_positions: None,
        ropes: vec![rope::read(config, place, head_dim, context)?],
        parallel: config.flag_or("use_parallel_residual", true)?,
        qk_norm: false,
        post_norms: false,
        gated: false,
        activation: activation(config, "hidden_act", "gelu")?,
        tied: config.flag_or("tie_word_embeddings", false)?,
        embed_scale: None,
        logit_cap: None,
        biases: Biases { qkv: bias, o: bias, mlp: true, norm: true, head: false },
    })
}
