#!/usr/bin/env python3
"""Holds the GGUF files of the golden references against llama.cpp: every family, and every switch of it that
GGUF can say, by the logits that transformers computed.

    benches/peers/golden.py            builds llama.cpp where it is missing, prints one line per reference

The bar is 1e-3. Families with a gelu get 6e-3, because ggml looks its gelu up in a table of 16-bit floats:
transformers with such a table in place of its own gelu is met within 6e-4. Exits 1 if a bar is missed.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engines import PROJECT, LlamaCpp, np

GOLDEN = PROJECT / "tests" / "golden"
BY_CONTEXT = "llama.cpp chooses LongRoPE's list by its context, not by the length of the text"
OTHERWISE = {
    "llama-dynamic-beyond": "the text is longer than the context that the file states",
    "llama-longrope": BY_CONTEXT,
    "phi3-short": BY_CONTEXT,
    "phi4-mini": BY_CONTEXT,
}


def write_files(folder):
    """The test that writes them is the one that also reads them back."""
    command = ["cargo", "test", "--release", "-q", "-p", "planish-model", "--test", "golden"]
    kept = {**os.environ, "PLANISH_KEEP_GGUF": str(folder)}
    subprocess.run(command, cwd=PROJECT, env=kept, check=True, stdout=subprocess.DEVNULL)


def worst(engine, gguf, sequences, out):
    """Largest difference of any logit of any sequence."""
    errors = []
    for s in sequences:
        want = np.frombuffer(base64.b64decode(s["logits"]), "<f4").reshape(len(s["tokens"]), -1)
        errors.append(np.abs(engine.logits(gguf, [s["tokens"]], out) - want).max())
    return float(max(errors))


def main():
    engine, missed = LlamaCpp("exact"), 0
    with tempfile.TemporaryDirectory() as folder:
        write_files(folder)
        files = sorted(Path(folder).glob("*.gguf"))
        if not files:
            sys.exit("golden.py: the test wrote no GGUF")
        for gguf in files:
            name = gguf.stem
            if name in OTHERWISE:
                print(f"{name:22} skipped: {OTHERWISE[name]}")
                continue
            sequences = json.loads((GOLDEN / name / "reference.json").read_text())["sequences"]
            error = worst(engine, gguf, sequences, Path(folder) / "out.f32")
            bar = 6e-3 if name.startswith(("gemma", "gpt2", "neox")) else 1e-3
            missed += error > bar
            print(f"{name:22} largest error {error:.1e}  {'ok' if error <= bar else 'MISSED'}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
