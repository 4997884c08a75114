"""What only a program that holds vLLM's engine can see, asked of a vLLM without plugins in a process of its own.

`text`: the log-probability of every token of long texts. measure_served.py asks; started as a program, this file is the
child: engine.py QUESTION FOLDER, where FOLDER/jobs.json lists jobs of llmquant.evaluation.vllm_check
and the answer to the n-th is written to FOLDER/n.safetensors.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


# --- in the child -----------------------------------------------------------------------------------------------------
def generate(engine, prompts, **options):
    "One token after each prompt."
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1, detokenize=False, **options)
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)


def text(engine, job):
    "The log-probability of every token but the first of all prompts; dtype, kernels, parts of fused Linears."
    import torch

    from llmquant.evaluation.kernels import kernel_names
    from llmquant.evaluation.served_linears import structure

    outputs = generate(engine, job.prompts, prompt_logprobs=0)
    tables = [
        [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(job.prompts, outputs, strict=True)
    ]
    facts = {"dtype": str(engine.llm_engine.model_config.dtype).removeprefix("torch."),
             "kernels": engine.apply_model(kernel_names)[0], "parts": engine.apply_model(structure)[0][0]}
    return {"logprobs": torch.tensor(tables, dtype=torch.float64)}, {k: json.dumps(v) for k, v in facts.items()}


def main(question, folder):
    "Answer every job."
    from safetensors.torch import save_file

    from llmquant.evaluation.kernels import prepare_process
    from llmquant.evaluation.vllm_check import Job, in_accepted_dtype, load_engine

    prepare_process()
    for number, given in enumerate(json.loads((Path(folder) / "jobs.json").read_text())):
        job = Job(**given)
        engine = load_engine(in_accepted_dtype(job))
        tensors, facts = {"text": text}[question](engine, job)
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


if __name__ == "__main__":
    main(*sys.argv[1:])
