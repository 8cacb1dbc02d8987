#!/usr/bin/env python3
"""Times transformers on PyTorch in bf16 on a Hugging Face directory and prints one JSON object:
`pytorch.py DIRECTORY PREFILL DECODE THREADS`. Runs in the environment that `speed.py --torch` makes.

As llama-bench does it: each measurement starts from an empty cache, after one that does not count, and
the prompt's logits are computed for its last token only.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def prefill(model, tokens):
    prompt = (torch.arange(tokens) * 31 % 1000).unsqueeze(0)
    begin = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return tokens / (time.perf_counter() - begin)


def decode(model, tokens):
    cache = DynamicCache(config=model.config)
    begin = time.perf_counter()
    for at in range(tokens):
        model(torch.tensor([[at * 31 % 1000]]), cache=cache, use_cache=True)
    return tokens / (time.perf_counter() - begin)


def main():
    directory, prompt, tokens, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        prefill(model, prompt)
        fill = prefill(model, prompt)
        decode(model, 4)
        step = decode(model, tokens)
    print(json.dumps({"prefill": fill, "decode": step}))


if __name__ == "__main__":
    main()
