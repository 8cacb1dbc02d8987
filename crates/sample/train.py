#!/usr/bin/env python3
"""Trains the built-in sample GPT on stories of the project's own grammar.

    python3 -m venv venv && venv/bin/pip install torch transformers tokenizers safetensors numpy
    venv/bin/python crates/sample/train.py --seed 1 --steps 2400 --out crates/sample/gpt

Stories come from `cargo xtask stories`; training and evaluation use different seeds. The script prints the
model's loss on unseen stories in nats a story; the grammar's entropy, which no model can beat, is printed by
`cargo test -p planish-sample -- --nocapture`.
"""
import argparse
import json
import math
import pathlib
import subprocess
import time

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, CONTEXT = 1024, 256


def stories(seed, documents):
    command = ["cargo", "run", "--release", "--quiet", "--package", "xtask", "--", "stories"]
    run = subprocess.run(command + ["--seed", str(seed), "--documents", str(documents)], check=True, capture_output=True)
    return run.stdout.decode().splitlines()


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def batch_of(ids, order):
    longest = max(len(ids[i]) for i in order)
    x = np.full((len(order), longest), 1, dtype=np.int64)
    y = np.full((len(order), longest), -100, dtype=np.int64)
    for row, i in enumerate(order):
        x[row, : len(ids[i])] = ids[i]
        y[row, : len(ids[i])] = ids[i]
    return torch.from_numpy(x), torch.from_numpy(y)


def loss_per_story(model, ids):
    model.eval()
    total = 0.0
    with torch.no_grad():
        for at in range(0, len(ids), 64):
            x, y = batch_of(ids, range(at, min(at + 64, len(ids))))
            count = int((y[:, 1:] != -100).sum())
            total += model(x, labels=y).loss.item() * count
    model.train()
    return total / len(ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    texts = stories(1000 + options.seed, options.steps * options.batch)
    tokenizer = train_tokenizer(texts[:20000])
    ids = [tokenizer.encode(t).ids + [1] for t in texts]
    unseen = [tokenizer.encode(t).ids for t in stories(999_999 + options.seed, 512)]
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {sum(map(len, ids))} tokens", flush=True)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.98))
    warm = 100

    def rate(step):
        if step < warm:
            return step / warm
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, options.steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    begin = time.time()
    for step in range(options.steps):
        x, y = batch_of(ids, range(step * options.batch, (step + 1) * options.batch))
        loss = model(x, labels=y).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"step {step + 1}: loss {loss.item():.4f}, {loss_per_story(model, unseen[:128]):.2f} nats a story, "
                  f"{time.time() - begin:.0f} s", flush=True)
    model.to(torch.bfloat16)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    tokenizer.save(str(options.out / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
             "add_bos_token": True, "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}
    (options.out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"unseen stories: {loss_per_story(model.float(), unseen):.3f} nats a story")


if __name__ == "__main__":
    main()
