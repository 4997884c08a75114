"""Where HQQ is behind plain MinMax, although its weights are closer: errors of weights and of outputs, layer by layer.

    measure_hqq.py OUT.json --calibration TEXT [--perplexity TEXT --perplexity TEXT] [--bits 4] [--group-size 64]

On the demo model taken off its grid. For each Linear and method: the relative squared error of the weight, of the
outputs on the calibration text, and what the outputs' error would be if its inputs were uncorrelated, with the sizes
of the channels (the diagonal of the Hessian) or all of one size. Perplexities are of whole models, 24 windows of 1024.
"""
import argparse
import json
from pathlib import Path

import torch

METHODS = {"minmax": ("minmax", {}), "hqq": ("hqq", {}), "hqq, p 1": ("hqq", {"lp_norm": 1.0}),
           "minmax, mse ranges": ("minmax", {"dynamic_range": "mse"})}


@torch.no_grad()
def hessians(model, ids, device):
    "X'X / n of what each Linear reads, by module name; Linears that share an input share one."
    found, handles = {}, []
    wanted = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    def hook(name):
        def see(module, args):
            x = args[0].flatten(0, -2).float()
            found[name] = found.get(name, 0) + x.T @ x / ids.numel()
        return see
    for name, module in wanted.items(): handles.append(module.register_forward_pre_hook(hook(name)))
    for window in ids: model(window[None].to(device))
    for handle in handles: handle.remove()
    return wanted, found


@torch.no_grad()
def compare(weight, quantized, hessian):
    "The relative squared errors of one weight."
    w, e, h = weight.double(), (quantized - weight).double(), hessian.double()
    whole = float(((w @ h) * w).sum())
    sizes = h.diagonal()
    outputs = float(((e @ h) * e).sum()) / whole
    apart = float((e.square() * sizes).sum()) / whole
    even = float(e.square().sum() * sizes.mean()) / whole
    along = float((e * w).sum() / w.square().sum()) # below 0: weights shrink
    return {"weight": float(e.square().sum() / w.square().sum()), "outputs": outputs, "channels_apart": apart,
            "channels_even": even, "along_weight": along}


@torch.no_grad()
def perplexity(model, ids, device, windows=24, length=1024):
    "exp of the mean loss over windows."
    losses = []
    for window in ids[:windows * length].view(-1, length):
        logits = model(window[None].to(device)).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:].to(device)).cpu())
    return float(torch.stack(losses).double().mean().exp())


def main():
    "Measure and write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--perplexity", type=Path, action="append", default=[])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16)
    given = parser.parse_args()
    from llmquant.core.quantizer_registry import QuantizerRegistry
    from llmquant.evaluation.demo import smollm2, take_off_levels_
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = smollm2()
    take_off_levels_(model)
    model.to(device)
    tokens = lambda path: torch.tensor(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    ids = tokens(given.calibration)[:given.windows * 512].view(-1, 512)
    linears, found = hessians(model, ids, device)
    texts = {path.stem: tokens(path) for path in given.perplexity}
    results = {"scheme": f"W{given.bits} g{given.group_size} asym", "calibration": f"{given.windows} x 512 tokens of "
               f"{given.calibration.stem}", "layers": {}, "outliers": {}, "perplexity": {}}
    for name, h in found.items():
        sizes = h.diagonal().sqrt()
        results["outliers"][name] = float(sizes.max() / sizes.median())
    floats = {name: module.weight.detach().clone() for name, module in linears.items()}
    results["perplexity"]["float"] = {text: perplexity(model, found_ids, device) for text, found_ids in texts.items()}
    for label, (method, options) in METHODS.items():
        quantizer = QuantizerRegistry.get(method)().configure(options)
        scheme = quantizer.make_scheme(given.bits, given.group_size, torch.float16)
        for name, module in linears.items():
            quantized = quantizer.quantize_weight(floats[name], None, scheme).dequantize(torch.float32)
            results["layers"].setdefault(name, {})[label] = compare(floats[name], quantized, found[name])
            module.weight.data.copy_(quantized)
        results["perplexity"][label] = {text: perplexity(model, found_ids, device) for text, found_ids in texts.items()}
        print(label, results["perplexity"][label], flush=True)
    given.out.write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")


def rounded(value):
    "Five digits are enough."
    if isinstance(value, dict): return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
