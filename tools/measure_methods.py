"""Perplexity and cost of every method at 4, 3 and 2 bits -> results/methods.json, which the methods' pages plot.

    measure_methods.py --calibration wikitext2_valid.raw --text wikitext2_test.raw [--other calib_sotu.txt]
    measure_methods.py ... --rows 'gptq W3'      only rows whose names match
    measure_methods.py --list                    the names

The model is SmolLM2-135M-Instruct off its grid in float32 (`llmquant.demo`), groups of 64, asymmetric, scales in
float16, as exports have them.
Calibration: consecutive windows of 512 tokens from the start of --calibration, no BOS. Perplexity: the first 24 windows of
1024 tokens of --text; rows ending in `other text` are the first 16 of --other, which the calibration never saw. Rows are written
as they come, in the order of importance; a run that was stopped goes on where it was, unless --fresh.
"""

import argparse
import re
import time
from pathlib import Path

from measure import CONTEXT, ROOT, Bench, Results, machine, unfolded

PLAIN = {"dynamic_range": "minmax", "propagate": 0.0}
SEARCH = {"dynamic_range": "mse", "propagate": 0.0}
BOTH = {"dynamic_range": "mse", "propagate": 0.25}
GPTQ = {"minmax ranges": PLAIN, "range search": SEARCH, "range search, propagate 0.25": BOTH}
CALLED = {"wikitext2_test.raw": "wikitext-2 test", "wikitext2_valid.raw": "wikitext-2 valid"} # what files hold; others keep their names
OTHER = ("minmax ranges", "range search, propagate 0.25")


def all_rows():
    "Name, method, bits, options, windows of calibration, whether the other text is read too; the most important first."
    rows = []
    for words in reversed(GPTQ):
        rows += [(f"gptq W{b}, {words}", "gptq", b, GPTQ[words], 32, words in OTHER and b > 2) for b in (4, 3, 2)]
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


def measure(row, given, benches, results):
    "Quantize once, read every text."
    from llmquant.core.quantizer_registry import QuantizerRegistry

    name, method, bits, options, windows, other = row
    data = calibration(benches[0], given.calibration, windows) if windows else None
    model, start = benches[0].model(), time.process_time()
    config = {**options, "calibration": {"batch_size": 4}}
    model = QuantizerRegistry.get(method)().quantize(model, bits=bits, group_size=64, calibration_data=data, config=config)
    seconds, model = time.process_time() - start, unfolded(model)
    facts = {"method": method, "bits": bits, "group_size": 64, "symmetric": False, "options": options,
             "calibration": f"{called(given.calibration)}, {windows} x 512" if windows else None, "cpu_seconds": round(seconds, 1)}
    for bench, text, ending in zip(benches, (given.text, given.other), ("", ", other text")):
        if ending and not other: continue
        results.add(name=name + ending, **facts, text=called(text), windows=bench.windows, perplexity=round(bench.perplexity(model), 4))


def main():
    "Parse the command line and go on where the last run stopped."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--base", type=Path, default=ROOT / "demo" / "base-float32", help="where the float32 model is, or will be made")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "methods.json")
    parser.add_argument("--rows", default="")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args()
    rows = [row for row in all_rows() if re.search(given.rows, row[0])]
    if given.list: return print(*(row[0] for row in rows), sep="\n")
    if not given.calibration or not given.text: parser.error("--calibration and --text must be given")
    benches = [bench_of(given, given.text, 24)] + ([bench_of(given, given.other, 16)] if given.other else [])
    header = {"command": "tools/measure_methods.py", "about": __doc__.split("\n")[0], "machine": machine(),
              "protocol": {"model": "SmolLM2-135M-Instruct, llmquant.demo, float32", "context": CONTEXT, "text": given.text.name,
                           "calibration": given.calibration.name}}
    results = Results(given.out, header, given.fresh)
    for bench, text, ending in zip(benches, (given.text, given.other), ("", ", other text")):
        if not results.has(name=f"float32{ending}"):
            results.add(name=f"float32{ending}", method="float32", bits=32, text=called(text), windows=bench.windows,
                        perplexity=round(bench.perplexity(bench.model()), 4))
    for row in rows:
        if not results.has(name=row[0]): measure(row, given, benches, results)


if __name__ == "__main__":
    main()
