"""A QLoRA training step and generation by other programs, on random weights of a model's shape.

    python3 benches/peers/qlora.py hf|unsloth SHAPE [STEPS] [--generate]

SHAPE: qwen2.5-3b, gemma-2-2b, smollm2-135m. The settings are those of `step time` in stages/shared/cuda/examples:
4-bit NF4 with double quantisation, r 16 on seven projections, micro-batches of 2 x 2048, 4 of them a
step, AdamW in 8 bits, clipping at 1. `hf` is transformers, PEFT and bitsandbytes with checkpointing,
attention by SDPA, or eager for Gemma-2, whose softcap SDPA leaves out.
Needs an NVIDIA GPU, torch, transformers, peft, bitsandbytes, and unsloth for `unsloth`.
"""

import argparse
import json
import os
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("peer", choices=["hf", "unsloth"])
parser.add_argument("shape", choices=["qwen2.5-3b", "gemma-2-2b", "smollm2-135m"])
parser.add_argument("steps", nargs="?", type=int, default=12)
parser.add_argument("--generate", action="store_true")
options = parser.parse_args()

if options.peer == "unsloth":  # Must be imported before transformers.
    from unsloth import FastLanguageModel
import bitsandbytes
import torch
import transformers

ROWS, LENGTH, ACCUMULATION = 2, 2048, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "qwen2.5-3b": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, rope_theta=1e6, rms_norm_eps=1e-6,
        use_sliding_window=False)),
    "gemma-2-2b": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, dict(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, vocab_size=256000, query_pre_attn_scalar=256,
        sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        rope_theta=1e4, rms_norm_eps=1e-6)),
    "smollm2-135m": (transformers.LlamaConfig, transformers.LlamaForCausalLM, dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, rope_theta=1e5, rms_norm_eps=1e-5)),
}


def checkpoint():
    """Folder of a random bf16 checkpoint of the shape, made once."""
    folder = os.path.join(tempfile.gettempdir(), "peer-" + options.shape)
    if os.path.exists(os.path.join(folder, "config.json")):
        return folder
    config, model, shape = SHAPES[options.shape]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        positions = 8192 if options.shape.startswith("gemma") else 32768
        made = model(config(tie_word_embeddings=True, max_position_embeddings=positions, bos_token_id=1,
                            eos_token_id=2, pad_token_id=3, **shape))
    torch.set_default_dtype(torch.float32)
    made.save_pretrained(folder)
    del made
    torch.cuda.empty_cache()
    from tokenizers import Tokenizer, models
    words = {f"t{i}": i for i in range(1000)} | {"<unk>": 1000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="t2", pad_token="t3"
    ).save_pretrained(folder)
    return folder


def load(folder):
    """The model with its adapter, as each peer's manual says."""
    if options.peer == "unsloth":
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=LENGTH, dtype=None, load_in_4bit=True, local_files_only=True)
        return FastLanguageModel.get_peft_model(
            model, r=16, target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth", random_state=42)
    import peft
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0},
        attn_implementation="eager" if options.shape.startswith("gemma") else "sdpa")
    model = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False})
    return peft.get_peft_model(model, peft.LoraConfig(
        r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS,
        task_type="CAUSAL_LM"))


def train(model, vocabulary):
    """Median step of all but the first three; prints one line of JSON."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=2e-4, weight_decay=0.01)
    model.train()
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(options.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(ACCUMULATION):
            tokens = torch.randint(0, vocabulary, (ROWS, LENGTH), device="cuda")
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens.clone()).loss / ACCUMULATION
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    times = sorted(times[3:])
    median = times[len(times) // 2]
    print(json.dumps({
        "peer": options.peer, "shape": options.shape, "step_ms": round(median * 1e3, 1),
        "tok_s": round(ROWS * LENGTH * ACCUMULATION / median),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}), flush=True)


def generate(model, vocabulary):
    """64 greedy tokens after prompts of 400, prefill included; the second of two runs."""
    model.eval()
    if options.peer == "unsloth":
        FastLanguageModel.for_inference(model)
    for batch in (1, 32):
        prompts = torch.randint(0, vocabulary, (batch, 400), device="cuda")
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
                model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts),
                               max_new_tokens=64, min_new_tokens=64, do_sample=False)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        print(json.dumps({"peer": options.peer, "shape": options.shape, "batch": batch,
                          "generated_tok_s": round(batch * 64 / seconds, 1)}), flush=True)


model = load(checkpoint())
train(model, SHAPES[options.shape][2]["vocab_size"])
if options.generate:
    generate(model, SHAPES[options.shape][2]["vocab_size"])
