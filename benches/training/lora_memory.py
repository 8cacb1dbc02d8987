#!/usr/bin/env python3
"""How much less memory do adapters over a 4-bit base take than the whole model? GPT-2's shape of 124 M parameters with
random weights, 4 x 256 tokens a step, activations checkpointed in both; `planish finetune` tells its own peak.

    PYTHON benches/training/lora_memory.py             the bar: at most 25 % of full fine-tuning's peak
    ... --steps 2 --lora rank=16,dora --precision f32

PYTHON has numpy. Exit 0: the bar passed. 1: it did not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "peers"))
import shapes  # noqa: E402

BAR = 0.25


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--lora", default="rank=16")
    p.add_argument("--storage", default="q4_k", help="of the base beneath the adapters")
    p.add_argument("--precision", default="bf16", choices=["f32", "bf16"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--planish", type=Path, default=PROJECT / "target/release/planish")
    p.add_argument("--work", type=Path, default=Path.home() / ".cache/planish/training")
    o = p.parse_args()
    o.work.mkdir(parents=True, exist_ok=True)
    shape = shapes.gpt2()
    whole = shapes.model_directory(shape, o.work)
    base = shapes.gguf(shape, o.storage, o.work, o.planish, None)
    with tempfile.TemporaryDirectory(dir=o.work) as folder:
        data = Path(folder) / "data.u16"
        np.random.default_rng(1).integers(0, 50000, 40_000, np.uint16).tofile(data)

        def peak(model, *words):
            command = [o.planish, "finetune", model, "--data", data, "--steps", o.steps, "--batch", 4, "--context", 256,
                       "--precision", o.precision, "--checkpoint-activations", "--threads", o.threads,
                       "--checkpoint-every", 1000, "--validate-every", 1000, *words, "--out",
                       f"{folder}/{len(words)}", "--json"]
            done = subprocess.run([str(w) for w in command], capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"planish finetune failed: {done.stderr[-2000:]}")
            said = json.loads(done.stdout.splitlines()[-1])
            print(f"{' '.join(words) or 'the whole model':30} {said['peak_rss_bytes'] / 2**20:8.0f} MiB, "
                  f"{said['tokens_per_second']:.0f} tokens/s")
            return said["peak_rss_bytes"]

        share = peak(base, "--lora", o.lora) / peak(whole)
    print(f"adapters over {o.storage}: {100 * share:.1f} % of the whole model's peak (bar: {100 * BAR:.0f} %)")
    sys.exit(0 if share <= BAR else 1)


if __name__ == "__main__":
    main()
