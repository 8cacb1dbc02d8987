#!/usr/bin/env python3
"""In every GGUF type, how much closer to the original is planish (`gptaq`) than llama.cpp's own
quantization with an importance matrix?

Both sides get the same calibration text, and store every matrix, embedding and head included, in the
one type. The results are held against the original on text that neither side has seen, in three ways
that do not share code:

    evaluate      `planish evaluate FILE --against MODEL` (all of the evaluation text)
    exact         KL over llama.cpp's f32 logits of whole documents (see llamacpp.sh)
    perplexity    `llama-perplexity --kl-divergence`, 8-bit activations and all, as its users see it

The bar: planish's mean KL is at most 0.85 of llama.cpp's by each of them, its file no larger by more than 0.5 %.

    benches/peers/quality.py [--models mix7m,babyllama105] [--types q4_k] [--work DIR]
    benches/peers/quality.py --peer-only --base F32.gguf --models mix7m      llama.cpp's numbers alone

Exits with 1 when a type misses the bar.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engines import (DATA, PROJECT, SEPARATOR, EngineError, LlamaCpp, Planish, documents_of, mean_kl, np,
                     positions_that_predict, table)


# Types that llama-quantize gives no table of an embedding, for which its importance matrix has no entry: both sides store
# that one in Q4_K.
NOT_FOR_TABLES = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s")


def table_of(storage):
    return "q4_k" if storage in NOT_FOR_TABLES else None


@dataclass
class Case:
    """A model, the types that the bar names for it, and its texts."""
    name: str
    types: tuple
    context: int
    calibration: list  # documents
    evaluation: list
    exact_every: int  # of the evaluation's documents, one in so many goes through the exact engine

    @property
    def model(self):
        return DATA / "models" / f"{self.name}-hf"


def byte_of_character():
    """GPT-2's table of printable stand-ins for bytes, the wrong way round."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


def decode_stream(model, ids, piece):
    """The texts of a stream of `<s> ... </s>` documents under a byte-level tokenizer, longer ones cut
    into pieces of `piece` tokens so that none is lost to the context."""
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    specials = {token["id"] for token in tokenizer["added_tokens"]}
    token = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    byte = byte_of_character()
    documents, document = [], []
    for number in [*ids.tolist(), min(specials)]:
        if number in specials or len(document) == piece:
            text = bytes(byte[character] for i in document for character in token[i])
            documents.append(text.decode("utf-8", errors="ignore").strip())
            document = []
        if number not in specials:
            document.append(number)
    return [text for text in documents if text]


def mix7m():
    folder = DATA / "text" / "mix-eval"
    stream = np.fromfile(folder / "train-tokens.u16", "<u2", count=70_000)
    evaluation = [document for file in sorted(folder.glob("eval-*.txt"))
                  for document in documents_of(file.read_text(encoding="utf-8"))]
    calibration = decode_stream(DATA / "models" / "mix7m-hf", stream, 500)
    types = ("q4_k", "q6_k", "q3_k", "q5_k", "q2_k", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m",
             "iq1_s", "tq2_0")
    return Case("mix7m", types, 512, calibration, evaluation, 6)


def babyllama105():
    """Stories cut to the context: 100 to judge by, 300 to calibrate on. The tokens are 102 characters;
    llama.cpp's tokenizer throws on any other where a vocabulary has no byte tokens, so line ends
    become spaces and a story with another stranger in it is left out."""
    known = json.loads((DATA / "models" / "babyllama105-hf" / "tokenizer.json").read_text(encoding="utf-8"))
    known = set(known["model"]["vocab"]) | {" "}
    text = (DATA / "text" / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8", errors="ignore")
    stories = [" ".join(story.split())[:250].strip() for story in documents_of(text)[1:]]
    stories = [story for story in stories if set(story) <= known][:400]
    return Case("babyllama105", ("q4_0", "q5_0", "iq4_nl"), 256, stories[100:], stories[:100], 1)


CASES = {"mix7m": mix7m, "babyllama105": babyllama105}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--types", help="instead of those that the bar names")
    parser.add_argument("--method", default="gptaq", help="planish's")
    parser.add_argument("--base", type=Path, help="an F32 GGUF of the one model, instead of planish's export")
    parser.add_argument("--peer-only", action="store_true", help="measure llama.cpp's side alone")
    parser.add_argument("--planish", type=Path, default=PROJECT / "target" / "release" / "planish")
    parser.add_argument("--work", type=Path, help="keep the files here (default: a temporary folder)")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class Bench:
    """One case: its texts on disk, the base model in every form, the measurements of a file."""

    def __init__(self, case, options, work):
        self.case, self.options, self.work = case, options, work
        self.native = LlamaCpp("native", options.threads)
        self.exact = LlamaCpp("exact", options.threads)
        self.planish = None if options.peer_only else Planish(options.planish, options.threads)
        self.calibration = self.write("calibration.txt", case.calibration, f"\n{SEPARATOR}\n")
        self.evaluation = self.write("evaluation.txt", case.evaluation, f"\n{SEPARATOR}\n")
        self.base = options.base or work / "base.gguf"
        if not options.base:
            self.planish.export(case.model, "f32", self.base)

    def write(self, name, documents, separator):
        path = self.work / name
        path.write_text(separator.join(documents), encoding="utf-8")
        return path

    def prepare(self):
        """What is the same for every type: the importance matrix and the base model's probabilities.
        llama.cpp sees the documents as the model was trained on them, between its own end and start."""
        settings = json.loads((self.case.model / "tokenizer_config.json").read_text(encoding="utf-8"))
        between = settings["eos_token"] + settings["bos_token"]
        text = self.write("calibration.llamacpp.txt", self.case.calibration, between)
        self.importance = self.work / "imatrix.gguf"
        self.native.imatrix(self.base, text, self.case.context, self.importance)
        plain = self.write("evaluation.llamacpp.txt", self.case.evaluation, " ")
        self.stored = self.work / "base.kld"
        self.native.perplexity_base(self.base, plain, self.case.context, self.stored)
        self.documents = [self.exact.token_ids(self.base, text)[:self.case.context]
                          for text in self.case.evaluation[::self.case.exact_every]]
        self.original = self.exact.logits(self.base, self.documents, self.work / "original.f32")
        self.keep = positions_that_predict(self.documents)

    def measure(self, file):
        """The mean KL of a file to the original by each harness, and its size as planish counts it."""
        rows = self.exact.logits(file, self.documents, self.work / "rows.f32")
        measured = {"exact": mean_kl(self.original, rows, self.keep),
                    "perplexity": self.native.kl_divergence(file, self.stored, self.case.context)}
        if self.planish:
            said = self.planish.evaluate(file, self.evaluation, "--against", self.case.model)
            measured["evaluate"] = said["against"]["kl_mean"]
            measured["size"] = said["size_bytes"]
        return measured

    def peer(self, storage):
        file = self.work / f"{storage}.llamacpp.gguf"
        self.native.quantize(self.base, storage, file, self.importance, table_of(storage))
        return file, self.measure(file)

    def ours(self, storage):
        file = self.work / f"{storage}.planish.gguf"
        self.planish.quantize(self.case.model, storage, self.calibration, file, self.options.method,
                              table_of(storage))
        return file, self.measure(file)


def show_peer(bench, types):
    rows = []
    for storage in types:
        file, measured = bench.peer(storage)
        rows.append((storage, file.stat().st_size, f"{measured['exact']:.6f}", f"{measured['perplexity']:.6f}"))
    table(["type", "bytes", "KL, exact", "KL, llama-perplexity"], rows)
    return True


def duel(bench, storage):
    """One row: both sides, the ratios of their KL, the verdict."""
    their_file, theirs = bench.peer(storage)
    our_file, ours = bench.ours(storage)
    ratios = [ours[harness] / theirs[harness] for harness in ("evaluate", "exact", "perplexity")]
    fits = ours["size"] <= theirs["size"] * 1.005
    held = fits and max(ratios) <= 0.85
    cells = [f"{ours[harness]:.6f} / {theirs[harness]:.6f} = {ratio:.3f}"
             for harness, ratio in zip(("evaluate", "exact", "perplexity"), ratios)]
    return (storage, our_file.stat().st_size, their_file.stat().st_size, f"{ours['size']} / {theirs['size']}",
            *cells, "pass" if held else "FAIL"), held


def judge(bench, types):
    rows, all_held = [], True
    for storage in types:
        try:
            row, held = duel(bench, storage)
        except EngineError as error:
            print(f"{storage}: {error}", file=sys.stderr)
            row, held = (storage, *["-"] * 6, "FAIL"), False
        # A run that is cut off keeps what it has shown.
        print(*row, sep="  ", file=sys.stderr, flush=True)
        rows.append(row)
        all_held = all_held and held
    table(["type", "file bytes, planish", "file bytes, llama.cpp", "tensor bytes", "KL by evaluate",
           "KL by exact logits", "KL by llama-perplexity", "bar"], rows)
    return all_held


def bench_case(name, options, work):
    case = CASES[name]()
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(case, options, folder)
    bench.prepare()
    print(f"\n{name}: {len(case.calibration)} documents to calibrate on, {len(case.evaluation)} to evaluate, "
          f"{int(bench.keep.sum())} tokens through the exact engine; KL as planish / llama.cpp = ratio")
    types = options.types.split(",") if options.types else case.types
    return show_peer(bench, types) if options.peer_only else judge(bench, types)


def main():
    options = arguments()
    names = options.models.split(",")
    if options.base and len(names) != 1:
        sys.exit("quality.py: --base is the file of one model; name that model with --models")
    if options.peer_only and not options.base:
        sys.exit("quality.py: --peer-only needs --base")
    if not (DATA / "models").exists():
        sys.exit("skipped: needs ../shared/data")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        return all([bench_case(name, options, work) for name in names])


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except EngineError as error:
        sys.exit(f"quality.py: {error}")
