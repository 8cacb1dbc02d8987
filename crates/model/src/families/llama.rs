//! Llama 1, 2 and 3 (arXiv 2302.13971, 2307.09288, 2407.21783) and the models that share their layout.

use super::{
    Family, GgufFamily, Layout, Stored,
    gguf_keys::{GgufKey, count, number},
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
pub static LLAMA: Family = Family {
    name: "llama",
    architectures: &["LlamaForCausalLM", "llama"],
    assumed: r#"{"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}"#,
    spec,
    stored: STORED,
    gguf: Some(GgufFamily {
        architecture: "llama",
        keys: KEYS,
        stored: GGUF,
        defaults: r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}"#,
        refuses,
        read_more: rope_gguf::read,
        write_more: |config, spec, out| rope_gguf::write("llama", Divisors::Any, config, spec, out),
    }),
};

/// Names that most families share.
pub(super) const STORED: &[Stored] = &[
    w!(Embed, "model.embed_tokens.weight"),
    w!(AttnNorm, "model.layers.{}.input_layernorm.weight"),
    w!(Q, "model.layers.{}.self_attn.q_proj.weight"),
    b!(Q, "model.layers.{}.self_attn.q_proj.bias"),
    w!(K, "model.layers.{}.self_attn.k_proj.weight"),
    b!(K, "model.layers.{}.self_attn.k_proj.bias"),
    w!(V, "model.layers.{}.self_attn.v_proj.weight"),
    b!(V, "model.layers.{}.self_attn.v_proj.bias"),
    w!(O, "model.layers.{}.self_attn.o_proj.weight"),
    b!(O, "model.layers.{}.self_attn.o_proj.bias"),
    w!(MlpNorm, "model.layers.{}.post_attention_layernorm.weight"),
    w!(Gate, "model.layers.{}.mlp.gate_proj.weight"),
    b!(Gate, "model.layers.{}.mlp.gate_proj.bias"),
    w!(Up, "model.layers.{}.mlp.up_proj.weight"),
    b!(Up, "model.layers.{}.mlp.up_proj.bias"),
    w!(Down, "model.layers.{}.mlp.down_proj.weight"),
    b!(Down, "model.layers.{}.mlp.down_proj.bias"),
    w!(FinalNorm, "model.norm.weight"),
    w!(Head, "lm_head.weight"),
];

/// GGUF names, with queries and keys permuted as llama.cpp's rotary kernel wants them.
pub(super) const GGUF: &[Stored] = &[
    w!(Embed, "token_embd.weight"),
    w!(AttnNorm, "blk.{}.attn_norm.weight"),
    w!(Q, "blk.{}.attn_q.weight").with(Layout::Adjacent),
    b!(Q, "blk.{}.attn_q.bias").with(Layout::Adjacent),
    w!(K, "blk.{}.attn_k.weight").with(Layout::Adjacent),
    b!(K, "blk.{}.attn_k.bias").with(Layout::Adjacent),
    w!(V, "blk.{}.attn_v.weight"),
    b!(V, "blk.{}.attn_v.bias"),
    w!(O, "blk.{}.attn_output.weight"),
    b!(O, "blk.{}.attn_output.bias"),
    w!(MlpNorm, "blk.{}.ffn_norm.weight"),
    w!(Gate, "blk.{}.ffn_gate.weight"),
    b!(Gate, "blk.{}.ffn_gate.bias"),
    w!(Up, "blk.{}.ffn_up.weight"),
    b!(Up, "blk.{}.ffn_up.bias"),
    w!(Down, "blk.{}.ffn_down.weight"),
    b!(Down, "blk.{}.ffn_down.bias"),
    w!(FinalNorm, "output_norm.weight"),
    w!(Head, "output.weight"),
];

/// Metadata of the families with rotary attention and gated networks.
pub(super) const KEYS: &[GgufKey] = &[
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
    count("vocab_size", "vocab_size").optional(),
];

/// What llama.cpp's Llama cannot compute.
pub(super) fn refuses(spec: &Spec, _: &Config) -> Option<String> {
    (spec.activation != Activation::Silu).then(|| "llama.cpp computes Llama with the silu activation only".into())
}

fn spec(config: &Config) -> Result<Spec> {
    let mut spec = base(config)?;
    let bias = config.flag_or("attention_bias", false)?;
    spec.biases = Biases { qkv: bias, o: bias, mlp: config.flag_or("mlp_bias", false)?, ..Biases::default() };
    Ok(spec)
}

/// What every family of this layout reads alike.
pub(super) fn base(config: &Config) -> Result<Spec> {
    let dim = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.size_or("num_key_value_heads", heads)?;
    if heads % kv_heads != 0 {
        return Err(config.error("num_key_value_heads", format!("is {kv_heads}; it must divide {heads} heads")));
    }
    let head_dim = match config.size_or_none("head_dim")? {
        Some(n) => n,
        None if dim % heads == 0 => dim / heads,
        None => return Err(config.error("head_dim", format!("is missing and {heads} heads do not divide {dim}"))),
    };
    let context = config.size_or("max_position_embeddings", 2048)?;
    let block = BlockSpec {
        heads,
        kv_heads,
        head_dim,
        hidden: config.size("intermediate_size")?,
        window: None,
        rope: Some(0),
        score_scale: 1.0 / (head_dim as f32).sqrt(),
        score_cap: None,
    };
    let layers = layers(config, "num_hidden_layers")?;
    Ok(Spec {
        vocab: config.size("vocab_size")?,
        dim,
        context,
        blocks: vec![block; layers.into()],
        origin: (0..layers).collect(),
        norm: NormKind::Rms,
        norm_eps: config.number_or("rms_norm_eps", 1e-6)? as f32,
        learned_positions: None,
        ropes: vec![rope::read(config, rope::usual(config), head_dim, context)?],
        parallel: false,
        qk_norm: false,
        post_norms: false,
        gated: true,
        activation: activation(config, "hidden_act", "silu")?,
        tied: config.flag_or("tie_word_embeddings", false)?,
        embed_scale: None,
        logit_cap: None,
        biases: Biases::default(),
    })
}

/// The number of blocks: at most 65,535, so that a site's number fits.
pub(super) fn layers(config: &Config, field: &str) -> Result<u16> {
    u16::try_from(config.size(field)?).map_err(|_| config.error(field, "must be below 65,536"))
}

/// The nonlinearity that a field names.
pub(super) fn activation(config: &Config, field: &str, default: &str) -> Result<Activation> {
    match config.text_or(field, default)? {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" => Ok(Activation::GeluTanh),
        "quick_gelu" => Ok(Activation::GeluQuick),
        "relu" => Ok(Activation::Relu),
        "relu2" | "relu_squared" => Ok(Activation::ReluSquared),
        "tanh" => Ok(Activation::Tanh),
        other => Err(config.error(
            field,
            format!(
                "is {other:?}; planish knows silu, gelu, gelu_new, gelu_pytorch_tanh, quick_gelu, relu, relu2 and tanh"
            ),
        )),
    }
}
