#!/usr/bin/env python3
"""Is the solver's answer better than the best uniform recipe of equal size?

For every uniform `gptq` recipe, `planish optimize` gets that recipe's size as its budget and the same text.
Both results are scored against the original on text that neither has seen. The bar: the solver's mean KL is at
most 0.9 of that of the best uniform recipe that is no larger.

    benches/solver.py [--model DIR --data FILE --unseen FILE] [--storages int4g32,q4_k] [--planish BINARY]

Without a model it takes mix7m-hf and babyllama105-hf of ../shared/data (or $PLANISH_DATA). Exits with 1 when
the bar is missed.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEPARATOR = "\n<|endoftext|>\n"


def planish(binary, *words):
    run = subprocess.run([binary, *map(str, words), "--json"], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"planish {' '.join(map(str, words))}: exit {run.returncode}\n{run.stderr}")
    return json.loads(run.stdout)


def texts(data, work):
    """Yields name, model, text for the job, unseen text."""
    def documents(path):
        return [d.strip() for d in path.read_text().split("<|endoftext|>") if d.strip()]

    def write(name, docs):
        path = work / name
        path.write_text(SEPARATOR.join(docs))
        return path

    mix = [d for p in sorted((data / "text/mix-eval").glob("eval-*.txt")) for d in documents(p)]
    yield ("mix7m", data / "models/mix7m-hf", write("mix.txt", mix[0::2]), write("mix-unseen.txt", mix[1::2]),
           ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "int3g32", "int4g32"])
    stories = documents(data / "text/tinystories/tinystories_sample.txt")[1:]
    yield ("babyllama105", data / "models/babyllama105-hf", write("stories.txt", stories[:300]),
           write("stories-unseen.txt", stories[300:450]), ["q4_0", "q5_0", "iq4_nl", "int3g32", "int4g32"])


def judge(binary, name, model, text, unseen, storages, work):
    def kl(out):
        return planish(binary, "evaluate", out, "--against", model, "--data", unseen)

    uniform = []
    for storage in storages:
        out = work / f"{name}-{storage}"
        planish(binary, "quantize", model, "--method", "gptq", "--storage", storage, "--data", text, "--out", out)
        score = kl(out)
        uniform.append((score["size_bytes"], score["against"]["kl_mean"], storage))
    good = True
    print(f"{name:14} {'budget':>9}  {'best uniform':>22}  {'solver':>20}  ratio")
    for size, _, storage in sorted(uniform):
        best = min((u for u in uniform if u[0] <= size * 1.005), key=lambda u: u[1])
        out = work / f"{name}-solved-{storage}"
        planish(binary, "optimize", model, "--max-size", size, "--data", text, "--out", out)
        score = kl(out)
        ratio = score["against"]["kl_mean"] / best[1]
        good &= ratio <= 0.9 and score["size_bytes"] <= size * 1.005
        print(f"{name:14} {size:9}  {best[2]:>10} {best[1]:11.6f}  {score['size_bytes']:9} "
              f"{score['against']['kl_mean']:10.6f}  {ratio:.3f}", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--unseen", type=pathlib.Path)
    parser.add_argument("--only", help="mix7m or babyllama105")
    parser.add_argument("--storages")
    parser.add_argument("--planish", default=str(ROOT / "target/release/planish"))
    options = parser.parse_args()
    data = pathlib.Path(os.environ.get("PLANISH_DATA", ROOT.parent / "shared/data"))
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        if options.model:
            jobs = [(options.model.name, options.model, options.data, options.unseen, ["int3g32", "int4g32", "q4_0"])]
        elif data.is_dir():
            jobs = list(texts(data, work))
        else:
            sys.exit("skipped: needs ../shared/data")
        good = True
        for name, model, text, unseen, storages in jobs:
            if options.only in (None, name):
                storages = options.storages.split(",") if options.storages else storages
                good &= judge(options.planish, name, model, text, unseen, storages, work)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
