"""Every width, grid and granularity on tiny models, served by a real vLLM; writes results/matrix_PLATFORM.json.

    matrix.py                                  the whole matrix on this machine's CPU
    matrix.py --platform cuda --workers 4      the same on a GPU, several vLLMs at once
    matrix.py --rows 'llama .* plugin'         only rows whose names match
    matrix.py --rows 'llama .* plugin' --fresh  the same once more; all other rows stay as they are
    matrix.py --budget-seconds 400             begin no more chunks of rows after that

A row is a tiny model quantized, exported, loaded by vLLM in float16 and compared with the dequantized export in
transformers (float32) at 4 x 48 tokens: the mean KL divergence must be at most 1e-4. Where this machine's kernels take
another dtype (a CPU with AMX: W8A8 and DeepSeek in bfloat16), that is served, under three times the reference's own
bfloat16 noise, and each row names its kernels. 4-bit weights are multiplied with float activations everywhere: each row
is taken with VLLM_CPU_INT4_W4A8=0, and says so, which is not what a server on a CPU with AMX does by default. `smollm2`
rows are the demo's language model; one that is above the bound is compared with what float16 costs transformers on the
same weights, and fails at twice that. `plugin` rows ask for `quantization="minmax"`, or the name of another method that
made them; `stock` rows run without plugins, wherever vLLM has a kernel of its own for that layout on that platform.

Rows with outlier suppressors start from a model with strong outliers (tests/outliers.py); for outlier_suppression_v2
`shifts` counts the sites that got a shift. Rows with activation quantization are served in float32 on a CPU without AMX
and must tell the simulation of that grid from none: the same bound against the simulation and more than it against
weights alone, and on vLLM's own inputs every Linear within 1e-5 of the simulation and further from weights alone. The
integer kernels of CUDA and AMX support half precision only, in which a divergence shows nothing: there each Linear must
be within 1e-3 of the simulation of that kernel (FP8: 5e-3, its sums are coarse), or a fifth of what its grid does, and
further from weights alone.

Mixtures of experts are judged at the positions where the router does not hang on rounding. Llama gets the
whole product; the other families get rows that hold each pair of settings. Rows are written as each chunk ends, and a
run that was stopped goes on where it was; --fresh runs the chosen rows again and keeps the others.
"""

import argparse
import importlib.metadata
import itertools
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

from measure import Results, machine  # noqa: E402

BOUND = 1e-4
GRANULARITIES = {"tensor": (0, {"per_channel": False}), "channel": (-1, {}), "group 32": (32, {}), "group 64": (64, {})}
GRID = {"bits": (2, 3, 4, 8), "symmetric": (True, False), "granularity": tuple(GRANULARITIES)}
FAMILIES = ("qwen2", "qwen3", "deepseek_v3")
VARIANTS = {"": {}, "tied": {"tie": True}, "biased": {"attention_bias": True}}
CHANNELS, FACTOR = [5, 40, 77, 110], 16  # outliers injected before suppressors; a power of two, so nothing is rounded
ENLARGED = {"llama": 64, "gpt_neox": 16, "opt": 16}  # times the embeddings before outlier_suppression_v2, see `enlarge_embeddings_`
TENSOR = {"granularity": "tensor"}
INPUTS = {  # grids of activations -> the recipe's section
    "int8 token": {"activations": 8},
    "int8 token asymmetric": {"activations": {"symmetric": False}},
    "int8 tensor": {"activations": TENSOR},
    "int8 tensor asymmetric": {"activations": {**TENSOR, "symmetric": False, "dynamic_range": "mse"}},
    "int8 tensor, down_proj token": {
        "activations": TENSOR,
        "overrides": [{"match": r".*\.down_proj", "activations": 8}],
    },
    "fp8 token": {"activations": {"type": "float"}},
}
REAL = "smollm2"  # a language model, not a tiny one: `llmquant.evaluation.demo`
ALONE = Lock()  # transformers builds models with the help of global state; only vLLM's children run side by side


# --- rows -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    "One export and how vLLM is asked for it."

    model: str
    bits: int
    symmetric: bool
    granularity: str
    format: str = "compressed_tensors"
    container: str = "auto"
    loader: str = "plugin"
    method: str = "minmax"
    variant: str = ""  # of the tiny model, see VARIANTS
    suppressors: str = ""  # joined by +
    inputs: str = ""  # the grid of activations, see INPUTS

    @property
    def name(self):
        "For people, and for --rows."
        layout = self.format + (f" {self.container}" if self.container != "auto" else "")
        made = "" if self.method == "minmax" else self.method
        parts = (self.model, self.variant, self.suppressors, made, f"W{self.bits}", self.granularity)
        grid = "symmetric" if self.symmetric else "asymmetric"
        inputs = f"inputs {self.inputs}," if self.inputs else ""
        return " ".join(filter(None, (*parts, grid, inputs, layout, self.loader)))

    @property
    def stored_bits(self):
        "Bits that a code takes in the file."
        if self.bits in (2, 3) and (self.container == "int4" or (self.container == "auto" and not self.symmetric)):
            return 4
        return self.bits


def product(factors):
    "Every combination of values, as dictionaries."
    return [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]


def pairs(choice):
    "The pairs of settings in one combination."
    return set(itertools.combinations(sorted(choice.items(), key=lambda item: item[0]), 2))


def pairwise(factors):
    "Few combinations that hold every pair of settings: always the one with most pairs not seen yet."
    choices = product(factors)
    left = set().union(*map(pairs, choices))
    chosen = []
    while left:
        best = max(choices, key=lambda choice: len(pairs(choice) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def native(row, platform):
    "Whether a stock vLLM has a kernel for the row's layout on `platform`."
    if row.format == "gptq":
        return row.symmetric and row.bits in ((4,) if platform == "cpu" else (4, 8))
    if row.format == "awq":
        return row.bits == 4
    if row.format == "float_zeros":
        return False
    if row.model == "gpt_neox" and platform == "cuda":  # vLLM 0.26 reorders weight_shape and input_scale by heads, too
        return row.inputs == "int8 token"
    return row.stored_bits == 4 or platform == "cuda" or row.inputs != ""


def all_rows(platform):
    "The matrix of one platform."
    grids = product(GRID)
    rows = [Row("llama", **grid) for grid in grids]
    rows += [Row(model, **grid) for model in FAMILIES for grid in pairwise(GRID)]
    stock = [
        Row("llama", **grid, format=format, loader="stock")
        for format in ("compressed_tensors", "gptq", "awq")
        for grid in grids
    ]
    stock += [
        Row("llama", **grid, container="int4", loader="stock")
        for grid in grids
        if grid["bits"] < 4 and grid["symmetric"]
    ]
    stock += [Row(model, **grid, loader="stock") for model in FAMILIES for grid in pairwise(GRID)]
    stock += [replace(row, loader="stock") for row in methods()] + suppressed() + activations()
    return rows + methods() + [row for row in stock if native(row, platform)]


def methods():
    "What calibrated methods and HQQ export by default, on every family."
    plain = "compressed_tensors"
    made = [("gptq", 4, True, "gptq"), ("gptq", 4, False, plain), ("gptq", 3, False, plain)]
    made += [("awq", 4, False, "awq"), ("awq", 4, True, "awq"), ("awq", 3, False, plain)]
    made += [("hqq", 4, False, plain), ("hqq", 3, False, plain), ("hqq", 3, False, "float_zeros")]
    rows = [Row(model, bits, symmetric, "group 64", format, method=method)
            for model in ("llama", *FAMILIES, REAL) for method, bits, symmetric, format in made]
    return [row for row in rows if row.format != "float_zeros" or row.model in ("llama", REAL)]


SUPPRESSORS = ("smooth_quant", "outlier_suppression_v2", "rotation", "rotation+smooth_quant")


def suppressed():
    "Edits that leave the function of the float model, under weights of 4 bits."
    models = [("llama", ""), ("qwen2", ""), ("qwen3", ""), ("gpt_neox", ""), ("llama", "tied"), ("opt", "tied")]
    grids = [("group 32", False), ("group 64", True)]
    rows = []
    for number, (model, variant) in enumerate(models):
        for turn, suppressors in enumerate(SUPPRESSORS):
            granularity, symmetric = grids[(number + turn) % 2]
            row = Row(model, 4, symmetric, granularity, loader="stock", variant=variant, suppressors=suppressors)
            rows.append(row)
    more = [("biased", "outlier_suppression_v2", "minmax"), ("tied", "rotation+smooth_quant", "gptq")]
    more = [Row("llama", 4, False, "group 64", "compressed_tensors", "auto", "stock", m, v, s) for v, s, m in more]
    return rows + more


def activations():
    "Weights of 8 bits with activation quantization, as they are and after suppressors."
    static, mixed = "int8 tensor", "int8 tensor, down_proj token"
    made = [("llama", "", "", "minmax", inputs) for inputs in INPUTS]
    made += [("qwen2", "", "", "minmax", static), ("qwen3", "tied", "", "minmax", "int8 token")]
    made += [("gpt_neox", "", "", "minmax", "int8 token"), ("opt", "tied", "", "minmax", static)]
    made += [("llama", "", "smooth_quant", "minmax", "int8 token"), ("llama", "tied", "smooth_quant", "gptq", mixed)]
    made += [("llama", "", "outlier_suppression_v2", "minmax", static), ("llama", "", "rotation", "gptq", "int8 token")]
    made += [("llama", "tied", "rotation+smooth_quant", "gptq", "int8 tensor asymmetric")]
    made += [("qwen2", "", "outlier_suppression_v2", "gptq", "int8 token"), ("qwen2", "", "rotation", "minmax", mixed)]
    made += [("qwen3", "", "smooth_quant", "minmax", static)]
    made += [("qwen3", "", "rotation+smooth_quant", "minmax", "int8 token")]
    made += [("gpt_neox", "", "outlier_suppression_v2", "minmax", static)]
    made += [("gpt_neox", "", "rotation", "gptq", "int8 token")]
    made += [("opt", "tied", "smooth_quant", "minmax", "int8 token")]
    made += [("llama", "", "smooth_quant", "minmax", "fp8 token")]
    columns = "model", "variant", "suppressors", "method", "inputs"
    shared = {"bits": 8, "symmetric": True, "granularity": "channel", "loader": "stock"}
    return [Row(**shared, **dict(zip(columns, values, strict=True))) for values in made]


# --- one row ----------------------------------------------------------------------------------------------------------
@cache
def base(model, folder, variant="", suppressors=""):
    "The tiny checkpoint of a family, or the real one; what suppressors work on has outliers."
    import outliers
    import tiny
    import tiny_tokenizer

    path = Path(folder) / "base" / f"{model}{variant}{suppressors}"
    if model == REAL:
        from llmquant.evaluation.demo import demo_base

        return demo_base(path, "float16")
    made = tiny.build(model, **VARIANTS[variant])
    if suppressors:
        outliers.inject_outliers(made, CHANNELS, FACTOR)
    if "outlier_suppression_v2" in suppressors:
        enlarge_embeddings_(made, ENLARGED.get(model, 1))
    made.save_pretrained(path)
    tiny.publish(path, model)
    tiny_tokenizer.save(path)
    return path


def enlarge_embeddings_(model, factor):
    """Make the residual stream that blocks add to `factor` times as large, as trained models have it; tied logits stay.
    outlier_suppression_v2 shifts nothing where rounding biases to half would show, and in a quiet stream it shows."""
    import torch

    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    norms = [module for name, module in model.named_modules() if "norm" in name and "layers." not in name]
    with torch.no_grad():
        for module in embeddings:
            module.weight *= factor
        for weight in norms[-1].parameters() if model.config.tie_word_embeddings else ():
            weight /= factor


def base_of(row, folder):
    "The checkpoint that a row starts from."
    return base(row.model, str(folder), row.variant, row.suppressors)


def export(row, folder, number):
    "Quantize and write; returns the export's folder."
    from llmquant.pipeline.run import quantize

    group_size, options = GRANULARITIES[row.granularity]
    options = {**(options if row.method == "minmax" else {}), "symmetric": row.symmetric}
    if row.format == "float_zeros":
        options["float_zeros"] = True
    section = {row.method: options, **INPUTS.get(row.inputs, {})}
    if row.suppressors:
        section["outlier_suppression"] = row.suppressors.split("+")
        if "smooth_quant" in section["outlier_suppression"]:
            section["smooth_quant"] = {"alpha": 0.5}
    reads = row.method not in ("minmax", "hqq") or row.suppressors or "tensor" in row.inputs
    text = {"calibration.num_samples": 8, "calibration.max_length": 64} if reads else {}
    out = Path(folder) / f"{number}"
    quantize(
        base_of(row, folder),
        out,
        method=row.method,
        bits=row.bits,
        group_size=group_size,
        format=row.format,
        container=row.container,
        config={"quantization": section},
        device="cpu",
        **text,
    )
    return out


def compare(job, reference, said):
    "The figures of one row: files against the digests, vLLM against the dequantized export and its activation grid."
    import torch

    from llmquant.evaluation import verification, served_check, served_model
    from llmquant.evaluation.verification_config import read_report
    from llmquant.export.loading import load

    out, prompts = Path(job.path), job.prompts
    layers, report = verification.check_files(out, reference)["layers"], read_report(out)
    figures = served_check.compare(out, prompts, said)
    real = Path(reference).name.startswith(REAL)
    if figures["mean_kl"] > figures["bound"] and real:  # is it float16's arithmetic?
        logits = served_model.forced_logits(load(out, torch.float32, "cpu", torch.float16), prompts)
        figures["own_noise"] = half_noise(load(out, torch.float16, "cpu", torch.float16), logits, prompts)
        figures["bound"] = max(figures["bound"], 2 * figures["own_noise"])
    found = {"layers": layers, "dtype": said.dtype, "environment": setting()}
    found |= {"kernels": sorted(set(said.kernels.values())), **shifts(report)}
    found |= figures | {"passed": not served_check.objection(figures, said.dtype)}
    if "linear_bound" in found:
        found |= with_grid(job, said, found)
    return {**found, "seconds": round(said.seconds, 1)}


def setting():
    "What vLLM's process is told about the activations of 4-bit weights."
    from llmquant.evaluation.vllm_check import child_environment
    from llmquant.serving.cpu_notes import W4A8

    return f"{W4A8}={child_environment(True)[W4A8]}"


def shifts(report):
    "At how many sites outlier_suppression_v2 shifted channels."
    blocks = (report.get("outlier_suppression") or {}).get("blocks", {}).values()
    sites = [site for block in blocks for site in block.get("outlier_suppression_v2", {}).get("pairs", {}).values()]
    return {"shifts": sum(site["edit"] == "shift and scale" for site in sites)} if sites else {}


def with_grid(job, said, found):
    "The divergence from a reference without the grid, which must be further away than is allowed, and so each Linear."
    import torch

    from llmquant.evaluation.served_model import divergences, forced_logits
    from llmquant.export.loading import load

    bare = load(job.path, torch.float32, "cpu", getattr(torch, said.dtype), activations=False)
    without = divergences(forced_logits(bare, job.prompts), said)[0].mean().item()
    shows = found["linear_error_without_activation_quantization"] > found["linear_bound"]
    shows &= said.dtype != "float32" or without > BOUND
    figures = {"mean_kl_without_activation_quantization": float(f"{without:.3g}"), "passed": found["passed"] and shows}
    if not shows:
        figures["error"] = f"the row shows nothing: a reference without activation quantization is as near as one with it ({found})"
    return figures


def half_noise(half, logits, prompts):
    "Mean KL of the same weights computed by transformers in float16, from what they give in float32."
    import torch

    from llmquant.evaluation.served_model import forced_logits

    each = []
    for exact, rounded in zip(logits, forced_logits(half, prompts)):
        p, q = exact.float().log_softmax(-1), rounded.float().log_softmax(-1)
        each.append((p.exp() * (p - q)).sum(-1))
    return float(f"{torch.cat(each).mean().item():.3g}")


def run_rows(rows, folder):
    "What vLLM makes of `rows`, which share a loader; one child answers all of them. A dictionary for each, in order."
    from llmquant.checkpoint.source import read_json
    from llmquant.core.errors import LLMQuantError
    from llmquant.evaluation.served_model import serving_dtype, teacher_tokens
    from llmquant.evaluation.vllm_check import Job, ask_vllm_many

    folder, found, jobs = Path(folder), {}, {}
    for number, row in enumerate(rows):
        try:
            with ALONE:
                out = export(row, folder, number)
        except LLMQuantError as error:
            found[number] = {"passed": False, "error": f"export: {error}"}
            continue
        config = read_json(out / "config.json")
        name = row.method if row.loader == "plugin" else None
        tokens, seen = teacher_tokens(out, config), bool(rows[number].inputs)
        jobs[number] = Job(str(out), tokens, serving_dtype(config), name, flexible=True, linears=seen)
    stock = rows[0].loader == "stock"
    answers = ask_vllm_many(list(jobs.values()), stock) if jobs else []
    for (number, job), said in zip(jobs.items(), answers, strict=True):
        if said.error:
            found[number] = {"passed": False, "error": said.error}
            continue
        try:
            with ALONE:
                found[number] = compare(job, base_of(rows[number], folder), said)
        except LLMQuantError as error:
            found[number] = {"passed": False, "error": str(error)}
        found[number]["quant_method"] = said.quantization
    return [{"name": row.name, **asdict(row), **found[number]} for number, row in enumerate(rows)]


# --- all rows ---------------------------------------------------------------------------------------------------------
def chunks(rows, size):
    "Rows in parts of at most `size` that share a loader."
    for loader in ("plugin", "stock"):
        group = [row for row in rows if row.loader == loader]
        yield from (group[start : start + size] for start in range(0, len(group), size))


def plugin_path(folder):
    "A folder for PYTHONPATH that makes the plugin known where the package runs from its source, not installed."
    if any(
        point.value.startswith("llmquant.") for point in importlib.metadata.entry_points(group="vllm.general_plugins")
    ):
        return ""
    from llmquant import __version__

    info = Path(folder) / "plugin" / f"llmquant-{__version__}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llmquant\nVersion: {__version__}\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nllmquant = llmquant.serving.plugin:register\n")
    return str(info.parent)


def header(platform):
    "Where the figures come from."
    import torch

    about = machine()
    if platform == "cuda":
        about["device"] = torch.cuda.get_device_name()
    try:
        about["vllm"] = importlib.metadata.version("vllm-cpu" if platform == "cpu" else "vllm")
    except importlib.metadata.PackageNotFoundError:
        about["vllm"] = importlib.metadata.version("vllm")
    return {
        "command": f"tools/matrix.py --platform {platform}",
        "about": "KL(dequantized export in float32 || vLLM in the row's dtype, else float16)",
        "machine": about,
        "protocol": {"platform": platform, "bound": BOUND, "prompts": 4, "predicted": 48},
    }


def main():
    "Parse the command line, run what is missing, exit with 1 when a row fails."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu", help="what the vLLM here runs on")
    parser.add_argument("--out", type=Path, help="the results file; results/matrix_PLATFORM.json by default")
    parser.add_argument("--rows", default="", help="only rows whose names match this regular expression")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin no chunk after this long")
    parser.add_argument("--workers", type=int, default=1, help="children at once")
    parser.add_argument("--chunk", type=int, default=16, help="rows for each child")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--fresh", action="store_true", help="run the chosen rows again; others are kept")
    given, start = parser.parse_args(), time.monotonic()
    rows = [row for row in all_rows(given.platform) if re.search(given.rows, row.name)]
    if given.list:
        return print("\n".join(row.name for row in rows))
    results = Results(given.out or ROOT / f"results/matrix_{given.platform}.json", header(given.platform))
    here = results.keep_machine()
    missing = [row for row in rows if given.fresh or not results.has(name=row.name, passed=True)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [plugin_path(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

        def work(part):
            if time.monotonic() - start > given.budget_seconds:
                return []
            with tempfile.TemporaryDirectory(dir=folder) as own:
                return run_rows(part, own)

        with ThreadPoolExecutor(given.workers) as pool:
            for done in as_completed([pool.submit(work, part) for part in chunks(missing, given.chunk)]):
                for row in done.result():
                    results.add(**row, **here)
    names = {row.name for row in rows}
    failed = [row["name"] for row in results.rows if row["name"] in names and not row["passed"]]
    done = sum(row["name"] in names for row in results.rows)
    print(f"{done} of {len(rows)} rows, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
