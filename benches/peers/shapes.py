"""The two models that `speed.py` times, made of nothing but their shapes: Hugging Face directories with
random N(0, 0.02) weights in bf16, and the GGUF files that planish writes of them. They say nothing
that means anything; speed depends on shapes and storage alone. Knows no engine but the two that write
files.

A matrix is drawn, rounded and written before the next one, so that making the 1.1-billion-weight model
takes 800 MB of memory. The seed is fixed: the same file on every machine.
"""

import itertools
import json
import multiprocessing
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from engines import EngineError, np, run

DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """A model without its weights: the configuration, and (name, sizes) of every tensor. A name that
    ends in `.weight` with one size is a norm's scale and holds ones; a bias holds zeros."""
    name: str
    config: dict
    tensors: tuple
    # Ids that follow each other for ever, whatever the blocks do; none where the weights say nothing.
    ring: range = range(0)

    @property
    def block_weights(self):
        """Weights of the products of the blocks: what a token of a prompt is multiplied by."""
        inside = [sizes for name, sizes in self.tensors if (".layers." in name or ".h." in name)]
        return sum(sizes[0] * sizes[1] for sizes in inside if len(sizes) == 2)


def tinyllama():
    dim, ffn, kv, vocab, layers = 2048, 5632, 4 * 64, 32000, 22
    block = (("input_layernorm", (dim,)), ("self_attn.q_proj", (dim, dim)), ("self_attn.k_proj", (kv, dim)),
             ("self_attn.v_proj", (kv, dim)), ("self_attn.o_proj", (dim, dim)),
             ("post_attention_layernorm", (dim,)), ("mlp.gate_proj", (ffn, dim)),
             ("mlp.up_proj", (ffn, dim)), ("mlp.down_proj", (dim, ffn)))
    blocks = [(f"model.layers.{layer}.{name}.weight", sizes) for layer in range(layers) for name, sizes in block]
    # The published model's context is 2,048; a longer one costs nothing here and lets long prompts be timed.
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": vocab, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": vocab - 1,
    }
    tensors = (("model.embed_tokens.weight", (vocab, dim)), *blocks, ("model.norm.weight", (dim,)),
               ("lm_head.weight", (vocab, dim)))
    return Shape("tinyllama", config, tensors)


def gpt2():
    dim, vocab, context, layers = 768, 50257, 1024, 12
    block = (("ln_1.weight", (dim,)), ("ln_1.bias", (dim,)),
             ("attn.c_attn.weight", (dim, 3 * dim)), ("attn.c_attn.bias", (3 * dim,)),
             ("attn.c_proj.weight", (dim, dim)), ("attn.c_proj.bias", (dim,)),
             ("ln_2.weight", (dim,)), ("ln_2.bias", (dim,)),
             ("mlp.c_fc.weight", (dim, 4 * dim)), ("mlp.c_fc.bias", (4 * dim,)),
             ("mlp.c_proj.weight", (4 * dim, dim)), ("mlp.c_proj.bias", (dim,)))
    blocks = [(f"transformer.h.{layer}.{name}", sizes) for layer in range(layers) for name, sizes in block]
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "n_embd": dim, "n_layer": layers, "n_head": 12, "n_positions": context, "n_ctx": context,
        "vocab_size": vocab, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "bos_token_id": vocab - 1, "eos_token_id": vocab - 1,
    }
    tensors = (("transformer.wte.weight", (vocab, dim)), ("transformer.wpe.weight", (context, dim)), *blocks,
               ("transformer.ln_f.weight", (dim,)), ("transformer.ln_f.bias", (dim,)))
    return Shape("gpt2", config, tensors)


def repeating():
    """TinyLlama's shape, saying `aa`, `ab` to `az` and `aa` again: its blocks add nothing, and the head of each of
    these words is the embedding of the one before it."""
    shape, first = tinyllama(), 256 + 256 * (ord("a") - ord("!")) + ord("a") - ord("!")
    return replace(shape, name="repeating", ring=range(first, first + 26))


SHAPES = {"tinyllama": tinyllama, "gpt2": gpt2}


def tokenizer(vocabulary):
    """A byte-level tokenizer of exactly that many ids: the bytes, pairs of bytes, and an end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    strangers = range(256, 256 + 256 - len(printable))
    characters = [chr(code) for code in (*printable, *strangers)]
    pairs = list(itertools.islice(itertools.product(characters, characters), vocabulary - 257))
    words = [*characters, *(left + right for left, right in pairs)]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": vocabulary - 1, "content": "<|endoftext|>", "special": True, "normalized": False,
           "single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0", "added_tokens": [end], "normalizer": None, "pre_tokenizer": plain,
        "post_processor": None, "decoder": plain,
        "model": {"type": "BPE", "vocab": {word: number for number, word in enumerate(words)},
                  "merges": [f"{left} {right}" for left, right in pairs]},
    }


def bf16_bytes(values):
    """f32 values, rounded to the nearest bf16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def draw(source, name, sizes):
    if len(sizes) == 2:
        return source.standard_normal(sizes, np.float32) * np.float32(DEVIATION)
    return np.zeros(sizes, np.float32) if name.endswith(".bias") else np.ones(sizes, np.float32)


def write_weights(shape, path):
    """A safetensors file, one tensor after the other."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, sizes in shape.tensors:
        end = at + 2 * int(np.prod(sizes))
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source, words = np.random.default_rng(20), None
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, sizes in shape.tensors:
            values = draw(source, name, sizes)
            if shape.ring:
                at = slice(shape.ring.start, shape.ring.stop)
                if "embed" in name:
                    words = values[at].copy()
                elif "lm_head" in name:
                    values[at] = np.roll(words, 1, axis=0)
                elif "o_proj" in name or "down_proj" in name:
                    values[:] = 0
            file.write(bf16_bytes(values))


def once(path, write):
    """Makes a file that is not there yet; a run that is stopped leaves no half of one behind."""
    if not path.exists():
        beside = path.with_name(f"unfinished-{path.name}")
        write(beside)
        os.replace(beside, path)
    return path


def model_directory(shape, work):
    """The Hugging Face directory of a shape, made where it is missing."""
    folder = work / f"{shape.name}-hf"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(shape.config["vocab_size"])))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    once(folder / "model.safetensors", lambda path: apart(write_weights, shape, path))
    return folder


def apart(work, *arguments):
    """Does memory-hungry work in a process of its own: what a process has ever held counts, for the
    system, to the peak of the programs that it starts."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise EngineError(f"{work.__name__} ended with {process.exitcode}")


def gguf(shape, storage, work, planish, llama_quantize):
    """The GGUF of a shape, made where it is missing: every matrix rounded to one storage, by planish;
    `q4_k_m`, llama.cpp's own mixture of Q4_K and Q6_K, by llama-quantize from planish's BF16 file."""
    path = work / f"{shape.name}.{storage}.gguf"
    if path.exists():
        return path
    if storage == "q4_k_m":
        base = gguf(shape, "bf16", work, planish, llama_quantize)
        return once(path, lambda out: run([llama_quantize, base, out, "Q4_K_M", 2]))
    command = [planish, "export", model_directory(shape, work), "--to", "gguf", "--type", storage]
    return once(path, lambda out: run([*command, "--overwrite", "--out", out]))
