"GPTQ against the paper's update written out plainly in float64, with the inverse Hessian shrunk column by column."

import numpy as np
import pytest
import torch

from llmquant.core.errors import UsageError
from llmquant.core.qtensor import round_to_nearest
from llmquant.core.quantizer_registry import QuantizerRegistry
from llmquant.core.scheme import QuantScheme
from llmquant.core.statistics import LayerStats
from llmquant.quantizers.gptq_quantizer import GPTQQuantizer

FACTORS = [1 - 0.6 * k / 23 for k in range(24)]


def inputs(features, tokens, seed=0):
    "Inputs with a few common causes and channels of very different size."
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(tokens, features // 3 + 1)) @ rng.normal(size=(features // 3 + 1, features))
    return (causes + 0.3 * rng.normal(size=(tokens, features))) * np.exp(rng.normal(size=features))


def grid(part, low, high, scheme):
    "Scale (rounded as stored) and zero point of each row [rows, 1] for the range [low, high]."
    stored = {torch.float16: np.float16, torch.float32: np.float32}[scheme.scale_dtype]
    if scheme.symmetric:
        scale = (np.maximum(np.abs(low), np.abs(high)) / ((2**scheme.bits - 1) / 2)).astype(stored).astype(np.float64)
        return scale, np.full_like(scale, 2 ** (scheme.bits - 1))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = ((high - low) / (2**scheme.bits - 1)).astype(stored).astype(np.float64)
    return scale, np.clip(np.round(-low / scale), 0, 2**scheme.bits - 1)


def rounded(part, scale, zero, scheme):
    "Codes and what they stand for."
    codes = np.clip(np.round(part / scale + zero), 0, 2**scheme.bits - 1)
    return codes, (codes - zero) * scale


def best_grid(part, importance, scheme):
    "The range of extremes, or the shrunk one with the least error weighted by the Hessian's diagonal."
    low, high = part.min(1, keepdims=True), part.max(1, keepdims=True)
    found = grid(part, low, high, scheme)
    if scheme.range_rule == "minmax":
        return found
    least = np.full((len(part), 1), np.inf)
    for factor in FACTORS:
        scale, zero = grid(part, low * factor, high * factor, scheme)
        error = ((rounded(part, scale, zero, scheme)[1] - part) ** 2 * importance).sum(1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        found = np.where(better, scale, found[0]), np.where(better, zero, found[1])
    return found


def plain_gptq(weight, hessian, scheme, by_size=False, static=False, damp=0.01):
    "Codes, the error's size at the rounding border left alone."
    w, features = np.asarray(weight, np.float64).copy(), len(hessian)
    diagonal = np.diag(hessian).copy()
    damped = hessian + np.diag(np.where(diagonal > 0, 0, 1) + damp * diagonal[diagonal > 0].mean())
    inverse = np.linalg.inv(damped)
    width = scheme.width(features)
    grids = {}
    if by_size or static:
        for g in range(features // width):
            own = slice(g * width, (g + 1) * width)
            grids[g] = best_grid(w[:, own], diagonal[own], scheme)
    codes, left = np.zeros(w.shape, np.uint8), list(range(features))
    for c in sorted(left, key=lambda j: -diagonal[j]) if by_size else list(left):
        g = c // width
        if g not in grids:
            own = slice(g * width, (g + 1) * width)
            grids[g] = best_grid(w[:, own], diagonal[own], scheme)
        q, value = rounded(w[:, c : c + 1], *grids[g], scheme)
        codes[:, c : c + 1] = q
        error = w[:, c : c + 1] - value
        left.remove(c)
        w[:, left] -= error * inverse[c, left] / inverse[c, c]
        inverse = inverse - np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    return torch.from_numpy(codes)


def stats_of(x, in_float=None):
    "What the walk would have measured on `x` [tokens, features]."
    stats, x = LayerStats(), torch.as_tensor(x, dtype=torch.float32)
    stats.add(x, ("hessian", "cross"), x if in_float is None else torch.as_tensor(in_float, dtype=torch.float32))
    return stats.finish()


def weights(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_loss(weight, quantized, hessian):
    delta = (weight - quantized.dequantize()).double()
    return torch.einsum("oi,ij,oj->", delta, hessian.double(), delta).item()


PLAIN = {"propagate": 0.0, "desc_act": False}
CASES = [
    (4, 16, {"dynamic_range": "minmax"}),
    (4, 16, {}),
    (3, 48, {}),
    (2, 16, {"sym": True}),
    (3, 16, {"static_groups": True}),
    (3, 16, {"desc_act": True}),
    (2, 16, {"desc_act": True, "dynamic_range": "minmax"}),
    (8, -1, {"dynamic_range": "minmax"}),
    (4, -1, {}),
    (4, -1, {"desc_act": True, "sym": True}),
]


@pytest.mark.parametrize("bits, group_size, options", CASES)
def test_codes_are_those_of_the_plain_loop(bits, group_size, options):
    x, weight = inputs(96, 400), weights(20, 96)
    quantizer = GPTQQuantizer().configure(PLAIN | options)
    scheme = quantizer.make_scheme(bits, group_size, torch.float16)
    stats = stats_of(x)
    flags = options.get("desc_act", False), options.get("static_groups", False)
    expected = plain_gptq(weight, stats.hessian.double().numpy(), scheme, *flags)
    found = quantizer.quantize_weight(weight, stats, scheme)
    found.check_values()
    # a row in which one weight lies at a border, to float32, goes its own way from there on
    assert (found.codes == expected).all(1).double().mean() >= 0.9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_far_nearer_than_those_of_rounding_to_nearest(bits):
    x, weight = inputs(192, 1000), weights(64, 192)
    losses = {}
    for rule in "minmax", "mse":
        quantizer = GPTQQuantizer().configure(PLAIN | {"dynamic_range": rule})
        scheme = quantizer.make_scheme(bits, 64, torch.float16)
        stats = stats_of(x)
        quantized = quantizer.quantize_weight(weight, stats, scheme)
        losses[rule] = output_loss(weight, quantized, stats.hessian)
        whole = torch.einsum("oi,ij,oj->", weight.double(), stats.hessian.double(), weight.double()).item()
        assert stats.notes["output_error"] == pytest.approx((losses[rule] / whole) ** 0.5, rel=1e-3)
    nearest = output_loss(weight, round_to_nearest(weight, QuantScheme(bits=bits, group_size=64)), stats.hessian)
    assert losses["minmax"] < (0.7 if bits == 2 else 0.5) * nearest
    assert losses["mse"] < losses["minmax"]


def test_dead_columns_are_rounded_to_nearest_and_disturb_nobody():
    x = inputs(64, 300)
    x[:, [5, 40]] = 0
    weight = weights(12, 64)
    quantizer = GPTQQuantizer().configure({"dynamic_range": "minmax"})
    scheme = quantizer.make_scheme(4, 32, torch.float16)
    stats = stats_of(x, in_float=x + 0.01)
    quantized = quantizer.quantize_weight(weight, stats, scheme)
    assert stats.notes["dead_columns"] == 2
    for c in 5, 40:
        scale, zero = quantized.scales[:, c // 32].float(), quantized.zeros[:, c // 32].float()
        assert torch.equal(quantized.codes[:, c].float(), (weight[:, c] / scale + zero).round().clamp(0, 15))
    other = weight.clone()
    other[:, 5] *= 0.5  # within the range as it is: the others' codes must not notice
    inner = (other[:, :32].amin(1) == weight[:, :32].amin(1)) & (other[:, :32].amax(1) == weight[:, :32].amax(1))
    again = quantizer.quantize_weight(other, stats_of(x, in_float=x + 0.01), scheme)
    alive = [c for c in range(64) if c != 5]
    assert inner.sum() >= 8 and torch.equal(again.codes[inner][:, alive], quantized.codes[inner][:, alive])


def test_fewer_tokens_than_features():
    x, weight = inputs(128, 20), weights(16, 128)
    quantizer = GPTQQuantizer().configure({"propagate": 0.0})
    scheme = quantizer.make_scheme(3, 32, torch.float16)
    stats = stats_of(x)
    quantized = quantizer.quantize_weight(weight, stats, scheme)
    assert stats.notes["few_tokens"] == "20 for 128 in_features"
    nearest = output_loss(weight, round_to_nearest(weight, scheme), stats.hessian)
    assert output_loss(weight, quantized, stats.hessian) < 0.2 * nearest


def test_damping_rises_until_the_factor_exists_and_is_reported():
    x, weight = inputs(64, 8), weights(8, 64)
    quantizer = GPTQQuantizer().configure({"propagate": 0.0, "damp_percent": 0.0})
    stats = stats_of(x)
    quantizer.quantize_weight(weight, stats, quantizer.make_scheme(4, 32, torch.float16))
    assert 0 < stats.notes["damp_percent"] <= 0.1


def test_what_cannot_be_a_hessian_is_refused_by_its_cause():
    quantizer, weight = GPTQQuantizer().configure({"propagate": 0.0}), weights(4, 32)
    scheme = quantizer.make_scheme(4, 32, torch.float16)
    cases = [
        (None, "hessian matrix and got none"),
        (LayerStats(10, torch.zeros(32, 32)), "Hessian is zero after 10 calibration tokens"),
        (LayerStats(0, torch.eye(32)), "Hessian is zero after 0 calibration tokens"),
        (LayerStats(10, torch.full((32, 32), float("nan"))), "NaN or infinite"),
        (LayerStats(10, torch.full((32, 32), float("inf"))), "NaN or infinite"),
        (LayerStats(10, torch.eye(16)), r"\[16, 16\] for 32 in_features"),
        (LayerStats(10, torch.eye(32) - 0.5), "no Cholesky factor"),
    ]
    for stats, message in cases:
        with pytest.raises(UsageError, match=message):
            quantizer.quantize_weight(weight, stats, scheme)
    with pytest.raises(UsageError, match="cross matrix and got none"):
        GPTQQuantizer().configure({}).quantize_weight(weight, LayerStats(10, torch.eye(32)), scheme)


@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"propagate": 0.0, "dynamic_range": "minmax"}])
def test_stacked_rows_get_the_codes_that_they_get_alone(options):
    x, quantizer = inputs(96, 400), GPTQQuantizer().configure(options)
    scheme, parts = quantizer.make_scheme(3, 32, torch.float16), [weights(n, 96, n) for n in (40, 8, 24)]
    noisy = x + 0.1 * inputs(96, 400, seed=5)
    stacked = quantizer.quantize_weight(torch.cat(parts), stats_of(x, noisy), scheme)
    alone = [quantizer.quantize_weight(part, stats_of(x, noisy), scheme) for part in parts]
    assert torch.equal(stacked.codes, torch.cat([q.codes for q in alone]))
    assert torch.equal(stacked.scales, torch.cat([q.scales for q in alone]))


def test_full_propagation_targets_the_least_squares_weight():
    rng = np.random.default_rng(0)
    in_float = inputs(48, 600)
    x = in_float + 0.4 * rng.normal(size=in_float.shape) * in_float.std(0)
    weight = weights(10, 48)
    # 8 bits: rounding itself is nearly nothing
    quantizer = GPTQQuantizer().configure({"propagate": 1.0, "damp_percent": 0.0})
    scheme = quantizer.make_scheme(8, 16, torch.float32)
    found = quantizer.quantize_weight(weight, stats_of(x, in_float), scheme).dequantize().double().numpy()
    best = np.linalg.lstsq(x, in_float @ weight.double().numpy().T, rcond=None)[0].T
    miss = lambda w: np.linalg.norm(weight.double().numpy() @ in_float.T - w @ x.T)
    assert miss(best) < 0.9 * miss(weight.double().numpy())
    assert miss(found) < 1.001 * miss(best)
    half = GPTQQuantizer().configure({"propagate": 0.5, "damp_percent": 0.0})
    half = half.quantize_weight(weight, stats_of(x, in_float), scheme).dequantize().double().numpy()
    middle = (weight.double().numpy() + best) / 2
    assert np.linalg.norm((half - middle) @ x.T) < 0.02 * np.linalg.norm((best - weight.double().numpy()) @ x.T)


def test_the_weight_and_the_hessian_are_left_alone():
    x, weight = inputs(64, 200), weights(8, 64)
    stats, before = stats_of(x), weight.clone()
    hessian = stats.hessian.clone()
    quantizer = GPTQQuantizer().configure({"desc_act": True})
    quantizer.quantize_weight(weight, stats, quantizer.make_scheme(4, 32, torch.float16))
    assert torch.equal(weight, before) and torch.equal(stats.hessian, hessian)
    assert stats.notes["desc_act"].startswith("by activation size")


def test_auto_orders_by_activation_size_at_2_bits_only():
    x, weight = inputs(64, 200), weights(8, 64)
    for bits in 2, 3, 4, 8:
        found = {}
        for wish in "auto", True, False:
            quantizer = GPTQQuantizer().configure({"desc_act": wish})
            stats = stats_of(x)
            found[wish] = quantizer.quantize_weight(weight, stats, quantizer.make_scheme(bits, 32, torch.float16)).codes
            assert ("desc_act" in stats.notes) == (wish is True or wish == "auto" and bits == 2)
        assert torch.equal(found["auto"], found[bits == 2]) and not torch.equal(found[True], found[False])


def test_static_groups_beside_the_order_are_told_to_change_nothing():
    x, weight, found = inputs(64, 200), weights(8, 64), []
    for static in False, True:
        quantizer = GPTQQuantizer().configure({"desc_act": True, "static_groups": static})
        stats = stats_of(x)
        found.append(quantizer.quantize_weight(weight, stats, quantizer.make_scheme(3, 32, torch.float16)).codes)
        assert stats.notes.get("static_groups", "").startswith("changes nothing") == static
    assert torch.equal(*found)
    said = next(option.help for option in GPTQQuantizer.options if option.name == "static_groups")
    assert "as desc_act always does" in said


def test_options_and_layout():
    quantizer = QuantizerRegistry.get("gptq")().configure({"sym": True, "propagate": 0})
    assert quantizer.needed_statistics() == ("hessian",)
    assert QuantizerRegistry.get("gptq")().needed_statistics() == ("hessian", "cross")
    layout = {b: quantizer.preferred_format(quantizer.make_scheme(b, 64, torch.float16)) for b in (2, 3, 4, 8)}
    assert layout == {2: "compressed_tensors", 3: "compressed_tensors", 4: "gptq", 8: "gptq"}
    assert GPTQQuantizer().preferred_format(QuantScheme(bits=4)) == "compressed_tensors"
    odd = QuantScheme(bits=4, symmetric=True, group_size=96)  # vLLM's gptq has no such group
    assert GPTQQuantizer().preferred_format(odd) == "compressed_tensors"
    channel = QuantScheme(bits=8, symmetric=True, granularity="channel", group_size=0)
    assert GPTQQuantizer().preferred_format(channel) == "gptq"
    for options, message in (({"damp": 1}, "unknown option; known: symmetric, damp_percent"),
                             ({"propagate": 1.5}, "between 0.0 and 1.0"),
                             ({"dynamic_range": "percentile"}, "minmax, mse"), ({"desc_act": "yes"}, "auto")):
        with pytest.raises(UsageError, match=message):
            GPTQQuantizer().configure(options)
