"""How far the GPU is from the f32 reference in bf16 and f16, beside how far PyTorch is.

    PIPE_FIXTURES=FIXTURES PIPE_PARITY=OURS cargo test --release -p cuda fixture
    python3 benches/peers/parity.py FIXTURES OURS [--device cpu]

FIXTURES holds tiny-models (a plain and an NF4 checkpoint, an adapter, reference outputs in f32 of each family);
OURS what the first command kept. PyTorch runs as transformers' Trainer has it: weights in the type, adapter in
f32, autocast; in f16 the loss is scaled. A distance is the norm of the difference over that of the reference.
The packed loss is one number, a mean in which the errors of its tokens cancel by chance: it is shown, and the
losses of its tokens and the losses of 64 rows are judged. Needs torch, transformers, peft and safetensors, and
an NVIDIA GPU, on which PyTorch multiplies as in training.
"""

import argparse
import json
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file

SCALE, ROWS = 1024.0, 64

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("fixtures", type=Path)
parser.add_argument("ours", type=Path)
parser.add_argument("--device", default="cuda")
options = parser.parse_args()
torch.backends.cuda.matmul.allow_tf32 = False


def decoded(folder):
    """The NF4 checkpoint's state dict with its matrices decoded, as bitsandbytes decodes them."""
    stored, state = load_file(folder / "model.safetensors"), {}
    for name, value in stored.items():
        blob = stored.get(f"{name}.quant_state.bitsandbytes__nf4")
        if blob is None:
            if ".weight." not in name:
                state[name] = value
            continue
        about = json.loads(bytes(blob.tolist()))
        part = lambda key: stored[f"{name}.{key}"].flatten()
        scales = part("nested_quant_map")[part("absmax").long()]
        scales = scales * part("nested_absmax").repeat_interleave(about["nested_blocksize"])[: len(scales)]
        scales = scales + torch.tensor(about["nested_offset"], dtype=torch.float32)
        codes = torch.stack([value.flatten() >> 4, value.flatten() & 15], 1).flatten().long()
        values = part("quant_map")[codes] * scales.repeat_interleave(about["blocksize"])[: len(codes)]
        state[name] = values.reshape(about["shape"])
    return state


def masks(config, segments, dtype):
    """Additive masks of rows that see their own segment up to themselves, and through the window."""
    at = torch.arange(len(segments))
    seen = (segments[:, None] == segments[None]) & (at[:, None] >= at[None])
    def additive(seen):
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)
        return mask[None, None].to(options.device, dtype)
    if config.model_type != "gemma2":
        return additive(seen)
    slides = at[:, None] - at[None] < config.sliding_window
    return {"full_attention": additive(seen), "sliding_attention": additive(seen & slides)}


class Run:
    """One family in one type by PyTorch; `found` has the names that the product's file has."""

    def __init__(self, family, dtype):
        self.folder, self.dtype, self.found = options.fixtures / "tiny-models" / family, dtype, {}
        self.config = transformers.AutoConfig.from_pretrained(self.folder / "f32")
        self.expected = load_file(self.folder / "expected.safetensors")
        plain = load_file(self.folder / "f32/model.safetensors")
        nf4 = decoded(self.folder / "nf4")
        assert torch.equal(nf4["model.layers.0.mlp.gate_proj.weight"], self.expected["dequant_layer0_gate"])
        ids = self.expected["input_ids"].to(options.device)
        for name, state in [("logits_f32", plain), ("logits_nf4", nf4)]:
            self.model = self.make(state)
            self.keep(name, self.logits(ids))
        self.model = peft.PeftModel.from_pretrained(self.model, self.folder / "adapter", is_trainable=True)
        self.keep("logits_nf4_adapter", self.logits(ids))
        self.train(ids[:1])

    def make(self, state):
        model = transformers.AutoModelForCausalLM.from_config(self.config, attn_implementation="eager")
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and missing in ([], ["lm_head.weight"]), (missing, unexpected)
        model.tie_weights()
        return model.to(options.device, self.dtype).eval()

    def keep(self, name, value):
        self.found[name] = value.detach().float().flatten().cpu()

    def logits(self, ids, **other):
        kind = torch.device(options.device).type
        with torch.set_grad_enabled(bool(other)), torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(input_ids=ids, use_cache=False, **other).logits.float()

    def loss(self, ids, labels):
        positions = self.expected["packed_positions"]
        segments = (positions[0] == 0).cumsum(0)
        logits = self.logits(ids, position_ids=positions.to(options.device),
                             attention_mask=masks(self.config, segments, self.dtype))[0, :-1]
        labels = labels[0, 1:].to(options.device)
        keep = labels != -100
        losses = torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="none")
        return logits[keep], labels[keep], losses.mean()

    def train(self, ids):
        scale = SCALE if self.dtype == torch.float16 else 1.0
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        labels = self.expected["packed_labels"]
        logits, self.labels, loss = self.loss(ids, labels)
        (loss * scale).backward()
        self.keep("packed_logits", logits)
        self.keep("packed_loss", loss)
        for name, p in trained.items():
            self.keep("grad." + short(name), p.grad / scale)
            p.grad = None
        at, losses = torch.arange(labels.shape[1]), []
        for row in range(ROWS):
            tokens = ((at * 7919 + at * at * 31 + row * 104729) % self.config.vocab_size)[None]
            losses.append(self.loss(tokens.to(options.device), torch.where(labels == -100, labels, tokens))[2])
        self.keep("row_losses", torch.stack(losses))
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
        losses, norms = [], []
        for s in range(10):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (s / 3 if s < 3 else (10 - s) / 7)
            loss = self.loss(ids, labels)[2]
            (loss * scale).backward()
            for p in trained.values():
                p.grad /= scale
            norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item())
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        self.keep("adamw_losses", torch.tensor(losses))
        self.keep("adamw_grad_norms", torch.tensor(norms))
        for name, p in trained.items():
            self.keep("factor." + short(name), p)


def short(name):
    return name.removeprefix("base_model.model.").replace(".default.weight", ".weight")


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def token_losses(logits, labels):
    return torch.nn.functional.cross_entropy(logits.reshape(len(labels), -1), labels.cpu(), reduction="none")


def together(found, part):
    names = sorted(n for n in found if n.startswith(part))
    return torch.cat([found[n] for n in names])


def compare(family):
    exact = Run(family, torch.float32)
    folder = options.fixtures / "tiny-models" / family
    reference = {n: v.flatten() for n, v in load_file(folder / "expected.safetensors").items()}
    reference |= {"grad." + n: v.flatten() for n, v in load_file(folder / "lora_grads.safetensors").items()}
    # What the fixtures do not hold, PyTorch gives in f32.
    reference["token_losses"] = token_losses(exact.found["packed_logits"], exact.labels)
    reference["row_losses"] = exact.found["row_losses"]
    after = load_file(folder / "adapter_after_10_steps/adapter_model.safetensors")
    reference |= {"factor." + short(n): v.flatten() for n, v in after.items()}
    over = 0
    for dtype, name in [(torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.float16, "f16")]:
        theirs = exact if dtype == torch.float32 else Run(family, dtype)
        ours = load_file(options.ours / f"{family}-{name}.safetensors")
        rows = []
        for what in ["logits_f32", "logits_nf4", "logits_nf4_adapter"]:
            rows.append((what, distance(ours[what], reference[what]), distance(theirs.found[what], reference[what])))
        own, their = (token_losses(f["packed_logits"], exact.labels) for f in (ours, theirs.found))
        rows.append(("token losses", distance(own, reference["token_losses"]), distance(their, reference["token_losses"])))
        rows.append(("losses of 64 rows", *(distance(f["row_losses"], reference["row_losses"]) for f in (ours, theirs.found))))
        rows.append(("packed loss", *(distance(f["packed_loss"], reference["packed_loss"]) for f in (ours, theirs.found))))
        for part, label in [("grad.", "gradients"), ("factor.", "factors, ten steps")]:
            rows.append((label, *(distance(together(f, part), together(reference, part)) for f in (ours, theirs.found))))
        worst = lambda f: max(distance(f[n], reference[n]) for n in reference if n.startswith("grad."))
        rows.append(("worst gradient", worst(ours), worst(theirs.found)))
        for what in ["adamw_losses", "adamw_grad_norms"]:
            rows.append((what, distance(ours[what], reference[what]), distance(theirs.found[what], reference[what])))
        for label, own, their in rows:
            ratio = own / max(their, 1e-12)
            judged = dtype != torch.float32 and label != "packed loss"
            over += judged and ratio > 2
            print(f"{family:7} {name:5} {label:20} ours {own:.2e}  PyTorch {their:.2e}  ratio {ratio:5.2f}"
                  + ("  ABOVE 2" if ratio > 2 and judged else ""), flush=True)
    return over


print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
      f"{torch.cuda.get_device_name() if options.device == 'cuda' else options.device}")
print("above twice PyTorch's own distance:", sum(compare(family) for family in ["llama", "qwen2", "gemma2"]))
