"""Long measurements that pages plot and tables quote; each writes one committed file in results/.

    measure.py                          everything, in this order
    measure.py resources                MinMax of the demo model: CPU seconds and memory -> resources.json
    measure.py big                      a checkpoint of 6 GB in shards of 1 GB: peak memory -> resources.json
    measure.py fidelity --text FILE     perplexity and weight errors against plain arithmetic -> fidelity.json
    measure.py grid --text FILE         perplexity of rules, granularities and widths -> minmax_perplexity.json

The model is SmolLM2-135M-Instruct off its grid (`llmquant.evaluation.demo`), in float32. The text should be the test part of
wikitext-2 (raw), on which published figures are given; without --text it is the demo's, the last third of Python's
own language reference. A perplexity is over consecutive windows of 1024 tokens from the start. Rows are written as
they come; a run that was stopped goes on where it was, unless --fresh.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 1024
RULES, GRANULARITIES, BITS = ("minmax", "percentile", "mse"), ("group 64", "channel", "tensor"), (8, 4, 3, 2)
GROUP_SIZES = {"group 64": (64, {}), "channel": (-1, {}), "tensor": (0, {"per_channel": False})}
FLOAT32_SCALES = {"model": {"torch_dtype": "float32"}}


# --- what is measured on ----------------------------------------------------------------------------------------------
def machine():
    "Where figures come from: processor, threads, versions."
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def read_text(path):
    "The text and what it is called."
    if path:
        text, name = Path(path).read_text(encoding="utf-8"), Path(path).name
    else:
        from llmquant.evaluation.demo import demo_text

        text, name = demo_text()[1], f"last third of pydoc_data.topics of Python {platform.python_version()}"
    return text, {"text": name, "text_sha256": hashlib.sha256(text.encode()).hexdigest()}


class Bench:
    "The float32 demo model, and perplexities of models made from it."

    def __init__(self, base, text, windows):
        from transformers import AutoTokenizer

        from llmquant.evaluation.demo import demo_base

        self.base, self.windows = demo_base(base, "float32"), windows
        self.ids = AutoTokenizer.from_pretrained(self.base)(text, add_special_tokens=False, verbose=False)["input_ids"]

    def model(self):
        "A fresh float model."
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

    def perplexity(self, model):
        "By the protocol."
        from llmquant.evaluation.perplexity import perplexity

        return perplexity(model, self.ids, context=CONTEXT, windows=self.windows)


def quantized(model, bits, granularity, options=None, config=None):
    "`model` quantized in memory by MinMax, its QuantLinears unfolded into Linears, which compute the same and faster."
    from llmquant.quantizers.minmax_quantizer import MinMaxQuantizer

    group_size, given = GROUP_SIZES[granularity]
    given = {**given, **(options or {})}
    return unfolded(
        MinMaxQuantizer().quantize(model, bits=bits, group_size=group_size, config={**given, **(config or {})})
    )


def unfolded(model):
    "Every QuantLinear as a Linear with the dequantized weight."
    import torch

    from llmquant.in_memory.model import replace_module_
    from llmquant.in_memory.quant_linear import QuantLinear

    for layer in [module for module in model.modules() if isinstance(module, QuantLinear)]:
        linear = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = torch.nn.Parameter(layer.dequantize(), requires_grad=False)
        linear.bias = layer.bias
        replace_module_(model, layer, linear)
    return model


def linears(model):
    "Names and weights that are quantized: every Linear but the head."
    import torch

    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def rounded_by_seven(model):
    "The other convention for symmetric grids, max |w| / 7, which uses 15 of the 16 codes."
    import torch

    from llmquant.core.qtensor import round_to_nearest
    from llmquant.core.scheme import QuantScheme

    scheme = QuantScheme(4, symmetric=True, group_size=64, scale_dtype=torch.float32)
    for weight in linears(model).values():
        scales = weight.view(len(weight), -1, 64).abs().amax(-1) / 7
        grid = scales, torch.full_like(scales, scheme.middle, dtype=torch.uint8)
        weight.copy_(round_to_nearest(weight, scheme, grid).dequantize())
    return model


# --- results ----------------------------------------------------------------------------------------------------------
class Results:
    "One file of results; rows that it holds from the same protocol are kept."

    def __init__(self, path, header, fresh=False):
        self.path, self.header, self.rows = Path(path), header, []
        if self.path.exists() and not fresh:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found.get("protocol") == header["protocol"]:
                self.rows = found["rows"]

    def keep_machine(self):
        "The header names the machine of the rows that are there; what a row from another one has to say beside."
        here = self.header["machine"]
        if self.rows:
            self.header["machine"] = json.loads(self.path.read_text(encoding="utf-8"))["machine"]
        return {} if here == self.header["machine"] else {"machine": here}

    def has(self, **key):
        "Whether a row with these values is there."
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, **row):
        "Add a row, replacing one of the same name, and write the file."
        self.rows = [r for r in self.rows if r["name"] != row["name"]] + [row]
        self.path.parent.mkdir(exist_ok=True)
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        head = json.dumps(self.header, indent=1)[1:-2].rstrip()
        self.path.write_text(f'{{{head},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
        print(row, flush=True)


def results_of(given, name, command, windows, about):
    "The results file of one measurement."
    header = {
        "command": f"tools/measure.py {command}",
        "about": about,
        "machine": machine(),
        "protocol": {
            "model": "SmolLM2-135M-Instruct, llmquant.evaluation.demo, float32",
            "context": CONTEXT,
            "windows": windows,
            **read_text(given.text)[1],
        },
    }
    return Results(given.out / name, header, given.fresh)


# --- the measurements -------------------------------------------------------------------------------------------------
FIDELITY = (  # name, bits, granularity, options, divisor of the plain arithmetic, columns per scale (None: the row)
    ("W4 group 64 asymmetric", 4, "group 64", {}, None, 64),
    ("W4 group 64 symmetric, max/7.5", 4, "group 64", {"symmetric": True}, 7.5, 64),
    ("W8 per channel asymmetric", 8, "channel", {}, None, None),
    ("W8 per channel symmetric, max/127.5", 8, "channel", {"symmetric": True}, 127.5, None),
)


def fidelity(given):
    "Perplexity of float and quantized models, and weight errors against numpy in float64."
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    import plain_minmax

    windows = given.windows or 24
    bench = Bench(given.base, read_text(given.text)[0], windows)
    results = results_of(given, "fidelity.json", "fidelity", windows, "scales in float32")
    if not results.has(name="float32"):
        results.add(name="float32", perplexity=round(bench.perplexity(bench.model()), 4))
    before = linears(bench.model())
    for name, bits, granularity, options, divisor, width in FIDELITY:
        if results.has(name=name):
            continue
        model = quantized(bench.model(), bits, granularity, options, FLOAT32_SCALES)
        error = sum(float((w.double() - before[n].double()).square().sum()) for n, w in linears(model).items())
        plain = sum(plain_minmax.squared_error(w.numpy(), bits, width or w.shape[1], divisor) for w in before.values())
        results.add(
            name=name, perplexity=round(bench.perplexity(model), 4), squared_error=error, plain_squared_error=plain
        )
    if not results.has(name="W4 group 64 symmetric, max/7"):
        with torch.no_grad():
            model = rounded_by_seven(bench.model())
        plain = sum(plain_minmax.squared_error(w.numpy(), 4, 64, 7) for w in before.values())
        error = sum(float((w.double() - before[n].double()).square().sum()) for n, w in linears(model).items())
        results.add(
            name="W4 group 64 symmetric, max/7",
            perplexity=round(bench.perplexity(model), 4),
            squared_error=error,
            plain_squared_error=plain,
        )


def grid(given):
    "Perplexity for each width, granularity and range rule, and for symmetric grids with the plain rule."
    windows = given.windows or 8
    bench = Bench(given.base, read_text(given.text)[0], windows)
    results = results_of(
        given,
        "minmax_perplexity.json",
        "grid",
        windows,
        "scales in float16; percentile 99.9; the error is that of all quantized weights, relative",
    )
    if not results.has(name="float32"):
        results.add(name="float32", bits=32, perplexity=round(bench.perplexity(bench.model()), 4))
    before = linears(bench.model())
    norm = sum(float(w.double().square().sum()) for w in before.values())
    cells = [(rule, granularity, False) for granularity in GRANULARITIES for rule in RULES]
    cells += [("minmax", granularity, True) for granularity in GRANULARITIES[:2]]
    for rule, granularity, symmetric in cells:
        for bits in BITS:
            name = f"W{bits} {granularity} {'symmetric' if symmetric else 'asymmetric'} {rule}"
            if results.has(name=name):
                continue
            start = time.process_time()
            model = quantized(bench.model(), bits, granularity, {"dynamic_range": rule, "symmetric": symmetric})
            seconds = time.process_time() - start
            error = sum(float((w.double() - before[n].double()).square().sum()) for n, w in linears(model).items())
            results.add(
                name=name,
                bits=bits,
                granularity=granularity,
                rule=rule,
                symmetric=symmetric,
                perplexity=round(bench.perplexity(model), 4),
                relative_error=round((error / norm) ** 0.5, 6),
                cpu_seconds=round(seconds, 1),
            )


# Runs code or a script and writes down its peak at the end. VmHWM is the process's own; `ru_maxrss` begins with that of
# the process that started it.
WATCHED = """
import atexit, runpy, sys
from pathlib import Path
def note():
    lines = Path("/proc/self/status").read_text().splitlines()
    Path(peak).write_text(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
_, peak, *sys.argv = sys.argv
atexit.register(note)
if sys.argv[0] == "-c": exec(sys.argv[1], {"__name__": "__main__"})
else: runpy.run_path(sys.argv[0], run_name="__main__")
"""


def cost(*command):
    "CPU seconds, seconds and peak MiB of a script or of `-c` and code, run in a process of its own."
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    with tempfile.TemporaryDirectory() as folder:
        peak = Path(folder) / "peak"
        done = subprocess.run([sys.executable, "-c", WATCHED, peak, *map(str, command)], cwd=ROOT, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode or not peak.exists():
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
        kib = int(peak.read_text())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime - before.ru_utime + used.ru_stime - before.ru_stime
    return {"cpu_seconds": seconds, "seconds": time.time() - start, "peak_mib": kib / 1024}


def llmquant(base, out):
    "The cost of quantizing a checkpoint as a user does, above an interpreter that has imported torch."
    shutil.rmtree(out, ignore_errors=True)
    floor = cost("-c", "import torch")
    used = cost(
        "quantize.py", "--model-path", base, "--output-path", out, "--method", "minmax", "--bits", 4, "--group-size", 64
    )
    above = {f"{k}_above_torch": round(used[k] - floor[k], 2) for k in ("cpu_seconds", "peak_mib")}
    return {**{k: round(v, 2) for k, v in used.items()}, **above}


def size_of(folder):
    "Bytes of the tensors files in a folder."
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def resources(given):
    "MinMax of the demo model in bfloat16: the least of five runs."
    make = "import sys; from llmquant.evaluation.demo import demo_base; demo_base(sys.argv[1])"
    base = Path(given.base).with_name("base-bfloat16")
    subprocess.run([sys.executable, "-c", make, str(base)], check=True, cwd=ROOT)
    results = Results(given.out / "resources.json", resources_header(), given.fresh)
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        runs = [llmquant(base, Path(folder) / "out") for _ in range(5)]
        results.add(
            name="demo model, W4 group 64, quantize and write",
            **min(runs, key=lambda run: run["cpu_seconds_above_torch"]),
            all_cpu_seconds_above_torch=[run["cpu_seconds_above_torch"] for run in runs],
            checkpoint_bytes=size_of(base),
            export_bytes=size_of(Path(folder) / "out"),
        )


def resources_header():
    "The header of resources.json."
    return {
        "command": "tools/measure.py resources big",
        "protocol": {"threads": 1, "program": "quantize.py"},
        "about": "above_torch: less than what `import torch` alone takes",
        "machine": machine(),
    }


def big(given):
    "A made-up checkpoint of 6 GB in shards of 1 GB."
    results = Results(given.out / "resources.json", resources_header(), given.fresh)
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        base, out = Path(folder) / "base", Path(folder) / "out"
        subprocess.run([sys.executable, ROOT / "tools/big_checkpoint.py", base], check=True)
        results.add(
            name="made-up checkpoint in shards of 1 GB, W4 group 64",
            **llmquant(base, out),
            checkpoint_bytes=size_of(base),
            shards=len(list(base.glob("*.safetensors"))),
            export_bytes=size_of(out),
        )


MEASUREMENTS = {"resources": resources, "big": big, "fidelity": fidelity, "grid": grid}


def main():
    "Parse the command line and measure."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="|".join(MEASUREMENTS), help="all when none is named")
    parser.add_argument("--text", help="a text file, such as wikitext-2's test part; the demo's text when absent")
    parser.add_argument("--windows", type=int, help="windows of 1024 tokens; 24 for fidelity, 8 for the grid")
    parser.add_argument(
        "--base", default=str(ROOT / "demo/base-float32"), help="where the float32 demo model is or will be"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--scratch", help="folder for large temporary files")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results hold already")
    given = parser.parse_args()
    unknown = set(given.what) - set(MEASUREMENTS)
    if unknown:
        parser.error(f"no measurement {', '.join(sorted(unknown))}; there are {', '.join(MEASUREMENTS)}")
    Path(given.base).parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
    for what in MEASUREMENTS:
        if what in (given.what or MEASUREMENTS):
            MEASUREMENTS[what](given)


if __name__ == "__main__":
    main()
