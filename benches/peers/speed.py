#!/usr/bin/env python3
"""How fast is planish beside the other engines? Every program on the same two shapes (TinyLlama 1.1B and
GPT-2 124M, random weights), on the same cores, in one run.

    benches/peers/speed.py                          planish, llama.cpp and candle
    benches/peers/speed.py --torch                  transformers on PyTorch bf16 as well (a large download)
    IK_LLAMA_BENCH=PROGRAM benches/peers/speed.py   ik_llama.cpp as well, by its own llama-bench
    benches/peers/speed.py --only planish,llama.cpp --models gpt2 --types q4_k --rounds 7

A round runs each program once on each of its files, every other round in the opposite order, so that a
machine that slows down slows all of them. What is printed is the median over the rounds, with the range;
a ratio is the median of the ratios within the rounds. Prefill is a prompt of 512 tokens read at once,
decode 64 tokens one by one. The peers decode from an empty cache; planish decodes after its prompt, which
is the harder case. For planish the time from its start to its first token is taken too, the file being in the
system's cache.

Then come the bars. Exit 0: each was measured and passed. 1: one failed, or a program did. 3: none failed, but some were not
measured, because a program or a type was left out. A peer that is 20 % slower than it was when the bars
were set was not set up right, or the machine is busy: that is printed as a warning.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from engines import CACHE, HERE, PROJECT, EngineError, LlamaCpp, run, table
from shapes import SHAPES, gguf, model_directory, repeating

ROOT = CACHE.parent
PROMPT, TOKENS = 512, 64
LONG_PROMPT, SHORT_PROMPT, TOGETHER = 4096, 64, 8
LONG = "long and together"
START = "to first token"
REPEATED, GUESSED = "text that repeats itself", "text that repeats itself, --lookup"
TORCH_PACKAGES = ("torch==2.15.0", "transformers==5.24.0")

# What the peers are timed on where planish has this storage; a storage that is not here has bars on
# planish's own share of the machine only.
PEER_STORAGE = {"q4_k": "q4_k_m", "q8_0": "q8_0", "bf16": "bf16"}
TYPES = ("q4_k", "q8_0", "bf16", "q2_k", "q3_k", "q5_k", "q6_k")

# Measured on 2 cores of a Zen 4, tokens/s: (prefill, decode), 512 and 64 tokens except candle's, which
# are of 128 and 32 (its attention makes it slower on longer ones), and PyTorch's decode, of 32.
ZEN4_TWO_CORES = {
    "tinyllama": {
        "llama.cpp q4_k_m": (127, 51.1), "llama.cpp q8_0": (98, 24.4), "llama.cpp bf16": (130, 15.4),
        "candle q4_k_m": (190, 24.7), "candle q8_0": (140, 19), "PyTorch bf16": (171, 9.6),
        "ik_llama.cpp q4_k_m": (181, 46),
    },
    "gpt2": {
        "llama.cpp q4_k_m": (1089, 234), "llama.cpp q8_0": (902, 159), "llama.cpp bf16": (938, 132),
        "PyTorch bf16": (1443, 48),
    },
}


@dataclass
class Cell:
    """One program on one file, and what it said in each round."""
    program: str
    storage: str
    file: Path
    command: list
    read: object  # standard output to {"prefill", "decode", ...}
    environment: dict = field(default_factory=dict)
    runs: list = field(default_factory=list)
    failed: bool = False

    @property
    def name(self):
        return f"{self.program} {self.storage}"

    def column(self, key):
        return [run[key] for run in self.runs]


@dataclass(frozen=True)
class Bar:
    """What `ours` must reach in `key`: `limit` times the best of `peers`, round by round, or `limit`
    itself where there are none; with `at_most`, what it must not pass."""
    model: str
    key: str
    ours: str
    limit: float
    peers: tuple = ()
    what: str = ""
    at_most: bool = False

    def value(self, cells):
        """None where a part of it was not measured."""
        if not all(name in cells for name in (self.ours, *self.peers)):
            return None
        ours = cells[self.ours].column(self.key)
        if not self.peers:
            return statistics.median(ours)
        best = [max(rates) for rates in zip(*(cells[name].column(self.key) for name in self.peers))]
        return statistics.median(mine / theirs for mine, theirs in zip(ours, best))

    def verdict(self, cells):
        value = self.value(cells)
        if value is None:
            return None
        return value <= self.limit if self.at_most else value >= self.limit


ALL_PEERS = ("candle q4_k_m", "candle q8_0", "PyTorch bf16", "llama.cpp q4_k_m", "llama.cpp q8_0", "llama.cpp bf16")
BARS = (
    Bar("tinyllama", "prefill", "planish q4_k", 2.2, ("llama.cpp q4_k_m",)),
    Bar("tinyllama", "prefill", "planish q4_k", 1.4, ALL_PEERS, "the best peer of any format"),
    Bar("tinyllama", "prefill", "planish q8_0", 2.5, ("llama.cpp q8_0",)),
    Bar("tinyllama", "prefill", "planish bf16", 1.1, ("PyTorch bf16",)),
    Bar("tinyllama", "prefill", "planish q4_k", 1.5, ("ik_llama.cpp q4_k_m",)),
    Bar("tinyllama", "decode", "planish q4_k", 1.4, ("llama.cpp q4_k_m",)),
    Bar("tinyllama", "decode", "planish q8_0", 1.7, ("llama.cpp q8_0",)),
    Bar("tinyllama", "decode", "planish bf16", 1.4, ("llama.cpp bf16",)),
    Bar("tinyllama", "decode", "planish q4_k", 1.1, ("ik_llama.cpp q4_k_m",)),
    Bar("gpt2", "decode", "planish q4_k", 2.0, ("llama.cpp q4_k_m",)),
    Bar("tinyllama", "share_of_peak", "planish q4_k", 0.55),
    Bar("tinyllama", "share_of_peak", "planish bf16", 0.80),
    *(Bar("tinyllama", "share_of_bandwidth", f"planish {storage}", 0.80) for storage in ("q4_k", "q8_0", "bf16")),
    *(Bar("tinyllama", "share_of_bandwidth", f"planish {storage}", 0.70)
      for storage in ("q2_k", "q3_k", "q5_k", "q6_k")),
    # The same against the reads right before and after: where memory changes its speed between rounds, as it does
    # under neighbours, the best of all reads is no limit of the others.
    *(Bar("tinyllama", "share_beside", f"planish {storage}", 0.80) for storage in ("q4_k", "q8_0", "bf16")),
    *(Bar("tinyllama", "seconds", f"planish {storage} {START}", seconds, at_most=True)
      for storage, seconds in (("q4_k", 0.3), ("q8_0", 0.45), ("bf16", 0.7))),
    *(Bar("tinyllama", "share_of_allowed_memory", f"planish {storage} {START}", 1.0, at_most=True)
      for storage in ("q4_k", "q8_0", "bf16")),
)
LONG_BARS = (
    Bar("tinyllama", "after_long", f"planish q4_k {LONG}", 0.8, what=f"decode after {LONG_PROMPT} tokens over after {SHORT_PROMPT}"),
    Bar("tinyllama", "together", f"planish q4_k {LONG}", 3.0, what=f"decode of {TOGETHER} texts over one"),
    Bar("tinyllama", "decode", f"planish q4_k {GUESSED}", 1.5, (f"planish q4_k {REPEATED}",)),
)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=words(SHAPES), default=list(SHAPES))
    parser.add_argument("--types", type=words(TYPES), default=list(TYPES), help="of planish's files")
    parser.add_argument("--only", type=words(PROGRAMS), default=list(PROGRAMS), help="these programs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch", action="store_true", help="time PyTorch too; $PLANISH_TORCH_PYTHON may "
                        "name a Python that has torch and transformers, otherwise one is made")
    parser.add_argument("--long", action="store_true", help="planish's decode after 4,096 tokens, of eight texts, and of "
                        "a text that repeats itself, too")
    parser.add_argument("--planish", type=Path, default=PROJECT / "target" / "release" / "planish")
    parser.add_argument("--work", type=Path, default=ROOT / "speed", help="the models are made and kept here (13 GB)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads start at 1")
    return options


def words(known):
    def parse(text):
        chosen = text.split(",")
        strangers = [word for word in chosen if word not in known]
        if strangers:
            raise argparse.ArgumentTypeError(f"no such thing as {', '.join(strangers)}; there are {', '.join(known)}")
        return chosen
    return parse


def read_planish(printed):
    said = json.loads(printed)
    return {**shares(said), "decode": said["contexts"][0]["tokens_per_second"], "limits": said["limits"]}


def shares(said):
    """Prefill, and the shares of the machine's limits."""
    return {"prefill": said["prefill"]["tokens_per_second"], "share_of_peak": said["prefill"]["share_of_peak"],
            "share_of_bandwidth": said["decode"]["share_of_bandwidth"],
            "share_beside": said["decode"]["share_beside"]}


def read_start(printed):
    """Nothing but that it wrote its object: the time and the memory are the system's count."""
    json.loads(printed)
    return {}


def read_generated(printed):
    return {"decode": json.loads(printed)["tokens_per_second"]}


def read_long(printed):
    """Ratios to the plain decode of the same rounds."""
    said = json.loads(printed)
    return {**shares(said), "decode": said["decode"]["tokens_per_second"],
            "after_long": said["contexts"][0]["ratio"], "together": said["sequences"][0]["ratio"]}


def read_llama_bench(printed):
    """One object per test; the one with a prompt is the prefill."""
    rates = {"prefill" if test["n_prompt"] else "decode": test["avg_ts"] for test in json.loads(printed)}
    return {"prefill": rates["prefill"], "decode": rates["decode"]}


def pinned(threads):
    """For programs whose threads are OpenMP's and that have no option for it: one thread per core."""
    places = ",".join(f"{{{core}}}" for core in range(threads))
    return {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_PLACES": places}


class Bench:
    """The programs, found or built where they are asked for, and the files that they read."""

    def __init__(self, options):
        self.options, self.threads = options, options.threads
        # A build of the project meanwhile must not replace the program that is timed.
        self.planish = options.work / "planish"
        if not options.planish.exists():
            raise EngineError(f"{options.planish} is not there; run cargo build --release")
        shutil.copy2(options.planish, self.planish)
        self.llama_cpp = LlamaCpp("native", options.threads).bin

    def file(self, shape, storage):
        return gguf(shape, storage, self.options.work, self.planish, self.llama_cpp / "llama-quantize")

    def planish_cells(self, shape, storage):
        """On its own file, and on llama.cpp's mixture where that is what the peers get."""
        for kind in dict.fromkeys((storage, PEER_STORAGE.get(storage, storage))):
            yield self.planish_cell(shape, kind)
        file = self.file(shape, storage)
        yield Cell("planish", f"{storage} {START}", file, [
            self.planish, "generate", file, "--prompt", "a", "--tokens", 1, "--threads", self.threads, "--json"], read_start)
        if self.options.long and (shape.name, storage) == ("tinyllama", "q4_k"):
            yield Cell("planish", f"{storage} {LONG}", file, [
                self.planish, "bench", file, "--prefill", SHORT_PROMPT, "--decode", TOKENS, "--context", LONG_PROMPT,
                "--sequences", TOGETHER, "--threads", self.threads, "--json"], read_long)
            file = self.file(repeating(), storage)
            for kind, more in ((REPEATED, ()), (GUESSED, ("--lookup",))):
                yield Cell("planish", f"{storage} {kind}", file, [
                    self.planish, "generate", file, "--prompt", "aa", "--tokens", 4 * TOKENS, *more, "--threads", self.threads,
                    "--json"], read_generated)

    def planish_cell(self, shape, storage):
        """One run after one that warms up: the rounds are the repetitions. llama-bench generates without a prompt, so
        decode is compared after one token; the shares are of decode after the prompt."""
        file = self.file(shape, storage)
        command = [self.planish, "bench", file, "--prefill", PROMPT, "--decode", TOKENS, "--context", 1, "--runs", 1,
                   "--threads", self.threads, "--json"]
        return Cell("planish", storage, file, command, read_planish)

    def llama_cpp_cells(self, shape, storage):
        if storage in PEER_STORAGE:
            file = self.file(shape, PEER_STORAGE[storage])
            command = [self.llama_cpp / "llama-bench", "-m", file, "-t", self.threads, "-C",
                       hex((1 << self.threads) - 1), "--cpu-strict", 1, "-p", PROMPT, "-n", TOKENS, "-r", 1, "-o", "json"]
            yield Cell("llama.cpp", PEER_STORAGE[storage], file, command, read_llama_bench)

    def candle_cells(self, shape, storage):
        """candle has no quantized GPT-2, and widens bf16 to f32."""
        if shape.name == "tinyllama" and storage in ("q4_k", "q8_0"):
            program = run([HERE / "candle.sh"]).strip()
            file = self.file(shape, PEER_STORAGE[storage])
            count = str(self.threads)
            yield Cell("candle", PEER_STORAGE[storage], file, [program, file, PROMPT, TOKENS], json.loads,
                       {"RAYON_NUM_THREADS": count, "CANDLE_NUM_THREADS": count})

    def torch_cells(self, shape, storage):
        if self.options.torch and storage == "bf16":
            folder = model_directory(shape, self.options.work)
            command = [torch_python(), HERE / "pytorch.py", folder, PROMPT, TOKENS, self.threads]
            yield Cell("PyTorch", "bf16", folder / "model.safetensors", command, json.loads, pinned(self.threads))

    def ik_cells(self, shape, storage):
        """ik_llama.cpp reads no GPT-2 with a tied head. Weights are repacked at load, which is its fastest way."""
        program = os.environ.get("IK_LLAMA_BENCH")
        if program and shape.name == "tinyllama" and storage == "q4_k":
            file = self.file(shape, PEER_STORAGE[storage])
            command = [program, "-m", file, "-t", self.threads, "-rtr", 1, "-p", PROMPT, "-n", TOKENS, "-r", 1, "-o", "json"]
            yield Cell("ik_llama.cpp", PEER_STORAGE[storage], file, command, read_llama_bench, pinned(self.threads))

    def cells(self, shape):
        """In the order of a round: what is compared stands side by side."""
        programs = [PROGRAMS[name] for name in PROGRAMS if name in self.options.only]
        return [cell for storage in self.options.types for make in programs for cell in make(self, shape, storage)]


PROGRAMS = {"planish": Bench.planish_cells, "llama.cpp": Bench.llama_cpp_cells, "candle": Bench.candle_cells,
            "PyTorch": Bench.torch_cells, "ik_llama.cpp": Bench.ik_cells}


def torch_python():
    """A Python with PyTorch: the one that is named, or one that is made in the cache, once."""
    if named := os.environ.get("PLANISH_TORCH_PYTHON"):
        return named
    folder = ROOT / "pytorch" / "venv"
    python = folder / "bin" / "python"
    if not python.exists():
        print("installing PyTorch and transformers", file=sys.stderr)
        run([sys.executable, "-m", "venv", folder])
    run([python, "-m", "pip", "install", "-q", *TORCH_PACKAGES])
    return python


def warm(file):
    """Brings a file into the system's cache, so that no program waits for the disk."""
    with open(file, "rb", buffering=0) as source:
        chunk = bytearray(1 << 20)
        while source.readinto(chunk):
            pass


def whole_text(file):
    file.seek(0)
    return file.read().decode(errors="replace")


def allowed_memory(file):
    """The file, 5 % and 48 MiB; the cache of a few tokens is far below a MiB."""
    return 1.05 * file.stat().st_size + 48 * 2**20


def take(cell):
    """Runs a cell and notes what it said, how long it ran, and the most memory that it held."""
    words = [str(word) for word in cell.command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        warm(cell.file)
        begin = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=err, env={**os.environ, **cell.environment})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        printed, said = whole_text(out), whole_text(err)
    if process.returncode != 0:
        raise EngineError(f"exit {process.returncode}: {' '.join(words)}\n{(printed + said)[-800:]}")
    try:
        measured = cell.read(printed)
    except (ValueError, KeyError) as error:
        raise EngineError(f"{' '.join(words)} printed something else: {error!r}\n{printed[-400:]}")
    rss = usage.ru_maxrss * 1024
    cell.runs.append({**measured, "seconds": seconds, "peak_rss_bytes": rss,
                      "share_of_allowed_memory": rss / allowed_memory(cell.file)})


def take_rounds(cells, options):
    """Every cell once per round, all models, every other round backwards, on the first cores only. One that
    fails is left out from then on: it must not cost what the others have shown."""
    os.sched_setaffinity(0, range(options.threads))
    for turn in range(options.rounds):
        begin = time.monotonic()
        for cell in cells if turn % 2 == 0 else reversed(cells):
            try:
                if not cell.failed:
                    take(cell)
            except EngineError as error:
                cell.failed = True
                print(f"{cell.name} is left out: {error}", file=sys.stderr, flush=True)
        print(f"round {turn + 1} of {options.rounds}: {time.monotonic() - begin:.0f} s, "
              f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        if options.json:
            # What was measured is kept, whatever becomes of the rest.
            options.json.write_text(json.dumps({f"{cell.file.name}: {cell.name}": cell.runs for cell in cells}, indent=1))


def spread(values):
    middle = statistics.median(values)
    digits = 0 if middle >= 200 else 1
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def counterpart(cell, cells):
    """planish's cell that a peer's is held against."""
    ours = next((kind for kind, theirs in PEER_STORAGE.items() if theirs == cell.storage), None)
    return cells.get(f"planish {ours}") if cell.program != "planish" else None


def show(name, cells):
    apart = (read_start, read_generated)
    show_speeds(name, {key: cell for key, cell in cells.items() if cell.read not in apart})
    starts, generated = ([cell for cell in cells.values() if cell.read is read] for read in apart)
    if starts:
        print(f"\n{name}, from the start of the program to the first token")
        table(["program", "file", "MB", "ms: median (range)", "peak RSS MiB"],
              [(cell.program, cell.file.name, f"{cell.file.stat().st_size / 1e6:.0f}",
                spread([1000 * seconds for seconds in cell.column("seconds")]), mebibytes(cell)) for cell in starts])


    if generated:
        print(f"\n{name}, {4 * TOKENS} tokens of `generate`")
        table(["program", "format", "tokens/s: median (range)"],
              [(cell.program, cell.storage, spread(cell.column("decode"))) for cell in generated])


def mebibytes(cell):
    return f"{statistics.median(cell.column('peak_rss_bytes')) / 2**20:.0f}"


def show_speeds(name, cells):
    rows = []
    for cell in cells.values():
        ours = counterpart(cell, cells)
        ratios = [f"{statistics.median(a / b for a, b in zip(ours.column(key), cell.column(key))):.2f}" if ours else ""
                  for key in ("prefill", "decode")]
        shares = [f"{100 * statistics.median(cell.column(key)):.0f} %" if cell.program == "planish" else ""
                  for key in ("share_of_peak", "share_of_bandwidth", "share_beside")]
        rows.append((cell.program, cell.storage, cell.file.name, f"{cell.file.stat().st_size / 1e6:.0f}",
                     spread(cell.column("prefill")), shares[0], spread(cell.column("decode")), shares[1], shares[2],
                     mebibytes(cell), *ratios))
    print(f"\n{name}, tokens/s: median (range); the last two columns are planish / peer")
    table(["program", "format", "file", "MB", f"prefill {PROMPT}", "of peak", f"decode {TOKENS}", "of bandwidth", "of reads beside",
           "peak RSS MiB", "prefill", "decode"], rows)


def warn_of_slow_peers(name, cells):
    """Zen 4 with two cores is what the figures are of; elsewhere they are no measure."""
    for peer, expected in ZEN4_TWO_CORES[name].items():
        for key, figure in zip(("prefill", "decode"), expected):
            got = statistics.median(cells[peer].column(key)) if peer in cells else figure
            if got < 0.8 * figure:
                print(f"warning: {name}, {peer}, {key}: {got:.1f} tokens/s, {figure} were measured on 2 cores of a Zen 4; "
                      "on such a machine, it was not set up right or the machine is busy", file=sys.stderr)


def judge(bars, models):
    """Prints the bars; returns the verdicts: True, False, or None where nothing was measured."""
    rows, verdicts = [], []
    for bar in bars:
        cells = models.get(bar.model, {})
        value, verdict = bar.value(cells), bar.verdict(cells)
        unit = {True: " x", False: " s" if bar.key == "seconds" else ""}[bool(bar.peers)]
        rows.append((bar.model, bar.key.replace("_", " "), bar.ours, bar.what or ", ".join(bar.peers),
                     f"{'at most' if bar.at_most else 'at least'} {bar.limit:.2f}{unit}",
                     "-" if value is None else f"{value:.2f}{unit}",
                     {True: "pass", False: "FAIL", None: "not measured"}[verdict]))
        verdicts.append(verdict)
    print()
    table(["model", "of", "ours", "against", "bar", "measured", "verdict"], rows)
    return verdicts


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(path, options, models, bars, verdicts):
    said = {
        "machine": processor(), "threads": options.threads, "rounds": options.rounds,
        "models": {name: [{"program": cell.program, "format": cell.storage, "file": cell.file.name,
                           "file_bytes": cell.file.stat().st_size, "command": [str(word) for word in cell.command],
                           "runs": cell.runs} for cell in cells.values()] for name, cells in models.items()},
        "bars": [{"model": bar.model, "of": bar.key, "ours": bar.ours, "peers": bar.peers,
                  "at_most" if bar.at_most else "at_least": bar.limit,
                  "measured": bar.value(models.get(bar.model, {})), "passed": verdict}
                 for bar, verdict in zip(bars, verdicts)],
    }
    path.write_text(json.dumps(said, indent=1) + "\n")


def main():
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    models = {name: {cell.name: cell for cell in bench.cells(SHAPES[name]())} for name in options.models}
    everything = [cell for cells in models.values() for cell in cells.values()]
    take_rounds(everything, options)
    models = {name: {key: cell for key, cell in cells.items() if not cell.failed} for name, cells in models.items()}
    for name, cells in models.items():
        show(name, cells)
    bars = [*BARS, *LONG_BARS] if options.long else BARS
    verdicts = judge(bars, models)
    for name, cells in models.items():
        warn_of_slow_peers(name, cells)
    if options.json:
        write_json(options.json, options, models, bars, verdicts)
    return 1 if False in verdicts or any(cell.failed for cell in everything) else 3 if None in verdicts else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EngineError as error:
        sys.exit(f"speed.py: {error}")
