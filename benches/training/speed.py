#!/usr/bin/env python3
"""How fast does planish train beside PyTorch? One shape, the same batch, the same cores, one interleaved run.

    PLANISH_TORCH_PYTHON=PYTHON benches/training/speed.py            f32 and bf16, medians of five rounds
    ... benches/training/speed.py --rounds 3 --precision bf16 --compile

PYTHON has torch, transformers and tokenizers. The shape is the bars': 8.3 M parameters of the Llama family (dim 288,
6 layers, 6 heads, hidden 768, vocabulary 4,096, untied), 8 x 256 tokens a step. Exit 0: every bar passed. 1: one did not.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
MAKE = """
import sys, random, torch
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
out = Path(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=4096, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
    num_attention_heads=6, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
LlamaForCausalLM(config).save_pretrained(out)
words = {f"w{i}": i for i in range(4096)}
t = Tokenizer(models.WordLevel(words, unk_token="w0"))
t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
t.save(str(out / "tokenizer.json"))
random.seed(0)
(out / "text.txt").write_text(" ".join(f"w{random.randrange(4096)}" for _ in range(120_000)))
"""
# (precision, least ratio of speed, largest ratio of memory)
BARS = (("f32", 1.3, 1 / 3), ("bf16", 1.4, 1 / 3))


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--precision", action="append", choices=[b[0] for b in BARS])
    p.add_argument("--compile", action="store_true", help="show torch.compile beside it")
    p.add_argument("--planish", type=Path, default=PROJECT / "target/release/planish")
    p.add_argument("--work", type=Path, default=Path.home() / ".cache/planish/training")
    o = p.parse_args()
    python = os.environ.get("PLANISH_TORCH_PYTHON")
    if not python:
        sys.exit("set PLANISH_TORCH_PYTHON to a Python with torch, transformers and tokenizers")
    model = o.work / "llama8m"
    if not (model / "text.txt").exists():
        model.mkdir(parents=True, exist_ok=True)
        subprocess.run([python, "-c", MAKE, model], check=True)
    wanted = [b for b in BARS if not o.precision or b[0] in o.precision]

    # A seed of its own for each run: one that was run before is done already.
    seeds = itertools.count(os.getpid() * 1000)

    def ours(precision):
        return run([o.planish, "finetune", model, "--data", model / "text.txt", "--steps", o.steps, "--batch", 8,
                    "--context", 256, "--precision", precision, "--threads", o.threads, "--validate-every", 10**6,
                    "--checkpoint-every", 10**6, "--out", o.work / "out", "--overwrite", "--restart", "--seed",
                    next(seeds), "--json"])

    def theirs(precision, *more):
        return run([python, HERE / "pytorch.py", model, "--precision", precision, "--steps", o.steps, "--threads",
                    o.threads, *more])

    cells = {}
    for b in wanted:
        cells[f"planish {b[0]}"] = lambda b=b: ours(b[0])
        cells[f"PyTorch {b[0]}"] = lambda b=b: theirs(b[0])
        if o.compile:
            cells[f"torch.compile {b[0]}"] = lambda b=b: theirs(b[0], "--compile")
    seen = {name: [] for name in cells}
    for r in range(o.rounds):
        for name in list(cells) if r % 2 == 0 else list(cells)[::-1]:
            seen[name].append(cells[name]())
        print(f"round {r + 1} of {o.rounds}", file=sys.stderr)
    median = lambda name, key: statistics.median(s[key] for s in seen[name])
    for name in cells:
        share = f"  {100 * median(name, 'share_of_peak'):.1f} % of peak" if "planish" in name else ""
        print(f"{name:20} {median(name, 'tokens_per_second'):8.0f} tokens/s  {median(name, 'peak_rss_bytes') / 2**20:6.0f} MiB{share}")
    failed = False
    for precision, speed, memory in wanted:
        pairs = list(zip(seen[f"planish {precision}"], seen[f"PyTorch {precision}"]))
        for what, value, passed, bar in (
            ("speed", statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs), lambda v: v >= speed, f"at least {speed}"),
            ("memory", statistics.median(a["peak_rss_bytes"] / b["peak_rss_bytes"] for a, b in pairs), lambda v: v <= memory, f"at most {memory:.2f}"),
        ):
            failed |= not passed(value)
            print(f"{precision} {what} over PyTorch's: {value:.2f}, {bar}: {'passed' if passed(value) else 'FAILED'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
