"""Task scores of GPTQ at 8, 4, 3 and 2 bits beside the float model's -> results/tasks.json, which the results page plots.

    measure_tasks.py --base MODEL --task-folder DIR --tasks A,B --calibration FILE --text FILE [--limit 1000] [--backend hf]

Groups of 64, symmetric, 128 calibration windows of 512 tokens, the method's defaults. Every export is measured by
`llmquant evaluate` on the same documents, the first --limit of each task; perplexity and KL divergence on --text. Exports
lie in --work and are made once, a task that was measured is not measured again.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, machine

GROUP, WINDOWS, LENGTH = 64, 128, 512


def llmquant(*words):
    "Run the command line, or stop with its message."
    subprocess.run([sys.executable, "-m", "llmquant", *map(str, words)], check=True, cwd=ROOT)


def quantize(given, bits, export):
    "Make an export that is not there yet."
    if export.exists():
        return
    llmquant("quantize", "--model-path", given.base, "--output-path", export, "--method", "gptq", "--bits", bits,
             "--group-size", GROUP, "--calibration-dataset", given.calibration, "--set", f"calibration.num_samples={WINDOWS}",
             "--set", f"calibration.max_length={LENGTH}", "--quiet")


def evaluate(given, export, samples):
    "Measure an export; the results as they are written."
    llmquant("evaluate", export, "--base", given.base, "--backend", given.backend, "--task-folder", given.task_folder,
             "--tasks", given.tasks, "--limit", given.limit, "--text", given.text, "--check-agreement", 0,
             "--samples", samples, "--quiet")
    return json.loads((export/"evaluation/results.json").read_text(encoding="utf-8"))


def row(results):
    "What the page needs of one export's results: no paths, no seconds."
    export = {key: results["models"]["export"][key] for key in ("method", "bits", "bytes")}
    tasks = {name.removeprefix("local_"): {key: task[key] for key in ("n", "chance", "metrics", "flips")}
             for name, task in results["tasks"].items()}
    return export | {"base_bytes": results["models"]["base"]["bytes"], "tasks": tasks, "text": results["text"],
                     "settings": results["settings"]}


def write(rows, where):
    "Write what has been measured."
    where = where | {key: rows[-1]["settings"][key] for key in ("device",) if key in rows[-1]["settings"]}
    found = {"command": "tools/measure_tasks.py", "machine": where, "group_size": GROUP,
             "calibration": f"{WINDOWS} windows of {LENGTH} tokens", "rows": rows}
    (ROOT/"results/tasks.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main():
    "Measure every width."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in "base", "task-folder", "tasks", "calibration", "text":
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--backend", default="hf")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir())/"measure_tasks")
    given = parser.parse_args()
    rows = []
    for bits in given.bits:
        export = given.work/f"gptq-w{bits}"
        quantize(given, bits, export)
        rows.append(row(evaluate(given, export, given.work/"samples")))
        write(rows, machine())


if __name__ == "__main__":
    main()
