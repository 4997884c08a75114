"""What only a program that holds vLLM's engine can see, asked of a vLLM without plugins in a process of its own.

`linears`: what went into every Linear of the served model and what came out, for the first prompt of a job;
`text`: the log-probability of every token of long texts. matrix.py and measure_served.py ask; started as a program,
this file is the child: engine.py QUESTION FOLDER, where FOLDER/jobs.json lists jobs of llmquant.evaluation.vllm_check
and the answer to the n-th is written to FOLDER/n.safetensors.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


# --- in the child -----------------------------------------------------------------------------------------------------
def generate(engine, prompts, **options):
    "One token after each prompt."
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1, detokenize=False, **options)
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)


def listen(kept, model):
    """Keep what passes through the Linears of vLLM's `model`. Returns the parts of fused ones, fused name -> names, and
    the heads of those whose rows vLLM reorders from head by head to all q, all k, all v."""
    from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

    heads = {}

    def keep(name, module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        for end, tensor in (("x", inputs[0]), ("y", output)):
            kept[f"{name}.{end}"] = tensor.detach().cpu().clone()

    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            module.register_forward_hook(partial(keep, name))
            if isinstance(module, QKVParallelLinear) and name.endswith("query_key_value"):
                heads[name] = module.total_num_heads
    return getattr(model, "packed_modules_mapping", None) or {}, heads


def linears(engine, job):
    "Inputs and outputs of all Linears for the first prompt: name.x, name.y; and how vLLM put them together."
    kept = {}
    ((parts, heads),) = engine.apply_model(partial(listen, kept))
    generate(engine, job.prompts[:1])
    return kept, {"parts": json.dumps(parts), "heads": json.dumps(heads)}


def text(engine, job):
    "The log-probability of every token but the first of all prompts."
    import torch

    outputs = generate(engine, job.prompts, prompt_logprobs=0)
    tables = [
        [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(job.prompts, outputs, strict=True)
    ]
    return {"logprobs": torch.tensor(tables, dtype=torch.float64)}, {}


def main(question, folder):
    "Answer every job."
    from safetensors.torch import save_file

    from llmquant.evaluation.vllm_check import Job, load_engine

    for number, given in enumerate(json.loads((Path(folder) / "jobs.json").read_text())):
        job = Job(**given)
        engine = load_engine(job)
        tensors, facts = {"linears": linears, "text": text}[question](engine, job)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, Path(folder) / f"{number}.safetensors", facts)
        engine.llm_engine.engine_core.shutdown()
        del engine


# --- in the parent ----------------------------------------------------------------------------------------------------
def ask(question, jobs):
    "One child for all jobs; for each its tensors and facts. `LLMQuantError` with vLLM's last words when it fails."
    from safetensors import safe_open

    from llmquant.core.errors import LLMQuantError
    from llmquant.evaluation.vllm_check import child_environment, last_error

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
        command = [sys.executable, __file__, question, folder]
        done = subprocess.run(command, env=child_environment(True), capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise LLMQuantError(f"vLLM, asked for {question}: {last_error(done.stderr)}")
        answers = []
        for number in range(len(jobs)):
            with safe_open(Path(folder) / f"{number}.safetensors", "pt") as file:
                answers.append(({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}))
        return answers


def place(name):
    "Where a Linear stands, in vLLM and in transformers alike: its name from `layers.` on."
    return name[name.index("layers.") :] if "layers." in name else name


def linear_error(model, seen):
    "The largest relative error of a served Linear's output from that of `model`'s Linears on the same input."
    import torch

    tensors, facts = seen
    parts, heads = json.loads(facts["parts"]), json.loads(facts["heads"])
    modules = {place(name): module for name, module in model.named_modules()}
    worst = 0.0
    for name in (key.removesuffix(".x") for key in tensors if key.endswith(".x")):
        parent, _, own = place(name).rpartition(".")
        x, said = tensors[f"{name}.x"].float(), tensors[f"{name}.y"].float()
        with torch.no_grad():
            ours = torch.cat([modules[f"{parent}.{part}"](x) for part in parts.get(own, [own])], -1)
        if name in heads:
            ours = ours.view(len(x), heads[name], 3, -1).transpose(1, 2).flatten(1)
        worst = max(worst, float((ours - said).norm() / ours.norm()))
    return worst


if __name__ == "__main__":
    main(*sys.argv[1:])
