"""What the Linears are given, before and after each outlier suppressor -> results/activations.json and .npz.

    measure_activations.py --calibration wikitext2_valid.raw [--device cuda]
    measure_activations.py ... --rows smooth_quant   only these; the others stay what they were

The model is SmolLM2-135M-Instruct off its grid in float32 (`llmquant.evaluation.demo`), nothing injected, nothing rounded: what is
measured is the function in float, which suppressors leave as it is; `logits_change` says by how much they did not.
Suppressors calibrate on the first windows of 512 tokens of --calibration with their default options (a search rounds
to W8A8, per token) and one window a batch; the figures are of the windows behind those.

In the .json, for each row, kind of input and block: `kurtosis`, the excess kurtosis of all values of the input (0 is a
normal distribution); `token_kurtosis`, that of one token's channels, mean over tokens; `ratio`, the largest channel
over the median one, by their maxima. In the .npz, for each row and kind, as `codes` gives them: `maxima` [blocks,
channels], the largest magnitude of each channel, and `tokens` [tokens, channels], the magnitudes of the first tokens
of a window in the block that `block` names: the one whose inputs have the largest kurtosis as they are.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
from measure import ROOT, Results, machine
from measure_methods import called, device_name

ROWS = ("as it is", "smooth_quant", "outlier_suppression_v2", "rotation")  # the last three are suppressors by name
KINDS = {"q, k, v": "self_attn.q_proj", "o": "self_attn.o_proj", "gate, up": "mlp.gate_proj", "down": "mlp.down_proj"}
CALIBRATION, WINDOWS, LENGTH, TOKENS = 8, 4, 512, 16
STEPS, ONE, LEAST = 3, 128, 113  # codes per power of two, the code of 1, the code of 1/32 and of all that is smaller


def codes(magnitudes):
    "Magnitudes as bytes, 128 + 3 log2 |x| and at least 113: what a picture's colours can show, and not more."
    with np.errstate(divide="ignore"):
        return np.clip(np.round(STEPS * np.log2(magnitudes)) + ONE, LEAST, 255).astype(np.uint8)


def suppressed(model, row, tokens):
    "The model of a row, in memory."
    from llmquant.core.outlier_suppression_registry import OutlierSuppressionRegistry, is_blockwise

    if row == "as it is": return model
    suppressor = OutlierSuppressionRegistry.get(row)().configure({"alpha": 0.5} if row == "smooth_quant" else {})
    return suppressor.apply(model, tokens if is_blockwise(suppressor) else None)


def linears(model, block):
    "The Linear of each kind that reads first."
    return {kind: model.model.layers[block].get_submodule(path) for kind, path in KINDS.items()}


def excess(values, dim=None):
    "Excess kurtosis of float64 values: of all of them, or along one dimension."
    centred = values - (values.mean() if dim is None else values.mean(dim, keepdim=True))
    mean = lambda power: centred.pow(power).mean() if dim is None else centred.pow(power).mean(dim)
    return mean(4) / mean(2) ** 2 - 3


def figures(values):
    "What is kept of the inputs [tokens, channels] of one Linear."
    maxima, values = values.abs().amax(0), values.double()
    return {"kurtosis": float(excess(values)), "token_kurtosis": float(excess(values, -1).mean()),
            "ratio": float(maxima.max() / maxima.median()), "maxima": maxima.cpu().numpy()}


def look(model, windows):
    "Figures of every kind and block, the first tokens of a window, and the logits of that window."
    import torch

    from llmquant.sequential.input_groups import watching

    blocks = range(len(model.model.layers))
    named = {(kind, block): module for block in blocks for kind, module in linears(model, block).items()}
    seen = {key: [] for key in named}
    with torch.no_grad(), watching(named, lambda key, x: seen[key].append(x[0].float())):
        logits = [model(window[None].to(model.device)).logits[0] for window in windows][0]
    found = {key: figures(torch.cat(parts)) for key, parts in seen.items()}
    return found, {key: parts[0][:TOKENS].abs().cpu().numpy() for key, parts in seen.items()}, logits.cpu()


def kept(found, name):
    "One figure by kind, a list over blocks; four digits."
    blocks = 1 + max(block for _, block in found)
    return {kind: [float(f"{found[kind, block][name]:.4g}") for block in range(blocks)] for kind in KINDS}


def worst_block(found):
    "The block with the largest kurtosis in front of any of its Linears."
    return max(found, key=lambda key: found[key]["kurtosis"])[1]


def arrays_of(name, found, tokens, block):
    "The arrays of one row."
    blocks = range(1 + max(index for _, index in found))
    maxima = {f"{name}/{kind}/maxima": codes(np.stack([found[kind, b]["maxima"] for b in blocks])) for kind in KINDS}
    return maxima | {f"{name}/{kind}/tokens": codes(tokens[kind, block]) for kind in KINDS}


def measure(given, base, tokens):
    "Every row that is asked for, from a fresh model each."
    import torch
    from transformers import AutoModelForCausalLM

    plain, block = None, given.block
    for row in ROWS:
        if row != "as it is" and not re.search(given.rows, row): continue
        clock = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().to(given.device)
        found, first, logits = look(suppressed(model, row, tokens[:CALIBRATION]), tokens[CALIBRATION:])
        if plain is None: plain, block = logits, worst_block(found) if block is None else block
        facts = {"device": device_name(given), "seconds": round(time.perf_counter() - clock, 1), "block": block,
                 "logits_change": float(f"{(logits - plain).norm() / plain.norm():.2g}"),
                 **{figure: kept(found, figure) for figure in ("kurtosis", "token_kurtosis", "ratio")}}
        yield row, facts, arrays_of(row, found, first, block)


def main():
    "Parse the command line, measure, and put what is new beside what is there."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=ROOT / "demo" / "base-float32",
                        help="where the float32 model is, or will be made")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "activations.json")
    parser.add_argument("--rows", default="")
    parser.add_argument("--block", type=int, help="whose tokens are kept; the one with the largest kurtosis by default")
    parser.add_argument("--device", default="cpu", help="where to suppress and to measure")
    given = parser.parse_args()
    from llmquant.calibration.data import load_calibration
    from llmquant.evaluation.demo import demo_base

    base = demo_base(given.base, "float32")
    tokens = load_calibration(str(given.calibration), base, 49152, CALIBRATION + WINDOWS, LENGTH, 0).tokens
    header = {"command": "tools/measure_activations.py", "about": __doc__.split("\n")[0], "machine": machine(),
              "protocol": {"model": "SmolLM2-135M-Instruct, llmquant.evaluation.demo, float32", "text": called(given.calibration),
                           "calibration": f"{CALIBRATION} x {LENGTH}", "measured": f"the next {WINDOWS} x {LENGTH}",
                           "codes": "128 + 3 log2 |x|, at least 113"}}
    results = Results(given.out, header)
    path = given.out.with_suffix(".npz")
    arrays = dict(np.load(path)) if results.rows and path.exists() else {}
    for name, facts, new in measure(given, base, tokens):
        arrays |= new
        np.savez_compressed(path, **arrays)
        results.add(name=name, **facts)


if __name__ == "__main__":
    main()
