#!/usr/bin/env python3
"""Does a student learn more from a teacher than from the text alone? A student of half of the teacher's blocks; both arms
begin as these, read the same text in the same order for as many steps, each at its best of three learning rates; three seeds.

    python3 benches/training/distill.py --teacher mix7m-hf --data train-tokens.u16
    ... --steps 400 --share 1 --variants          on-policy and cached-teacher variants at the best rate as well

The bar: the mean gain in validation loss (nats, the text's likelihood, over the seeds) less two standard errors is above
zero; the goal is 3 %. Exit 0: the bar passed. 1: it did not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

PROJECT = Path(__file__).resolve().parent.parent.parent
GOAL = 0.03


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--layers", help="blocks of the student (default: every other one of the teacher)")
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--context", type=int, default=256)
    p.add_argument("--share", type=float, default=0.9, help="of the divergence in the loss of the taught arm")
    p.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--variants", action="store_true")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--planish", type=Path, default=PROJECT / "target/release/planish")
    o = p.parse_args()
    blocks = json.loads(subprocess.run([str(o.planish), "inspect", str(o.teacher), "--json"], capture_output=True,
                                       text=True, check=True).stdout)["blocks"]
    layers = o.layers or ",".join(str(i) for i in range(0, blocks, 2))

    with tempfile.TemporaryDirectory() as folder:
        def loss(name, share, rate, seed, *more):
            out = Path(folder) / f"{name}-{rate}-{seed}"
            command = [o.planish, "distill", "--teacher", o.teacher, "--student-layers", layers, "--data", o.data,
                       "--steps", o.steps, "--batch", o.batch, "--context", o.context, "--lr", rate, "--share", share,
                       "--seed", seed, "--validate-every", o.steps, "--checkpoint-every", o.steps, "--threads", o.threads,
                       *more, "--out", out, "--json"]
            done = subprocess.run([str(w) for w in command], capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"planish distill failed: {done.stderr[-2000:]}")
            said = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:10} rate {rate:g} seed {seed}: {said['validation_loss']:.4f} "
                  f"({said['tokens_per_second']:.0f} tokens/s)", flush=True)
            return said["validation_loss"]

        def arm(name, share, rates, *more):
            losses = {rate: [loss(name, share, rate, seed, *more) for seed in o.seeds] for rate in rates}
            best = min(losses, key=lambda rate: mean(losses[rate]))
            print(f"{name}: best rate {best:g}, {mean(losses[best]):.4f}", flush=True)
            return best, losses[best]

        _, alone = arm("text", 0, o.rates)
        best, taught = arm("teacher", o.share, o.rates)
        arms = [("teacher", taught)]
        if o.variants:
            cache = Path(folder) / "teacher.said"
            arms.append(("cached", arm("cached", o.share, [best], "--teacher-cache", cache, "--top-k", 32)[1]))
            arms.append(("on-policy", arm("on-policy", o.share, [best], "--on-policy", 0.25)[1]))
        passed = False
        for name, losses in arms:
            gains = [(a - b) / a for a, b in zip(alone, losses)]
            error = stdev(gains) / sqrt(len(gains)) if len(gains) > 1 else float("inf")
            least = mean(gains) - 2 * error
            passed |= name == "teacher" and least > 0
            print(f"{name}: gain {100 * mean(gains):.2f} %, less two standard errors {100 * least:.2f} % (bar: above 0; "
                  f"goal: {100 * GOAL:.0f} %)")
    print("passed" if passed else "did not pass")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
