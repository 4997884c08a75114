"""One quantization in a process of its own, in the environment of the library that does it. `peers.py` starts this.

    child.py NAME BASE TOKENS OUT '{"bits": 4, ...}'

BASE is a float32 checkpoint, TOKENS a .npy file of token ids [windows, length]. What the library made of the weights
is written to OUT as float32 safetensors, only the tensors that differ from BASE; the last line printed is JSON: CPU
seconds and memory of the quantization alone, the speed of a matrix product before and after, versions.
"""

import gc
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

GROUP_SIZE, BATCH = 64, 4
PACKAGES = "torch", "transformers", "llmcompressor", "compressed-tensors", "auto-round", "hqq", "gptqmodel"


# --- the libraries: each function imports, and returns what is called on the model and gives back {name: weight} ------
def llmquant(options, tokens, base):
    "Ours, in memory."
    import torch

    from llmquant.core.quantizer_registry import QuantizerRegistry
    from llmquant.in_memory.quant_linear import QuantLinear

    bits, method = options.pop("bits"), options.pop("method")
    quantizer = QuantizerRegistry.get(method)()
    config = {**options, "model": {"torch_dtype": "float32"}, "calibration": {"batch_size": BATCH}}
    data = None if quantizer.data_free else torch.from_numpy(tokens)

    def quantize(model):
        return quantizer.quantize(model, bits=bits, group_size=GROUP_SIZE, calibration_data=data, config=config)

    def weights(model):
        packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
        return {f"{name}.weight": layer.dequantize() for name, layer in packed.items()} | dict(model.named_parameters())

    return quantize, weights


def llmcompressor(options, tokens, base):
    "GPTQModifier by `oneshot`, which leaves the dequantized weights in the Linears."
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoTokenizer

    grid = QuantizationArgs(num_bits=options["bits"], strategy="group", group_size=GROUP_SIZE, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=grid)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": (tokens * 0 + 1).tolist()})
    given = {"dataset": rows, "num_calibration_samples": len(tokens), "max_seq_length": tokens.shape[1]}
    given |= {"shuffle_calibration_samples": False, "batch_size": BATCH}
    tokenizer = AutoTokenizer.from_pretrained(base)

    def quantize(model):
        return oneshot(model=model, processor=tokenizer, recipe=recipe, **given)

    return quantize, lambda model: dict(model.named_parameters())


def autoround(options, tokens, base):
    "`AutoRound.quantize`, which leaves the dequantized weights in the Linears."
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = list(torch.from_numpy(tokens).split(1))
    given = {"bits": options["bits"], "group_size": GROUP_SIZE, "sym": False, "iters": options["iters"]}
    given |= {"batch_size": options["batch_size"], "nsamples": len(tokens), "seqlen": tokens.shape[1], "dataset": rows}

    def quantize(model):
        return AutoRound(model, tokenizer, device_map="cpu", enable_torch_compile=False, **given).quantize()[0]

    return quantize, lambda model: dict(model.named_parameters())


def hqq(options, tokens, base):
    "`quantize_model` of transformers models; zero points stay floats."
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    config = BaseQuantizeConfig(nbits=options["bits"], group_size=GROUP_SIZE, axis=options["axis"])

    def quantize(model):
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
        return model

    def weights(model):
        packed = {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}
        return {f"{name}.weight": layer.dequantize() for name, layer in packed.items()}

    return quantize, weights


def gptqmodel(options, tokens, base):
    "`GPTQModel.quantize`, which leaves packed layers; they are read by passing the identity through each."
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=options["bits"], group_size=GROUP_SIZE, sym=False, offload_to_disk=False)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]

    def quantize(model):
        model = GPTQModel.load(str(base), config, device="cpu", dtype=torch.float32)
        model.quantize(rows, batch_size=BATCH, backend=BACKEND.TORCH)
        return model.model

    def weights(model):
        packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
        return {f"{name}.weight": layer.dequantize_weight().T for name, layer in packed.items()}

    return quantize, weights


def products(options, tokens, base):
    "What no GPTQ that walks the blocks can do without: two forward passes, and X'X of each Linear's input once."
    import torch

    inputs = {"q_proj", "o_proj", "gate_proj", "down_proj"}  # k, v and up read what one of these reads

    def quantize(model):
        def see(module, args):
            x = args[0].reshape(-1, args[0].shape[-1])
            module.square = x.T @ x

        linears = [m for n, m in model.named_modules() if n.rpartition(".")[2] in inputs]
        with torch.no_grad():
            for hooked in (True, False):
                handles = [m.register_forward_pre_hook(see) for m in linears if hooked]
                for batch in torch.from_numpy(tokens).split(BATCH):
                    model.model(batch, use_cache=False)
                for handle in handles:
                    handle.remove()
        return model

    return quantize, lambda model: {}


LIBRARIES = {f.__name__: f for f in (llmquant, llmcompressor, autoround, hqq, gptqmodel, products)}


# --- measuring --------------------------------------------------------------------------------------------------------
def probe():
    "GFLOP/s of a float32 product of 2048 x 2048 matrices on this process's threads, the best of three."
    import torch

    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return round(2 * 2048**3 / min(times) / 1e9, 1)


def memory(key):
    "MiB of this process by the kernel: VmRSS, or VmHWM, its peak since `forget_peak`."
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def forget_peak():
    "From here on VmHWM counts anew."
    Path("/proc/self/clear_refs").write_text("5")


def cpu_seconds():
    "Of all threads of this process, and of processes it started that have ended."
    used = os.times()
    return time.process_time() + used.children_user + used.children_system


def load(base):
    "The float32 model with weights of its own, none mapped from the file, which would count only once it is read."
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def import_classes(base):
    "Import the model's classes, which transformers does when it first makes one."
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))


def changed(weights, base):
    "Weights that differ from the checkpoint's, as float32."
    import torch
    from safetensors.torch import load_file

    before, found = load_file(Path(base) / "model.safetensors"), {}
    for name, weight in weights.items():
        weight = weight.detach().to(torch.float32).contiguous()
        if name in before and not torch.equal(weight, before[name]):
            found[name] = weight.clone()
    return found


def digest(tensors):
    "SHA-256 of tensors, in the order of their names."
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def versions():
    "Of the packages that are installed here."
    installed = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def main():
    "Measure one call."
    name, base, tokens, out, options = sys.argv[1:]
    import numpy
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    quantize, weights = LIBRARIES[name](json.loads(options), numpy.load(tokens), base)  # imports
    import_classes(base)
    speed = [probe()]
    gc.collect()
    imported = memory("VmRSS")
    model = None if name == "gptqmodel" else load(base)  # that one wants to load by itself, at its expense
    gc.collect()
    forget_peak()
    held, start, wall = memory("VmRSS"), cpu_seconds(), time.perf_counter()
    model = quantize(model)
    found = {"cpu_seconds": round(cpu_seconds() - start, 2), "seconds": round(time.perf_counter() - wall, 2)}
    peak = memory("VmHWM")
    found |= {"peak_mib_above_call": round(peak - held), "peak_mib_above_imports": round(peak - imported)}
    speed.append(probe())
    with torch.no_grad():
        tensors = changed(weights(model), base)
    save_file(tensors, out)
    found |= {"gflops_before": speed[0], "gflops_after": speed[1], "threads": torch.get_num_threads()}
    found |= {"tensors_changed": len(tensors), "weights_sha256": digest(tensors), "versions": versions()}
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
