#!/usr/bin/env python3
"""Does a GGUF file mean the same to planish and to llama.cpp?

For every type, planish writes the model as GGUF, both engines compute the logits of the same tokens
from that same file, and the mean KL between the engines is held against the mean KL that the type
itself costs:

    F32, F16, BF16      largest difference of any logit at most 1e-3
    quantized types     KL(llama.cpp || planish) at most 2 % of KL(original || type)

The reference is llama.cpp's `exact` build (see llamacpp.sh): f32 products on the dequantized weights,
f32 cache, no flash attention. The `native` column shows how far llama.cpp's own fast kernels, which
round activations to 8 bits, are from that reference; it is for the reader, no bar depends on it.

    benches/peers/kl.py [--model DIR] [--text FILE] [--tokens N] [--types q4_k,q6_k] [--work DIR]

Exits with 1 when a type misses its bar.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from engines import (DATA, PROJECT, SEPARATOR, TYPES, EngineError, LlamaCpp, Planish, documents_of,
                     mean_kl, np, positions_that_predict, split_documents, table)

LOGIT_BAR = 1e-3
KL_BAR = 0.02
UNROUNDED = ("f32", "f16", "bf16")
# A smaller KL than this between two f32 engines is the rounding of f32 sums, not a difference in meaning.
F32_NOISE = 1e-9


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA / "models" / "mix7m-hf")
    parser.add_argument("--text", type=Path, default=DATA / "text" / "mix-eval" / "eval-medical.txt")
    parser.add_argument("--tokens", type=int, default=4000, help="about how many tokens to feed, in whole documents")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--planish", type=Path, default=PROJECT / "target" / "release" / "planish")
    parser.add_argument("--work", type=Path, help="keep the files here (default: a temporary folder)")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def excerpt(text, tokens):
    """Whole documents from the start of `text`, about `tokens` tokens of them at four bytes each."""
    taken, size = [], 0
    for document in documents_of(text):
        if size >= 4 * tokens:
            break
        taken.append(document)
        size += len(document.encode())
    return f"\n{SEPARATOR}\n".join(taken)


class Comparison:
    """One model, one text, the logits of the original; then type after type against them."""

    def __init__(self, options, work):
        self.options, self.work = options, work
        self.exact = LlamaCpp("exact", options.threads)
        self.native = LlamaCpp("native", options.threads)
        self.planish = Planish(options.planish, options.threads)
        self.text = work / "text.txt"
        self.text.write_text(excerpt(options.text.read_text(encoding="utf-8"), options.tokens), encoding="utf-8")

    def original(self):
        """llama.cpp on the F32 file. Its tokenizer must give the ids that planish fed, and planish on
        the original directory must give its logits."""
        file = self.work / "original.gguf"
        self.planish.export(self.options.model, "f32", file)
        ours, ids = self.planish.logits(self.options.model, self.text, self.work / "original.planish.f32")
        self.documents = split_documents(ids, self.exact.token_ids(file, "a")[0])
        for text, fed in zip(documents_of(self.text.read_text(encoding="utf-8")), self.documents, strict=True):
            if self.exact.token_ids(file, text)[:len(fed)] != fed.tolist():
                raise EngineError(f"the engines tokenize differently: {text[:60]!r}")
        self.rows = self.exact.logits(file, self.documents, self.work / "original.llamacpp.f32")
        self.keep = positions_that_predict(self.documents)
        return float(np.abs(self.rows - ours).max())

    def measure(self, storage):
        """One row of the table and whether it meets its bar."""
        file = self.work / f"{storage}.gguf"
        self.planish.export(self.options.model, storage, file)
        theirs = self.exact.logits(file, self.documents, self.work / "llamacpp.f32")
        rounded = self.native.logits(file, self.documents, self.work / "native.f32")
        ours, ids = self.planish.logits(file, self.text, self.work / "planish.f32")
        if not np.array_equal(ids, np.concatenate(self.documents)):
            raise EngineError(f"planish read other ids from {file.name} than from the original")
        difference = float(np.abs(theirs - ours).max())
        between = mean_kl(theirs, ours, self.keep)
        fast = mean_kl(theirs, rounded, self.keep)
        cost = mean_kl(self.rows, theirs, self.keep)
        if storage in UNROUNDED:
            held, share = difference <= LOGIT_BAR, "-"
        else:
            held = between <= KL_BAR * cost or between <= F32_NOISE
            share = f"{100 * between / cost:.4f} %" if cost else "-"
        row = (storage, file.stat().st_size, f"{difference:.2e}", f"{between:.2e}", f"{cost:.3e}", share,
               f"{fast:.2e}", "pass" if held else "FAIL")
        return row, held


def compare(options, work):
    comparison = Comparison(options, work)
    difference = comparison.original()
    tokens = int(comparison.keep.sum())
    print(f"{options.model.name}, {len(comparison.documents)} documents, {tokens} predicted tokens of {options.text.name}")
    print(f"planish on the directory, llama.cpp on its F32 export: largest logit difference {difference:.2e}")
    rows, all_held = [], difference <= LOGIT_BAR and tokens >= 2000
    if tokens < 2000:
        print("too few tokens: the bars are defined over 2,000 or more")
    for storage in options.types.split(","):
        try:
            row, held = comparison.measure(storage)
        except EngineError as error:
            print(f"{storage}: {error}", file=sys.stderr)
            row, held = (storage, *["-"] * 6, "FAIL"), False
        rows.append(row)
        all_held = all_held and held
    table(["type", "bytes", "max logit difference", "KL llama.cpp || planish", "KL original || type",
           "share", "KL exact || native llama.cpp", "bar"], rows)
    return all_held


def main():
    options = arguments()
    if not options.model.exists() or not options.text.exists():
        sys.exit("skipped: needs ../shared/data")
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        return compare(options, options.work)
    with tempfile.TemporaryDirectory() as work:
        return compare(options, Path(work))


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except EngineError as error:
        sys.exit(f"kl.py: {error}")
