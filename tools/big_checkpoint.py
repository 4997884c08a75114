"""A made-up checkpoint with the names and shapes of a Llama: about 6 GB of bfloat16 in shards of 1 GB.

    big_checkpoint.py FOLDER [--layers 13] [--shard-bytes 1000000000]

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


def shapes(layers):
    "Name and shape of every tensor."
    hidden, inner, keys = CONFIG["hidden_size"], CONFIG["intermediate_size"], 128 * CONFIG["num_key_value_heads"]
    attention = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    found = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden)}
    for i in range(layers):
        found |= {f"model.layers.{i}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        found |= {f"model.layers.{i}.mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
        found |= {f"model.layers.{i}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (CONFIG["vocab_size"], hidden)}


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


def make(folder, layers, shard_bytes):
    "Write the checkpoint."
    import torch

    block = (
        (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02)
        .to(torch.bfloat16)
        .view(torch.uint8)
        .numpy()
    )
    folder.mkdir(parents=True)
    parts, index = shards(shapes(layers), shard_bytes), {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_shard(folder / file, part, block)
        index |= dict.fromkeys(part, file)
    total = sum(map(bytes_of, shapes(layers).values()))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}, indent=2))
    print(f"{total / 1e9:.2f} GB in {len(parts)} shards", flush=True)


def main():
    "Parse the command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--shard-bytes", type=int, default=10**9)
    given = parser.parse_args()
    make(given.folder, given.layers, given.shard_bytes)


if __name__ == "__main__":
    main()
