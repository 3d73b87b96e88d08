"""Trains SmolLM2-135M-Instruct on the quickstart's rows here and in PEFT, step beside step.

    python3 benches/peft_parity.py prepare FOLDER --pipe PIPE
    python3 benches/peft_parity.py peft FOLDER [--device cpu|cuda] [--dtype f32|bf16] [--steps 60]
    python3 benches/peft_parity.py ours FOLDER --pipe PIPE [--device ...] [--dtype ...] [--steps 60]
    python3 benches/peft_parity.py compare FOLDER [--steps 60]

`prepare` puts what both sides read into FOLDER: `model/` with the GGUF, `train.safetensors` with the packed
rows, and `init/`, an adapter as PEFT starts it. It needs a cache with the quickstart (PIPE_CACHE, else one below
FOLDER) or a network; the rest needs neither, so that FOLDER can be taken to a machine with a GPU.
`peft` and `ours` train with the quickstart's settings in one order of rows (torch's randperm of each epoch) and
write FOLDER/losses/WHO-DEVICE-DTYPE-STEPS.jsonl, a line a step. In bf16 PEFT has weights in bf16, the adapter in f32
and autocast. `compare` holds all of them against PEFT in f32 and writes losses.json and losses.svg.

Needs torch, transformers, peft, gguf and safetensors; `ours` and `compare` need none of them.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, ACCUMULATION, SEED, WARMUP, PEAK = 2, 4, 42, 5, 1e-3
QUICKSTART = Path(__file__).resolve().parent.parent / "pipelines/quickstart.yaml"
PIPELINE = """
stages:
  train:
    kind: train
    inputs: {{model: {{path: {model}}}, tokens: {{path: train.safetensors}}, init_adapter: {{path: init}}}}
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


def run(options, *arguments):
    cache = os.environ.get("PIPE_CACHE", str(options.folder / "cache"))
    subprocess.run([options.pipe, *arguments], check=True, cwd=options.folder, env=dict(os.environ, PIPE_CACHE=cache))


def gguf(options):
    (found,) = (options.folder / "model").rglob("*.gguf")
    return found


def prepare(options):
    """Model, packed rows and the initial adapter, as files that both sides read."""
    import peft
    import torch

    out = options.folder
    out.mkdir(parents=True, exist_ok=True)
    run(options, "run", "-f", str(QUICKSTART), "tokenize-pack")
    for stage in ["model", "tokenize-pack"]:
        if not (out / stage).exists():
            run(options, "outputs", "-f", str(QUICKSTART), stage, "--to", str(out / stage))
    (out / "train.safetensors").write_bytes(next((out / "tokenize-pack").rglob("*.safetensors")).read_bytes())
    torch.manual_seed(SEED)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    peft.get_peft_model(load(options, torch.float32), config).save_pretrained(str(out / "init"))


def load(options, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    file = gguf(options)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    model.quantization_method = None
    return model.to(options.device, dtype)


def order(rows):
    """Rows of every step: torch's randperm of each epoch, cut as transformers' Trainer cuts it."""
    import torch

    step, epoch = BATCH * ACCUMULATION, 0
    while True:
        shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        yield from (shuffled[i:i + step] for i in range(0, rows, step))
        epoch += 1


def rate(step, steps):
    if step < WARMUP:
        return PEAK * step / WARMUP
    return PEAK * max(0.0, (steps - step) / (steps - WARMUP))


def losses_file(options, who):
    path = options.folder / "losses" / f"{who}-{options.device}-{options.dtype}-{options.steps}.jsonl"
    path.parent.mkdir(exist_ok=True)
    return path


def train_peft(options):
    """A step's loss is the mean over the targets of all its rows."""
    import peft
    import torch
    from safetensors.torch import load_file

    bf16 = options.dtype == "bf16"
    base = load(options, torch.bfloat16 if bf16 else torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(options.folder / "init"), is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=PEAK, weight_decay=0.01)
    file = load_file(options.folder / "train.safetensors")
    bounds, segments = file["row_offsets"].tolist(), file["cu_seqlens"].tolist()
    assert bounds == segments, "rows of one segment each: nothing to keep apart"
    with open(losses_file(options, "peft"), "w") as log:
        for step, rows in zip(range(options.steps), order(len(bounds) - 1)):
            start = time.monotonic()
            spans = [slice(bounds[row], bounds[row + 1]) for row in rows]
            masks = [file["label_mask"][span].bool() for span in spans]
            targets = sum(int(mask[1:].sum()) for mask in masks)
            total = 0.0
            for span, mask in zip(spans, masks):
                tokens = file["tokens"][span].long()[None].to(options.device)
                # The head runs where the next token counts, which is where the loss looks.
                at = mask[1:].nonzero().flatten().to(options.device)
                with torch.autocast(options.device, dtype=torch.bfloat16, enabled=bf16):
                    logits = model(input_ids=tokens, logits_to_keep=at).logits[0]
                loss = torch.nn.functional.cross_entropy(logits.float(), tokens[0, at + 1], reduction="sum") / targets
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            optimizer.param_groups[0]["lr"] = rate(step, options.steps)
            optimizer.step()
            optimizer.zero_grad()
            line = {"step": step + 1, "loss": total, "grad_norm": norm, "targets": targets,
                    "learning_rate": rate(step, options.steps), "seconds": time.monotonic() - start}
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(line, flush=True)
    model.save_pretrained(str(options.folder / f"peft-{options.device}-{options.dtype}-{options.steps}"))


def train_here(options):
    text = PIPELINE.format(steps=options.steps, peak=PEAK, warmup=WARMUP, batch=BATCH, seed=SEED,
                           accumulation=ACCUMULATION, device=options.device, dtype=options.dtype,
                           model=gguf(options).parent.relative_to(options.folder))
    name = f"ours-{options.device}-{options.dtype}-{options.steps}"
    (options.folder / f"{name}.yaml").write_text(text)
    run(options, "run", "-f", f"{name}.yaml")
    run(options, "outputs", "-f", f"{name}.yaml", "train", "--to", str(options.folder / name))
    (log,) = (options.folder / name).rglob("*.jsonl")
    losses_file(options, "ours").write_bytes(log.read_bytes())


def draw(curves):
    """The losses as lines, the reference first and widest."""
    width, height, top = 720, 360, max(max(c) for c in curves.values())
    colours = ["#bbb", "#d33", "#27b", "#2a2", "#a3a", "#c80"]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>']
    for index, (name, losses) in enumerate(curves.items()):
        points = " ".join(f"{40 + i * (width - 60) / max(1, len(losses) - 1):.1f},{height - 30 - l / top * (height - 60):.1f}"
                          for i, l in enumerate(losses))
        colour, wide = colours[index % len(colours)], 6 if index == 0 else 1.3
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{wide}"/>')
        parts.append(f'<text x="{width - 170}" y="{40 + 18 * index}" fill="{colour}">{name}</text>')
    steps = len(next(iter(curves.values())))
    parts.append(f'<text x="40" y="{height - 8}">step 1 to {steps}</text>')
    parts.append(f'<text x="4" y="20">loss, 0 to {top:.2f}</text></svg>')
    return "\n".join(parts) + "\n"


def compare(options):
    """Every log of that many steps against PEFT's in f32."""
    logs = {}
    for path in sorted((options.folder / "losses").glob(f"*-{options.steps}.jsonl")):
        who, device, dtype, _ = path.stem.split("-")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if len(lines) == options.steps:
            logs[f"{who}, {dtype}, {device}"] = lines
        else:
            print(f"{path.name}: {len(lines)} of {options.steps} steps, left out")
    reference = next(name for name in logs if name.startswith("peft, f32"))
    names = [reference, *(name for name in logs if name != reference)]
    curves = {name: [line["loss"] for line in logs[name]] for name in names}
    for name in names[1:]:
        assert [line["targets"] for line in logs[name]] == [line["targets"] for line in logs[reference]], "other rows"
        off = [abs(a - b) / b for a, b in zip(curves[name], curves[reference])]
        over = sum(o > 0.01 for o in off)
        print(f"{name}: greatest relative difference of a step's loss from {reference}: {max(off):.2e} "
              f"(step {off.index(max(off)) + 1}), mean {sum(off) / len(off):.2e}, over 1 % in {over} steps")
    rounded = {name: [round(loss, 7) for loss in losses] for name, losses in curves.items()}
    lines = [f' {json.dumps(name)}: {json.dumps(losses)}' for name, losses in rounded.items()]
    (options.folder / "losses.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (options.folder / "losses.svg").write_text(draw(curves))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["prepare", "peft", "ours", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pipe")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.what in ("prepare", "ours") and not options.pipe:
        parser.error("--pipe names the program to run")
    options.pipe = options.pipe and os.path.abspath(options.pipe)
    {"prepare": prepare, "peft": train_peft, "ours": train_here, "compare": compare}[options.what](options)


if __name__ == "__main__":
    main()
