"""Rates of PyTorch and PEFT on SmolLM2-135M, for comparison with `cargo run --release -p model --example rates`.

    python3 benches/torch_cpu.py FOLDER_OF_THE_GGUF [threads [f32] [bf16]]

Needs torch, transformers, peft, gguf. Same shapes as the example: prefill 1 x 512, a LoRA step of 4 x 256 with the
loss on all tokens, 16 prompts of 256 and 32 new tokens each with the prefill timed apart. Best of three after one
in f32, one run in bf16 (processors without bf16 instructions take minutes).
"""
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 2)


def load(dtype):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=FILE, dtype=torch.float32)
    model.quantization_method = None
    return model.to(dtype)


def tokens(rows, columns):
    return (3 + torch.arange(rows * columns) * 7919 % 49000).reshape(rows, columns)


def best(run, times_over):
    if times_over > 1:
        run()
    times = []
    for _ in range(times_over):
        start = time.time()
        run()
        times.append(time.time() - start)
    return min(times)


for dtype, name, repeats in ((torch.float32, "f32", 3), (torch.bfloat16, "bf16", 1)):
    if len(sys.argv) > 3 and name not in sys.argv[3:]:
        continue
    model = load(dtype)

    def generate(ids, new):
        model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=2)

    with torch.no_grad():
        prefill = best(lambda: model(tokens(1, 512), logits_to_keep=1), repeats)
        print(f"{name} prefill 1 x 512: {512 / prefill:.0f} tok/s", flush=True)
        short, long = [best(lambda: generate(tokens(16, 256), new), repeats) for new in (1, 33)]
        print(f"{name} batch-16 prefill: {16 * 256 / short:.0f} tok/s", flush=True)
        print(f"{name} batch-16 decode: {16 * 32 / (long - short):.0f} tok/s", flush=True)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    def step():
        ids = tokens(4, 256)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        tuned.zero_grad()

    print(f"{name} train 4 x 256, loss on all: {1024 / best(step, repeats):.0f} tok/s", flush=True)
