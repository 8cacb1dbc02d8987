//! GPT-2 (Radford et al. 2019): layer norm with bias, learned positions, fused and transposed projections.

use super::{
    Family, GgufFamily, Layout,
    gguf_keys::{GgufKey, count, number},
    llama::{activation, layers},
    stored::{b, w},
};
use crate::{
    Config, Result, Spec,
    spec::{Biases, BlockSpec},
};
use tensor::ops::{Activation, NormKind};

/// The family.
pub static GPT2: Family = Family {
    name: "gpt2",
    architectures: &["GPT2LMHeadModel", "gpt2"],
    assumed: r#"{"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": true}"#,
    spec,
    stored: &[
        w!(Embed, "transformer.wte.weight"),
        w!(Position, "transformer.wpe.weight"),
        w!(AttnNorm, "transformer.h.{}.ln_1.weight"),
        b!(AttnNorm, "transformer.h.{}.ln_1.bias"),
        w!(Q K V, "transformer.h.{}.attn.c_attn.weight").with(Layout::Columns),
        b!(Q K V, "transformer.h.{}.attn.c_attn.bias"),
        w!(O, "transformer.h.{}.attn.c_proj.weight").with(Layout::Columns),
        b!(O, "transformer.h.{}.attn.c_proj.bias"),
        w!(MlpNorm, "transformer.h.{}.ln_2.weight"),
        b!(MlpNorm, "transformer.h.{}.ln_2.bias"),
        w!(Up, "transformer.h.{}.mlp.c_fc.weight").with(Layout::Columns),
        b!(Up, "transformer.h.{}.mlp.c_fc.bias"),
        w!(Down, "transformer.h.{}.mlp.c_proj.weight").with(Layout::Columns),
        b!(Down, "transformer.h.{}.mlp.c_proj.bias"),
        w!(FinalNorm, "transformer.ln_f.weight"),
        b!(FinalNorm, "transformer.ln_f.bias"),
        w!(Head, "lm_head.weight"),
    ],
    gguf: Some(GgufFamily {
        architecture: "gpt2",
        keys: KEYS,
        stored: &[
            w!(Embed, "token_embd.weight"),
            w!(Position, "position_embd.weight"),
            w!(AttnNorm, "blk.{}.attn_norm.weight"),
            b!(AttnNorm, "blk.{}.attn_norm.bias"),
            w!(Q K V, "blk.{}.attn_qkv.weight"),
            b!(Q K V, "blk.{}.attn_qkv.bias"),
            w!(O, "blk.{}.attn_output.weight"),
            b!(O, "blk.{}.attn_output.bias"),
            w!(MlpNorm, "blk.{}.ffn_norm.weight"),
            b!(MlpNorm, "blk.{}.ffn_norm.bias"),
            w!(Up, "blk.{}.ffn_up.weight"),
            b!(Up, "blk.{}.ffn_up.bias"),
            w!(Down, "blk.{}.ffn_down.weight"),
            b!(Down, "blk.{}.ffn_down.bias"),
            w!(FinalNorm, "output_norm.weight"),
            b!(FinalNorm, "output_norm.bias"),
            w!(Head, "output.weight"),
        ],
        defaults: r#"{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}"#,
        refuses: |spec, config| {
            let scaled = config.get("scale_attn_by_inverse_layer_idx").and_then(|v| v.as_bool()) == Some(true)
                || config.get("scale_attn_weights").and_then(|v| v.as_bool()) == Some(false);
            if spec.activation != Activation::GeluTanh {
                return Some("llama.cpp computes GPT-2 with the gelu_new activation only".into());
            }
            scaled.then(|| "llama.cpp knows GPT-2's plain attention scaling only".into())
        },
        read_more: |_, _| Ok(()),
        write_more: |_, _, _| Ok(()),
    }),
};

const KEYS: &[GgufKey] = &[
    count("context_length", "n_positions"),
    count("embedding_length", "n_embd"),
    count("block_count", "n_layer"),
    count("feed_forward_length", "n_inner"),
    count("attention.head_count", "n_head"),
    number("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    count("vocab_size", "vocab_size").optional(),
];

fn spec(config: &Config) -> Result<Spec> {
    let dim = config.size("n_embd")?;
    let heads = config.size("n_head")?;
    if dim % heads != 0 {
        return Err(config.error("n_head", format!("is {heads}; it must divide n_embd = {dim}")));
    }
    let context = config.size_or("n_positions", 1024)?;
    let layers = layers(config, "n_layer")?;
    let head_dim = dim / heads;
    let scaled = config.flag_or("scale_attn_weights", true)?;
    let by_layer = config.flag_or("scale_attn_by_inverse_layer_idx", false)?;
    let score_scale = |layer: u16| {
        let scale = if scaled { 1.0 / (head_dim as f32).sqrt() } else { 1.0 };
        if by_layer { scale / f32::from(layer + 1) } else { scale }
    };
    let hidden = config.size_or("n_inner", 4 * dim)?;
    let block = |layer| BlockSpec {
        heads,
        kv_heads: heads,
        head_dim,
        hidden,
        window: None,
        rope: None,
        score_scale: score_scale(layer),
        score_cap: None,
    };
    Ok(Spec {
        vocab: config.size("vocab_size")?,
        dim,
        context,
        blocks: (0..layers).map(block).collect(),
        origin: (0..layers).collect(),
        norm: NormKind::Layer,
        norm_eps: config.number_or("layer_norm_epsilon", 1e-5)? as f32,
        learned_positions: Some(context),
        ropes: Vec::new(),
        parallel: false,
        qk_norm: false,
        post_norms: false,
        gated: false,
        activation: activation(config, "activation_function", "gelu_new")?,
        tied: config.flag_or("tie_word_embeddings", true)?,
        embed_scale: None,
        logit_cap: None,
        biases: Biases { qkv: true, o: true, mlp: true, norm: true, head: false },
    })
}
