"""Perplexity as vLLM serves it beside perplexity as it is simulated here -> results/served.json.

    measure_served.py --calibration wikitext2_valid.raw --text wikitext2_test.raw                    on a CPU
    measure_served.py --calibration ... --text ... --device cuda                                      on a GPU
    measure_served.py ... --rows 'W8A8 dynamic'     only rows whose names match
    measure_served.py ... --rows 'W8A8 dynamic' --fresh   the same once more; all other rows stay as they are
    measure_served.py --list                        the names

The model is SmolLM2-135M-Instruct off its grid in float32 (`llmquant.evaluation.demo`). Each row is an export: `llmquant.load` and
`perplexity` give the simulated figure, a vLLM without plugins the served one, from its log-probabilities of the same
tokens: the first 8 windows of 1024 tokens of --text, at 32 windows of 512 tokens of --calibration. The two must lie
within 2 %. vLLM serves in float32 where all Linears have a grid for activations and the platform is a CPU, else in
float16, or in what this machine's kernels take instead (bfloat16 for W8A8 on a CPU with AMX); each row names kernels
and dtype. The simulation's weights are rounded to that dtype and its inputs are put on the grids as those kernels have
them; it always computes in float32. 4-bit weights keep float activations: each row is taken with VLLM_CPU_INT4_W4A8=0,
and says so, which is not a server's default on a CPU with AMX. Rows are written as they come, one for each platform; a
run that was stopped goes on where it was; --fresh runs the chosen rows again and keeps the others.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from matrix import setting
from measure import CONTEXT, ROOT, machine
from measure_methods import Rows, bench_of, called, device_name
from measure_outliers import AUTO, DOWN_DYNAMIC, OS2, ROTATED, SMOOTH, STATIC_MSE, recipe, row

APART, SAMPLES, LENGTH = 0.02, 32, 512


def all_rows():
    "The most important first; None is the float model."
    best = ROTATED, SMOOTH
    return [
        ("float", None),
        ("W8A8 dynamic, as it is", row("")),
        ("W8A8 dynamic, smooth_quant", row("", SMOOTH)),
        ("W8A8 dynamic, smooth_quant auto", row("", AUTO)),
        ("W8A8 dynamic, rotation", row("", ROTATED)),
        ("W8A8 static mse, down_proj dynamic, rotation, smooth_quant",
         row("", *best, activations=STATIC_MSE, overrides=DOWN_DYNAMIC)),
        ("W8A8 static mse, rotation, smooth_quant", row("", *best, activations=STATIC_MSE)),
        ("W4 group 64, gptq, rotation", row("", ROTATED, bits=4, activations=None, method="gptq") | {"group_size": 64}),
        ("W8A8 dynamic, outlier_suppression_v2", row("", OS2)),
    ]


def exported(one, given, bench, folder):
    "The folder to serve, and the seconds that making it took."
    from llmquant.pipeline.run import quantize

    if one is None:
        return Path(bench.base), 0.0
    start, config = time.perf_counter(), recipe(one)
    if one["method"] != "minmax" or one["suppressors"] or one["activations"] == STATIC_MSE:
        config["calibration"] |= {"dataset": str(given.calibration), "num_samples": SAMPLES, "max_length": LENGTH}
    widths = {key: one[key] for key in ("bits", "group_size")}
    quantize(bench.base, Path(folder) / "out", one["method"], config, given.device, **widths)
    return Path(folder) / "out", time.perf_counter() - start


def dtype_of(out, given):
    "What vLLM serves the export in; the float model as the platform's exports with activation grids."
    from llmquant.checkpoint.source import read_json
    from llmquant.evaluation.served_model import serving_dtype

    config = read_json(out / "config.json")
    if given.dtype == "auto" and "quantization_config" not in config:
        return "float32" if given.device == "cpu" else "float16"
    return serving_dtype(config, given.dtype)


def simulated(out, said, given, bench):
    "Perplexity here, with the kernels that vLLM took."
    import torch

    from llmquant import load
    from llmquant.evaluation.served_linears import per_token_places, quantize_inputs_as_served_

    served_in = getattr(torch, said["dtype"])
    model = load(out, torch.float32, given.device, served_in, activations=False)
    quantize_inputs_as_served_(model, out, per_token_places(said["kernels"], said["parts"]), served_in)
    return bench.perplexity(model)


def served(out, dtype, flexible, bench):
    "Perplexity in a vLLM without plugins, and what it was computed with: dtype, kernels, parts of fused Linears."
    from engine import ask

    from llmquant.evaluation.perplexity import as_ids, perplexity_windows
    from llmquant.evaluation.vllm_check import Job

    windows = perplexity_windows(as_ids(bench.ids), CONTEXT, bench.windows).tolist()
    ((tensors, facts),) = ask("text", [Job(str(out), windows, dtype, top=1, sample=1, flexible=flexible)])
    return tensors["logprobs"].mean().neg().exp().item(), {name: json.loads(value) for name, value in facts.items()}


def measure(words, one, given, bench, results, here):
    "One row: export, simulate, serve; `here` is what it says about its machine."
    platform = "cpu" if given.device == "cpu" else "cuda"
    name = f"{words}, {platform}"
    if results.has(name=name) and not given.fresh:
        return
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        out, seconds = exported(one, given, bench, folder)
        dtype = dtype_of(out, given)
        clock = time.perf_counter()
        theirs, said = served(out, dtype, given.dtype == "auto" and one is not None, bench)
        middle = time.perf_counter()
        ours = simulated(out, said, given, bench)
        took = {"export": seconds, "served": middle - clock, "simulated": time.perf_counter() - middle}
    about = one or {"bits": 32, "suppressors": {}}
    facts = {key: about[key] for key in ("bits", "group_size", "activations", "method", "overrides") if key in about}
    facts["suppressors"] = dict(about["suppressors"])
    results.add(name=name, words=words, platform=platform, dtype=said["dtype"], device=device_name(given), **facts,
                kernels=sorted(set(said["kernels"].values())), environment=setting(),
                simulated=round(ours, 4), served=round(theirs, 4), ratio=round(theirs / ours, 5),
                passed=abs(theirs / ours - 1) <= APART, seconds={key: round(value, 1) for key, value in took.items()},
                **here)


def main():
    "Parse the command line and go on where the last run stopped."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--base", type=Path, default=ROOT / "demo" / "base-float32", help="made if absent")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "served.json")
    parser.add_argument("--rows", default="")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all is done, vLLM's too")
    parser.add_argument("--dtype", default="auto", help="what vLLM serves in: float32, float16 or bfloat16")
    parser.add_argument("--scratch", help="folder for the exports, which are removed")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="run the chosen rows again; others are kept")
    given = parser.parse_args()
    rows = [(words, one) for words, one in all_rows() if re.search(given.rows, words)]
    if given.list:
        return print(*(words for words, _ in rows), sep="\n")
    if not given.calibration or not given.text:
        parser.error("--calibration and --text must be given")
    bench = bench_of(given, given.text, given.windows)
    protocol = {"model": "SmolLM2-135M-Instruct, llmquant.evaluation.demo, float32", "context": CONTEXT, "windows": given.windows}
    protocol |= {"apart": APART, "text": called(given.text)}
    protocol |= {"calibration": f"{called(given.calibration)}, {SAMPLES} x {LENGTH}"}
    header = {"command": "tools/measure_served.py", "about": __doc__.split("\n")[0]}
    header |= {"machines": {device_name(given): machine()}, "protocol": protocol}
    results = Rows(given.out, header)
    here = results.keep_machine(device_name(given))
    for words, one in rows:
        measure(words, one, given, bench, results, here)
    failed = [entry["name"] for entry in results.rows if not entry["passed"]]
    print(f"{len(failed)} of {len(results.rows)} rows are apart by more than {APART:.0%}", *failed, sep="\n  ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
