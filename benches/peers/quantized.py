#!/usr/bin/env python3
"""Other quantizers' files, both ways, with the programs that made the formats.

    benches/peers/quantized.py golden             has compressed-tensors and GPTQModel quantize a tiny random model in every
                                                  form that planish reads; writes tests/golden/../quantized
    benches/peers/quantized.py check [--planish BIN] [--model DIR]
                                                  has planish quantize a model in every form that it writes, loads each
                                                  with transformers, and compares its logits with planish's own

Needs `pip install torch transformers compressed-tensors gptqmodel safetensors numpy` (BUILD_CUDA_EXT=0 where there is no GPU).
"""

import argparse
import base64
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
from safetensors import safe_open

ROOT = pathlib.Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "quantized"


def tiny(key_heads=2):
    """A Llama of 2 blocks with weights that make logits differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=key_heads,
        vocab_size=96, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.2)
    return model


def sequences(model, about, made_with):
    """Logits of two texts, as reference.json of the golden references holds them."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for length in (12, 7):
        tokens = torch.randint(3, 96, (length,), generator=generator)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0].float().numpy()
        text = base64.b64encode(logits.astype("<f4").tobytes()).decode()
        out.append({"tokens": tokens.tolist(), "logits": text})
    return {"about": about, "made_with": made_with, "sequences": out}


def versions(*names):
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in names}


def compressed(name, about, weights, inputs=None, skip=("lm_head",)):
    """Quantizes the tiny model with compressed-tensors, scales from the largest value."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus, apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    model = tiny()
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=QuantizationArgs(**inputs) if inputs else None
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(skip))
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        w = module.weight.data
        if args.strategy == "group":
            cut = w.reshape(w.shape[0], -1, args.group_size)
            low, high = cut.amin(-1), cut.amax(-1)
        elif args.strategy == "channel":
            low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        else:
            low, high = w.amin().reshape(1), w.amax().reshape(1)
        scale, zero = calculate_qparams(low, high, args)
        module.weight_scale.data = scale.half().float() if args.type == "int" else scale.float()
        if getattr(module, "weight_zero_point", None) is not None:
            module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
        if inputs and not inputs["dynamic"]:
            module.input_scale.data = torch.full((1,), 0.03)
            module.input_zero_point.data = torch.zeros(1, dtype=module.input_zero_point.dtype)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = CASES / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    # transformers 5.24 cannot load packed zero points again, so the compressor itself unpacks what was written.
    compressor.decompress_model(model)
    finish(folder, sequences(model.eval(), about, versions("compressed-tensors", "transformers", "torch")))


def gptq(name, about, key_heads=2, **options):
    """Quantizes the tiny model with GPTQModel on random texts."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        base = pathlib.Path(scratch) / "base"
        tiny(key_heads).save_pretrained(base)
        words(base)
        generator = torch.Generator().manual_seed(9)
        texts = [{"input_ids": torch.randint(3, 96, (1, 48), generator=generator),
                  "attention_mask": torch.ones(1, 48, dtype=torch.long)} for _ in range(24)]
        model = GPTQModel.load(str(base), QuantizeConfig(**options), device="cpu")
        model.quantize(texts, batch_size=1, backend=BACKEND.TORCH if options.get("quant_method", "gptq") == "gptq" else None)
        folder = CASES / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save(str(folder))
        reference = sequences(in_floats(folder), about, versions("gptqmodel", "transformers", "torch"))
    finish(folder, reference)


def in_floats(folder):
    """A model that GPTQModel stored, with what its own code unpacks, in 32-bit floats: its kernels take 16 bits alone."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    out = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # What is no code is read from the file: GPTQModel holds it in 16 bits.
    with safe_open(pathlib.Path(folder) / "model.safetensors", "pt") as f:
        parts = (".qweight", ".qzeros", ".scales", ".g_idx")
        state = {name: f.get_tensor(name).float() for name in f.keys() if not name.endswith(parts)}
    for name, module in stored.named_modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
            if hasattr(module, "dequantize_weight"):
                w = module.dequantize_weight()
            else:
                w = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
            assert w.dtype == torch.float32, w.dtype
            state[f"{name}.weight"] = w.T.contiguous()
    out.load_state_dict(state, strict=not config.tie_word_embeddings)
    return out.eval()


def words(folder):
    """A tokenizer of 96 words, which GPTQModel wants to see."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(96)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0")
    fast.save_pretrained(folder)


def finish(folder, reference):
    """Keeps the files that a reader needs."""
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].pop("meta", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "reference.json").write_text(json.dumps(reference) + "\n")
    print(f"{folder.name}: {sum(p.stat().st_size for p in folder.iterdir())} bytes")


def golden(only):
    CASES.mkdir(exist_ok=True)
    int_group = {"type": "int", "strategy": "group", "group_size": 32}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    cases = {
        "ct-int4": lambda n: compressed(n, "4 bits, groups of 32", {"num_bits": 4, **int_group}),
        "ct-int4-zero": lambda n: compressed(n, "4 bits with zero points", {"num_bits": 4, "symmetric": False, **int_group}),
        "ct-int3": lambda n: compressed(n, "3 bits, across words", {"num_bits": 3, **int_group}),
        "ct-w8a8": lambda n: compressed(n, "8 bits, inputs too", {"num_bits": 8, "type": "int", "strategy": "channel"}, inputs),
        "ct-w8a8-static": lambda n: compressed(n, "8 bits, inputs too, by one scale", {"num_bits": 8, "type": "int", "strategy": "channel"},
                                               {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}),
        "ct-fp8": lambda n: compressed(n, "8-bit floats by row, inputs too", {"num_bits": 8, "type": "float", "strategy": "channel"},
                                       {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}),
        "ct-fp8-tensor": lambda n: compressed(n, "8-bit floats, one scale", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "gptq-4": lambda n: gptq(n, "4 bits", bits=4, group_size=32, desc_act=False, sym=True),
        "gptq-4-order": lambda n: gptq(n, "4 bits, groups by activations", bits=4, group_size=32, desc_act=True, sym=True),
        "gptq-3": lambda n: gptq(n, "3 bits, across words", bits=3, group_size=32, desc_act=False, sym=True),
        "gptq-8-v2": lambda n: gptq(n, "8 bits, version 2", bits=8, group_size=-1, desc_act=False, sym=False,
                                  act_group_aware=False, format="gptq_v2"),
        "awq": lambda n: gptq(n, "AWQ", key_heads=4, bits=4, group_size=32, sym=False, quant_method="awq", format="gemm"),
    }
    for name, make in cases.items():
        if not only or name in only:
            make(name)


def logits_of(planish, model, ids, vocabulary, folder):
    """planish's logits of some tokens, by `evaluate --logits` on a text that it cuts as it likes."""
    out = folder / "logits.bin"
    text = folder / "text.txt"
    subprocess.run([planish, "evaluate", model, "--data", text, "--logits", out, "--json"], check=True, capture_output=True)
    tokens = np.fromfile(f"{out}.ids", "<u4")
    return tokens, np.fromfile(out, "<f4").reshape(len(tokens), -1)


FORMS = [
    ("compressed-tensors", ["--bits", "4", "--group", "32"]),
    ("compressed-tensors", ["--storage", "int4g64z"]),
    ("compressed-tensors", ["--storage", "int3g32"]),
    ("compressed-tensors", ["--storage", "int8"]),
    ("compressed-tensors", ["--storage", "int8", "--activations", "int8"]),
    ("compressed-tensors", ["--storage", "int8", "--activations", "int8-static"]),
    ("compressed-tensors", ["--storage", "fp8_e4m3", "--activations", "fp8"]),
    ("compressed-tensors", ["--storage", "int4g32", "--override", "down=int8"]),
    ("gptq", ["--bits", "4", "--group", "32"]),
    ("gptq", ["--storage", "int4g32z"]),
    ("gptq", ["--storage", "int8"]),
    ("awq", ["--storage", "int4g32z"]),
]


def check(planish, model):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        text = scratch / "text.txt"
        text.write_text("Once upon a time there was a small dog. It ran to the old tree and found a red ball.\n" * 4)
        for form, words_ in FORMS:
            out = scratch / "out"
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run(
                [planish, "quantize", model, "--method", "rtn", *words_, "--format", form, "--data", text, "--out", out],
                check=True, capture_output=True,
            )
            tokens, ours = logits_of(planish, out, None, None, scratch)
            if form == "compressed-tensors":
                # Loading codes and zero points as they are fails in transformers 5.24 even on its own files.
                plainly = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "int4g64z" in words_ else {}
                other = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **plainly).eval()
            else:
                other = in_floats(out)
            with torch.no_grad():
                theirs = other(torch.tensor(tokens.astype(np.int64))[None]).logits[0].float().numpy()
            worst = float(np.abs(ours - theirs).max())
            # Where transformers itself unpacks codes it does so in the 16 bits of the scales.
            fine = worst < (2e-2 if "int4g64z" in words_ else 1e-4)
            bad += not fine
            print(f"{form:20} {' '.join(words_):40} largest difference of a logit {worst:.1e} {'' if fine else 'TOO LARGE'}")
    raise SystemExit(bad > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["golden", "check"])
    parser.add_argument("only", nargs="*", help="of golden: these cases alone")
    parser.add_argument("--planish", default="planish")
    parser.add_argument("--model", default=str(ROOT / "crates" / "sample" / "gpt"))
    args = parser.parse_args()
    golden(args.only) if args.what == "golden" else check(args.planish, args.model)


main()
