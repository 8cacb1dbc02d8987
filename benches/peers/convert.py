#!/usr/bin/env python3
"""How fast does planish store a model in a GGUF type, beside llama-quantize?

A TinyLlama-1.1B-shaped model with random weights becomes an F16 GGUF on a file system in memory (6 GB of it); both programs
make every matrix one type from it, in turn, each round in the opposite order of the last. planish reads its file again and
compares logits before it says that it is done; llama-quantize does not.

    benches/peers/convert.py [--planish BIN] [--types q4_k,q6_k] [--rounds 5] [--work /dev/shm/planish]

Exits with 1 when a bar is missed: K-quants in at most half of llama-quantize's time.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import shapes
from engines import CACHE, PROJECT, TYPES, EngineError, LlamaCpp, run, table

BAR = 2.0


def seconds(command, out):
    out.unlink(missing_ok=True)
    begin = time.monotonic()
    run(command)
    return time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planish", default=PROJECT / "target" / "release" / "planish")
    parser.add_argument("--types", default="q2_k,q3_k,q4_k,q5_k,q6_k")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/planish"))
    options = parser.parse_args()
    peer = LlamaCpp("native")
    options.work.mkdir(parents=True, exist_ok=True)
    shape = shapes.tinyllama()
    base, out = options.work / "base.gguf", options.work / "out.gguf"
    folder = shapes.model_directory(shape, CACHE.parent / "speed")
    run([options.planish, "export", folder, "--to", "gguf", "--type", "f16", "--overwrite", "--out", base])
    rows, held = [], True
    try:
        for name in options.types.split(","):
            commands = {
                "planish": [options.planish, "export", base, "--to", "gguf", "--type", name, "--out", out],
                "llama": [peer.bin / "llama-quantize", "--pure", base, out, TYPES[name][0], 2],
            }
            times = {program: [] for program in commands}
            for turn in range(options.rounds):
                for program in sorted(commands, reverse=turn % 2 == 1):
                    times[program].append(seconds(commands[program], out))
            own, other = (statistics.median(times[program]) for program in ("planish", "llama"))
            barred = name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
            held &= not barred or other / own >= BAR
            rows.append([name, f"{own:.1f}", f"{other:.1f}", f"{other / own:.2f}", BAR if barred else "-"])
            print(*rows[-1], file=sys.stderr, flush=True)
    finally:
        base.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
    table(["type", "planish, s", "llama-quantize, s", "ratio", "bar"], rows)
    return held


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except EngineError as error:
        sys.exit(f"convert.py: {error}")
