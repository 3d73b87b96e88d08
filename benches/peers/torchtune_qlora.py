"""The same training step with torchtune: torchao's NF4, compiled layers, chunked loss.

    python3 benches/peers/torchtune_qlora.py keep|recompute [SHAPE]

SHAPE: qwen2.5-3b, smollm2-135m, gemma-2-2b (of which torchtune caps the last hidden state in place of the logits, at the
same cost or less). Random weights, settings as in qlora.py. Needs an NVIDIA GPU, torchtune 0.6.1, torchao
0.13.0, bitsandbytes.
"""

import json
import sys
import time

import bitsandbytes
import torch
from torchtune import training
from torchtune.models.gemma2 import lora_gemma2_2b
from torchtune.models.llama3_2._component_builders import lora_llama3_2
from torchtune.models.qwen2_5 import lora_qwen2_5_3b
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

ROWS, LENGTH, ACCUMULATION = 2, 2048, 4


def lora_smollm2_135m(**lora):
    return lora_llama3_2(
        vocab_size=49152, num_layers=30, num_heads=9, num_kv_heads=3, embed_dim=576, max_seq_len=8192,
        intermediate_dim=1536, norm_eps=1e-5, rope_base=100_000, scale_factor=1, **lora)


SHAPES = {
    "qwen2.5-3b": (lora_qwen2_5_3b, 151936),
    "gemma-2-2b": (lora_gemma2_2b, 256000),
    "smollm2-135m": (lora_smollm2_135m, 49152),
}
mode, device = sys.argv[1], torch.device("cuda")
shape = sys.argv[2] if len(sys.argv) > 2 else "qwen2.5-3b"
make, VOCABULARY = SHAPES[shape]
torch.set_float32_matmul_precision("high")
with training.set_default_dtype(torch.bfloat16), device:
    model = make(
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True,
        lora_rank=16, lora_alpha=16, lora_dropout=0.0, quantize_base=True)
    for module in model.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
set_trainable_params(model, get_adapter_params(model))
training.compile_model(model, verbose=False)
if mode == "recompute":
    training.set_activation_checkpointing(
        model, auto_wrap_policy={TransformerSelfAttentionLayer})
loss_of = CEWithChunkedOutputLoss()
training.compile_loss(loss_of, verbose=False)
model.set_num_output_chunks(loss_of.num_output_chunks)

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=2e-4, weight_decay=0.01)
times = []
for step in range(12):
    if step == 3:
        torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(ACCUMULATION):
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), device=device)
        ends = torch.full((ROWS, 1), -100, device=device)
        loss = loss_of(model(tokens), torch.cat([tokens[:, 1:], ends], 1)) / ACCUMULATION
        loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
timed = sorted(times[4:])
median = timed[len(timed) // 2]
print(json.dumps({
    "peer": f"torchtune, {mode}", "shape": shape, "step_ms": round(median * 1e3, 1),
    "best_ms": round(timed[0] * 1e3, 1), "first_step_s": round(times[0], 1),
    "tok_s": round(ROWS * LENGTH * ACCUMULATION / median),
    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}), flush=True)
