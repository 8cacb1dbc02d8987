#!/usr/bin/env python3
"""Do PEFT and planish compute the same with each other's adapters?

    PYTHON benches/training/peft_adapters.py check      planish teaches, PEFT loads: largest differences of a logit
    PYTHON benches/training/peft_adapters.py llamacpp   planish exports, llama.cpp loads: of a log-probability
    PYTHON benches/training/peft_adapters.py golden     PEFT makes adapters for tests/golden, which `cargo test` reads

PYTHON has torch, transformers, tokenizers and peft, for `llamacpp` xllamacpp as well. The bar of `check` is 1e-4, that of
`llamacpp` 1e-3, and 6e-3 with a gelu, which ggml looks up in a table of 16-bit floats. Exit 0: every bar passed. 1: one did not.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Phi3Config

PROJECT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT / "benches/peers"))
import shapes  # noqa: E402

PLANISH = Path(os.environ.get("PLANISH", PROJECT / "target/release/planish"))
BAR = 1e-4
VOCAB = 300
SHAPES = {
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "llama": LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64),
    "phi3": Phi3Config(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
                       original_max_position_embeddings=64),
    "neox": GPTNeoXConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=64),
}
# (shape, words of --lora)
CHECKS = (
    ("gpt2", "rank=4"), ("gpt2", "rank=4,sites=q+v+down,dora"), ("gpt2", "rank=3,alpha=5,sites=k+1.o,rslora"),
    ("llama", "rank=4"), ("llama", "rank=4,dora,rslora"), ("llama", "rank=4,sites=0.q+1.v"),
    ("phi3", "rank=4"), ("phi3", "rank=4,sites=q+gate,dora"), ("neox", "rank=4,sites=q+v+up"),
)
# (golden model, folder, what PEFT is asked for)
GOLDEN = (
    ("gpt2", "peft-lora", dict(r=4, lora_alpha=8, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)),
    ("gpt2", "peft-dora", dict(r=3, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)),
    ("phi3", "peft-lora", dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True)),
    ("neox", "peft-lora", dict(r=4, lora_alpha=8, target_modules=["query_key_value", "dense"])),
    ("llama-gqa-tied", "peft-dora", dict(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)),
    ("gemma3", "peft-patterns", dict(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
                                     rank_pattern={"q_proj": 3}, alpha_pattern={"layers.0.self_attn.v_proj": 5})),
)


def drawn(model, seed):
    """What begins as zero gets values, so that every part of an adapter shows."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
        if "magnitude" in name:
            p.data.mul_(1 + 0.2 * torch.rand_like(p.data))


def golden():
    for base, folder, asked in GOLDEN:
        out = PROJECT / "tests/golden" / base / folder
        shutil.rmtree(out, ignore_errors=True)
        model = AutoModelForCausalLM.from_pretrained(PROJECT / "tests/golden" / base, torch_dtype=torch.float32).eval()
        tokens = torch.arange(16) * 7 % model.config.vocab_size
        with torch.no_grad():
            plain = model(tokens[None]).logits[0, -1]
            peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **asked)).eval()
            drawn(peft, 3)
            last = peft(tokens[None]).logits[0, -1]
        peft.peft_config["default"].base_model_name_or_path = base
        peft.save_pretrained(out, save_embedding_layers=False)
        (out / "README.md").unlink(missing_ok=True)
        said = {"tokens": tokens.tolist(), "last": last.tolist(), "change": (last - plain).abs().max().item()}
        (out / "logits.json").write_text(json.dumps(said) + "\n")
        print(f"{base}/{folder}: the adapter changes a logit by {said['change']:.3f}")


def made(shape, folder):
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(SHAPES[shape]).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{i * i % 97 + i % 5}" for i in range(1, 3000)))
    return text


def made_for_ggml(shape, folder):
    """The same with a tokenizer that GGUF can hold."""
    text = made(shape, folder)
    (folder / "tokenizer.json").write_text(json.dumps(shapes.tokenizer(VOCAB)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return text


def ggml_log_probabilities(base, adapter, ids):
    """Of every token after `ids`, as llama.cpp computes them."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = str(base)
    asked.n_ctx, asked.n_parallel, asked.warmup, asked.verbosity = 64, 1, False, -1
    asked.cpuparams.n_threads = 2
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    # The grammar keeps the token that is drawn to whole characters, without which no probabilities are told.
    said = xllamacpp.Server(asked).handle_completions({
        "prompt": [int(i) for i in ids], "max_tokens": 1, "logprobs": VOCAB, "grammar": "root ::= [ -~]+",
        "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    })
    if not said.get("choices", [{}])[0].get("logprobs"):
        sys.exit(f"llama.cpp says {said}")
    out = np.full(VOCAB, -np.inf)
    for token in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        out[token["id"]] = token["logprob"]
    return out


def llamacpp():
    missed = 0
    with tempfile.TemporaryDirectory() as work:
        for i, (shape, words) in enumerate((s, w) for s, w in CHECKS if "dora" not in w):
            base, out, raw = Path(work) / shape, Path(work) / f"adapter{i}", Path(work) / "logits"
            text = base / "text.txt" if base.exists() else made_for_ggml(shape, base)
            whole, lora = Path(work) / f"{shape}.gguf", Path(work) / f"adapter{i}.gguf"
            run("finetune", base, "--data", text, "--lora", words, "--steps", 30, "--context", 32, "--lr", 1e-2,
                "--precision", "f32", "--out", out)
            run("export", base, "--to", "gguf", "--type", "f32", "--overwrite", "--out", whole)
            run("export", base, "--adapter", out, "--to", "gguf", "--out", lora)
            run("evaluate", base, "--adapter", out, "--data", text, "--context", 32, "--documents", 1, "--logits", raw)
            ids = np.fromfile(f"{raw}.ids", "<u4")
            own = np.fromfile(raw, "<f4").reshape(len(ids), -1)[-1].astype(np.float64)
            own -= np.log(np.exp(own - own.max()).sum()) + own.max()
            plain, theirs = (ggml_log_probabilities(whole, a, ids) for a in (None, lora))
            error, change = np.abs(own - theirs).max(), np.abs(plain - theirs).max()
            bar = 6e-3 if shape in ("gpt2", "neox") else 1e-3
            fails = not error <= bar or change < 10 * bar
            missed += fails
            print(f"{shape:6} {words:32} largest error {error:.1e} of {change:.2f}  {'MISSED' if fails else 'ok'}", flush=True)
    sys.exit(1 if missed else 0)


def run(*words):
    done = subprocess.run([str(w) for w in (PLANISH, *words, "--json")], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"planish {words[0]} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check():
    missed = 0
    with tempfile.TemporaryDirectory() as work:
        for i, (shape, words) in enumerate(CHECKS):
            base, out, raw = Path(work) / shape, Path(work) / f"adapter{i}", Path(work) / "logits"
            text = base / "text.txt" if base.exists() else made(shape, base)
            taught = run("finetune", base, "--data", text, "--lora", words, "--steps", 30, "--context", 32, "--lr", 1e-2,
                         "--precision", "f32", "--out", out)
            run("evaluate", base, "--adapter", out, "--data", text, "--context", 32, "--documents", 4, "--logits", raw)
            ids = np.fromfile(f"{raw}.ids", "<u4").astype(np.int64).reshape(4, 32)
            own = np.fromfile(raw, "<f4").reshape(4, 32, -1)
            model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32).eval()
            with torch.no_grad():
                plain = model(torch.from_numpy(ids)).logits.numpy()
                peft = PeftModel.from_pretrained(model, out).eval()
                theirs = peft(torch.from_numpy(ids)).logits.numpy()
            error, change = np.abs(own - theirs).max(), np.abs(plain - theirs).max()
            fails = error > BAR or change < 100 * BAR
            missed += fails
            loss = f"loss {taught['validation_loss_before']:.3f} to {taught['validation_loss']:.3f}"
            print(f"{shape:6} {words:32} {loss}, largest error {error:.1e} of {change:.2f}  {'MISSED' if fails else 'ok'}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    {"check": check, "golden": golden, "llamacpp": llamacpp}.get(sys.argv[1] if len(sys.argv) > 1 else "", lambda: sys.exit(__doc__))()
