"""AWQ on real blocks: pairs, folding, statistics after the folding, and errors that name what is wrong."""
from dataclasses import replace

import pytest
import tiny
import torch

from llmquant.core.errors import UsageError
from llmquant.core.model_registry import ModelRegistry
from llmquant.core.qtensor import round_to_nearest
from llmquant.core.smoothing import SmoothingPair, fold
from llmquant.plan.plan import make_plan
from llmquant.quantizers.awq_quantizer import AWQQuantizer
from llmquant.sequential.block_source import for_model
from llmquant.sequential.block_view import BlockView
from llmquant.sequential.block_loop import BlockLoop
from llmquant.sequential.hidden_states import Activations

LITE = {"deepseek_v2": dict(q_lora_rank=None)}   # no latent query, as in V2-Lite


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield


def with_outliers(kind, **changes):
    "A tiny float32 model whose norms make some channels large, so that there is something to find."
    model = tiny.build(kind, torch.float32, **changes)
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if p.dim() == 1 and "norm" in name and name.endswith("weight"):
            p.mul_(torch.exp(torch.randn(p.shape, generator=generator)))
        if p.dim() == 1: p.copy_(p.half().float())
    return model


def loop_over(model, bits=3, group_size=32, **options):
    "A walk in front of the first block, with random tokens as calibration text."
    adapter, quantizer = ModelRegistry.for_config(model.config.to_dict()), AWQQuantizer().configure(options)
    tensors = {name: (t.dtype, tuple(t.shape)) for name, t in adapter.checkpoint_tensors(model).items()}
    plan = make_plan(adapter, model.config.to_dict(), tensors, model.dtype, quantizer, bits, group_size)
    blocks = for_model(model, adapter)
    entry = blocks.inputs(torch.randint(3, 512, (4, 48), generator=torch.Generator().manual_seed(0)), 2)
    keep = lambda name, index: Activations([tuple(h.shape) for h in entry.hidden], torch.float32)
    stream = keep("quantized", 0)
    for batch, hidden in enumerate(entry.hidden): stream.put(batch, hidden)
    return BlockLoop(plan, quantizer, blocks, entry, stream, stream, keep)


def view_of(loop, index=0, drop=(), dtype=torch.float16, pairs=None):
    "The block, its view and its groups, measured; Linears whose name ends with one of `drop` stay in float."
    block, adapter = loop.blocks.load(index), loop.blocks.adapter
    find = lambda name: adapter.get_layer_by_name(loop.blocks.model, name)
    plans = {l.name: l for l in loop.plan.quantized if l.block == index and not l.name.endswith(tuple(drop) or "-")}
    groups = loop.find_groups(index, block, {n: find(n) for n in plans})
    measured = loop.measure(index, block, {names[0]: find(names[0]) for names in groups})
    stats = {n: measured[names[0]] for names in groups for n in names}
    if pairs is None: pairs = adapter.smoothing_pairs(loop.blocks.model.config.to_dict(), index)
    return block, BlockView(index, dtype, plans, stats, pairs, find), groups


@pytest.mark.parametrize("kind,index", [("llama", 0), ("qwen2", 1), ("qwen2_moe", 0), ("qwen2_moe", 1),
                                        ("deepseek_v3", 1), ("deepseek_v2", 0)])
def test_function_stays_and_statistics_follow(kind, index):
    loop = loop_over(with_outliers(kind, **LITE.get(kind, {})))
    block, view, groups = view_of(loop, index)
    before = loop.run(index, block, loop.activations, 0)
    loop.quantizer.prepare_block(view)
    after = loop.run(index, block, loop.activations, 0)
    assert (after - before).norm() / before.norm() < 2e-6
    edited = {name for pair in view.pairs for name in (pair.producer, *pair.consumers)}
    assert view.edited and view.edited <= edited
    again = loop.measure(index, block, {names[0]: view.module(names[0]) for names in groups})
    for names in groups:
        told, seen = view.stats[names[0]], again[names[0]]
        assert torch.allclose(told.hessian, seen.hessian, rtol=1e-3, atol=float(seen.hessian.abs().max()) * 1e-5)
        assert torch.allclose(told.means, seen.means, rtol=1e-3)
        assert torch.allclose(told.maxima, seen.maxima, rtol=1e-3)
        assert all(view.stats[name] is told for name in names)
    for name in view.edited:
        module = view.module(name)
        parameters = [module.bias] if module.weight.dim() == 2 else [module.weight]
        for p in parameters:
            if p is not None: assert torch.allclose(p, p.to(torch.float16).float(), rtol=1e-5, atol=1e-8), name
    loop.blocks.empty()


@pytest.mark.parametrize("symmetric", (False, True))
def test_output_error_below_plain_rounding(symmetric):
    loop = loop_over(with_outliers("llama"), symmetric=symmetric)
    block, view, _ = view_of(loop)
    plain = {}
    for name, plan in view.plans.items():
        w, h = view.module(name).weight, view.stats[name].hessian
        moved = round_to_nearest(w, plan.scheme).dequantize() - w
        plain[name] = float(((moved @ h) * moved).sum() / ((w @ h) * w).sum())**.5
    loop.blocks.empty()
    found, _ = loop.quantize_block(0, loop.blocks.load(0), dict(view.plans), view.pairs)
    errors = {result.layer.name: next(v for k, v in result.notes.items() if k.startswith("output_error"))
              for _, result in found}
    assert set(errors) == set(plain)
    assert sum(errors.values()) < 0.9 * sum(plain.values())
    loop.blocks.empty()


def test_a_consumer_in_float_gets_powers_of_two():
    loop = loop_over(with_outliers("llama"))
    block, view, _ = view_of(loop, drop=("k_proj",))
    name = "model.layers.0.self_attn.k_proj"
    old = view.module(name).weight.clone()
    before = loop.run(0, block, loop.activations, 0)
    loop.quantizer.prepare_block(view)
    factors = (view.module(name).weight / old)[0]
    assert (factors != 1).any() and (factors.log2() - factors.log2().round()).abs().max() < 5e-3
    assert name in view.edited and name not in view.stats
    after = loop.run(0, block, loop.activations, 0)
    assert (after - before).norm() / before.norm() < 2e-6
    loop.blocks.empty()


def test_a_producer_in_float_stays_representable():
    model, name = with_outliers("llama"), "model.layers.0.self_attn.v_proj"
    rows = torch.exp(1.5 * torch.randn(64, 1, generator=torch.Generator().manual_seed(3)))
    value = model.get_submodule(name).weight
    value.copy_((value * rows).half().float())
    loop = loop_over(model)
    _, view, _ = view_of(loop, drop=("v_proj",))
    pair = next(p for p in view.pairs if p.producer == name)
    loop.quantizer.smooth_site(view.site(pair))
    value = view.module(name).weight
    normal = torch.where(value.abs() > 1e-3, value, 0)  # smaller ones may be subnormal in float16
    assert torch.equal(normal, normal.half().float())
    assert name in view.edited
    loop.blocks.empty()


def test_a_pair_without_quantized_consumers_is_skipped():
    loop = loop_over(with_outliers("llama"))
    _, view, _ = view_of(loop, drop=("gate_proj", "up_proj", "down_proj"))
    loop.quantizer.prepare_block(view)
    assert not any("mlp" in name or "post_attention" in name for name in view.edited)
    assert "model.layers.0.input_layernorm" in view.edited
    loop.blocks.empty()


def test_errors_name_the_pair_and_the_adapters():
    loop = loop_over(with_outliers("llama"))
    pair = SmoothingPair("model.layers.0.input_norm", ("model.layers.0.self_attn.q_proj",))
    _, view, _ = view_of(loop, pairs=(pair,))
    said = r"smoothing pair model\.layers\.0\.input_norm -> .*q_proj does not match block 0"
    with pytest.raises(UsageError, match=said):
        loop.quantizer.prepare_block(view)
    view.pairs = ()
    with pytest.raises(UsageError, match="no smoothing pairs are known for block 0.*deepseek, .*llama, .*qwen"):
        loop.quantizer.prepare_block(view)
    AWQQuantizer().configure({"n_grid": 0}).prepare_block(view)
    assert not view.edited
    view.pairs = (replace(pair, producer="model.layers.0.input_layernorm"),)
    view.stats["model.layers.0.self_attn.q_proj"].hessian.zero_()
    with pytest.raises(UsageError, match="Hessian of model.layers.0.self_attn.q_proj is zero"):
        loop.quantizer.prepare_block(view)
    loop.blocks.empty()


def test_a_forgotten_consumer_is_stopped_by_the_walk():
    loop = loop_over(with_outliers("llama"))
    _, view, _ = view_of(loop)
    loop.blocks.empty()
    half = tuple(replace(p, consumers=p.consumers[:1]) for p in view.pairs)
    with pytest.raises(UsageError, match="changed its function"):
        loop.quantize_block(0, loop.blocks.load(0), dict(view.plans), half)
    loop.blocks.empty()


@pytest.mark.parametrize("kind", ("gemma2", "olmo2", "phi3"))
def test_other_architectures_claim_no_pairs(kind):
    config = tiny.config(kind).to_dict()
    assert ModelRegistry.for_config(config).smoothing_pairs(config, 0) == ()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_layernorms_and_biases_fold_exactly(dtype):
    model = with_outliers("opt", layers=1)
    at, ids = "model.decoder.layers.0", torch.arange(3, 40)[None]
    pairs = [SmoothingPair(f"{at}.self_attn_layer_norm", tuple(f"{at}.self_attn.{n}_proj" for n in "qkv")),
             SmoothingPair(f"{at}.self_attn.v_proj", (f"{at}.self_attn.out_proj",)),
             SmoothingPair(f"{at}.final_layer_norm", (f"{at}.fc1",)), SmoothingPair(f"{at}.fc1", (f"{at}.fc2",))]
    for p in model.parameters(): p.copy_(p.to(dtype).float())
    before, find = model(ids).logits, model.get_submodule
    for pair in pairs:
        scale = torch.exp(torch.randn(len(find(pair.producer).weight), generator=torch.Generator().manual_seed(1)))
        fold(find(pair.producer), [find(n) for n in pair.consumers], scale, pair, dtype)
    assert (model(ids).logits - before).norm() / before.norm() < 2e-6
    for pair in pairs:
        for p in find(pair.producer).parameters():
            if p.dim() == 1: assert torch.allclose(p, p.to(dtype).float(), rtol=1e-5, atol=1e-8)
