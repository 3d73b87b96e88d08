"""Ten steps of our 8-bit AdamW beside bitsandbytes' AdamW8bit, on the same random gradients.

    cargo build --release -p cuda --example adamw8bit
    python3 benches/peers/adamw8bit.py target/release/examples/adamw8bit

Tensors below and above 4,096 elements, not all multiples of 256; a learning rate that rises and falls. Needs an
NVIDIA GPU, torch, safetensors and bitsandbytes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import bitsandbytes
import numpy
import torch
from safetensors.torch import load_file, save_file

STEPS, BLOCK, LEAST = 10, 256, 4096
program, folder = sys.argv[1], Path(tempfile.mkdtemp())
subprocess.run([program, folder, "layout"], check=True)
bounds = load_file(folder / "layout.safetensors")["bounds"].tolist()
count = bounds[-1][1]

generator = torch.Generator().manual_seed(7)
values = torch.randn(count, generator=generator) * 0.05
# Gradients of every magnitude, as those of a model are, and some that are zero.
scales = torch.cat([torch.full((end - start,), 10.0 ** -(1 + index % 5)) for index, (start, end) in enumerate(bounds)])
gradients = torch.randn(STEPS, count, generator=generator) * scales
gradients[:, ::97] = 0.0
rates = torch.tensor([1e-2 * min((step + 1) / 3, (STEPS - step) / STEPS) for step in range(STEPS)])
save_file({"values": values, "gradients": gradients, "rates": rates}, folder / "in.safetensors")
subprocess.run([program, folder], check=True)
ours = load_file(folder / "out.safetensors")

tensors = [torch.nn.Parameter(values[start:end].cuda()) for start, end in bounds]
optimizer = bitsandbytes.optim.AdamW8bit(tensors, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
for gradient, rate in zip(gradients, rates):
    for tensor, (start, end) in zip(tensors, bounds):
        tensor.grad = gradient[start:end].cuda()
    for group in optimizer.param_groups:
        group["lr"] = rate.item()
    optimizer.step()

# States: m and v as codes over all elements, the scales of their blocks, then f32 blocks of the small tensors.
large = [(start, end) for start, end in bounds if end - start >= LEAST]
small = [(start, end) for start, end in bounds if end - start < LEAST]
blocks = lambda spans: sum((end - start + BLOCK - 1) // BLOCK for start, end in spans)
raw = bytes(ours["states"].numpy())[len(b"cuda-adamw") + 4:]
sizes = [("u1", count), ("u1", count), ("<f4", blocks(large)), ("<f4", blocks(large)),
         ("<f4", blocks(small) * BLOCK), ("<f4", blocks(small) * BLOCK)]
parts, at = [], 0
for kind, number in sizes:
    size = numpy.dtype(kind).itemsize * number
    parts.append(numpy.frombuffer(raw[at:at + size], kind))
    # Buffers are at least 16 bytes long.
    at += max(size, 16)
m8, v8, m_scale, v_scale, m32, v32 = parts

relative = lambda a, b: float(numpy.linalg.norm(a.astype("f8") - b) / max(numpy.linalg.norm(b.astype("f8")), 1e-30))
worst = {"values": 0.0, "scales": 0.0, "states in f32": 0.0}
codes = {"equal": 0, "adjacent": 0, "further": 0}
block, far = {"large": 0, "small": 0}, []
for tensor, (start, end) in zip(tensors, bounds):
    state, length = optimizer.state[tensor], end - start
    worst["values"] = max(worst["values"], relative(ours["values"][start:end].numpy(), tensor.detach().cpu().numpy()))
    number = (length + BLOCK - 1) // BLOCK
    if state["state1"].dtype == torch.uint8:
        assert length >= LEAST
        first, block["large"] = block["large"], block["large"] + number
        for own, own_scale, key in [(m8, m_scale, "1"), (v8, v_scale, "2")]:
            theirs = state["state" + key].flatten().cpu().numpy().astype(int)
            off = abs(own[start:end].astype(int) - theirs)
            for name, hit in [("equal", off == 0), ("adjacent", off == 1), ("further", off > 1)]:
                codes[name] += int(hit.sum())
            own_map = state["qmap" + key].cpu().numpy()
            for at in numpy.nonzero(off > 1)[0]:
                a, b = int(own[start:end][at]), int(theirs[at])
                far.append(f"state {key}: {a} and {b}, values {own_map[a]:.3e} and {own_map[b]:.3e} of the scale")
            absmax = state["absmax" + key].cpu().numpy()
            worst["scales"] = max(worst["scales"], relative(own_scale[first:first + number], absmax))
    else:
        assert length < LEAST
        first, block["small"] = block["small"], block["small"] + number
        for own, key in [(m32, "state1"), (v32, "state2")]:
            theirs = state[key].flatten().cpu().numpy()
            own = own[first * BLOCK:first * BLOCK + length]
            worst["states in f32"] = max(worst["states in f32"], relative(own, theirs))
moved = relative(ours["values"].numpy() - values.numpy(), torch.cat([t.detach().flatten().cpu() for t in tensors]).numpy() - values.numpy())
print(f"bitsandbytes {bitsandbytes.__version__}, {torch.cuda.get_device_name()}: {len(large)} tensors in 8 bits, {len(small)} in 32")
print("worst relative difference in norm of a tensor:", ", ".join(f"{k} {v:.1e}" for k, v in worst.items()),
      f"; of the way that all went {moved:.1e}")
for what in far:
    print("further than adjacent: " + what)
print("codes:", ", ".join(f"{v} {k}" for k, v in codes.items()))
print("PASSED" if worst["values"] < 1e-4 and codes["further"] == 0 else "FAILED")
