"""Golden references: tiny random models of every family, with the logits that transformers computes for them.

    python -m venv ENV && ENV/bin/pip install -r xtask/golden-requirements.txt
    ENV/bin/python xtask/golden.py            # all variants, into tests/golden
    ENV/bin/python xtask/golden.py gemma2     # those whose name starts with gemma2

Each variant is a directory with config.json, model.safetensors (or shards with an index) and reference.json:

    about       what the variant is there to catch
    made_with   versions of transformers and torch
    sequences   a list of { tokens, logits, greedy }
        tokens  ids of the prompt
        logits  base64 of little-endian f32, [len(tokens), vocab_size], every position, attention in f32
        greedy  the 16 ids that follow when each step runs the whole sequence anew, without a cache

Weights are exact in the type they are stored in (bf16, f16 or f32), so an engine that computes in f32 has to land
on the same logits. Every written directory is loaded again and must give the same bits. Seeds are the CRC-32 of the
variant's name, so that adding a variant changes no other.
"""

import base64
import copy
import json
import shutil
import sys
import zlib
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
OUT = Path(__file__).resolve().parent.parent / "tests" / "golden"
VOCAB = 64
LENGTHS = (40, 13)  # Longer than the windows of 8, and a second sequence of another length.
GREEDY = 16
LEAST_MARGIN = 2e-3  # Between the best and second-best logit of a greedy step: a tie would test nothing.

GATED = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GPT2 = dict(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
NEOX = {k: v for k, v in GATED.items() if k != "num_key_value_heads"} | dict(
    num_attention_heads=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25)
)
GEMMA = GATED | dict(head_dim=16, num_attention_heads=2, num_key_value_heads=1)


def rope(kind, theta=10000.0, **fields):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **fields))


def version4(config):
    """Rotary parameters as transformers 4 and nearly every published model write them."""
    parameters = dict(config.pop("rope_parameters"))
    config["rope_theta"] = parameters.pop("rope_theta")
    partial = parameters.pop("partial_rotary_factor", None)
    if partial is not None and partial != 1.0:
        config["partial_rotary_factor"] = partial
    plain = parameters.get("rope_type", "default") == "default"
    config["rope_scaling"] = None if plain else parameters
    config["torch_dtype"] = config.pop("dtype")


def version4_type(config):
    """The same with the older key `type` for the kind of scaling."""
    version4(config)
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")


def version4_neox(config):
    parameters = config.pop("rope_parameters")
    config["rotary_emb_base"] = int(parameters["rope_theta"])
    config["rotary_pct"] = parameters["partial_rotary_factor"]
    config["torch_dtype"] = config.pop("dtype")


def version4_phi3(config):
    version4_type(config)
    config["rope_scaling"].pop("original_max_position_embeddings", None)


def version4_layers(config):
    """Windows by the older fields alone."""
    version4(config)
    config.pop("layer_types")


def version4_gemma3(config):
    parameters = config.pop("rope_parameters")
    config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    full = dict(parameters["full_attention"])
    config["rope_theta"] = full.pop("rope_theta")
    config["rope_scaling"] = None if full["rope_type"] == "default" else full
    config["sliding_window_pattern"] = 3
    config.pop("_sliding_window_pattern", None)
    config.pop("layer_types")
    config["torch_dtype"] = config.pop("dtype")


def sparse(config):
    """Only the fields that a bare configuration has: everything else must come from the family's defaults."""
    keep = {"architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    keep |= {"num_attention_heads", "num_key_value_heads", "head_dim", "n_embd", "n_layer", "n_head"}
    for field in [f for f in config if f not in keep]:
        del config[field]


def variant(kind, about, *fields, dtype="bf16", config=None, shards=None):
    merged = {}
    for f in fields:
        merged |= f
    return dict(kind=kind, about=about, fields=merged, dtype=dtype, config=config, shards=shards)


def llama(about, *fields, **options):
    return variant("llama", about, GATED, *fields, **options)


UNTIED, TIED = dict(tie_word_embeddings=False), dict(tie_word_embeddings=True)
LLAMA3 = rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)
YARN = dict(factor=4.0, original_max_position_embeddings=32)
SHORT, LONG = [1.0, 1.1, 1.25, 1.5], [1.5, 2.5, 4.0, 7.0]
LONGROPE = rope("longrope", short_factor=SHORT, long_factor=LONG)
PHI3_48 = rope("longrope", partial_rotary_factor=0.75, short_factor=SHORT[:3], long_factor=LONG[:3])
WINDOWED = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
CAPS = dict(attn_logit_softcapping=3.0, final_logit_softcapping=5.0)
LOCAL_GLOBAL = dict(
    num_hidden_layers=4,
    sliding_window=8,
    query_pre_attn_scalar=24,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=10000.0),
        full_attention=dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
    ),
)

VARIANTS = {
    "llama-mha": llama("Llama 1 and 2: as many key heads as query heads, untied", UNTIED, dict(num_key_value_heads=4)),
    "llama-sparse": llama("a configuration that leaves all it can to defaults", UNTIED, dict(max_position_embeddings=2048, num_key_value_heads=4), config=sparse),
    "llama-gqa-tied": llama("grouped queries, tied, theta of Llama 3, rms_norm_eps 1e-5", TIED, rope("default", 500000.0), dict(rms_norm_eps=1e-5), config=version4),
    "llama3-scaled": llama("Llama 3.1 frequencies: kept, blended and stretched ones", TIED, LLAMA3),
    "llama3-scaled-v4": llama("the same as transformers 4 writes it", UNTIED, LLAMA3, config=version4),
    "llama-linear": llama("linear scaling with the key `type`", rope("linear", factor=4.0), config=version4_type),
    "llama-dynamic": llama("dynamic scaling within the trained length changes nothing", rope("dynamic", factor=4.0)),
    "llama-dynamic-beyond": llama("dynamic scaling of sequences beyond the trained length", rope("dynamic", factor=4.0), dict(max_position_embeddings=16)),
    "llama-yarn": llama("YaRN with its defaults", rope("yarn", **YARN)),
    "llama-yarn-tuned": llama("YaRN with its own ramp, no rounding and its own attention factor", rope("yarn", beta_fast=4.0, beta_slow=0.5, attention_factor=1.3, truncate=False, **YARN), config=version4),
    "llama-yarn-mscale": llama("YaRN with the two scales of DeepSeek", rope("yarn", mscale=1.0, mscale_all_dim=0.5, **YARN)),
    "llama-longrope": llama("LongRoPE with a factor of its own", rope("longrope", factor=4.0, short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=32)),
    "llama-biases": llama("attention_bias and mlp_bias", dict(attention_bias=True, mlp_bias=True)),
    "llama-head-dim": llama("heads wider than hidden_size / heads", dict(head_dim=12), dtype="f16"),
    "llama-gelu": llama("another nonlinearity in the gate", dict(hidden_act="gelu")),
    "mistral-window": variant("mistral", "Mistral 0.1: every layer sees 8 positions", GATED, dict(sliding_window=8), config=version4),
    "mistral-full": variant("mistral", "Mistral 0.3 and Nemo: no window, head_dim of its own", GATED, dict(sliding_window=None, head_dim=16)),
    "qwen2-untied": variant("qwen2", "biases on query, key and value; in shards", GATED, UNTIED, rope("default", 1000000.0), shards="20KB"),
    "qwen2-tied": variant("qwen2", "tied; a sliding_window that use_sliding_window turns off", GATED, TIED, dict(sliding_window=8), config=version4_layers),
    "qwen2-window": variant("qwen2", "layers from max_window_layers on see 8 positions", GATED, WINDOWED),
    "qwen2-window-v4": variant("qwen2", "the same without layer_types", GATED, WINDOWED, config=version4_layers),
    "qwen2-yarn": variant("qwen2", "the long-context setting of Qwen2.5", GATED, rope("yarn", 1000000.0, **YARN), config=version4_layers),
    "qwen3-tied": variant("qwen3", "norms on query and key heads, head_dim of its own", GATED, TIED, dict(head_dim=16), rope("default", 1000000.0), config=version4_layers, dtype="f16"),
    "qwen3-biases": variant("qwen3", "untied with attention_bias", GATED, UNTIED, dict(head_dim=8, attention_bias=True)),
    "qwen3-window": variant("qwen3", "layers from max_window_layers on see 8 positions", GATED, WINDOWED, dict(head_dim=8)),
    "gemma": variant("gemma", "Gemma 1: scaled embedding, norms of 1 + w, one key head", GEMMA, config=version4),
    "gemma-mha": variant("gemma", "as many key heads as query heads", GEMMA, dict(num_key_value_heads=2, rms_norm_eps=1e-5)),
    "gemma2": variant("gemma2", "Gemma 2: caps that bind, four norms, alternating windows, its own query scale", GEMMA, CAPS, dict(num_hidden_layers=3, sliding_window=8, query_pre_attn_scalar=24), config=version4_layers),
    "gemma2-by-head": variant("gemma2", "scores scaled by the width of a head, as the models up to 9B, which GGUF can say", GEMMA, CAPS, dict(intermediate_size=24, sliding_window=8, query_pre_attn_scalar=16)),
    "gemma2-uncapped": variant("gemma2", "no caps", GEMMA, dict(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=8, query_pre_attn_scalar=16)),
    "gemma3": variant("gemma3_text", "Gemma 3: local and global frequencies, linear scaling on the global ones, norms on heads", GEMMA, LOCAL_GLOBAL),
    "gemma3-v4": variant("gemma3_text", "the same as transformers 4 writes it, layers by sliding_window_pattern, scores scaled by the width of a head", GEMMA, LOCAL_GLOBAL, dict(query_pre_attn_scalar=16), config=version4_gemma3),
    "gemma3-sparse": variant("gemma3_text", "defaults: six layers to a pattern, windows wider than the text", GEMMA, dict(num_hidden_layers=6, head_dim=8, intermediate_size=24, max_position_embeddings=131072), config=sparse),
    "phi3": variant("phi3", "fused projections, a window", GATED, UNTIED, dict(sliding_window=8, original_max_position_embeddings=128), config=version4),
    "phi3-short": variant("phi3", "LongRoPE within the trained length", GATED, LONGROPE, dict(original_max_position_embeddings=64), config=version4_phi3),
    "phi3-long": variant("phi3", "LongRoPE beyond it", GATED, LONGROPE, dict(original_max_position_embeddings=12), config=version4_phi3),
    "phi4-mini": variant("phi3", "Phi-4-mini: three quarters of each head turn, tied", GATED, TIED, PHI3_48, dict(original_max_position_embeddings=64)),
    "gpt2": variant("gpt2", "GPT-2: Conv1D, learned positions, gelu_new, tied", GPT2, dtype="f32"),
    "gpt2-sparse": variant("gpt2", "defaults", GPT2, dict(n_positions=1024, n_layer=1), config=sparse),
    "gpt2-relu": variant("gpt2", "relu, untied", GPT2, UNTIED, dict(activation_function="relu")),
    "gpt2-gelu": variant("gpt2", "the exact gelu, n_inner", GPT2, dict(activation_function="gelu", n_inner=40)),
    "gpt2-tanh": variant("gpt2", "gelu_pytorch_tanh", GPT2, dict(activation_function="gelu_pytorch_tanh")),
    "gpt2-by-layer": variant("gpt2", "scores divided by the number of the layer", GPT2, dict(scale_attn_by_inverse_layer_idx=True)),
    "gpt2-unscaled": variant("gpt2", "scores that are not divided", GPT2, dict(scale_attn_weights=False)),
    "neox": variant("gpt_neox", "GPT-NeoX and Pythia: parallel, a quarter of each head turns", NEOX, config=version4_neox),
    "neox-sequential": variant("gpt_neox", "use_parallel_residual false", NEOX, dict(use_parallel_residual=False)),
    "neox-unbiased": variant("gpt_neox", "attention_bias false, tied", NEOX, TIED, dict(attention_bias=False)),
    "neox-whole": variant("gpt_neox", "whole heads turn, gelu_fast of GPT-NeoX-20B", NEOX, dict(hidden_act="gelu_fast", num_attention_heads=4), rope("default", partial_rotary_factor=1.0)),
}


def randomize(model, generator):
    """Weights large enough that every part of the model moves the logits."""
    centre = 0.0 if "Gemma" in type(model).__name__ else 1.0
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 1 and name.endswith("weight"):
            p.data = centre + 0.2 * noise
        elif p.ndim == 1:
            p.data = 0.3 * noise
        else:
            p.data = (0.6 if "embed" in name or "wte" in name or "wpe" in name else 0.25) * noise


def logits(model, tokens):
    # Some rotary embeddings remember the longest sequence they saw; each run starts from the untouched model.
    with torch.no_grad():
        return copy.deepcopy(model)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def reference(model, tokens):
    first = logits(model, tokens)
    ids, at, margin = [], first, float("inf")
    for step in range(GREEDY):
        top = at[-1].topk(2)
        margin = min(margin, (top.values[0] - top.values[1]).item())
        ids.append(top.indices[0].item())
        at = logits(model, tokens + ids) if step + 1 < GREEDY else at
    packed = base64.b64encode(first.contiguous().numpy().astype("<f4").tobytes()).decode()
    return dict(tokens=tokens, logits=packed, greedy=ids), margin


def build(fields, kind, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    config = AutoConfig.for_model(kind, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(model, generator)
    model.tie_weights()
    for p in model.parameters():
        p.data = p.data.to(dtype).float()
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    return model, prompts


def write(name, v):
    dtype = dict(f32=torch.float32, f16=torch.float16, bf16=torch.bfloat16)[v["dtype"]]
    for attempt in range(20):
        model, prompts = build(copy.deepcopy(v["fields"]), v["kind"], dtype, zlib.crc32(name.encode()) + attempt)
        found = [reference(model, p) for p in prompts]
        margin = min(m for _, m in found)
        if margin > LEAST_MARGIN:
            break
    else:
        raise SystemExit(f"{name}: every seed has greedy steps that are ties")
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    stored = copy.deepcopy(model).to(dtype)
    stored.save_pretrained(folder, **({"max_shard_size": v["shards"]} if v["shards"] else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    if v["config"]:
        v["config"](config)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    check_reload(name, folder, found, prompts)
    made_with = dict(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])
    document = dict(about=v["about"], made_with=made_with, sequences=[r for r, _ in found])
    (folder / "reference.json").write_text(json.dumps(document, indent=1) + "\n")
    spread = logits(model, prompts[0]).std().item()
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name:22} {size:7} bytes  logits' spread {spread:6.2f}  least greedy margin {margin:.4f}")


def check_reload(name, folder, found, prompts):
    """What is written must be all of the model: transformers reads it back to the same bits."""
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for (r, _), prompt in zip(found, prompts):
        packed = base64.b64encode(logits(again, prompt).contiguous().numpy().astype("<f4").tobytes()).decode()
        if packed != r["logits"]:
            raise SystemExit(f"{name}: the written directory computes other logits than the model it was written from")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    for name, v in VARIANTS.items():
        if not wanted or any(name.startswith(w) for w in wanted):
            write(name, v)
