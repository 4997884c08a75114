"""Tiny checkpoints of every family, made on the spot from a seed.

Their weights are large (`initializer_range` 0.1) and their norms uneven, so that a planted fault (a zero point off by
one, two projections swapped) moves the log-probabilities far beyond rounding noise. All `in_features` are divisible
by 64 and all quantized `out_features` by 32, as vLLM's CPU kernels want.
"""
import argparse
import hashlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128, beta_fast=32,
            beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
COMMON = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=512, initializer_range=0.1, bos_token_id=1, eos_token_id=2)
# vLLM compiles latent attention for 512 + 64 only, as the published models have it.
LATENT = dict(num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
              v_head_dim=128, moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
              n_group=2, topk_group=1, first_k_dense_replace=1, routed_scaling_factor=1.0, norm_topk_prob=True,
              rope_parameters=YARN)
MOE = dict(head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True)
OWN = {
    "llama": dict(head_dim=32),
    "mistral": dict(head_dim=32, sliding_window=None),
    "qwen2": dict(),
    "qwen3": dict(head_dim=32),
    "qwen2_moe": dict(shared_expert_intermediate_size=128, mlp_only_layers=[0], **MOE),
    "qwen3_moe": dict(**MOE),
    "deepseek_v2": dict(LATENT, topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1),
    "deepseek_v3": dict(LATENT),
    "gemma2": dict(head_dim=32, sliding_window=64, query_pre_attn_scalar=32),
    "olmo2": dict(),
    "gpt_neox": dict(num_key_value_heads=4),   # it knows no shared heads, and vLLM believes a configuration that says so
    "phi3": dict(pad_token_id=0, sliding_window=None),
    "opt": dict(ffn_dim=256, word_embed_proj_dim=128, pad_token_id=0),
}
KINDS = tuple(OWN)
# The published configurations say these; transformers 5 drops them, and vLLM's defaults differ.
PUBLISHED = {"deepseek_v2": dict(scoring_func="softmax", topk_method="greedy"),
             "deepseek_v3": dict(scoring_func="sigmoid", topk_method="noaux_tc")}


def config(kind: str, layers: int = 2, tie: bool = False, **changes):
    "The transformers configuration of one tiny model; `changes` override single values."
    from transformers import AutoConfig
    if kind not in OWN: raise ValueError(f"no tiny model {kind!r}; there are {', '.join(KINDS)}")
    values = {**COMMON, "num_hidden_layers": layers, "tie_word_embeddings": tie, **OWN[kind], **changes}
    return AutoConfig.for_model(kind, **values)


@torch.no_grad()
def perturb_(model: torch.nn.Module, seed: int):
    "Give norms, biases and routing corrections values of their own, and a fused or stacked weight the common spread."
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if not parameter.is_floating_point() or "rotary" in name or "inv_freq" in name: continue
        noise = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"): parameter.add_(0.2 * noise)
        elif parameter.dim() == 1: parameter.copy_(0.05 * noise)
        elif parameter.dim() == 3: parameter.copy_(0.1 * noise)


def build(kind: str, dtype: torch.dtype = torch.float16, layers: int = 2, tie: bool = False, seed: int = 0, **changes):
    "A tiny model in memory, in eval mode."
    from transformers import AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(kind, layers, tie, **changes), dtype=torch.float32)
    perturb_(model, seed)
    for parameter in model.parameters(): parameter.data = parameter.data.to(dtype)   # buffers stay: rope is float32
    model.config.dtype = dtype
    return model.eval()


def publish(path: Path, kind: str):
    "Add what transformers leaves out of config.json."
    file = Path(path)/"config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**values, **PUBLISHED.get(kind, {})}, indent=2) + "\n", encoding="utf-8")


@cache
def made() -> tempfile.TemporaryDirectory:
    "Where this process keeps what it has made."
    return tempfile.TemporaryDirectory(prefix="tiny-")


def write(path: Path, kind: str, dtype: torch.dtype, layers: int, tie: bool, shards: int, seed: int, changes: dict):
    "Build and save one checkpoint."
    model = build(kind, dtype, layers, tie, seed, **changes)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(path, max_shard_size="5GB" if shards == 1 else max(total // shards, 1))
    publish(path, kind)


def make(kind: str, path, dtype: torch.dtype = torch.float16, layers: int = 2, tie: bool = False, shards: int = 1,
         seed: int = 0, **changes) -> Path:
    """Write a tiny checkpoint to `path` in about `shards` files (at least two when more than one is asked for).

    It is built once in a process; the same one again is a copy.
    """
    options = kind, dtype, layers, tie, shards, seed, changes
    kept = Path(made().name)/hashlib.sha256(repr(options).encode()).hexdigest()
    if not kept.exists():
        write(kept.with_suffix(".part"), *options)
        kept.with_suffix(".part").rename(kept)
    return Path(shutil.copytree(kept, path, dirs_exist_ok=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write a tiny checkpoint")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tie", action="store_true")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    given = parser.parse_args()
    make(given.kind, given.path, getattr(torch, given.dtype), given.layers, given.tie, given.shards)
