"""Perplexity and cost of every method at 4, 3 and 2 bits -> results/methods.json, which the methods' pages plot.

    measure_methods.py --calibration wikitext2_valid.raw --text wikitext2_test.raw [--other calib_sotu.txt]
    measure_methods.py ... --rows 'gptq W3'      only rows whose names match
    measure_methods.py --list                    the names

The model is SmolLM2-135M-Instruct off its grid in float32 (`llmquant.evaluation.demo`), groups of 64, asymmetric, scales in
float16, as exports have them, unless the row says otherwise.
Calibration: consecutive windows of 512 tokens from the start of --calibration, no BOS. Perplexity: the first 24 windows of
1024 tokens of --text; rows ending in `other text` are the first 16 of --other, which the calibration never saw. Sums in
another order round differently, and a calibrated method carries that on: rows of calibrated methods are runs at several
batch sizes, their perplexity is the runs' mean. Rows are written as they come, in the order of importance; a run that
was stopped goes on where it was, unless --fresh.
"""

import argparse
import json
import re
import time
from pathlib import Path

from measure import CONTEXT, ROOT, Bench, Results, machine, unfolded

PLAIN = {"dynamic_range": "minmax", "propagate": 0.0, "desc_act": False}
SEARCH = {"dynamic_range": "mse", "propagate": 0.0, "desc_act": False}
BOTH = {"dynamic_range": "mse", "propagate": 0.25, "desc_act": False}
GPTQ = {"minmax ranges": PLAIN, "range search": SEARCH, "range search, propagate 0.25": BOTH}
CALLED = {"wikitext2_test.raw": "wikitext-2 test", "wikitext2_valid.raw": "wikitext-2 valid"} # what files hold; others keep their names
OTHER = ("minmax ranges", "range search, propagate 0.25")


def all_rows():
    "Name, method, bits, options, windows of calibration, whether the other text is read too; the most important first."
    rows = []
    for words in reversed(GPTQ):
        rows += [(f"gptq W{b}, {words}", "gptq", b, GPTQ[words], 32, words in OTHER and b > 2) for b in (4, 3, 2)]
    rows += [("gptq W3, range search, float32 scales", "gptq", 3, {**SEARCH, "torch_dtype": "float32"}, 32, False)]
    rows += [(f"awq W{b}", "awq", b, {}, 32, False) for b in (4, 3, 2)]
    rows += [(f"hqq W{b}", "hqq", b, {}, 0, False) for b in (4, 3, 2)]
    rows += [(f"hqq W{b}, float zeros", "hqq", b, {"float_zeros": True}, 0, False) for b in (4, 3)]
    rows += [(f"minmax W{b}", "minmax", b, {}, 0, False) for b in (4, 3, 2)]
    words = "range search, propagate 0.25"
    rows += [(f"gptq W{b}, {words}, 128 windows", "gptq", b, BOTH, 128, False) for b in (4, 3, 2)]
    rows += [(f"gptq W{b}, {words}, activation order", "gptq", b, {**BOTH, "desc_act": True}, 32, False) for b in (4, 3, 2)]
    return rows


def called(path):
    "What a text is called."
    return CALLED.get(Path(path).name, Path(path).name)


def bench_of(given, text, windows):
    "The model, and perplexity on one text."
    return Bench(given.base, Path(text).read_text(encoding="utf-8"), windows)


def calibration(bench, path, windows):
    "Consecutive windows of 512 tokens."
    from llmquant.calibration.data import load_calibration

    return load_calibration(str(path), bench.base, 49152, windows, 512, 0)


def quantized(bench, row, given, batch_size):
    "A quantized model, and what it took."
    import torch

    from llmquant.core.quantizer_registry import QuantizerRegistry

    _, method, bits, options, windows, _ = row
    data = calibration(bench, given.calibration, windows) if windows else None
    model = bench.model().to(given.device)
    start, clock = time.process_time(), time.perf_counter()
    own = {key: value for key, value in options.items() if key != "torch_dtype"}
    config = {**own, "calibration": {"batch_size": batch_size}}
    if "torch_dtype" in options: config["model"] = {"torch_dtype": options["torch_dtype"]}
    model = QuantizerRegistry.get(method)().quantize(model, bits=bits, group_size=64, calibration_data=data, config=config)
    if given.device == "cpu": took = {"cpu_seconds": round(time.process_time() - start, 1)}
    else:
        torch.cuda.synchronize()
        took = {"seconds": round(time.perf_counter() - clock, 1), "peak_gpu_mib": torch.cuda.max_memory_allocated() >> 20}
    return unfolded(model), {"device": device_name(given), "batch_size": batch_size if windows else None, **took}


def device_name(given):
    "What computes."
    import torch

    return "cpu" if given.device == "cpu" else torch.cuda.get_device_name()


def measure(row, given, benches, results):
    "Quantize at each batch size that is still to be measured, and read every text."
    name, method, bits, options, windows, other = row
    facts = {"method": method, "bits": bits, "group_size": 64, "symmetric": False, "options": options,
             "calibration": f"{called(given.calibration)}, {windows} x 512" if windows else None}
    for batch_size in given.batch_sizes if windows else given.batch_sizes[:1]:
        if batch_size in [run["batch_size"] or batch_size for run in results.runs(name)]: continue
        model, run = quantized(benches[0], row, given, batch_size)
        for bench, text, ending in zip(benches, (given.text, given.other), ("", ", other text")):
            if ending and not other: continue
            runs = [*results.runs(name + ending), {**run, "perplexity": round(bench.perplexity(model), 4)}]
            mean = round(sum(r["perplexity"] for r in runs) / len(runs), 4)
            results.add(name=name + ending, **facts, text=called(text), windows=bench.windows, perplexity=mean, runs=runs)


class Rows(Results):
    "Results whose rows are made of runs, on one machine or several."

    def __init__(self, path, header, fresh=False):
        super().__init__(path, header, fresh)
        self.before = json.loads(self.path.read_text())["machines"] if self.rows else {}
        header["machines"] = self.before | header["machines"]

    def keep_machine(self, device):
        "The header names the machine of a device's first rows; what a row from another one has to say beside."
        here = self.header["machines"][device]
        self.header["machines"][device] = self.before.get(device, here)
        return {} if here == self.header["machines"][device] else {"machine": here}

    def runs(self, name):
        "Runs of one row so far."
        return next((row["runs"] for row in self.rows if row["name"] == name), [])


def main():
    "Parse the command line and go on where the last run stopped."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--base", type=Path, default=ROOT / "demo" / "base-float32", help="where the float32 model is, or will be made")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "methods.json")
    parser.add_argument("--rows", default="")
    parser.add_argument("--device", default="cpu", help="where to quantize and to measure")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4], help="windows per pass, one run for each")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args()
    rows = [row for row in all_rows() if re.search(given.rows, row[0])]
    if given.list: return print(*(row[0] for row in rows), sep="\n")
    if not given.calibration or not given.text: parser.error("--calibration and --text must be given")
    benches = [bench_of(given, given.text, 24)] + ([bench_of(given, given.other, 16)] if given.other else [])
    header = {"command": "tools/measure_methods.py", "about": __doc__.split("\n")[0],
              "machines": {device_name(given): machine()},
              "protocol": {"model": "SmolLM2-135M-Instruct, llmquant.evaluation.demo, float32", "context": CONTEXT, "text": given.text.name,
                           "calibration": given.calibration.name}}
    results = Rows(given.out, header, given.fresh)
    for bench, text, ending in zip(benches, (given.text, given.other), ("", ", other text")):
        if not results.has(name=f"float32{ending}"):
            results.add(name=f"float32{ending}", method="float32", bits=32, text=called(text), windows=bench.windows,
                        perplexity=round(bench.perplexity(bench.model().to(given.device)), 4))
    for row in rows:
        measure(row, given, benches, results)


if __name__ == "__main__":
    main()
