#!/usr/bin/env python3
"""Do bf16 and fp16 learn as f32 does? One small Llama, one seed and one order of data, three precisions, 1,000 steps; the
loss curves, smoothed over so many steps, side by side.

    python3 benches/training/precision.py --data train-tokens.u16 --tokenizer mix7m-hf
    ... --steps 300 --hidden 128 --lr 1e-3 --seeds 1 2 3

The bar is of the mean over the seeds at every place of the curve, windows of 50 steps: at most 0.5 % from f32. What two
seeds of f32 differ by is shown beside it, as a measure of what chance does. Exit 0: the bar passed. 1: it did not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

PROJECT = Path(__file__).resolve().parent.parent.parent
BAR = 0.005
CONFIG = """
[model]
architectures = ["LlamaForCausalLM"]
model_type = "llama"
hidden_size = {hidden}
intermediate_size = {inner}
num_hidden_layers = {layers}
num_attention_heads = 4
num_key_value_heads = 4
hidden_act = "silu"
max_position_embeddings = 256
rms_norm_eps = 1e-5
rope_theta = 10000.0
tie_word_embeddings = true

[training]
steps = {steps}
batch = 8
context = {context}
lr = {lr}
weight_decay = 0.1
beta2 = 0.95
validate_every = 1000000
checkpoint_every = 1000000
precision = "{precision}"
"""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="a text, or tokens of two bytes (.u16)")
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--hidden", type=int, default=64)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--context", type=int, default=64)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--window", type=int, default=50)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--planish", type=Path, default=PROJECT / "target/release/planish")
    o = p.parse_args()

    def curve(precision, seed, folder):
        name = f"{precision}-{seed}"
        config = Path(folder) / f"{name}.toml"
        config.write_text(CONFIG.format(hidden=o.hidden, inner=3 * o.hidden, layers=o.layers, steps=o.steps, lr=o.lr,
                                        context=o.context, precision=precision))
        out = Path(folder) / name
        command = [o.planish, "train", config, "--data", o.data, "--tokenizer", o.tokenizer, "--seed", seed, "--threads",
                   o.threads, "--out", out, "--json"]
        done = subprocess.run([str(w) for w in command], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"planish train failed: {done.stderr[-2000:]}")
        said = json.loads(done.stdout.splitlines()[-1])
        points = json.loads((out / "training.json").read_text())["record"]["points"]
        print(f"{precision:5} seed {seed}: last loss {points[-1]['loss']:.4f}, validation {said['validation_loss']:.4f}, "
              f"{said['skipped_steps']} steps skipped, {said['tokens_per_second']:.0f} tokens/s", flush=True)
        return [point["loss"] for point in points], said["validation_loss"]

    def smooth(losses):
        return [mean(losses[i:i + o.window]) for i in range(0, len(losses) - o.window + 1, o.window)]

    with tempfile.TemporaryDirectory() as folder:
        runs = {k: [curve(k, seed, folder) for seed in o.seeds] for k in ("f32", "bf16", "fp16")}
    exact = [smooth(losses) for losses, _ in runs["f32"]]
    passed = True
    for kind in ("bf16", "fp16"):
        ratios = [[a / b for a, b in zip(smooth(losses), base)] for (losses, _), base in zip(runs[kind], exact)]
        means = [mean(places) - 1 for places in zip(*ratios)]
        worst = max(means, key=abs)
        held = mean(v / b - 1 for (_, v), (_, b) in zip(runs[kind], runs["f32"]))
        passed &= abs(worst) <= BAR
        print(f"{kind} over f32, windows of {o.window}: worst {100 * worst:+.2f} %, mean {100 * mean(means):+.3f} %, last "
              f"{100 * means[-1]:+.2f} %; validation {100 * held:+.3f} % (bar: {100 * BAR} %)")
    if len(exact) > 1:
        chance = max((a / b - 1 for a, b in zip(exact[0], exact[1])), key=abs)
        print(f"two seeds of f32 differ by {100 * chance:+.2f} % at most")
    print("passed" if passed else "did not pass")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
