"""An exactly equivalent model with strong outliers, for tests and figures.

Small models have few activation outliers: the grid of a 135M model loses a few percent where that of a large one loses
everything. `inject_outliers` makes them. A norm multiplies its channels by its weight, last of all; the Linears behind
it multiply each channel by a column. Multiply the norm's weight of a few channels by a factor and divide the columns
by it, and the function is what it was, to the last bit when the factor is a power of two. The activations between the
two are not: a few channels are `factor` times as large, in every token, as large models have them.

Nothing else is touched: not the residual stream, not what stands between v and o or up and down. Whatever is measured
on such a model says how well a method deals with outliers of this one kind, and says so beside the figure.
"""
import torch
from block_views import adapter_of
from torch import nn


@torch.no_grad()
def inject_outliers(model: nn.Module, channels: list[int], factor: float) -> nn.Module:
    "Make the given channels `factor` times as large behind every norm that a Linear of its block reads; in place."
    config, adapter = model.config.to_dict(), adapter_of(model)
    find, found = model.get_submodule, 0
    for block in range(len(adapter.get_layers(model))):
        for pair in adapter.smoothing_pairs(config, block):
            norm = find(pair.producer)
            if norm.weight.dim() != 1: continue
            weight = norm.weight.double()
            one = 1 if "gemma" in type(norm).__name__.lower() else 0   # Gemma multiplies by 1 + weight
            weight[channels] = (weight[channels] + one) * factor - one
            norm.weight.copy_(weight)
            if getattr(norm, "bias", None) is not None: norm.bias[channels] *= factor
            for name in pair.consumers: find(name).weight[:, channels] /= factor
            found += 1
    if not found: raise ValueError(f"{type(model).__name__} has no norm with readers known to its adapter")
    return model
