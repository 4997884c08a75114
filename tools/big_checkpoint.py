"""A made-up checkpoint with the names and shapes of a Llama: about 6 GB of bfloat16 in shards of 1 GB.

    big_checkpoint.py FOLDER [--like 8b] [--layers 13] [--shard-bytes 1000000000]

`--like 3b` has the shapes of a small Llama 3.2: 28 layers, 3.2 billion parameters, the output head tied to the
embedding. `--like qwen0.5b` and `qwen1.5b` have those of Qwen2.5, with biases.

Weights are one block of random numbers, repeated; so it is written as fast as the disk takes it.
"""

import argparse
import json
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SMALL = {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
         "tie_word_embeddings": True}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1000000.0}  # fmt: skip
HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "head_dim": 64}
MORE = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "head_dim": 128}
LIKE = {"8b": (CONFIG, 13), "3b": (CONFIG | SMALL, 28), "qwen0.5b": (CONFIG | QWEN | HALF, 24),
        "qwen1.5b": (CONFIG | QWEN | MORE, 28)}  # fmt: skip


def shapes(config, layers):
    "Name and shape of every tensor."
    hidden, inner, keys = config["hidden_size"], config["intermediate_size"], config["head_dim"] * config["num_key_value_heads"]
    attention = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(layers):
        found |= {f"model.layers.{i}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        if config["model_type"] == "qwen2":
            found |= {f"model.layers.{i}.self_attn.{name}_proj.bias": attention[name][:1] for name in "qkv"}
        found |= {f"model.layers.{i}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
        found |= {f"model.layers.{i}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": (config["vocab_size"], hidden)}
    return found | {"model.norm.weight": (hidden,)} | head


def bytes_of(shape):
    "Bytes of a bfloat16 tensor."
    return 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)


def shards(tensors, limit):
    "Tensors dealt out in order, at most `limit` bytes to a shard."
    parts, size = [{}], 0
    for name, shape in tensors.items():
        if parts[-1] and size + bytes_of(shape) > limit:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += bytes_of(shape)
    return parts


def write_shard(path, tensors, block):
    "One safetensors file; every tensor starts at the beginning of `block` and repeats it."
    header, at = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + bytes_of(shape)]}
        at += bytes_of(shape)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for shape in tensors.values():
            left = bytes_of(shape)
            while left:
                left -= file.write(memoryview(block)[: min(left, len(block))])


def make(folder, config, layers, shard_bytes):
    "Write the checkpoint."
    import torch

    block = (
        (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02)
        .to(torch.bfloat16)
        .view(torch.uint8)
        .numpy()
    )
    folder.mkdir(parents=True)
    parts, index = shards(shapes(config, layers), shard_bytes), {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_shard(folder / file, part, block)
        index |= dict.fromkeys(part, file)
    total = sum(map(bytes_of, shapes(config, layers).values()))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}, indent=2))
    print(f"{total / 1e9:.2f} GB in {len(parts)} shards", flush=True)


def main():
    "Parse the command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--like", choices=LIKE, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shard-bytes", type=int, default=10**9)
    given = parser.parse_args()
    config, layers = LIKE[given.like]
    make(given.folder, config, given.layers or layers, given.shard_bytes)


if __name__ == "__main__":
    main()
