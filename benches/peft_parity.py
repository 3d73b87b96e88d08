"""Trains SmolLM2-135M-Instruct on the quickstart's rows here and in PEFT, step beside step.

    python3 benches/peft_parity.py PIPE OUT [--steps 60] [--device cuda|cpu]

One initial adapter (PEFT's), one order of rows, the quickstart's settings; PEFT in f32 is the reference. On
a GPU both also train in bf16 (PEFT: weights in bf16, adapter in f32, autocast). Writes OUT/losses.csv and
OUT/losses.svg and prints the greatest relative difference of a step's loss. Needs torch, transformers, peft,
gguf and safetensors, and a cache (PIPE_CACHE, else one below OUT) or a network for model and rows.
"""

import argparse
import csv
import json
import os
import subprocess
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, ACCUMULATION, SEED, WARMUP, PEAK = 2, 4, 42, 5, 1e-3
PIPELINE = """
stages:
  train:
    kind: train
    inputs: {{model: {{path: model}}, tokens: {{path: train.safetensors}}, init_adapter: {{path: init}}}}
    params:
      lora: {{r: 16, alpha: 16}}
      max_steps: {steps}
      learning_rate: {peak}
      warmup_steps: {warmup}
      weight_decay: 0.01
      optimizer: adamw
      batch_size: {batch}
      gradient_accumulation: {accumulation}
      seed: {seed}
      device: {device}
      dtype: {dtype}
"""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("pipe")
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
options = parser.parse_args()
out, pipe = options.out.resolve(), os.path.abspath(options.pipe)
out.mkdir(parents=True, exist_ok=True)
quickstart = Path(__file__).resolve().parent.parent / "pipelines/quickstart.yaml"
environment = dict(os.environ, PIPE_CACHE=os.environ.get("PIPE_CACHE", str(out / "cache")))


def run(*arguments):
    subprocess.run([pipe, *arguments], check=True, cwd=out, env=environment, stdout=subprocess.DEVNULL)


def prepare():
    """Model, packed rows and the initial adapter, as files that both sides read."""
    run("run", "-f", str(quickstart), "tokenize-pack")
    for stage in ["model", "tokenize-pack"]:
        if not (out / stage).exists():
            run("outputs", "-f", str(quickstart), stage, "--to", str(out / stage))
    (found,) = (out / "model").rglob("*.gguf")
    (out / "train.safetensors").write_bytes(next((out / "tokenize-pack").rglob("*.safetensors")).read_bytes())
    return found


def load(gguf, dtype):
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    model.quantization_method = None
    return model.to(options.device, dtype)


def order(rows):
    """Rows of every step: torch's randperm of each epoch, cut as transformers' Trainer cuts it."""
    step, epoch = BATCH * ACCUMULATION, 0
    while True:
        shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        yield from (shuffled[i:i + step] for i in range(0, rows, step))
        epoch += 1


def rate(step):
    if step < WARMUP:
        return PEAK * step / WARMUP
    return PEAK * max(0.0, (options.steps - step) / (options.steps - WARMUP))


def train_peft(gguf, dtype):
    """Losses of the steps, each the mean over the targets of the whole step."""
    model = peft.PeftModel.from_pretrained(load(gguf, dtype), str(out / "init"), is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=PEAK, weight_decay=0.01)
    file = load_file(out / "train.safetensors")
    bounds = file["row_offsets"].tolist()
    losses = []
    for step, rows in zip(range(options.steps), order(len(bounds) - 1)):
        spans = [slice(bounds[row], bounds[row + 1]) for row in rows]
        masks = [file["label_mask"][span].bool() for span in spans]
        targets = sum(int(mask[1:].sum()) for mask in masks)
        total = 0.0
        for span, mask in zip(spans, masks):
            tokens = file["tokens"][span].long()[None].to(options.device)
            with torch.autocast(options.device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(input_ids=tokens).logits
            labels = torch.where(mask.to(options.device), tokens[0], -100)[1:]
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels, reduction="sum") / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def train_here(dtype):
    text = PIPELINE.format(steps=options.steps, peak=PEAK, warmup=WARMUP, batch=BATCH, seed=SEED,
                           accumulation=ACCUMULATION, device=options.device, dtype=dtype)
    (out / f"{dtype}.yaml").write_text(text)
    run("run", "-f", str(out / f"{dtype}.yaml"))
    run("outputs", "-f", str(out / f"{dtype}.yaml"), "train", "--to", str(out / f"ours-{dtype}"))
    (log,) = (out / f"ours-{dtype}").rglob("*.jsonl")
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def draw(curves):
    """The losses as lines, the reference on top."""
    width, height, top = 720, 360, max(max(c) for c in curves.values())
    colours = ["#888", "#d55", "#38c", "#3a3"]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">']
    for index, (name, losses) in enumerate(curves.items()):
        points = " ".join(f"{40 + i * (width - 60) / (len(losses) - 1):.1f},{height - 30 - l / top * (height - 60):.1f}"
                          for i, l in enumerate(losses))
        style = f'stroke="{colours[index]}" stroke-width="{4 if index == 0 else 1.3}"'
        parts.append(f'<polyline points="{points}" fill="none" {style}/>')
        parts.append(f'<text x="{width - 150}" y="{40 + 18 * index}" fill="{colours[index]}">{name}</text>')
    parts.append(f'<text x="40" y="{height - 8}">step 1 to {options.steps}</text><text x="4" y="20">loss, 0 to {top:.2f}</text></svg>')
    (out / "losses.svg").write_text("\n".join(parts) + "\n")


gguf = prepare()
if not (out / "init").exists():
    torch.manual_seed(SEED)
    config = peft.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM")
    peft.get_peft_model(load(gguf, torch.float32), config).save_pretrained(str(out / "init"))
curves = {"PEFT, f32": train_peft(gguf, torch.float32), "ours, f32": train_here("f32")}
if options.device == "cuda":
    curves |= {"PEFT, bf16": train_peft(gguf, torch.bfloat16), "ours, bf16": train_here("bf16")}
with open(out / "losses.csv", "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["step", *curves])
    writer.writerows([i + 1, *(f"{x:.6f}" for x in row)] for i, row in enumerate(zip(*curves.values())))
draw(curves)
reference = curves["PEFT, f32"]
for name, losses in list(curves.items())[1:]:
    off = [abs(a - b) / b for a, b in zip(losses, reference)]
    print(f"{name}: greatest relative difference of a step's loss from PEFT in f32 {max(off):.2e} "
          f"(step {off.index(max(off)) + 1}), mean {sum(off) / len(off):.2e}")
