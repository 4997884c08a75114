"""llmquant beside llm-compressor, auto-round and hqq: CPU seconds, memory and perplexity -> results/benchmarks.json.

    peers.py --calibration wikitext2_valid.raw --text wikitext2_test.raw
    peers.py ... --only 'W3|hqq'    only rows whose names match
    peers.py ... --gptqmodel        that one too; it brings gigabytes
    peers.py --install              only make the environments
    peers.py --list | --table       the names of the rows | the table of what has been measured

The README beside this says what is measured and how. Rows are written as they come; a run that was stopped goes on
where it was, unless --fresh. Linux only.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from measure import CONTEXT, Bench, Results, machine  # noqa: E402

TORCH = "torch==2.13.0"  # the Makefile's; it goes in first, or pip takes another build of it
PEERS = {  # name: what is installed after torch, and what its process needs in its environment
    "llmcompressor": (["llmcompressor==0.14.*"], {}),
    "autoround": (["auto-round==0.16.*"], {}),
    "hqq": (["hqq==0.2.8"], {}),
    "gptqmodel": (["gptqmodel==7.7.*"], {"GPTQMODEL_CPU_WORKERS": "2"}),  # wants torch 2.14.1; refuses fewer workers
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
PLAIN, SEARCH = ({"method": "gptq", "dynamic_range": rule, "propagate": 0.0} for rule in ("minmax", "mse"))
BOTH = {**SEARCH, "propagate": 0.25}
STEPS = {"iters": 50, "batch_size": 2}
REFERENCE = "llm-compressor GPTQ"
FLOOR = "two forward passes and the Hessians alone"


def all_rows():
    "Name, library, options, in this order: ours before and after each peer."
    ours = "llmquant GPTQ, {}".format
    plain, search, both = map(ours, ("minmax ranges", "range search", "range search, propagate 0.25"))
    names = [
        (FLOOR, "products", 4, {}),
        (plain, "llmquant", 4, PLAIN),
        (REFERENCE, "llmcompressor", 4, {}),
        (plain, "llmquant", 4, PLAIN),
        (search, "llmquant", 4, SEARCH),
        (both, "llmquant", 4, BOTH),
        ("auto-round, 50 steps", "autoround", 4, STEPS),
        (both, "llmquant", 4, BOTH),
        ("llmquant HQQ", "llmquant", 4, {"method": "hqq"}),
        ("llmquant HQQ, float zeros", "llmquant", 4, {"method": "hqq", "float_zeros": True}),
        ("hqq, axis 1", "hqq", 4, {"axis": 1}),
        ("hqq, axis 0", "hqq", 4, {"axis": 0}),
        ("llmquant HQQ", "llmquant", 4, {"method": "hqq"}),
        ("llmquant AWQ", "llmquant", 4, {"method": "awq"}),
        ("llmquant HQQ, float zeros", "llmquant", 3, {"method": "hqq", "float_zeros": True}),
        ("hqq, axis 1", "hqq", 3, {"axis": 1}),
        (both, "llmquant", 3, BOTH),
        ("auto-round, 50 steps", "autoround", 3, STEPS),
        (plain, "llmquant", 3, PLAIN),
        (REFERENCE, "llmcompressor", 3, {}),
        (plain, "llmquant", 3, PLAIN),
        ("gptqmodel GPTQ", "gptqmodel", 4, {}),
    ]
    rows, seen = [], set()
    for name, library, bits, options in names:
        name = f"W{bits} {name}"
        rows.append((name + " (again)" * (name in seen), library, {"bits": bits, **options}))
        seen.add(name)
    return rows


# --- environments -----------------------------------------------------------------------------------------------------
def python_of(peer, folder):
    "The interpreter that has this library; ours is the one that runs this script."
    return Path(sys.executable) if peer in ("llmquant", "products") else folder / peer / "bin" / "python"


def install(peer, folder):
    "Make the environment of a peer, unless one with the same pins is there."
    pins, stamp = [[TORCH], PEERS[peer][0]], folder / peer / "pins.json"
    if stamp.exists() and json.loads(stamp.read_text()) == pins:
        return
    print(f"installing {' '.join(pins[0] + pins[1])} in {folder / peer}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder / peer], check=True)
    pip = [python_of(peer, folder), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    for packages in pins:
        subprocess.run([*pip, *packages], check=True)
    stamp.write_text(json.dumps(pins))


# --- one row ----------------------------------------------------------------------------------------------------------
def write_tokens(given, base):
    "The calibration tokens, the same file for everybody: consecutive windows from the start, no BOS."
    import numpy

    from llmquant.calibration.data import load_calibration

    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    count, length = given.samples
    data = load_calibration(str(given.calibration), str(base), vocabulary, count, length, 0)
    path = given.environments / "tokens.npy"
    numpy.save(path, data.tokens.numpy())
    return path, data.fingerprint


def run_child(row, given, base, tokens):
    "What the child measured and the file of its weights; or None and what it said before it failed."
    name, library, options = row
    out = given.environments / "weights.safetensors"
    out.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ONE_THREAD | QUIET
    environment |= PEERS.get(library, ([], {}))[1]
    if library in ("llmquant", "products"):
        environment["PYTHONPATH"] = str(ROOT)
    command = [*shlex.split(given.prefix), python_of(library, given.environments), ROOT / "benchmarks/child.py", library, base, tokens, out]
    log = given.environments / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}.log"
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run([*map(str, command), json.dumps(options)], env=environment, cwd=given.environments,
                              stdout=subprocess.PIPE, stderr=stream, text=True)  # fmt: skip
    if done.returncode:
        return None, f"{log.read_text(encoding='utf-8').strip().splitlines()[-1]} ({log})"
    return json.loads(done.stdout.strip().splitlines()[-1]), out


def with_weights(bench, file):
    "The float model with a child's weights; every Linear but the head must be among them."
    import torch
    from safetensors.torch import load_file

    model, tensors = bench.model(), load_file(file)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    left = linears - set(tensors)
    if left:
        raise SystemExit(f"{len(left)} of {len(linears)} Linears were left as they were, {min(left)} among them")
    unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise SystemExit(f"the model has no tensor {unknown[0]}")
    return model


def perplexity_of(bench, found, file, results):
    "Of a child's weights; not measured twice for the same weights."
    same = [row for row in results.rows if row.get("weights_sha256") == found["weights_sha256"]]
    return same[0]["perplexity"] if same else round(bench.perplexity(with_weights(bench, file)), 4)


def measure(row, given, bench, tokens, results, session):
    "Run a row and keep it; what went wrong, or nothing."
    name, library, options = row
    found, file = run_child(row, given, bench.base, tokens)
    if found is None:
        return file
    found["perplexity"] = perplexity_of(bench, found, file, results) if library != "products" else None
    file.unlink()
    results.add(name=name, library=library, options=options, session=session, **found)


# --- the table --------------------------------------------------------------------------------------------------------
def ratio(row, rows):
    "CPU seconds over llm-compressor's at the same width; a star when they are of different sessions."
    reference = [r for r in rows if r["name"] == f"W{row['options']['bits']} {REFERENCE}"]
    if not reference:
        return "-"
    star = "*" * (reference[0]["session"] != row["session"])
    return f"{row['cpu_seconds'] / reference[0]['cpu_seconds']:.2f}{star}"


def table(results):
    "What has been measured, in the order of the rows."
    rows = [row for row in results.rows if "options" in row]
    heads = "", "CPU s", "ratio", "MiB above call", "above imports", "perplexity", "GFLOP/s before", "after"
    lines = [heads] + [
        (row["name"], f"{row['cpu_seconds']:.1f}", ratio(row, rows), str(row["peak_mib_above_call"]),
         str(row["peak_mib_above_imports"]), f"{row['perplexity']:.3f}" if row["perplexity"] else "-", str(row["gflops_before"]),
         str(row["gflops_after"]))
        for name, *_ in all_rows() for row in rows if row["name"] == name
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        print(line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:])), sep="  ")


def parse():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="text to calibrate on, such as wikitext-2's validation part")
    parser.add_argument("--text", type=Path, help="text of the perplexities, such as wikitext-2's test part")
    parser.add_argument("--base", type=Path, default=ROOT / "demo/base-float32", help="the float32 model, or will be")
    parser.add_argument("--environments", type=Path, default=ROOT / ".bench", help="folder of the peers' environments")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks.json")
    parser.add_argument("--samples", type=int, nargs=2, default=(32, 512), help="windows and tokens of calibration")
    parser.add_argument("--windows", type=int, default=24, help=f"windows of {CONTEXT} tokens of the perplexities")
    parser.add_argument("--only", default="", metavar="NAME", help="a regular expression for the rows' names")
    parser.add_argument("--prefix", default="", help="a command that starts each child, such as 'taskset -c 0'")
    for name in ("gptqmodel", "install", "list", "table", "fresh"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args()
    given.environments = given.environments.resolve()
    if not (given.calibration and given.text or given.install or given.list or given.table):
        parser.error("--calibration and --text must be given")
    return given


def header_of(given):
    "What the rows have in common; rows of another protocol are not kept."
    protocol = {"model": given.base.name, "group_size": 64, "symmetric": False, "calibration_windows": given.samples[0],
                "calibration_length": given.samples[1], "context": CONTEXT, "windows": given.windows, "threads": 1,
                "calibration": given.calibration.name, "text": given.text.name}  # fmt: skip
    return {"command": "benchmarks/peers.py", "about": __doc__.split("\n")[0], "machine": machine(),
            "protocol": protocol}  # fmt: skip


def stored(given):
    "The results file as it is, for the table."
    if not given.out.exists():
        raise SystemExit(f"there is no {given.out}; run this with --calibration and --text first")
    return Results(given.out, json.loads(given.out.read_text(encoding="utf-8")))


def main():
    "Install, measure what is missing, print the table; the exit status is 1 when a row failed."
    given = parse()
    rows = [row for row in all_rows() if re.search(given.only, row[0]) and (given.gptqmodel or row[1] != "gptqmodel")]
    if given.list:
        return print(*(row[0] for row in rows), sep="\n")
    if given.table:
        return table(stored(given))
    given.environments.mkdir(parents=True, exist_ok=True)
    for peer in dict.fromkeys(row[1] for row in rows if row[1] in PEERS):
        install(peer, given.environments)
    if given.install:
        return
    os.environ.update(QUIET)
    given.base.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.base.resolve(), given.text.read_text(encoding="utf-8"), given.windows)
    tokens, fingerprint = write_tokens(given, bench.base)
    header = header_of(given)
    header["protocol"]["tokens_sha256"] = fingerprint
    results, session = Results(given.out, header, given.fresh), datetime.datetime.now().isoformat(timespec="seconds")
    if not results.has(name="float32"):
        results.add(name="float32", perplexity=round(bench.perplexity(bench.model()), 4))
    missing = [row for row in rows if not results.has(name=row[0])]
    failed = {row[0]: measure(row, given, bench, tokens, results, session) for row in missing}
    table(results)
    failed = {name: error for name, error in failed.items() if error}
    for name, error in failed.items():
        print(f"FAILED {name}: {error}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
