"""Blocks of a model in memory as a suppressor sees them, and a plain walk that suppresses one after the other.

The package's own walk does much more; this one is what its parts look like when they are put together in a few lines,
so that the edits can be judged alone.
"""
from dataclasses import replace

import torch

from llmquant.core.model_registry import ModelRegistry
from llmquant.core.quantizer_registry import BaseQuantizer
from llmquant.models.layernorm_adapters import GPTNeoXAdapter, OPTAdapter
from llmquant.plan.plan import make_plan
from llmquant.sequential.block_source import for_model
from llmquant.sequential.block_loop import BlockLoop
from llmquant.sequential.hidden_states import Activations

LAYERNORM = {"gpt_neox": GPTNeoXAdapter, "opt": OPTAdapter}


def adapter_of(model):
    "An adapter for a model in memory."
    config = model.config.to_dict()
    kind = config["model_type"]
    return LAYERNORM[kind]() if kind in LAYERNORM else ModelRegistry.for_config(config)


class Measuring(BaseQuantizer):
    "Stands where a method would; asks for what a suppressor asks for."
    name = "measuring"
    wanted = ()
    def needed_statistics(self): return self.wanted
    def quantize_weight(self, weight, stats, scheme): raise NotImplementedError


def loop_over(model, tokens, wanted=("maxima", "range"), batch_size=2, bits=8, group_size=-1, symmetric=True):
    "A walk in front of the first block of a model in memory."
    adapter, quantizer = adapter_of(model), Measuring()
    quantizer.wanted = wanted
    tensors = {name: (t.dtype, tuple(t.shape)) for name, t in adapter.checkpoint_tensors(model).items()}
    plan = make_plan(adapter, model.config.to_dict(), tensors, model.dtype, quantizer, bits, group_size)
    blocks = for_model(model, adapter)
    entry = blocks.inputs(tokens, batch_size)
    keep = lambda name, index: Activations([tuple(h.shape) for h in entry.hidden], torch.float32)
    stream = keep("quantized", 0)
    for batch, hidden in enumerate(entry.hidden): stream.put(batch, hidden)
    return BlockLoop(plan, quantizer, blocks, entry, stream, stream, keep)


def view_of(loop, index=0, drop=(), pairs=None, activations=None, dtype=torch.float32):
    """A block, filled and measured, and its view.

    Linears whose names end with one of `drop` stay in float; `dtype` is the export's; `activations` is the grid that
    `view.error` puts inputs on.
    """
    block, adapter = loop.blocks.load(index), loop.blocks.adapter
    find = lambda name: adapter.get_layer_by_name(loop.blocks.model, name)
    plans = {l.name: l for l in loop.plan.quantized if l.block == index and not l.name.endswith(tuple(drop) or "-")}
    if activations:
        plans = {n: replace(l, scheme=replace(l.scheme, activations=activations)) for n, l in plans.items()}
    groups = loop.find_groups(index, block, {n: find(n) for n in plans})
    measured = loop.measure(index, block, {names[0]: find(names[0]) for names in groups})
    stats = {n: measured[names[0]] for names in groups for n in names}
    if pairs is None: pairs = adapter.smoothing_pairs(loop.blocks.model.config.to_dict(), index)
    view = loop.view(index, block, plans, stats, pairs)
    view.dtype = dtype
    return block, view


@torch.no_grad()
def suppress(model, suppressor, tokens, activations=None, dtype=torch.float32, **options):
    "Suppress a model in memory block by block; the views, in order."
    loop = loop_over(model, tokens, suppressor.needed_statistics(), **options)
    views = []
    for index in range(len(loop.blocks)):
        block, view = view_of(loop, index, activations=activations, dtype=dtype)
        suppressor.apply_to_block(view)
        loop.activations = loop.feed(index, block, loop.activations, "quantized")
        for (part, name), parameter in loop.blocks.lent.items(): parameter.data.copy_(part._parameters[name])
        loop.blocks.empty()
        views.append(view)
    return views
