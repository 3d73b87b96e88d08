"""Logits that PEFT computes with an adapter, in f32 on a CPU.

    python benches/peft_logits.py BASE ADAPTER OUT ID...

BASE is a model folder, ADAPTER a PEFT folder, OUT a safetensors file that gets `logits
[n, vocabulary]` for the token ids. Needs peft, torch and transformers, and bitsandbytes and scipy where LoftQ started the adapter.
"""

import sys

import loftq_cpu  # noqa: F401
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(base, adapter, out, *ids):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[int(i) for i in ids]])).logits[0]
    save_file({"logits": logits.contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
