"""The two engines that these benches hold against each other, llama.cpp and planish, as programs
that are run, and the numbers that compare their logits. Knows no model and no bar: those are in
`kl.py` and `quality.py`.

Importing it makes sure that numpy is there, in the environment that llamacpp.sh keeps in the cache,
so that the benches need nothing but Python.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
DATA = Path(os.environ.get("PLANISH_DATA", PROJECT.parent / "shared" / "data"))
CACHE = Path(os.environ.get("PLANISH_CACHE", Path.home() / ".cache" / "planish")) / "llamacpp"

# The name of a storage type for planish, for `llama-quantize`, and inside llama.cpp's type options.
# The `_S` recipes under `--pure` store every matrix in the one type.
TYPES = {
    "f32": ("F32", "f32"),
    "f16": ("F16", "f16"),
    "bf16": ("BF16", "bf16"),
    "q8_0": ("Q8_0", "q8_0"),
    "q4_0": ("Q4_0", "q4_0"),
    "q4_1": ("Q4_1", "q4_1"),
    "q5_0": ("Q5_0", "q5_0"),
    "q5_1": ("Q5_1", "q5_1"),
    "q2_k": ("Q2_K", "q2_K"),
    "q3_k": ("Q3_K_S", "q3_K"),
    "q4_k": ("Q4_K_S", "q4_K"),
    "q5_k": ("Q5_K_S", "q5_K"),
    "q6_k": ("Q6_K", "q6_K"),
    "iq4_nl": ("IQ4_NL", "iq4_nl"),
    **{name: (name.upper(), name) for name in (
        "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs", "tq1_0", "tq2_0")},
}


class EngineError(RuntimeError):
    """A program of an engine failed; the message holds its command and its last words."""


def run(command, threads=None):
    """Runs a program and returns what it printed on standard output; standard error is kept for the
    message of a failure."""
    # Two thread pools, ggml's and OpenBLAS's, must not spin against each other on few cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if threads:
        environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = str(threads)
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise EngineError(f"exit {done.returncode}: {' '.join(words)}\n{said}")
    return done.stdout


def need_numpy():
    """Restarts the running script under the cached environment when this Python has no numpy."""
    try:
        import numpy  # noqa: F401
        return
    except ImportError:
        pass
    python = CACHE / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", CACHE / "venv"], check=True)
    if subprocess.run([python, "-c", "import numpy"], capture_output=True).returncode != 0:
        subprocess.run([python, "-m", "pip", "install", "-q", "numpy"], check=True)
    if Path(sys.prefix).resolve() == (CACHE / "venv").resolve():
        sys.exit("engines.py: numpy is installed in the cache's environment but does not import")
    os.execv(python, [str(python), *sys.argv])


need_numpy()
import numpy as np  # noqa: E402


# Without weights laid out anew: ggml's AMX products crash on IQ4_XS (0.3.36).
PLAIN = ("--no-repack",)


class LlamaCpp:
    """llama.cpp as llamacpp.sh builds it. `kind` is `native` or `exact`; see there."""

    def __init__(self, kind, threads=2):
        self.kind, self.threads = kind, threads
        built = subprocess.run([HERE / "llamacpp.sh", kind], stdout=subprocess.PIPE, text=True)
        if built.returncode != 0:
            raise EngineError("llamacpp.sh could not build llama.cpp")
        self.bin = Path(built.stdout.strip())

    def logits(self, gguf, documents, out):
        """f32 logits [tokens, vocabulary] of every position of `documents`, lists of token ids."""
        listing = Path(out).with_suffix(".documents")
        with open(listing, "wb") as file:
            for ids in documents:
                file.write(struct.pack("<I", len(ids)) + np.asarray(ids, "<u4").tobytes())
        run([self.bin / "logits", gguf, listing, out, self.threads], self.threads)
        return as_rows(out, sum(map(len, documents)))

    def token_ids(self, gguf, text):
        """The ids of one document, special tokens in it parsed, with BOS where the file asks for it."""
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", suffix=".txt") as file:
            file.write(text)
            file.flush()
            printed = run([self.bin / "llama-tokenize", "-m", gguf, "-f", file.name, "--ids", "--log-disable"])
        return json.loads(printed)

    def quantize(self, base, storage, out, imatrix=None, table=None):
        """Every matrix of `base`, embedding and head included, in one type, by llama-quantize; the table of the embedding
        in another one where `table` names it."""
        recipe, ggml = TYPES[storage]
        looked_up = TYPES[table or storage][1]
        command = [self.bin / "llama-quantize", "--pure"]
        if imatrix:
            command += ["--imatrix", imatrix]
        command += ["--token-embedding-type", looked_up, "--output-tensor-type", looked_up]
        run([*command, base, out, recipe, self.threads])

    def imatrix(self, base, text, context, out, *more):
        """The importance matrix of `base` on `text`; special tokens in the text are parsed, so the
        documents can be separated by the model's own end and start."""
        run([self.bin / "llama-imatrix", "-m", base, "-f", text, "-o", out, "-c", context,
             "-b", context, "-t", self.threads, "--parse-special", "--process-output", "--no-ppl",
             "-ngl", 0, *more], self.threads)

    def perplexity_base(self, base, text, context, out):
        """Stores the base model's probabilities on `text` for `kl_divergence`."""
        run([self.bin / "llama-perplexity", "-m", base, "-f", text, "-c", context, "-b", context,
             "-t", self.threads, "-ngl", 0, *PLAIN, "--kl-divergence-base", out], self.threads)

    def kl_divergence(self, gguf, stored, context):
        """Mean KL as llama-perplexity prints it (second half of every chunk). Its log is written by a
        thread that it does not always wait for at exit, so a run whose end is missing is repeated."""
        command = [self.bin / "llama-perplexity", "-m", gguf, "-c", context, "-b", context,
                   "-t", self.threads, "-ngl", 0, *PLAIN, "--kl-divergence", "--kl-divergence-base", stored]
        for _ in range(5):
            for line in run(command, self.threads).splitlines():
                if line.startswith("Mean") and "KLD:" in line:
                    return float(line.split("KLD:")[1].split()[0])
        raise EngineError(f"llama-perplexity printed no mean KLD for {gguf}")


class Planish:
    """The program of this project, as a user runs it."""

    def __init__(self, program, threads=2):
        self.program, self.threads = program, threads

    def call(self, *arguments):
        """One command with `--json`; returns the object that it printed."""
        printed = run([self.program, *arguments, "--threads", self.threads, "--json"])
        try:
            return json.loads(printed)
        except ValueError as error:
            raise EngineError(f"planish {arguments[0]} --json printed no JSON: {error}\n{printed[-600:]}")

    def export(self, model, storage, out):
        """Round-to-nearest GGUF of one type."""
        return self.call("export", model, "--to", "gguf", "--type", storage, "--out", out, "--overwrite")

    def quantize(self, model, storage, text, out, method="gptq", table=None):
        """Every matrix on one GGUF grid, calibrated on `text`."""
        other = ["--override", f"embed={table}", ] if table else []
        return self.call("quantize", model, "--method", method, *other, "--storage", storage,
                         "--data", text, "--out", out, "--overwrite")

    def evaluate(self, model, text, *more):
        return self.call("evaluate", model, "--data", text, *more)

    def logits(self, model, text, out):
        """f32 logits [tokens, vocabulary] and the ids that planish fed, both as it dumps them."""
        self.evaluate(model, text, "--logits", out)
        ids = read_ids(out)
        return as_rows(out, len(ids)), ids


SEPARATOR = "<|endoftext|>"


def documents_of(text, separator=SEPARATOR):
    """The documents of a text as planish cuts it: between separators, stripped, empty ones dropped."""
    return [document for document in (part.strip() for part in text.split(separator)) if document]


def read_ids(dump):
    """The ids beside a dump of logits: `OUT.ids` for `OUT.f32`."""
    for place in (Path(dump).with_suffix(".ids"), Path(f"{dump}.ids")):
        if place.exists():
            return np.fromfile(place, "<u4")
    raise EngineError(f"no ids beside {dump}")


def as_rows(dump, tokens):
    values = np.fromfile(dump, "<f4")
    if tokens == 0 or len(values) % tokens:
        raise EngineError(f"{dump}: {len(values)} numbers do not make {tokens} rows")
    rows = values.reshape(tokens, -1)
    if not np.isfinite(rows).all():
        raise EngineError(f"{dump}: a logit is not finite")
    return rows


def split_documents(ids, bos):
    """Cuts a run of ids where a document starts, which is at every BOS."""
    starts = [int(at) for at in np.flatnonzero(ids == bos)]
    if not starts or starts[0] != 0:
        raise EngineError(f"the first id is not BOS ({bos}); this bench needs a model whose tokenizer adds it")
    return [ids[start:end] for start, end in zip(starts, starts[1:] + [len(ids)])]


def positions_that_predict(documents):
    """A mask over all tokens: the last one of a document predicts nothing that is in the text."""
    keep = np.ones(sum(map(len, documents)), bool)
    keep[np.cumsum([len(ids) for ids in documents]) - 1] = False
    return keep


def log_probabilities(rows):
    rows = rows.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def mean_kl(original, other, keep=slice(None)):
    """Mean over positions of KL(original || other), in nats, summed in f64."""
    total, count = 0.0, 0
    original, other = original[keep], other[keep]
    for at in range(0, len(original), 512):
        p = log_probabilities(original[at:at + 512])
        q = log_probabilities(other[at:at + 512])
        total += float((np.exp(p) * (p - q)).sum())
        count += len(p)
    return total / count


def table(header, rows):
    """Prints a Markdown table with aligned columns."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(lines), flush=True)
