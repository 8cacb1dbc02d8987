"""Golden training: ten steps of PyTorch's AdamW on the golden models, loss by loss.

    ENV/bin/python xtask/golden_training.py       # after xtask/golden.py, with the same packages

Writes training.json beside the reference.json of each model in MODELS:

    rate, beta, eps, decay, clip    of the optimizer; `decay` is of matrices only
    losses                          mean over all predictions of both sequences before each step, nats
    norms                           of the whole gradient before it is clipped

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


def train(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    sequences = [s["tokens"] for s in json.loads((folder / "reference.json").read_text())["sequences"]]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [dict(params=matrices, weight_decay=DECAY), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETA, eps=EPS)
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
        document = dict(
            made_with=dict(transformers=transformers.__version__, torch=torch.__version__.split("+")[0]),
            rate=RATE, beta=BETA, eps=EPS, decay=DECAY, clip=CLIP, losses=losses, norms=norms,
        )
        (OUT / name / "training.json").write_text(json.dumps(document, indent=1) + "\n")
        print(f"{name:22} loss {losses[0]:.4f} to {losses[-1]:.4f}")
