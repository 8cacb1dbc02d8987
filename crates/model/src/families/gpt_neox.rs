//! GPT-NeoX (arXiv 2204.06745) and Pythia (arXiv 2304.01373): attention and feed-forward in parallel, a part of each
//! head turns, query, key and value interleaved head by head.

use super::{
    Family, GgufFamily, Layout, Stored,
    gguf_keys::{GgufKey, count, flag, number},
    llama::{activation, layers},
    rope,
    rope_gguf::{self, Divisors},
    stored::{b, w},
};
use crate::{
    Config, Result, Spec,
    spec::{Biases, BlockSpec},
};
use tensor::ops::{Activation, NormKind};

/// The family.
pub static GPT_NEOX: Family = Family {
    name: "gpt_neox",
    architectures: &["GPTNeoXForCausalLM", "gpt_neox"],
    assumed: r#"{"rotary_pct": 0.25, "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "use_parallel_residual": true}"#,
    spec,
    stored: STORED,
    gguf: Some(GgufFamily {
        architecture: "gptneox",
        keys: KEYS,
        stored: GGUF,
        // llama.cpp computes the tanh form of gelu, whichever form the model was trained with.
        defaults: r#"{"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu_fast"}"#,
        refuses,
        read_more: |file, fields| {
            rope_gguf::read_share(file, "rotary_pct", fields)?;
            rope_gguf::read(file, fields)
        },
        write_more: |config, spec, out| match spec.ropes.first() {
            Some(rope) => rope_gguf::write_at("gptneox", Divisors::None, config, place(config), rope, out),
            None => Ok(()),
        },
    }),
};

const KEYS: &[GgufKey] = &[
    count("context_length", "max_position_embeddings"),
    count("embedding_length", "hidden_size"),
    count("block_count", "num_hidden_layers"),
    count("feed_forward_length", "intermediate_size"),
    count("attention.head_count", "num_attention_heads"),
    number("attention.layer_norm_epsilon", "layer_norm_eps"),
    number("rope.freq_base", "rotary_emb_base").optional(),
    flag("use_parallel_residual", "use_parallel_residual"),
    count("vocab_size", "vocab_size").optional(),
];

const GGUF: &[Stored] = &[
    w!(Embed, "token_embd.weight"),
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
];

/// What llama.cpp's GPT-NeoX cannot compute.
fn refuses(spec: &Spec, _: &Config) -> Option<String> {
    if !matches!(spec.activation, Activation::Gelu | Activation::GeluTanh) {
        return Some("llama.cpp computes GPT-NeoX with the gelu activation only".into());
    }
    if !spec.biases.qkv || !spec.biases.o {
        return Some("llama.cpp computes GPT-NeoX only with biases in attention".into());
    }
    spec.tied
        .then(|| "llama.cpp computes GPT-NeoX only with a head of its own, and this model's is its embedding".into())
}

fn place(config: &Config) -> rope::Place<'static> {
    rope::Place { theta: "rotary_emb_base", ..rope::usual(config) }
}

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
        ropes: vec![rope::read(config, place(config), head_dim, context)?],
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
