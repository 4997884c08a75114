"""Statistics of every Linear against the hooked whole model, for every causal model type -> results/statistics.json.

    measure_statistics.py                  all model types that transformers' AutoModelForCausalLM knows
    measure_statistics.py llama gemma4     the rows of these

Each model is tiny and made on the spot from a seed. Text: 4 windows of random ids, in batches of 1, 2 and 4; batches of
2 read the model in memory, the others its tensors as on disk. A method that rounds to nearest and keeps what it was
given runs over the blocks; beside it, transformers runs the whole model, window by window, with the quantized weights
of all blocks before the one at hand, and hooks sum up in float64 what its Linears are given. The table holds the largest
relative difference of each statistic (cross: relative to the root of both energies), or the sentence with which `check`
refuses the type.
"""
import argparse
import copy
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
from measure import machine
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmquant.core.errors import UsageError
from llmquant.core.model_registry import ModelRegistry
from llmquant.core.qtensor import round_to_nearest
from llmquant.core.quantizer_registry import BaseQuantizer
from llmquant.plan.plan import make_plan
from llmquant.sequential.block_flow import flow_of
from llmquant.sequential.block_source import for_checkpoint, for_model
from llmquant.sequential.decoder_loop import Storage, run_blocks, start_blocks

ROOT = Path(__file__).parent.parent
WINDOWS, LENGTH, BATCHES, VOCABULARY = 4, 20, (1, 2, 4), 96
STATISTICS = ("hessian", "cross", "maxima", "range")
# Whatever a configuration knows of these is made this small.
SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.1, pad_token_id=90,
    bos_token_id=1, eos_token_id=2, sliding_window=8, n_positions=64, d_model=32, n_embd=32, n_layer=2, n_head=4,
    n_layers=2, n_heads=4, d_ff=64, ffn_dim=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, moe_intermediate_size=32, n_routed_experts=4,
    num_experts=4, num_local_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=32, n_shared_experts=1,
    first_k_dense_replace=1, n_group=2, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, mamba_d_state=8, mamba_d_conv=4, mamba_expand=2, mamba_d_head=16,
    mamba_n_heads=4, mamba_n_groups=1, mamba_head_dim=8, ssm_state_size=8, n_groups=1, state_size=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, head_size=8,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, image_size=16, patch_size=8, dff=64, dim_ff=64,
    dim_head=8, index_topk=8, index_head_dim=8, o_lora_rank=16, dense_intermediate_size=64, shared_intermediate_size=32,
    intermediate_size_mlp=64, attention_chunk_size=8, ffn_hidden_size=64, expert_ffn_hidden_size=32, zero_expert_num=2,
    swa_head_dim=8, sliding_window_size=8, rel_extent=32, kv_channels=8, linear_head_dim=8, ngram_vocab_size_base=64,
    hc_lowrank=8, split_ngram_parts=4, make_ngram_vocab_size_divisible_by=8, router_hidden_size=16, d_inner=64,
    emb_dim=32, attention_window_size=8, query_pre_attn_scalar=8, chunk_size=8, mamba_chunk_size=8, index_block_size=4,
    block_size=8, keep_window_size=8, local_attention=8, embedding_size=32, input_embedding_size=32,
    output_embedding_size=32, lru_width=32)
LATENT = dict(head_dim=None, num_key_value_heads=4)
PAIRS = ["sliding_attention", "full_attention"] * 2
SHARING = dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=PAIRS)
HYBRID = dict(num_hidden_layers=6, layer_types=["linear_attention", "linear_attention", "hybrid"] * 2, head_dim=None,
              attention_head_dim=16)
PADDED = dict(pad_token_id=1)
# What a type needs beside; None leaves a value out.
OWN = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
                     "minicpm3", "youtu"), LATENT),
    "kimi_linear": dict(LATENT, num_experts_per_token=2, num_expert_group=1),
    "longcat_flash": dict(LATENT, head_dim=8, num_layers=2, num_hidden_layers=None, moe_topk=2),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
                     "xmod", "prophetnet"), PADDED),
    "codegen": dict(rotary_dim=4), "gptj": dict(rotary_dim=4), "zaya": dict(num_experts_per_tok=1),
    "gemma3n": dict(SHARING, intermediate_size=[64] * 4, activation_sparsity_pattern=[0.5, 0., 0., 0.], laurel_rank=8),
    "gemma4": dict(SHARING, global_head_dim=8),
    "gemma4_unified": dict(num_hidden_layers=4, layer_types=PAIRS, global_head_dim=8),
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4, window_size=8),
    "falcon_h1": dict(mamba_d_ssm=64), "mamba2": dict(num_heads=8), "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "zamba": dict(HYBRID, mamba_dt_rank=4, n_mamba_heads=2),
    "zamba2": dict(HYBRID, num_mem_blocks=1, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1, adapter_rank=8,
                   num_key_value_heads=4),
    "xglm": dict(pad_token_id=1, attention_heads=4, num_layers=2), "hrm_text": dict(num_hidden_layers=4),
    "nemotron_h": dict(num_hidden_layers=None, mamba_num_heads=8, moe_shared_expert_intermediate_size=32,
                       layers_block_type=["linear_attention", "full_attention", "mlp", "moe"]),
    "deepseek_v4": dict(num_hidden_layers=4),
    "qwen3_5": dict(num_hidden_layers=4), "qwen3_next": dict(num_hidden_layers=4), "jamba": dict(num_hidden_layers=4),
}


MUSIC, LARGE, DRAFT = "writes music or speech", "configuration alone makes no small model of it", "drafts for another model"
LEFT_OUT = {
    **dict.fromkeys(("blt", "cohere_compass_text", "dbrx", "fuyu", "git", "got_ocr2", "phi4_multimodal", "reformer",
                     "roc_bert"), LARGE),
    **dict.fromkeys(("moshi", "musicgen", "musicgen_melody"), MUSIC),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), DRAFT),
    "gemma3n": "its vision tower is timm's; its decoder is gemma3n_text",
}


def configuration(kind, **changes):
    "The configuration of one tiny model."
    known = CONFIG_MAPPING[kind]().to_dict()
    own = OWN.get(kind) or OWN.get(kind.removesuffix("_text")) or {}
    own = own | changes
    def small(values, own):
        found = {key: value for key, value in (SMALL | own).items() if key in values or key in own}
        if values.get("layer_types") and "layer_types" not in found: found["layer_types"] = None
        return {key: value for key, value in found.items() if value is not None or key == "layer_types"}
    if not isinstance(known.get("text_config"), dict): return CONFIG_MAPPING[kind](**_drop(small(known, own), known))
    towers = {key: small(known[key], {}) for key in ("vision_config", "audio_config") if isinstance(known.get(key), dict)}
    return CONFIG_MAPPING[kind](text_config=small(known["text_config"], own), **towers)


def _drop(values, known):
    "Without a list of layer types that the configuration makes by itself."
    return {key: value for key, value in values.items() if value is not None}


@torch.no_grad()
def build(kind, **changes):
    "A tiny model in float32 whose norms and biases are uneven."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(kind, **changes), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        if parameter.dim() == 1: parameter.add_(0.05 * noise)
        elif parameter.dim() == 3: parameter.copy_(0.1 * noise)
    return model


class Keeping(BaseQuantizer):
    "Asks for every statistic and rounds to nearest."
    name, stacks_rows = "keeping", False

    def needed_statistics(self): return STATISTICS

    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight, scheme)


class Kept(dict):
    "A writer that keeps dequantized weights, and what was measured for them."
    def __init__(self): self.stats, self.edited = {}, {}

    def put(self, layer, weight, result):
        self[layer.name] = weight.dequantize(torch.float32)


def note_statistics(loop, writer):
    "Let a writer keep what each Linear is quantized with."
    solve = loop.solve
    def noting(modules, plans, stats):
        writer.stats.update({name: stats.copy() for name in modules})
        return solve(modules, plans, stats)
    loop.solve = noting


def measured(model, adapter, tensors, tokens, batch_size):
    "What the block loop measures at each planned Linear, and the quantized weights."
    quantizer = Keeping()
    quantizer.configure({})
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    config = model.config.to_dict()
    with patch("llmquant.plan.plan.leave_unfit", lambda layers, *_: layers): # too narrow for vLLM, and measured all the same
        plan = make_plan(adapter, config, shapes, torch.float32, quantizer, 4, -1)
    source = SimpleNamespace(config=config, tensor=lambda name: tensors[name].detach().clone())
    blocks = for_model(model, adapter) if batch_size == 2 else for_checkpoint(source, adapter)
    writer = Kept()
    loop = start_blocks(plan, quantizer, blocks, tokens, batch_size, Storage(torch.float32))
    note_statistics(loop, writer)
    run_blocks(loop, writer)
    return writer.stats, writer


@torch.no_grad()
def inputs_of(model, names, tokens):
    "What Linears are given when the whole model reads each window: name to float64 [tokens, in_features]."
    found = {name: [] for name in names}
    hooks = [model.get_submodule(name).register_forward_pre_hook(
        lambda module, given, name=name: found[name].append(given[0].detach().reshape(-1, given[0].shape[-1]).double()))
        for name in names]
    for window in tokens: model(input_ids=window[None], use_cache=False)
    for hook in hooks: hook.remove()
    return {name: torch.cat(parts) if parts else None for name, parts in found.items()}


def expected(model, adapter, weights, tokens):
    "The same statistics from the whole model, with the quantized weights of the blocks before."
    where = {name: next(n for n, m in model.named_modules() if m is adapter.get_layer_by_name(model, name))
             for name in weights}
    block = {name: adapter.block_of(name) for name in weights}
    in_float = inputs_of(model, where.values(), tokens)
    found, quantized = {}, copy.deepcopy(model)
    for index in sorted({*block.values()}):
        mine = [name for name in weights if block[name] == index]
        given = inputs_of(quantized, [where[name] for name in mine], tokens)
        for name in mine: found[name] = _sums(given[where[name]], in_float[where[name]])
        for name in mine: quantized.get_submodule(where[name]).weight.data.copy_(weights[name])
    return found


def _sums(x, in_float):
    "Statistics of inputs in float64."
    if x is None: return None
    energy = (x.square().sum() * (in_float - x).square().sum()).sqrt() / len(x)
    return SimpleNamespace(tokens=len(x), hessian=x.T @ x / len(x), cross=(in_float - x).T @ x / len(x), energy=energy,
                           maxima=x.abs().amax(0), low=x.amin(0), high=x.amax(0))


def apart(found, right):
    "Relative differences of one Linear's statistics."
    if right is None or found.tokens != right.tokens:
        same = right is None and found.tokens == 0
        return dict.fromkeys(STATISTICS, 0.0 if same else float("inf"))
    off = lambda name, size: float((getattr(found, name).double() - getattr(right, name)).norm() / size.clamp(min=1e-30))
    return {"hessian": off("hessian", right.hessian.norm()),
            "cross": off("cross", right.energy) if right.energy else float(found.cross.norm()),
            "maxima": off("maxima", right.maxima.norm()),
            "range": max(off("low", right.low.norm()), off("high", right.high.norm()))}


def refused(adapter, config):
    "The sentence with which `check` refuses a model type, from its skeleton; None where it goes on."
    try:
        skeleton = adapter.skeleton(config)
        size = sum(p.numel() for p in skeleton.parameters())
        widest = max((m.in_features for m in skeleton.modules() if isinstance(m, nn.Linear)), default=0)
        assert size < 3e6 and widest <= 512, f"{size} parameters, a Linear reads {widest} features"
        adapter.linear_sites(config, {name: tuple(t.shape) for name, t in adapter.checkpoint_tensors(skeleton).items()})
        flow_of(skeleton, adapter.get_layers(skeleton))
    except UsageError as error: return str(error)


def measure(kind):
    "The row of one model type: the worst differences, or why it is refused."
    config = configuration(kind).to_dict()
    adapter = ModelRegistry.for_config(config)
    if refusal := refused(adapter, config): return {"refused": refusal}
    model = build(kind)
    tokens = torch.randint(3, VOCABULARY - 8, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(2))
    try:
        tensors = adapter.checkpoint_tensors(model)
        row, right = {"linears": 0, "blocks": len(adapter.get_layers(model))}, None
        for batch_size in BATCHES:
            stats, weights = measured(model, adapter, tensors, tokens, batch_size)
            right = right or expected(model, adapter, weights, tokens)
            off = [apart(stats[name], right[name]) for name in stats]
            row["linears"] = len(stats)
            row |= {s: max(row.get(s, 0.0), *(o[s] for o in off)) for s in STATISTICS}
        row["uncalled"] = sum(r is None for r in right.values())
    except UsageError as error: return {"refused": str(error)}
    return row


def main():
    "Measure and write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="model types whose rows are measured again; all when not given")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = {}
    for kind in given.kinds or [k for k in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if k not in LEFT_OUT]:
        rows[kind] = row = measure(kind)
        words = [f"{key} {value:.0e}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        print(f"{kind}: {', '.join(words)}", flush=True)
    file = ROOT/"results"/"statistics.json"
    if given.kinds: rows = json.loads(file.read_text(encoding="utf-8"))["rows"] | rows
    found = {"command": "tools/measure_statistics.py", "machine": machine(), "windows": WINDOWS, "length": LENGTH,
             "batch_sizes": BATCHES, "rows": rows, "left_out": LEFT_OUT}
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
