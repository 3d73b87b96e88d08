"""Checks an export of `pipe` with the libraries of those who will read it.

    python benches/check_export.py MODEL ADAPTER EXPORT

MODEL is a folder of safetensors in f32 with its tokenizer, ADAPTER a PEFT folder, EXPORT the output
`model` of the stage kind `export`. PEFT merges; every tensor of the export must be what rounding
leaves of the merged one. Safetensors are also loaded by transformers; of GGUF, the tokens, merges
and the chat template are compared too. Needs gguf, peft, safetensors, transformers (made with gguf
0.19.0, peft 0.21.2, transformers 5.23.0).
"""

import json
import sys
from pathlib import Path

import loftq_cpu  # noqa: F401
import numpy as np
import torch
from gguf import GGUFReader, Keys
from gguf.quants import dequantize, quantize
from peft import PeftModel
from transformers import AutoModelForCausalLM

# f32 sums in another order may move a value across a rounding boundary: at most this share of them.
MOVED = 1e-3
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name, config):
    if name in OUTER:
        return OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    modules = MODULES | GEMMA_NORMS if config.model_type == "gemma2" else MODULES
    return f"blk.{layer}.{modules[module]}.{kind}"


def permute(values, heads):
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    shape = values.shape
    halves = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def check_gemma2(reader, config):
    """The keys of `Gemma2Model.set_gguf_parameters`, under their names in the package."""
    for key, value in {
        Keys.LLM.ATTN_LOGIT_SOFTCAPPING: config.attn_logit_softcapping,
        Keys.LLM.FINAL_LOGIT_SOFTCAPPING: config.final_logit_softcapping,
        Keys.Attention.SLIDING_WINDOW: config.sliding_window,
        Keys.Attention.KEY_LENGTH: config.head_dim,
        Keys.Attention.VALUE_LENGTH: config.head_dim,
        Keys.Attention.HEAD_COUNT_KV: config.num_key_value_heads,
        Keys.Attention.LAYERNORM_RMS_EPS: np.float32(config.rms_norm_eps),
        Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
    }.items():
        found = reader.get_field(key.format(arch="gemma2")).contents()
        assert found == value, f"{key}: {found}, not {value}"


def check_gguf(path, merged, config, source):
    reader = GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == config.model_type
    stored = {t.name: t for t in reader.tensors}
    assert set(stored) == {gguf_name(name, config) for name in merged}, sorted(stored)
    if config.model_type == "gemma2":
        check_gemma2(reader, config)
    for name, values in merged.items():
        tensor = stored[gguf_name(name, config)]
        values = values.numpy()
        if config.model_type == "gemma2" and name.endswith("norm.weight"):
            values = values + 1  # `Gemma2Model.modify_tensors` of convert_hf_to_gguf.py
        if config.model_type == "llama" and name.endswith("q_proj.weight"):
            values = permute(values, config.num_attention_heads)
        if config.model_type == "llama" and name.endswith("k_proj.weight"):
            values = permute(values, config.num_key_value_heads)
        expected = dequantize(quantize(values, tensor.tensor_type), tensor.tensor_type)
        found = dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        moved = np.mean(found != expected)
        assert moved <= MOVED, f"{name}: {moved:.2%} of the values differ"
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert len(tokens) == len(types) == config.vocab_size
    for text, index in tokenizer["model"]["vocab"].items():
        assert tokens[index] == text and types[index] == 1, text
    for token in tokenizer["added_tokens"]:
        assert tokens[token["id"]] == token["content"] and types[token["id"]] == 3, token
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert reader.get_field("tokenizer.ggml.merges").contents() == merges
    about = json.loads((source / "tokenizer_config.json").read_text())
    assert reader.get_field("tokenizer.chat_template").contents() == about["chat_template"]
    eos = reader.get_field("tokenizer.ggml.eos_token_id").contents()
    assert tokens[eos] == about["eos_token"]


def check_safetensors(folder, merged):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    found = model.state_dict()
    for name, values in merged.items():
        moved = (found[name] != values.bfloat16()).float().mean().item()
        assert moved <= MOVED, f"{name}: {moved:.2%} of the values differ"


def main(source, adapter, export):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = model.config
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    if config.tie_word_embeddings:
        merged.pop("lm_head.weight", None)
    gguf = export / "model.gguf"
    if gguf.exists():
        check_gguf(gguf, merged, config, source)
    else:
        check_safetensors(export, merged)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
