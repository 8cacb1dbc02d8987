#!/usr/bin/env python3
"""Wanda and SparseGPT as their papers and reference scripts have them, in PyTorch.

    benches/peers/sparse.py MODEL TOKENS OUT --method wanda|sparsegpt --pattern 50%|2:4

TOKENS are 16-bit ids, cut into windows of the model's context. Block by block the inputs of each matrix are gathered on the model
as it is pruned so far, as the reference scripts do: all matrices of a block from one pass, then the block runs again.
Wanda (arXiv 2306.11695): of each output row those of least |w| * ||x||, nothing is made up for. SparseGPT (arXiv 2301.00774): blocks of
128 columns, damping of 1 % of the mean diagonal, least w^2 / U_jj^2 of the block over all rows.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def wanda(w, h, share, pattern):
    worth = w.abs() * h.diag().sqrt()
    gone = torch.zeros_like(w, dtype=torch.bool)
    if pattern:
        n, m = pattern
        for i in range(0, w.shape[1], m):
            least = worth[:, i : i + m].topk(m - n, dim=1, largest=False).indices
            gone[:, i : i + m].scatter_(1, least, True)
    else:
        gone.scatter_(1, worth.sort(dim=1, stable=True).indices[:, : int(w.shape[1] * share)], True)
    return w.masked_fill(gone, 0)


def sparsegpt(w, h, share, pattern, block=128):
    w, h, columns = w.clone(), h.clone(), w.shape[1]
    dead = h.diag() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += torch.eye(columns, dtype=h.dtype) * 0.01 * h.diag().mean()
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part, errors, own = w[:, first:last].clone(), torch.zeros_like(w[:, first:last]), u[first:last, first:last]
        gone = torch.zeros_like(part, dtype=torch.bool)
        if not pattern:
            worth = part**2 / own.diag() ** 2
            gone = worth <= worth.flatten().sort().values[int(worth.numel() * share)]
        for i in range(last - first):
            if pattern and i % pattern[1] == 0:
                n, m = pattern
                worth = part[:, i : i + m] ** 2 / own.diag()[i : i + m] ** 2
                gone.scatter_(1, i + worth.topk(m - n, dim=1, largest=False).indices, True)
            q = part[:, i].masked_fill(gone[:, i], 0)
            e = (part[:, i] - q) / own[i, i]
            part[:, i:] -= e[:, None] * own[i, i:][None, :]
            part[:, i] = q
            errors[:, i] = e
        w[:, first:last] = part
        w[:, last:] -= errors @ u[first:last, last:]
    return w


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("tokens", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--method", choices=["wanda", "sparsegpt"], required=True)
    p.add_argument("--pattern", default="50%")
    o = p.parse_args()
    pattern = tuple(map(int, o.pattern.split(":"))) if ":" in o.pattern else None
    share = 0 if pattern else float(o.pattern.strip("%")) / 100
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32).eval()
    ids = np.fromfile(o.tokens, dtype="<u2").astype(np.int64)
    length = min(model.config.max_position_embeddings, 512)
    windows = torch.from_numpy(ids[: len(ids) // length * length].reshape(-1, length))
    prune = wanda if o.method == "wanda" else sparsegpt
    caught = []

    class Stop(Exception):
        pass

    def catch(_, args, kwargs):
        caught.append((args, kwargs))
        raise Stop

    layers = model.model.layers
    with torch.no_grad():
        hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        for window in windows.split(8):
            try:
                model(window)
            except Stop:
                pass
        hook.remove()
        flows = [(args[0] if args else kwargs.pop("hidden_states"), kwargs) for args, kwargs in caught]
        for layer in layers:
            matrices = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            moments = {name: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for name, m in matrices.items()}

            def gather(name):
                def add(_, args, __):
                    x = args[0].reshape(-1, args[0].shape[-1])
                    moments[name].add_((x.T @ x).double())

                return add

            hooks = [m.register_forward_hook(gather(name)) for name, m in matrices.items()]
            run = lambda x, kwargs: (lambda y: y[0] if isinstance(y, tuple) else y)(layer(x, **kwargs))
            for x, kwargs in flows:
                run(x, kwargs)
            for hook in hooks:
                hook.remove()
            for name, m in matrices.items():
                h = moments[name] / windows.numel()
                m.weight.copy_(prune(m.weight.double(), h, share, pattern).float())
            flows = [(run(x, kwargs), kwargs) for x, kwargs in flows]
    model.to(torch.bfloat16).save_pretrained(o.out)
    AutoTokenizer.from_pretrained(o.model).save_pretrained(o.out)


if __name__ == "__main__":
    main()
