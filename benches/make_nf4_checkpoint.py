"""Writes a model of random weights in the layout in which bitsandbytes stores NF4.

    python benches/make_nf4_checkpoint.py FOLDER               # the shape of Qwen2.5-3B: 2.05 GB
    python benches/make_nf4_checkpoint.py FOLDER --layers 4    # a smaller one

Double quantisation, blocks of 64 and 256, compute type bf16, tied embeddings, as Unsloth and
transformers save Qwen2.5. Needs numpy; bitsandbytes only to read it.
"""

import argparse
import json
from pathlib import Path

import numpy as np

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def dynamic_map():
    """bitsandbytes' signed 8-bit map (`create_dynamic_map`)."""
    values = [0.0, 1.0]
    for bits in range(7):
        bounds = np.linspace(0.1, 1, 2**bits + 1, dtype=np.float32)
        middles = (bounds[:-1] + bounds[1:]) / 2 * np.float32(10.0 ** (bits - 6))
        values += [*middles, *-middles]
    return np.sort(np.array(values, dtype=np.float32))


def bf16(values):
    return (np.asarray(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Model:
    """Shapes of the tensors, in the order of the file; their values are made while writing."""

    def __init__(self, args):
        self.rng = np.random.default_rng(3)
        self.map = dynamic_map()
        self.parts = []
        hidden, ffn, kv = args.hidden, args.intermediate, args.kv_heads * args.head_dim
        self.matrix("model.embed_tokens.weight", args.vocabulary, hidden)
        for layer in range(args.layers):
            name = f"model.layers.{layer}"
            q = args.heads * args.head_dim
            for module, rows, columns in [
                ("self_attn.q_proj", q, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, q),
                ("mlp.gate_proj", ffn, hidden),
                ("mlp.up_proj", ffn, hidden),
                ("mlp.down_proj", hidden, ffn),
            ]:
                self.linear(f"{name}.{module}.weight", rows, columns)
                if module[-6:] in ("q_proj", "k_proj", "v_proj"):
                    self.add(f"{name}.{module}.bias", "BF16", [rows], lambda n: bf16(np.zeros(n)))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.ones(f"{name}.{norm}.weight", hidden)
        self.ones("model.norm.weight", hidden)

    def add(self, name, dtype, shape, values):
        self.parts.append((name, dtype, shape, values))

    def ones(self, name, size):
        self.add(name, "BF16", [size], lambda n: bf16(np.ones(n)))

    def matrix(self, name, rows, columns):
        def values(n):
            pool = bf16(self.rng.normal(0, 0.02, 1 << 20))
            return np.resize(pool, n)

        self.add(name, "BF16", [rows, columns], values)

    def linear(self, name, rows, columns):
        count = rows * columns
        blocks = -(-count // 64)
        state = {
            "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns],
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05,
        }  # fmt: skip
        text = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
        codes = lambda n: self.rng.integers(0, 256, n, dtype=np.uint8)
        scales = lambda n: np.full(n, 0.03, dtype=np.float32)
        self.add(name, "U8", [-(-count // 2), 1], codes)
        self.add(f"{name}.absmax", "U8", [blocks], codes)
        self.add(f"{name}.nested_absmax", "F32", [-(-blocks // 256)], scales)
        self.add(f"{name}.nested_quant_map", "F32", [256], lambda n: self.map)
        self.add(f"{name}.quant_map", "F32", [16], lambda n: np.array(NF4, dtype=np.float32))
        self.add(f"{name}.quant_state.bitsandbytes__nf4", "U8", [text.size], lambda n: text)

    def write(self, path):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, dtype, shape, _ in self.parts:
            size = int(np.prod(shape)) * {"U8": 1, "BF16": 2, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, _, shape, values in self.parts:
                data = values(int(np.prod(shape))).tobytes()
                start, stop = header[name]["data_offsets"]
                assert len(data) == stop - start, name
                file.write(data)
        return end


def config(args):
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "vocab_size": args.vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=151936)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "config.json").write_text(json.dumps(config(args), indent=2) + "\n")
    size = Model(args).write(args.folder / "model.safetensors")
    print(f"{size / 1e9:.2f} GB of tensors in {args.folder}")


if __name__ == "__main__":
    main()
