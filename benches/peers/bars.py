#!/usr/bin/env python3
"""How far is mix7m from its original at so many bits per weight, embedding and head included?

planish makes a GGUF of each average (`quantize --bits X`), calibrated on the first 70,000 training tokens;
`llama-perplexity -c 512 --kl-divergence` holds it against the F32 GGUF on the held-out documents, joined in a shuffled
order, 8-bit activations of llama.cpp and all. Beside it stand a bar and what llama.cpp's own types with an importance
matrix reached by the same protocol.

    benches/peers/bars.py [--planish BIN] [--bits 4.6,3.4] [--method gptaq] [--option 'steps=150' ...]

Exits with 1 when a bar is missed.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from engines import DATA, PROJECT, SEPARATOR, EngineError, LlamaCpp, Planish, table

# Bits per weight: the bar; llama.cpp's nearest type, its bits, which planish may use and no more, and its mean KL.
BARS = {
    8.5: (0.00027, "Q8_0", 8.51, 0.00033),
    6.6: (0.0016, "Q6_K", 6.58, 0.0020),
    5.07: (0.0065, "Q4_K_M", 5.07, 0.0081),
    4.6: (0.0103, "IQ4_XS", 4.60, 0.0128),
    3.9: (0.030, "IQ3_S", 3.90, 0.037),
    3.4: (0.057, "IQ3_XXS", 3.40, 0.072),
    2.94: (0.100, "IQ2_S", 2.94, 0.124),
    2.6: (0.160, "IQ2_XXS", 2.61, 0.201),
}
CALIBRATION = 70_000
CONTEXT = 512


def held_out(path):
    documents = []
    for file in sorted((DATA / "text" / "mix-eval").glob("eval-*.txt")):
        documents += [d.strip() for d in file.read_text(encoding="utf-8").split(SEPARATOR) if d.strip()]
    random.Random(1).shuffle(documents)
    path.write_text("\n\n".join(documents), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planish", default=PROJECT / "target" / "release" / "planish")
    parser.add_argument("--bits", default=",".join(str(b) for b in BARS))
    parser.add_argument("--method", default="gptaq")
    parser.add_argument("--option", action="append", default=[])
    options = parser.parse_args()
    if not (DATA / "models").exists():
        sys.exit("skipped: needs ../shared/data")
    model, planish, peer = DATA / "models" / "mix7m-hf", Planish(options.planish), LlamaCpp("native")
    rows, held = [], True
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text, tokens = folder / "held-out.txt", folder / "calibration.u16"
        held_out(text)
        tokens.write_bytes((DATA / "text" / "mix-eval" / "train-tokens.u16").read_bytes()[: 2 * CALIBRATION])
        base, stored = folder / "f32.gguf", folder / "base.kld"
        planish.call("export", model, "--to", "gguf", "--type", "f32", "--out", base)
        peer.perplexity_base(base, text, CONTEXT, stored)
        more = [word for option in options.option for word in ("--option", option)]
        for bits in map(float, options.bits.split(",")):
            bar, name, room, theirs = BARS[bits]
            out = folder / f"{bits}.gguf"
            said = planish.call("quantize", model, "--method", options.method, *more, "--bits", f"{room + 1e-3:.3f}",
                                "--calibration-tokens", CALIBRATION, "--data", tokens, "--out", out)
            ours = peer.kl_divergence(out, stored, CONTEXT)
            held = held and ours <= bar
            got = said["proof"]["after"]["bits_per_weight"]
            rows.append((f"{bits}", f"{got:.3f}", f"{ours:.6f}", f"{bar}", f"{name} {room}: {theirs}", f"{ours / theirs:.2f}",
                         "pass" if ours <= bar else "FAIL"))
            print(rows[-1], file=sys.stderr, flush=True)
    table(["bits", "planish's bits", "mean KL", "bar", "llama.cpp", "ratio", ""], rows)
    return held


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except EngineError as error:
        sys.exit(f"bars.py: {error}")
