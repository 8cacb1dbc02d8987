"""Training steps of a Hugging Face directory on PyTorch at its best on a CPU: SDPA, fused AdamW.

    python pytorch.py DIR --precision f32|bf16 --steps 12 --batch 8 --context 256 --threads 2 [--compile]

Prints {"tokens_per_second", "peak_rss_bytes", "loss"}: the median over the steps after the first two.
"""

import argparse
import json
import resource
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

p = argparse.ArgumentParser()
p.add_argument("directory")
p.add_argument("--precision", choices=("f32", "bf16"), required=True)
p.add_argument("--steps", type=int, default=12)
p.add_argument("--batch", type=int, default=8)
p.add_argument("--context", type=int, default=256)
p.add_argument("--threads", type=int, default=2)
p.add_argument("--compile", action="store_true")
o = p.parse_args()

torch.set_num_threads(o.threads)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(o.directory, dtype=torch.float32, attn_implementation="sdpa").train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
run = torch.compile(model) if o.compile else model
ids = torch.randint(0, model.config.vocab_size, (o.steps, o.batch, o.context + 1))
seconds = []
for step in range(o.steps):
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=o.precision == "bf16"):
        logits = run(ids[step, :, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[step, :, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    seconds.append(time.perf_counter() - began)
rate = o.batch * o.context / statistics.median(seconds[2:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"tokens_per_second": rate, "peak_rss_bytes": peak, "loss": loss.item()}))
