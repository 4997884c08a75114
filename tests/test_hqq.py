"""HQQ: against a plain loop, in memory against streamed, and its exports in a real vLLM, float zero points too."""
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_tokenizer
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmquant.core.errors import UsageError
from llmquant.core.scheme import scheme_for
from llmquant.evaluation import verification, served_model
from llmquant.evaluation.vllm_check import Job, ask_vllm_many
from llmquant.export.loading import load
from llmquant.formats.unpackers import read_safetensors, unpack_layer
from llmquant.in_memory.quant_linear import QuantLinear
from llmquant.pipeline.run import quantize
from llmquant.quantizers.hqq_quantizer import HQQQuantizer
from llmquant.quantizers.minmax_quantizer import MinMaxQuantizer

LAYER = "model.layers.0.mlp.down_proj"


def options(**given):
    "A recipe's config with options of hqq."
    return {"quantization": {"hqq": given}}


EXPORTS = {
    "w4": dict(bits=4, group_size=32),
    "w3": dict(bits=3, group_size=64),
    "w4sym": dict(bits=4, group_size=32, config=options(symmetric=True)),
    "float4": dict(bits=4, group_size=64, config=options(float_zeros=True)),
    "float3": dict(bits=3, group_size=32, config=options(float_zeros=True)),
    "float2": dict(bits=2, group_size=-1, config=options(float_zeros=True)),
    "float_mixed": dict(bits=3, group_size=64, config={"quantization": {
        "hqq": {"float_zeros": True}, "overrides": [{"match": r".*layers\.1\.self_attn\.(q|k|v)_proj", "bits": 8},
                                                    {"match": r".*layers\.0\.mlp\.(gate|up)_proj", "skip": True}]}}),
}
FLOATING = [name for name in EXPORTS if name.startswith("float")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A base model and all exports of it."
    folder = tmp_path_factory.mktemp("hqq")
    base = tiny.make("llama", folder/"base")
    tiny_tokenizer.save(base)
    for name, given in EXPORTS.items(): quantize(base, folder/name, method="hqq", **given)
    return folder


def weights_with_outliers(rows=6, columns=64):
    "Heavy tails, as trained weights have them."
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator) * .05
    weight[torch.rand(rows, columns, generator=generator) < .03] *= 5
    return weight


def plain_hqq(group, bits, floating, p=.7, beta=4., kappa=1.01, rounds=20):
    "The method on one group, one weight at a time, in float64 but for the scale: scale, zero point."
    top = 2**bits - 1
    def codes(s, z): return [min(max(round(w / s + z), 0), top) for w in group]
    def error(s, z, p): return sum(abs(w - (q - z) * s)**p for w, q in zip(group, codes(s, z)))
    low, high = min(*group, 0.), max(*group, 0.)
    first = s = float(np.float16((high - low) / top))
    best = s, float(round(-low / s))
    limit, least, last, z = error(*best, 2), error(*best, p), math.inf, best[1]
    for _ in range(rounds):
        found = error(s, z, p)
        if found < least and error(s, z, 2) <= limit: best, least = (s, z), found
        if not found < last * .999: break
        last, q = found, codes(s, z)
        helped = []
        for w, code in zip(group, q):
            x = w / s - (code - z)
            shrunk = math.copysign(max(abs(x) - abs(x)**(p - 1) / beta, 0), x) if x else 0
            helped.append(w / s - shrunk)
        steps = [code - z for code in q]
        scale = s * sum(a * b for a, b in zip(steps, helped)) / sum(a * a for a in steps)
        if floating: z = sum(code - h for code, h in zip(q, helped)) / len(q)
        s = float(np.float16(min(max(scale, .9 * first), 1.1 * first)))
        beta *= kappa
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("floating", [False, True])
def test_against_a_plain_loop(bits, floating):
    weight = weights_with_outliers()
    scheme = scheme_for(bits, 32, float_zeros=floating)
    found = HQQQuantizer().configure({"float_zeros": floating}).quantize_weight(weight, None, scheme)
    for row in range(len(weight)):
        for group in range(2):
            scale, zero = plain_hqq(weight[row, 32*group:32*group + 32].tolist(), bits, floating)
            assert found.scales[row, group].item() == pytest.approx(scale, rel=2e-3)
            assert float(found.zeros[row, group]) == pytest.approx(zero, abs=.02)


def test_the_guides_file_and_the_guides_names():
    guide = yaml.safe_load(Path(__file__).parents[1].joinpath("configs", "hqq_config.yaml").read_text())
    assert guide["quantization"]["method"] == "hqq" and guide["quantization"]["hqq"] == "pass"
    assert HQQQuantizer().get_supported_bits() == [2, 3, 4, 8]
    assert HQQQuantizer().get_supported_group_sizes() == [32, 64, 128, 256]
    with pytest.raises(UsageError, match="float_zeros and symmetric are both set"):
        HQQQuantizer().configure({"float_zeros": True, "sym": True})
    with pytest.raises(UsageError, match=r"quantization\.hqq\.lp_norm: 1.5"): HQQQuantizer().configure({"lp_norm": 1.5})


@pytest.mark.parametrize("bits,group", [(2, 32), (3, 64), (4, 128), (4, 256), (8, 64), (4, -1)])
@pytest.mark.parametrize("given", [{}, {"symmetric": True}, {"float_zeros": True}])
def test_no_worse_than_minmax_in_either_error(bits, group, given):
    weight = weights_with_outliers(16, 256)
    ours, plain = (quantizer.configure(chosen) for quantizer, chosen in
                   ((HQQQuantizer(), given), (MinMaxQuantizer(), {k: v for k, v in given.items() if k == "symmetric"})))
    got, before = ((q.quantize_weight(weight, None, q.make_scheme(bits, group, torch.float16)).dequantize() - weight)
                   .abs().double() for q in (ours, plain))
    for p in .7, 2: assert got.pow(p).sum() <= before.pow(p).sum() * (1 + 1e-6)
    if bits < 8: assert got.pow(.7).sum() < before.pow(.7).sum()


def test_in_memory_equals_streamed(folder):
    for name in "w3", "float3":
        given = EXPORTS[name]
        model = AutoModelForCausalLM.from_pretrained(folder/"base", dtype=torch.float16)
        HQQQuantizer().quantize(model, given["bits"], given["group_size"], config=given.get("config"))
        layer = model.get_submodule(LAYER)
        assert isinstance(layer, QuantLinear)
        assert layer.zeros.dtype == (torch.float32 if name == "float3" else torch.uint8)
        config = json.loads((folder/name/"config.json").read_text())["quantization_config"]
        read = unpack_layer(read_safetensors(folder/name), LAYER, config, layer.in_features, layer.out_features)
        assert read.digest() == layer.quantized_weight().digest()
        model.float()
        served = load(folder/name, torch.float32).get_submodule(LAYER).weight
        assert torch.equal(layer.dequantize(torch.float16).float(), served)


@pytest.mark.parametrize("name", EXPORTS)
def test_the_independent_reader_finds_what_was_computed(name, folder):
    assert verification.check_files(folder/name, folder/"base")["layers"] == (12 if name == "float_mixed" else 14)


def test_float_zeros_are_said_and_refused_where_they_cannot_go(folder):
    config = json.loads((folder/"float4"/"config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "llmquant" and config["llmquant_scheme"]["float_zeros"] is True
    shard, = (folder/"float4").glob("*.safetensors")
    assert load_file(shard)[f"{LAYER}.weight_zero_point"].dtype == torch.float32
    for layout in "compressed_tensors", "gptq", "awq":
        with pytest.raises(UsageError, match="no place for float zero points; use format float_zeros"):
            quantize(folder/"base", folder/"never", method="hqq", format=layout, **EXPORTS["float4"])
    with pytest.raises(UsageError, match="float_zeros is for zero points between the codes"):
        quantize(folder/"base", folder/"never", method="hqq", format="float_zeros", **EXPORTS["w4"])


with_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def prompts(folder):
    return served_model.teacher_tokens(folder/"w4", json.loads((folder/"w4"/"config.json").read_text()))


@pytest.fixture(scope="module")
def answers(folder, prompts):
    "What vLLM says: {(export, --quantization, without plugins): answer}."
    asked = [(name, "hqq", False) for name in EXPORTS] + [("float4", None, False), ("float4", "awq", False),
                                                          ("float4", "minmax", False)]
    asked += [(name, None, True) for name in ("w4", "w3", "w4sym", "float4")]
    found = {}
    for stock in False, True:
        part = [a for a in asked if a[2] == stock]
        jobs = [Job(str(folder/name), prompts, quantization=method) for name, method, _ in part]
        found |= dict(zip(part, ask_vllm_many(jobs, stock=stock), strict=True))
    return found


@with_vllm
@pytest.mark.parametrize("name,method,stock", [(name, "hqq", False) for name in EXPORTS] + [("float4", None, False)] +
                         [(name, None, True) for name in ("w4", "w3", "w4sym")])
def test_in_vllm(name, method, stock, folder, answers, prompts):
    answer = answers[name, method, stock]
    assert not answer.error, answer.error
    assert answer.quantization == ("compressed-tensors" if stock else "llmquant")
    model = load(folder/name, torch.float32, served_in=torch.float16)
    kl, _ = served_model.divergences(served_model.forced_logits(model, prompts), answer)
    assert kl.mean().item() <= 1e-5


@with_vllm
def test_a_server_without_the_plugin_stops(answers):
    assert "Unknown quantization method: llmquant" in answers["float4", None, True].error
    assert "quantized by hqq, not by minmax" in answers["float4", "minmax", False].error
    assert answers["float4", "awq", False].error
