"""Perplexity with 8- and 4-bit activations, before and after outlier suppression -> results/outliers.json.

    measure_outliers.py --calibration wikitext2_valid.raw --text wikitext2_test.raw [--device cuda]
    measure_outliers.py ... --rows 'dynamic'     only rows whose names match
    measure_outliers.py --list                   the names

The model is SmolLM2-135M-Instruct off its grid in float32 (`llmquant.evaluation.demo`); rows with `injected` are of the same
function with strong outliers in its norms (tests/outliers.py). Quantized in memory, perplexity through QuantLinear,
which puts inputs on the grid as vLLM does. Calibration: the first 32 windows of 512 tokens of --calibration;
perplexity: the first 24 windows of 1024 tokens of --text. An activation near the border of two codes goes either way by
rounding alone, so each row is several runs, on models whose embeddings were changed by 1e-6 (relative, Gaussian, one
seed a run), and its perplexity is their mean.
"""

import argparse
import re
import sys
import time
from pathlib import Path

from measure import CONTEXT, ROOT, machine
from measure_methods import Rows, bench_of, called, device_name

sys.path.append(str(ROOT / "tests"))

NOISE, WINDOWS, CHANNELS, INJECTED = 1e-6, 32, 8, 60.0
STATIC = {"granularity": "tensor", "dynamic_range": "minmax"}
STATIC_MSE = {"granularity": "tensor", "dynamic_range": "mse"}
FLOAT8 = {"type": "float"}
SMOOTH, AUTO = ("smooth_quant", {"alpha": 0.5}), ("smooth_quant", {"auto_alpha": True})
OS2 = ("outlier_suppression_v2", {})
ROTATED, BLOCKS = ("rotation", {}), ("rotation", {"block_size": 192})
DOWN_DYNAMIC = [{"match": r".*\.down_proj", "activations": 8}]


def row(name, *suppressors, bits=8, activations=8, method="minmax", overrides=(), dynamic_range=None,
        injected=False):
    "A row: its name and what is done."
    return {"name": name, "suppressors": suppressors, "bits": bits, "activations": activations, "method": method,
            "overrides": list(overrides), "group_size": -1, "dynamic_range": dynamic_range, "injected": injected}


KINDS = {"as it is": (), "smooth_quant": (SMOOTH,), "smooth_quant auto": (AUTO,), "outlier_suppression_v2": (OS2,),
         "rotation": (ROTATED,), "rotation, smooth_quant": (ROTATED, SMOOTH),
         "rotation, outlier_suppression_v2": (ROTATED, OS2), "rotation in blocks": (BLOCKS,)}
FIRST, FEW = list(KINDS)[:-1], ("as it is", "smooth_quant", "outlier_suppression_v2")


def rows_at_8_bits():
    "Weights of 8 bits."
    yield row("W8", activations=None)
    for words in FIRST: yield row(f"W8A8 dynamic, {words}", *KINDS[words])
    for words in FIRST: yield row(f"W8A8 static mse, {words}", *KINDS[words], activations=STATIC_MSE)
    for words in FIRST[:-1]:
        yield row(f"W8A8 static mse, down_proj dynamic, {words}", *KINDS[words], activations=STATIC_MSE,
                  overrides=DOWN_DYNAMIC)
    for words in FEW:
        yield row(f"W8A8 dynamic, {words}, injected", *KINDS[words], injected=True)
        yield row(f"W8A8 static mse, {words}, injected", *KINDS[words], activations=STATIC_MSE, injected=True)
        yield row(f"W8A8 static minmax, {words}", *KINDS[words], activations=STATIC)
    for words in (*FEW, "rotation, smooth_quant"):
        yield row(f"W8A8 static mse, gptq, {words}", *KINDS[words], activations=STATIC_MSE, method="gptq")
    yield row("FP8 dynamic", activations=FLOAT8)
    yield row("W8A8 dynamic, smooth_quant auto, injected", AUTO, injected=True)
    for alpha in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9):
        yield row(f"W8A8 dynamic, smooth_quant alpha {alpha}", ("smooth_quant", {"alpha": alpha}))


def rows_at_4_bits():
    "Weights of 4 bits."
    kinds = (*FEW, "rotation", "rotation in blocks")
    for words in kinds:
        yield row(f"W4A8 dynamic, {words}", *KINDS[words], bits=4)
        yield row(f"W4A4 dynamic, {words}", *KINDS[words], bits=4, activations=4)
        yield row(f"W4A4 dynamic, gptq, {words}", *KINDS[words], bits=4, activations=4, method="gptq")
    for words in (kinds[0], *kinds[-2:]):
        yield row(f"W4 channel, {words}", *KINDS[words], bits=4, activations=None)
        yield row(f"W4 channel mse, {words}", *KINDS[words], bits=4, activations=None, dynamic_range="mse")
        yield row(f"W4 channel gptq, {words}", *KINDS[words], bits=4, activations=None, method="gptq")


def all_rows():
    "Those of 8 bits first."
    return [*rows_at_8_bits(), *rows_at_4_bits()]


def perturbed(model, seed):
    "The model with its embeddings moved by a millionth."
    import torch

    weight = model.get_input_embeddings().weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    with torch.no_grad():
        weight.mul_(1 + NOISE * noise)
    return model


def prepared(bench, given, one, seed):
    "The float model of a run."
    model = bench.model()
    if one["injected"]:
        from outliers import inject_outliers

        inject_outliers(model, list(range(0, model.config.hidden_size, model.config.hidden_size // CHANNELS)), INJECTED)
    return perturbed(model, seed).to(given.device)


def recipe(one):
    "The document that describes a row."
    section = {"symmetric": True, "overrides": one["overrides"],
               "outlier_suppression": [name for name, _ in one["suppressors"]]}
    if one["dynamic_range"]: section["dynamic_range"] = one["dynamic_range"]
    if one["activations"]: section["activations"] = one["activations"]
    section |= {name: options for name, options in one["suppressors"] if options}
    return {"quantization": section, "calibration": {"batch_size": 4}}


def measure(one, given, bench, data, results):
    "One row: every seed that is still to be measured."
    from llmquant.core.quantizer_registry import QuantizerRegistry

    facts = {key: value for key, value in one.items() if key not in ("name", "suppressors")}
    facts["suppressors"] = {name: options for name, options in one["suppressors"]}
    static = isinstance(one["activations"], dict) and one["activations"].get("granularity") == "tensor"
    reads = one["method"] == "gptq" or one["suppressors"] or static
    for seed in given.seeds:
        if seed in [run["seed"] for run in results.runs(one["name"])]: continue
        model, clock = prepared(bench, given, one, seed), time.perf_counter()
        quantizer = QuantizerRegistry.get(one["method"])()
        model = quantizer.quantize(model, bits=one["bits"], group_size=one["group_size"],
                                   calibration_data=data if reads else None, config=recipe(one))
        seconds = round(time.perf_counter() - clock, 1)
        run = {"device": device_name(given), "seed": seed, "seconds": seconds,
               "perplexity": round(bench.perplexity(model), 4)}
        add(results, one["name"], facts, [*results.runs(one["name"]), run])


def add(results, name, facts, runs):
    "A row from its runs: mean and spread."
    values = [run["perplexity"] for run in runs]
    results.add(name=name, **facts, perplexity=round(sum(values) / len(values), 4),
                spread=round(max(values) - min(values), 4), runs=runs)


def in_float(given, bench, results):
    "The float model, and the one with injected outliers, which is the same function."
    for name, injected in (("float32", False), ("float32, injected", True)):
        if results.runs(name): continue
        runs = [{"device": device_name(given), "seed": seed, "perplexity": round(bench.perplexity(
            prepared(bench, given, {"injected": injected}, seed)), 4)} for seed in given.seeds]
        add(results, name, {"bits": 32, "injected": injected}, runs)


def main():
    "Parse the command line and go on where the last run stopped."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--base", type=Path, default=ROOT / "demo" / "base-float32",
                        help="where the float32 model is, or will be made")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "outliers.json")
    parser.add_argument("--rows", default="")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--device", default="cpu", help="where to quantize and to measure")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args()
    rows = [one for one in all_rows() if re.search(given.rows, one["name"])]
    if given.list: return print(*(one["name"] for one in rows), sep="\n")
    if not given.calibration or not given.text: parser.error("--calibration and --text must be given")
    from llmquant.calibration.data import load_calibration

    bench = bench_of(given, given.text, given.windows)
    data = load_calibration(str(given.calibration), bench.base, 49152, WINDOWS, 512, 0)
    header = {"command": "tools/measure_outliers.py", "about": __doc__.split("\n")[0],
              "machines": {device_name(given): machine()},
              "protocol": {"model": "SmolLM2-135M-Instruct, llmquant.evaluation.demo, float32", "context": CONTEXT,
                           "windows": given.windows, "text": called(given.text), "noise": NOISE,
                           "calibration": f"{called(given.calibration)}, {WINDOWS} x 512",
                           "injected": f"{CHANNELS} channels times {INJECTED:g}"}}
    results = Rows(given.out, header, given.fresh)
    in_float(given, bench, results)
    for one in rows: measure(one, given, bench, data, results)


if __name__ == "__main__":
    main()
