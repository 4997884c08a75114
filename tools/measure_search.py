"""What the search for smoothing factors costs and finds, beside an older commit: CPU seconds, choices and errors.

    measure_search.py OUT.json --before CHECKOUT [--model FOLDER ...] [--blocks 0,8,15] [--windows 4] [--length 512]

Both commits search the same blocks of the same model on the same text, each in a process of its own on one thread.
The judge is the same for both: the whole block's output error with all of its Linears and their inputs on their 8-bit
grids, on all of the text, relative to that without factors; it is computed by the newer commit. CHECKOUT is a working
tree of this repository at the older commit. Without a model the demo's is measured.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPRESSORS = ("smooth_quant", "outlier_suppression_v2")


def model_and_ids(folder, blocks, windows, length):
    "The first blocks of a model, and token ids [windows, length] of text, or random ones without a tokenizer."
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmquant.evaluation.demo import demo_text, smollm2, take_off_levels_
    if not folder:
        model, tokenizer = smollm2()
        take_off_levels_(model)
        del model.model.layers[blocks:]
        model.config.num_hidden_layers = blocks
    else:
        config = AutoConfig.from_pretrained(folder)
        config.num_hidden_layers = blocks
        if kinds := getattr(config, "layer_types", None): config.layer_types = kinds[:blocks]
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
        tokenizer = None
    if tokenizer is None:
        ids = torch.randint(config.vocab_size, (windows, length), generator=torch.Generator().manual_seed(0))
        return model, ids
    return model, torch.tensor(tokenizer(demo_text()[0])["input_ids"][:windows * length]).view(windows, length)


def measure(given):
    "Search the blocks of one model with one suppressor; print one JSON line for each."
    import torch
    from block_views import view_of, loop_over

    from llmquant.core.outlier_suppression_registry import OutlierSuppressionRegistry
    from llmquant.sequential.activation_quantization import ActivationScheme
    blocks = [int(b) for b in given.blocks.split(",")]
    model, ids = model_and_ids(given.model[0] if given.model else "", max(blocks) + 1, given.windows, given.length)
    loop = loop_over(model, ids, batch_size=1)
    judged = json.loads(given.judge) if given.judge else {}
    with torch.no_grad():
        for index in range(max(blocks) + 1):
            if index in blocks:
                (block, view), found = view_of(loop, index, activations=ActivationScheme()), {}
                for when, choices in judged.items():
                    with kept(block): found[when] = judge(view, given.suppressor, choices[str(index)])
                if not judged: found = search(view, OutlierSuppressionRegistry.get(given.suppressor)())
                print(json.dumps({"block": index, **found}), flush=True)
                loop.blocks.empty()
            loop.activations = loop.feed(index, loop.blocks.load(index), loop.activations, "quantized")
            loop.blocks.empty()


def search(view, suppressor):
    "Time the search of one block."
    suppressor.configure({"declare_biases": False} if suppressor.name == "outlier_suppression_v2" else {})
    cpu, wall = time.process_time(), time.perf_counter()
    suppressor.apply_to_block(view)
    seconds = {"cpu": round(time.process_time() - cpu, 3), "wall": round(time.perf_counter() - wall, 3)}
    return {"seconds": seconds, "choices": view.notes[suppressor.name]["pairs"]}


def judge(view, name, choices):
    "The error that the factors of one side leave: of each pair's readers alone, and of the whole block."
    from llmquant.outlier_suppression.outlier_suppression_v2 import drawn
    from llmquant.outlier_suppression.smooth_quant import smoothing_factors
    from llmquant.outlier_suppression.site_suppressor import sites_of
    reference, alone, stats = view.outputs(None), {}, dict(view.stats)
    plain = view.error(reference, len(reference))
    for site in sites_of(view, name):
        facts, sizes = choices[site.pair.producer], site.gather(site.stats.maxima)
        before = view.error(reference, len(reference), site.quantized)
        if name == "smooth_quant" and facts["alpha"] is not None:
            site.scale_by(smoothing_factors(sizes, site.column_maxima(), facts["alpha"]))
        elif name != "smooth_quant" and facts["threshold"]:
            site.scale_by(drawn(sizes, facts["threshold"], facts["strength"]))
        alone[site.pair.producer] = view.error(reference, len(reference), site.quantized) / before
    error = view.error(reference, len(reference)) / plain
    view.stats.update(stats)
    return {"error": error, "error_of_pairs": alone}


@contextmanager
def kept(block):
    "A block's parameters are put back."
    before = [p.detach().clone() for p in block.parameters()]
    try: yield
    finally:
        for p, value in zip(block.parameters(), before): p.data.copy_(value)


def child(checkout, given, model, suppressor, judge=None):
    "Run this file in another checkout's package; what it printed."
    tests = ROOT / "tests" if checkout == ROOT else checkout / "tests"
    path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (checkout, tests, *path))),
                                "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "-", "--child", "--suppressor", suppressor, "--blocks", given.blocks,
               "--windows", str(given.windows), "--length", str(given.length)]
    if model: command += ["--model", model]
    if judge: command += ["--judge", json.dumps(judge)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {str(found.pop("block")): found for found in map(json.loads, done.stdout.splitlines())}


def main():
    "Measure both commits and write the results."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--name", help="what the model is called in the results")
    parser.add_argument("--blocks", default="0,8,15,29")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--suppressor", action="append", default=[])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--judge", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        given.suppressor = given.suppressor[0]
        return measure(given)
    out = Path(given.out)
    results = json.loads(out.read_text()) if out.exists() else {}
    for model in given.model or [""]:
        entry = results.setdefault(given.name or (Path(model).name if model else "SmolLM2-135M"), {})
        entry["text"] = f"{given.windows} x {given.length} tokens"
        for suppressor in given.suppressor or SUPPRESSORS:
            own = entry.setdefault(suppressor, {})
            sides = {"now": ROOT} | ({"before": given.before.resolve()} if given.before else {})
            found = {when: child(checkout, given, model, suppressor) for when, checkout in sides.items()}
            choices = {when: {block: f["choices"] for block, f in side.items()} for when, side in found.items()}
            judged = child(ROOT, given, model, suppressor, choices)
            for when, side in found.items(): own[when] = {b: {**side[b], **judged[b][when]} for b in side}
            out.write_text(json.dumps(results, indent=1) + "\n") # what is measured is not lost with the rest


if __name__ == "__main__":
    main()
