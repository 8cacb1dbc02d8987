#!/usr/bin/env python3
"""At equal bits and on the same texts, is planish's `autoround` as close to the original as the program of the paper's authors?

    benches/peers/autoround.py [--model mix7m|babyllama105] [--planish BIN] [--bits 3] [--group 64] [--steps 200] [--work DIR]

Both treat the matrices of blocks alone, since auto-round leaves embedding and head as they are. Exit 0: planish's mean KL on text
that neither has seen is at most 5 % above. Needs `pip install torch transformers auto-round`; minutes to an hour on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from engines import DATA, PROJECT, SEPARATOR
from quality import CASES


def peer(args, case, out):
    """What auto-round makes of a model, as floats; returns the folder that it chose."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(case.model)
    ids = [i for text in case.calibration for i in [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]]
    ids = torch.tensor(ids)
    # Sequences of one length, as it wants them.
    texts = [{"input_ids": ids[i : i + case.context][None]} for i in range(0, len(ids) - case.context + 1, case.context)]
    floats = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    rounding = AutoRound(
        floats, tokenizer, bits=args.bits, group_size=args.group, sym=True, iters=args.steps, nsamples=len(texts),
        seqlen=case.context, batch_size=8, dataset=texts, device_map="cpu", enable_torch_compile=False,
    )
    rounding.quantize_and_save(str(out), format="fake")
    folder = next(out.glob("**/config.json")).parent
    # The floats need none of the quantization that it names.
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def closeness(planish, out, case, text):
    """Mean KL from the original, with its interval."""
    words = [planish, "evaluate", out, "--against", case.model, "--data", text, "--context", case.context, "--json"]
    said = json.loads(subprocess.run([str(w) for w in words], check=True, capture_output=True).stdout)["against"]
    return said["kl_mean"], said["kl_ci95"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mix7m", choices=CASES)
    parser.add_argument("--planish", default=PROJECT / "target" / "release" / "planish")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit("skipped: needs ../shared/data")
    case, work = CASES[args.model](), args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    separator, texts = f"\n{SEPARATOR}\n", {}
    for name in ["calibration", "evaluation"]:
        texts[name] = work / f"{name}.txt"
        texts[name].write_text(separator.join(getattr(case, name)), encoding="utf-8")
    begin = time.time()
    words = [args.planish, "quantize", case.model, "--method", "autoround", "--storage", f"int{args.bits}g{args.group}",
             "--option", f"steps={args.steps}", "--skip", "embed", "--data", texts["calibration"],
             "--calibration-tokens", "100000", "--out", work / "planish", "--overwrite"]
    subprocess.run([str(w) for w in words], check=True, stdout=subprocess.DEVNULL)
    print(f"planish: {time.time() - begin:.0f} s", flush=True)
    begin = time.time()
    results = {"planish": work / "planish", "auto-round": peer(args, case, work / "auto-round")}
    print(f"auto-round: {time.time() - begin:.0f} s", flush=True)
    kl = {name: closeness(args.planish, out, case, texts["evaluation"]) for name, out in results.items()}
    for name, (mean, interval) in kl.items():
        print(f"{name}: mean KL {mean:.5f}, 95 % interval {interval}")
    ratio = kl["planish"][0] / kl["auto-round"][0]
    print(f"planish's over auto-round's: {ratio:.3f}; {'met' if ratio <= 1.05 else 'MISSED'} (at most 1.05)")
    sys.exit(ratio > 1.05)


if __name__ == "__main__":
    main()
