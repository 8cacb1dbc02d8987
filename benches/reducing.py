#!/usr/bin/env python3
"""What do factors and smaller shapes lose?

    benches/reducing.py factors  MODEL --data TEXT --held-out TEXT      gfwsvd against svd-llm, asvd and svd at equal size
    benches/reducing.py healed   MODEL --data TEXT --held-out TEXT      layers or neurons removed and healed, against the same
                                                                       shape from nothing with five times the tokens

    benches/reducing.py values   MODEL --data TOKENS.u16 --held-out TEXT --python PYTHON
                                                                       half of the values, and 2:4, against Wanda and SparseGPT
    benches/reducing.py clusters MODEL --data TEXT --held-out TEXT      palettes, entropy-coded, against gptq's even levels

`factors`: the rise of the perplexity on held-out text at 80 % of the parameters of the matrices; the bar is 0.9 of svd-llm's.
`healed`: the loss on held-out text; the bar is that it is below that of the shape from nothing, at its best of the rates and
stopped at its best validation loss.
`values`: the rise of the perplexity on held-out text; the bars are 0.95 of the reference's without healing, and half of our own after
it (`--heal`). PYTHON has torch and transformers.
`clusters`: the bar is a smaller file than gptq's 4 bits in groups of 128 at no larger KL. Exit 0: the bars passed. 1: one did not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def call(planish, *words):
    done = subprocess.run([str(w) for w in (planish, *words, "--json")], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"planish {words[0]} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def factors(o, folder):
    rises = {}
    for method in ("svd", "asvd", "svd-llm", "gfwsvd"):
        out = folder / method
        call(o.planish, "factorize", o.model, "--method", method, "--parameters", o.parameters, "--data", o.data, "--out", out,
             "--force", "--seed", 1)
        told = call(o.planish, "evaluate", out, "--against", o.model, "--data", o.held_out)
        ratio, (low, high) = told["against"]["perplexity_ratio"], told["against"]["perplexity_ratio_ci95"]
        rises[method] = ratio - 1
        print(f"{method:8} {told['parameters']:>10} parameters, perplexity ratio {ratio:.4f} [{low:.4f}, {high:.4f}], "
              f"KL {told['against']['kl_mean']:.4f}", flush=True)
    share = rises["gfwsvd"] / rises["svd-llm"]
    print(f"gfwsvd's rise is {share:.3f} of svd-llm's (bar: at most 0.9)")
    return share <= 0.9


def healed(o, folder):
    held = True
    for name, words in (("layers", ("--pattern", "layers", "--sparsity", "25%")),
                        ("neurons", ("--pattern", "neurons", "--sparsity", "30%"))):
        if name not in o.patterns:
            continue
        losses = {}
        for heal in ((), ("--heal", o.heal, "--option", f"distill.lr={o.rate}")):
            out = folder / f"{name}-{len(heal)}"
            call(o.planish, "prune", o.model, *words, *heal, "--data", o.data, "--out", out, "--force", "--seed", 1)
            told = call(o.planish, "evaluate", out, "--data", o.held_out)
            losses["healed" if heal else "pruned"] = told["nll"]
            print(f"{name}: {'healed' if heal else 'pruned'} {told['nll']:.4f} nats a token, {told['parameters']} parameters",
                  flush=True)
        shape = {k: v for k, v in json.loads((folder / f"{name}-0/config.json").read_text()).items()
                 if isinstance(v, (int, float, bool, str, list)) and k not in ("torch_dtype", "dtype", "transformers_version")}
        tokens = 5 * int(float(o.heal.rstrip("kM")) * {"k": 1e3, "M": 1e6}[o.heal[-1]])
        best = float("inf")
        for rate in o.rates:
            steps = tokens // (16 * 256)
            recipe = folder / "scratch.toml"
            lines = ["[model]"] + [f"{k} = {json.dumps(v)}" for k, v in shape.items()]
            lines += ["[training]", f"steps = {steps}", "batch = 16", "context = 256", f"lr = {rate}", 'schedule = "wsd"',
                      "warm_up = 100", "decay_part = 0.3", "least = 0.02", "weight_decay = 0.1", "beta2 = 0.95",
                      f"validate_every = {max(1, steps // 12)}", "checkpoint_every = 1000000"]
            recipe.write_text("\n".join(lines) + "\n")
            out = folder / f"{name}-scratch-{rate}"
            call(o.planish, "train", recipe, "--data", o.data, "--tokenizer", o.model, "--out", out)
            told = call(o.planish, "evaluate", out, "--data", o.held_out)
            print(f"{name}: from nothing at {rate} {told['nll']:.4f}, {tokens} tokens", flush=True)
            best = min(best, told["nll"])
        held = held and losses["healed"] < best
        print(f"{name}: healed {losses['healed']:.4f}, from nothing with five times the tokens {best:.4f}")
    return held


def values(o, folder):
    held = True

    def rise(out):
        told = call(o.planish, "evaluate", out, "--against", o.model, "--data", o.held_out)["against"]
        ratio, (low, high) = told["perplexity_ratio"], told["perplexity_ratio_ci95"]
        return ratio - 1, f"perplexity ratio {ratio:.4f} [{low:.4f}, {high:.4f}], KL {told['kl_mean']:.4f}"

    for pattern, words in (("50%", ("--pattern", "unstructured", "--sparsity", "50%")), ("2:4", ("--pattern", "2:4"))):
        rises = {}
        for method in ("wanda", "sparsegpt"):
            out = folder / f"{method}-{pattern}"
            script = PROJECT / "benches/peers/sparse.py"
            subprocess.run([o.python, script, o.model, o.data, out, "--method", method, "--pattern", pattern], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rises[method], text = rise(out)
            print(f"{pattern}: {method} of its paper {text}", flush=True)
        for name, heal in (("ours", ()), ("healed", ("--heal", o.heal, "--option", f"distill.lr={o.rate}"))):
            out = folder / f"{name}-{pattern}"
            data = o.heal_data if heal and o.heal_data else o.data
            call(o.planish, "prune", o.model, *words, *heal, "--data", data, "--out", out, "--force", "--seed", 1)
            rises[name], text = rise(out)
            print(f"{pattern}: {name} {text}", flush=True)
        best, share = min(rises["wanda"], rises["sparsegpt"]), rises["healed"] / rises["ours"]
        print(f"{pattern}: our rise is {rises['ours'] / best:.3f} of the better paper's (bar: at most 0.95), and {share:.3f} of it "
              f"is left after {o.heal} tokens of healing (bar: at most 0.5)")
        held = held and rises["ours"] <= 0.95 * best and share <= 0.5
    return held


def clusters(o, folder):
    found = {}
    for name, words in (
        ("int4g128", ("quantize", "--method", "gptq", "--storage", "int4g128")),
        ("palette4g128", ("cluster", "--bits", "4", "--group", "128", "--entropy-code")),
        ("palette4", ("cluster", "--bits", "4", "--group", "0", "--entropy-code")),
        ("int3g64", ("quantize", "--method", "gptq", "--storage", "int3g64")),
        ("palette3g64", ("cluster", "--bits", "3", "--group", "64", "--entropy-code")),
    ):
        out = folder / name
        call(o.planish, words[0], o.model, *words[1:], "--data", o.data, "--out", out, "--force", "--seed", 1)
        told = call(o.planish, "evaluate", out, "--against", o.model, "--data", o.held_out)
        low, high = told["against"]["kl_ci95"]
        found[name] = told["file_bytes"], told["against"]["kl_mean"]
        print(f"{name:13} {found[name][0]:>9} bytes, KL {found[name][1]:.4f} [{low:.4f}, {high:.4f}]", flush=True)
    even, best = found["int4g128"], found["palette4g128"]
    print(f"the palette's file is {best[0] / even[0]:.3f} of the even levels', its KL {best[1] / even[1]:.3f} (bar: below 1, at most 1)")
    return best[0] < even[0] and best[1] <= even[1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["factors", "healed", "values", "clusters"])
    p.add_argument("model", type=Path)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--held-out", type=Path, required=True)
    p.add_argument("--parameters", default="80%")
    p.add_argument("--patterns", default="layers,neurons")
    p.add_argument("--heal", default="2M")
    p.add_argument("--rate", type=float, default=5e-4)
    p.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3])
    p.add_argument("--heal-data", type=Path, help="of values: another text to heal on")
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--planish", type=Path, default=PROJECT / "target/release/planish")
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        passed = {"factors": factors, "healed": healed, "values": values, "clusters": clusters}[o.what](o, Path(folder))
    print("passed" if passed else "did not pass")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
