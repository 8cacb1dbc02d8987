#!/usr/bin/env python3
"""Do planish and llama.cpp mean the same by an importance matrix?

Both gather one on the same tokens: sequences of the context, each begun with BOS, as `llama-imatrix`
cuts a text. Then each reads the other's:

    layout      the same metadata keys of the same types, the same tensors of the same shapes, equal counts
    values      the largest difference of a sum of squares, over the largest of its tensor, at most 1e-4
    theirs      `planish quantize --method imatrix --stats` with llama-imatrix's file, GGUF and the older
                .dat, has the same KL to the original as with planish's own, within 1 %
    ours        `llama-quantize --imatrix` takes planish's file and finds every matrix in it

llama.cpp runs as its `exact` build (see llamacpp.sh): its fast kernels round what the values are sums of.

    benches/peers/imatrix.py [--model DIR] [--text FILE] [--context N] [--planish BIN] [--work DIR]

Exits with 1 when one does not hold.
"""

import argparse
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from engines import DATA, PROJECT, EngineError, LlamaCpp, Planish, np, table

VALUES_BAR = 1e-4
KL_BAR = 0.01
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DATA / "models" / "mix7m-hf")
    parser.add_argument("--text", type=Path, default=DATA / "text" / "mix-eval" / "eval-medical.txt")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--planish", type=Path, default=PROJECT / "target" / "release" / "planish")
    parser.add_argument("--work", type=Path, help="keep the files here (default: a temporary folder)")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class Gguf:
    """The keys with their types, and the tensors, of a GGUF file of floats."""

    def __init__(self, path):
        self.bytes, self.at = Path(path).read_bytes(), 4
        if self.bytes[:4] != b"GGUF":
            raise EngineError(f"{path} is no GGUF file")
        _, tensors, keys = self.take("I"), self.take("Q"), self.take("Q")
        self.keys = {}
        for _ in range(keys):
            key, kind = self.text(), self.take("I")
            self.keys[key] = (kind, self.value(kind))
        infos = [self.info() for _ in range(tensors)]
        start = -(-self.at // 32) * 32
        self.tensors = {}
        for name, shape, kind, offset in infos:
            if kind != 0:
                raise EngineError(f"{path}: {name} is no F32")
            count = int(np.prod(shape))
            self.tensors[name] = np.frombuffer(self.bytes, "<f4", count, start + offset).reshape(shape)

    def take(self, kind):
        size = struct.calcsize("<" + kind)
        self.at += size
        return struct.unpack_from("<" + kind, self.bytes, self.at - size)[0]

    def text(self):
        length = self.take("Q")
        self.at += length
        return self.bytes[self.at - length:self.at].decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])

    def info(self):
        name, dimensions = self.text(), self.take("I")
        shape = [self.take("Q") for _ in range(dimensions)]
        return name, shape[::-1], self.take("I"), self.take("Q")


def excerpt(path):
    """A text without special tokens, long enough for some sequences."""
    return path.read_text(encoding="utf-8").replace("<|endoftext|>", " ")[:60_000]


class Comparison:
    def __init__(self, options, work):
        self.options, self.work = options, work
        self.planish, self.peer = Planish(options.planish, options.threads), LlamaCpp("exact", options.threads)
        self.base, self.text = work / "base.gguf", work / "text.txt"
        self.planish.export(options.model, "f32", self.base)
        self.text.write_text(excerpt(options.text), encoding="utf-8")
        self.ours, self.theirs, self.older = work / "ours.gguf", work / "theirs.gguf", work / "theirs.dat"
        self.failed = False

    def hold(self, what, measured, held):
        self.failed = self.failed or not held
        return what, measured, "pass" if held else "FAIL"

    def gather(self):
        context = self.options.context
        # Keys and values as they are: by default they are rounded to 16 bits, which the sums behind them show.
        plain = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
        self.peer.imatrix(self.base, self.text, context, self.theirs, *plain)
        self.peer.imatrix(self.base, self.text, context, self.older, "--output-format", "dat", *plain)
        ids = np.array(self.peer.token_ids(self.base, self.text.read_text(encoding="utf-8")))
        bos = ids[0]
        chunks = ids[:len(ids) // context * context].reshape(-1, context).copy()
        if (chunks.ravel()[1:] == bos).any():
            raise EngineError("the text holds a token that begins documents")
        chunks[:, 0] = bos
        tokens = self.work / "tokens.u16"
        chunks.astype("<u2").tofile(tokens)
        done = self.planish.call("calibrate", self.options.model, "--data", tokens, "--whole", "--calibration-tokens",
                                 chunks.size, "--out", self.ours, "--overwrite")
        if done["tokens"] != chunks.size:
            raise EngineError(f"planish read {done['tokens']} tokens, not {chunks.size}")
        return chunks.shape

    def layout(self):
        ours, theirs = Gguf(self.ours), Gguf(self.theirs)
        kinds = [[(key, kind) for key, (kind, _) in file.keys.items()] for file in (ours, theirs)]
        yield self.hold("metadata keys and types", ", ".join(ours.keys), kinds[0] == kinds[1])
        same = all(name in ours.tensors and ours.tensors[name].shape == values.shape
                   for name, values in theirs.tensors.items())
        more = sorted(set(ours.tensors) - set(theirs.tensors))
        yield self.hold("their tensors in ours", f"{len(theirs.tensors)}; ours alone: {more}", same)
        counts = [name for name in theirs.tensors if name.endswith(".counts")]
        yield self.hold("counts", f"{float(ours.tensors[counts[0]].ravel()[0]):.0f}",
                        all((ours.tensors[name] == theirs.tensors[name]).all() for name in counts))
        off = {name: float(np.abs(ours.tensors[name] - values).max() / values.max())
               for name, values in theirs.tensors.items() if name.endswith(".in_sum2")}
        worst = max(off, key=off.get)
        yield self.hold("largest difference of a sum", f"{off[worst]:.1e} ({worst})", off[worst] <= VALUES_BAR)

    def kl(self, stats):
        out = self.work / "quantized.gguf"
        self.planish.call("quantize", self.options.model, "--method", "imatrix", "--storage", "q3_k", "--stats", stats,
                          "--override", "embed=q6_k", "--data", self.options.text, "--out", out, "--overwrite")
        return self.planish.evaluate(out, self.options.text, "--against", self.options.model)["against"]["kl_mean"]

    def exchange(self):
        own = self.kl(self.ours)
        yield self.hold("KL in Q3_K with ours", f"{own:.6f}", True)
        for name, stats in (("theirs", self.theirs), ("their .dat", self.older)):
            kl = self.kl(stats)
            yield self.hold(f"KL in Q3_K with {name}", f"{kl:.6f}", abs(kl / own - 1) <= KL_BAR)
        command = [self.peer.bin / "llama-quantize", "--pure", "--imatrix", self.ours, self.base,
                   self.work / "peer.gguf", "Q3_K_S", self.options.threads]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
        said = done.stdout + done.stderr
        entries = len(Gguf(self.ours).tensors) // 2
        taken = done.returncode == 0 and f"{entries} entries" in said and "did not find weights" not in said
        yield self.hold("llama-quantize takes ours", f"exit {done.returncode}, {entries} entries", taken)


def main():
    options = arguments()
    if not (DATA / "models").exists():
        sys.exit("skipped: needs ../shared/data")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        comparison = Comparison(options, work)
        sequences, context = comparison.gather()
        print(f"{options.model.name}: {sequences} sequences of {context} tokens")
        table(["what", "measured", "bar"], [*comparison.layout(), *comparison.exchange()])
        return not comparison.failed


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except EngineError as error:
        sys.exit(f"imatrix.py: {error}")
