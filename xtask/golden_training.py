"""Golden training: ten steps of PyTorch's AdamW on the golden models, loss by loss.

    ENV/bin/python xtask/golden_training.py       # after xtask/golden.py, with the same packages

Writes training.json beside the reference.json of each model in MODELS:

    rate, beta, eps, decay, clip    of the optimizer; `decay` is of matrices only
    losses                          mean over all predictions of both sequences before each step, nats
    norms                           of the whole gradient before it is clipped
    others                          the same of other optimizers, each at its own rate (models in OTHERS_OF): PyTorch's
                                    Adafactor; Lion and Muon by the formulas of their papers, Muon's products in f32

Everything runs in f32, attention in its plain form, without dropout.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

OUT = Path(__file__).resolve().parent.parent / "tests" / "golden"
MODELS = ("llama-mha", "llama-gqa-tied", "gpt2", "gemma2", "gemma3", "neox", "phi3", "qwen2-tied", "qwen3-tied")
STEPS, RATE, BETA, EPS, DECAY, CLIP = 10, 2e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


OTHERS_OF = ("llama-gqa-tied", "qwen3-tied")
OTHERS = dict(lion=2e-4, adafactor=1e-2, muon=2e-3)


class Lion(torch.optim.Optimizer):
    """arXiv 2302.06675, algorithm 2."""

    def __init__(self, groups, lr):
        super().__init__(groups, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.sign(0.9 * m + 0.1 * p.grad), alpha=group["lr"])
                m.mul_(0.99).add_(p.grad, alpha=0.01)


def orthogonal(x):
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """arXiv 2502.16982, equation 4; momentum as torch.optim.Muon has it."""

    def __init__(self, groups, lr):
        super().__init__(groups, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 0.05)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(orthogonal(p.grad.lerp(m, 0.95)), alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


class Both:
    def __init__(self, *all):
        self.all = all

    def zero_grad(self):
        [o.zero_grad() for o in self.all]

    def step(self):
        [o.step() for o in self.all]


def optimizer_of(name, model, lr):
    named = list(model.named_parameters())
    decayed = lambda ps: [
        dict(params=[p for _, p in ps if p.ndim == 2], weight_decay=DECAY),
        dict(params=[p for _, p in ps if p.ndim != 2], weight_decay=0.0),
    ]
    if name == "lion":
        return Lion(decayed(named), lr)
    if name == "adafactor":
        return torch.optim.Adafactor(decayed(named), lr=lr)
    block = [(n, p) for n, p in named if p.ndim == 2 and (".layers." in n or ".h." in n)]
    rest = [(n, p) for n, p in named if all(p is not q for _, q in block)]
    adamw = torch.optim.AdamW(decayed(rest), lr=lr, betas=(0.9, 0.95), eps=EPS)
    return Both(Muon([dict(params=[p for _, p in block], weight_decay=DECAY)], lr), adamw)


def train(folder, other=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    sequences = [s["tokens"] for s in json.loads((folder / "reference.json").read_text())["sequences"]]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETA, eps=EPS)
    if other:
        optimizer = optimizer_of(other, model, OTHERS[other])
    losses, norms = [], []
    count = sum(len(s) - 1 for s in sequences)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = 0.0
        for sequence in sequences:
            ids = torch.tensor([sequence])
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        loss = loss / count
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        losses.append(loss.item())
        optimizer.step()
    return losses, norms


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in MODELS:
        losses, norms = train(OUT / name)
        others = {}
        for other, rate in OTHERS.items() if name in OTHERS_OF else ():
            seen = train(OUT / name, other)
            others[other] = dict(rate=rate, losses=seen[0], norms=seen[1])
        document = dict(
            made_with=dict(transformers=transformers.__version__, torch=torch.__version__.split("+")[0]),
            rate=RATE, beta=BETA, eps=EPS, decay=DECAY, clip=CLIP, losses=losses, norms=norms,
            **(dict(others=others) if others else {}),
        )
        (OUT / name / "training.json").write_text(json.dumps(document, indent=1) + "\n")
        print(f"{name:22} loss {losses[0]:.4f} to {losses[-1]:.4f}")
