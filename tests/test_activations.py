"""Quantized activations: the simulation against vLLM's own operations, and exports against a real vLLM.

The exports are written here by hand, weight by weight, so that nothing but schemes, formats and the verification is tried.
"""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_tokenizer
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import llmquant
from llmquant.core.errors import VerificationError
from llmquant.core.format_registry import FormatRegistry
from llmquant.core.qtensor import round_to_nearest
from llmquant.core.scheme import QuantScheme
from llmquant.core.statistics import LayerStats
from llmquant.evaluation import verification, served_check, served_model
from llmquant.evaluation.kernels import PER_TOKEN
from llmquant.evaluation.served_linears import fused_parts, linear_errors, place, token_error
from llmquant.evaluation.vllm_check import Answer, Job, ask_vllm_many, child_environment
from llmquant.export.loading import load
from llmquant.in_memory.quant_linear import QuantLinear
from llmquant.sequential.activation_quantization import ActivationScheme, simulate, static_parameters

AMX = torch.cpu._is_amx_tile_supported() and os.environ.get("LLMQUANT_CPU_AMX") != "0"
WITH_AMX = pytest.mark.skipif(not AMX, reason="needs a CPU with AMX")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
DYNAMIC, ASYMMETRIC = ActivationScheme(), ActivationScheme(symmetric=False)
STATIC = ActivationScheme(granularity="tensor", dynamic=False)
STATIC_ASYMMETRIC = STATIC.replaced(symmetric=False, range_rule="mse")
FP8 = ActivationScheme(type="float")


def grid(inputs):
    "A grid of eight bits per channel, with these activations."
    return QuantScheme(8, True, "channel", 0, scale_dtype=torch.float32, type=inputs.type, activations=inputs)


# name -> grid of all Linears, grid of down_proj
EXPORTS = {"dynamic": (grid(DYNAMIC), None), "asymmetric": (grid(ASYMMETRIC), None), "static": (grid(STATIC), None),
           "static_asymmetric": (grid(STATIC_ASYMMETRIC), None), "two_groups": (grid(STATIC), grid(DYNAMIC)),
           "fp8": (grid(FP8), None)}


def measured(model, names):
    "The statistics of the inputs of Linears, over random tokens."
    stats = {name: LayerStats() for name in names}
    hooks = [model.get_submodule(name).register_forward_pre_hook(lambda m, x, s=stats[name]: s.add(x[0], ("range",)))
             for name in names]
    tokens = torch.randint(0, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): model(tokens)
    for hook in hooks: hook.remove()
    return {name: s.finish() for name, s in stats.items()}


def on_inputs(weight, stats):
    "A weight with the static grid of its inputs, where it has one."
    inputs = weight.scheme.activations
    if inputs is None or inputs.dynamic: return weight
    scale, zero = static_parameters(stats, inputs)
    return replace(weight, input_scale=scale, input_zero=zero)


def write(base, target, main, down=None):
    "An export of a tiny checkpoint, with its report."
    packing, shard = FormatRegistry.get("compressed_tensors")(), "model.safetensors"
    model = load(base, torch.float32)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    overrides = {n: down for n in names if down and n.endswith("down_proj")}
    stats, weights = measured(model, names), {}
    tensors = {n: t.float() for n, t in load_file(base/shard).items()}
    for name in names:
        weight = round_to_nearest(tensors.pop(f"{name}.weight"), overrides.get(name, main))
        weights[name] = on_inputs(weight, stats[name])
        assert packing.objection(weight.scheme, *weight.codes.shape) == ""
        tensors |= packing.pack(name, weights[name])
    shutil.copytree(base, target)
    save_file(tensors, target/shard, metadata={"format": "pt"})
    config = json.loads((base/"config.json").read_text()) | {"dtype": "float32"}
    config["quantization_config"] = packing.quantization_config(main, names, ["lm_head"], "minmax", overrides)
    (target/"config.json").write_text(json.dumps(config))
    layers = {n: {"shape": list(w.codes.shape), "scheme": str(w.scheme)} for n, w in weights.items()}
    report = {"scheme": main.to_dict(), "method": "minmax", "layers": layers,
              "verification": {"digests": {n: w.digest() for n, w in weights.items()}, "within_one_step": main.type == "int"}}
    (target/"quantization_report.yaml").write_text(yaml.safe_dump(report))
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A base model, all exports of it, and what they hold."
    folder = tmp_path_factory.mktemp("activations")
    base = tiny.make("llama", folder/"base", num_key_value_heads=4)
    for name, grids in EXPORTS.items(): write(base, folder/name, *grids)
    return folder


@pytest.mark.parametrize("name", EXPORTS)
def test_files(folder, name):
    "The second reader finds what was computed, near the original."
    found = verification.check_files(folder/name, folder/"base")
    assert found["layers"] == 14 and found["float_tensors"] > 3
    assert ("largest_step" in found) == (name != "fp8")


def edited(source, target, edit):
    "A copy of an export, edited."
    shutil.copytree(source, target)
    tensors, config = load_file(target/"model.safetensors"), json.loads((target/"config.json").read_text())
    edit(tensors, config["quantization_config"])
    save_file(tensors, target/"model.safetensors", metadata={"format": "pt"})
    (target/"config.json").write_text(json.dumps(config))
    return target


DOWN = "model.layers.1.mlp.down_proj"


def louder(tensors, config): tensors[f"{DOWN}.input_scale"] *= 1.5
def moved(tensors, config): tensors[f"{DOWN}.input_zero_point"] += 1
def unsigned(tensors, config): tensors[f"{DOWN}.weight"].view(torch.uint8).bitwise_xor_(128)
def symmetric(tensors, config): config["config_groups"]["group_0"]["input_activations"]["symmetric"] = True
def without(tensors, config): config["config_groups"]["group_0"]["input_activations"] = None
def packed(tensors, config): config["format"] = "pack-quantized"
def dropped(tensors, config): del tensors[f"{DOWN}.input_scale"]


@pytest.mark.parametrize("fault, said", [(louder, "SHA-256 differs"), (moved, "SHA-256 differs"),
                                         (unsigned, "SHA-256 differs"), (symmetric, "for its inputs"),
                                         (without, "for its inputs"), (packed, "format is"),
                                         (dropped, "input_scale: the export has no such tensor")])
def test_planted_faults(folder, tmp_path, fault, said):
    "What would compute another model is found in the files."
    with pytest.raises(VerificationError, match=said):
        verification.check_files(edited(folder/"static_asymmetric", tmp_path/"x", fault), folder/"base")


def test_loaded_model_is_quant_linear(folder):
    "The reference loaded from the files and `QuantLinear` compute the same, bit by bit."
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(4)) * 3
    for name, (main, _) in EXPORTS.items():
        linear = load(folder/name, torch.float32).get_submodule(DOWN)
        packing = FormatRegistry.get("compressed_tensors")()
        tensors = load_file(folder/name/"model.safetensors")
        scheme = EXPORTS[name][1] or main
        assert torch.equal(linear(x), QuantLinear(packing.unpack(DOWN, tensors, scheme, 256))(x)), name


def test_linear_error_finds_what_differs(folder):
    "The comparison of served Linears, on what passes through `load`'s own: fused parts, and a planted difference."
    model = load(folder/"static", torch.float32)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(5))
    gate, up = (model.get_submodule(f"model.layers.1.mlp.{name}_proj") for name in ("gate", "up"))
    with torch.no_grad(): y = torch.cat([gate(x), up(x)], -1)
    name = "model.model.layers.1.mlp.gate_up_proj"
    def error(model, y): return linear_errors(model, {name: (x, y)}, parts, {}, torch.float32)[name]
    parts = {"gate_up_proj": ["gate_proj", "up_proj"]}
    assert error(model, y) <= 1e-7
    assert 9e-4 < error(model, 1.001 * y) < 1.1e-3
    assert error(load(folder/"static", torch.float32, activations=False), y) > 1e-3


def test_linears_that_cannot_be_compared(folder, monkeypatch):
    "A vLLM whose names are others, or that hands over nothing, verifies no grid; on CUDA nothing is asked for."
    model = load(folder/"static", torch.float32, activations=False)
    x, name = torch.randn(2, 128, generator=torch.Generator().manual_seed(5)), "model.layers.1.mlp.gate_proj"
    with torch.no_grad(): y = load(folder/"static", torch.float32).get_submodule(name)(x)
    def figures(linears, cuda=False, export="static"):
        config = json.loads((folder/export/"config.json").read_text())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        found = served_check.compare_linears(model, folder/export, config, Answer(linears=linears, dtype="float32"))
        return found, served_check.objection({"mean_kl": 0, "bound": 1e-4, **found}, "float32")
    for linears in {"trunk.7.mix": (x, x)}, {}: assert figures(linears) == ({"linears": 0}, served_check.UNSEEN)
    assert figures({}, export="base") == ({}, "")
    assert figures({"trunk.7.mix": (x, x)}, cuda=True) == ({"linears": 0}, served_check.UNSEEN)
    assert figures({}, cuda=True) == ({"linears": "not compared one by one on CUDA"}, "")
    some, objection = figures({"trunk.7.mix": (x, x), name: (x, y)})
    assert (some["linears"], some["not_compared"], objection) == (1, 13, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA Linears are not compared one by one")
def test_a_verification_that_compares_no_linear_fails(folder, monkeypatch):
    "The answers are right; the float reference is not served, for nothing was found to be wrong."
    def serve(jobs, stock):
        job, = jobs
        logits = served_model.forced_logits(load(job.path, torch.float32), job.prompts)
        tables = [each.log_softmax(-1).sort(descending=True) for each in logits]
        return [Answer([t.indices.numpy() for t in tables], [t.values.numpy() for t in tables], dtype=job.dtype)]
    monkeypatch.setattr(verification, "vllm_installed", lambda: True)
    monkeypatch.setattr(served_check, "ask_vllm_many", serve)
    with pytest.raises(VerificationError) as caught: verification.verify(folder/"static", folder/"base")
    assert str(caught.value) == f"not verified: {served_check.UNSEEN}"


LIBRARY = """
import sys, torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
import json
folder, layer = sys.argv[1:]
config = json.load(open(f"{folder}/config.json"))["quantization_config"]
scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
whole = load_file(f"{folder}/model.safetensors")
tensors = {k.removeprefix(layer + "."): t for k, t in whole.items() if k.startswith(layer + ".")}
read = BaseCompressor.get_value_from_registry(config["format"]).decompress(tensors, scheme)
save_file({"weight": read["weight"].float().contiguous()}, f"{folder}/read.pt")
"""


@pytest.mark.parametrize("name", ["dynamic", "static_asymmetric", "fp8"])
def test_library_reads_it(folder, name):
    "compressed-tensors' own library takes the weights for what they are."
    pytest.importorskip("compressed_tensors")
    layer = "model.layers.0.self_attn.q_proj"
    subprocess.run([sys.executable, "-c", LIBRARY, folder/name, layer], check=True)
    ours = load(folder/name, torch.float32).get_submodule(layer).weight
    assert torch.equal(load_file(folder/name/"read.pt")["weight"], ours)


OPERATIONS = """
import sys, torch
from safetensors.torch import load_file, save_file
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
current_platform.import_kernels()
given, out = load_file(sys.argv[1]), {}
x, weight, scales = given["x"], given["weight"], given["scales"]
for name in ("dynamic", "asymmetric", "static", "static_asymmetric"):
    symmetric, scale, zero = "asym" not in name, given.get(f"{name}.scale"), given.get(f"{name}.zero")
    if scale is not None: scale = scale.reshape(())
    if zero is not None: zero = zero.int().reshape(())
    q, s, z = ops.onednn_scaled_int8_quant(x, scale, zero, symmetric)
    out[f"{name}.codes"], out[f"{name}.s"] = q, s.reshape(-1, 1).expand(len(x), 1).contiguous()
    if z is not None: out[f"{name}.z"] = z.reshape(-1, 1).expand(len(x), 1).contiguous()
    handler = ops.create_onednn_scaled_mm(weight.t(), scales, torch.float32, scale is None, not symmetric, 32)
    adjust = None if symmetric and scale is not None else weight.sum(1, dtype=torch.float32)[None] * scales.squeeze()
    y = torch.empty(len(x), len(weight))
    ops.onednn_scaled_mm(handler, q, y, s, z, adjust, None)
    out[f"{name}.y"] = y
if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
    amx = x.bfloat16(), torch.ops._C.convert_weight_packed(weight), scales, None, torch.bfloat16, True
    out["amx.y"] = torch.ops._C.int8_scaled_mm_with_quant(*amx).float()
save_file(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def operations(tmp_path_factory):
    "Inputs of many sizes, and what vLLM's CPU operations make of them."
    folder, generator = tmp_path_factory.mktemp("operations"), torch.Generator().manual_seed(7)
    x = torch.randn(400, 512, generator=generator) * torch.logspace(-6, 6, 400)[:, None]
    x[:, 3] *= 40
    x[100:200] += x[100:200].abs().amax(1, keepdim=True) * 2     # ranges that do not hold zero
    x[399], x[398] = 0, 3.
    weight = round_to_nearest(torch.randn(64, 512, generator=generator), grid(DYNAMIC))
    given = {"x": x, "weight": (weight.codes ^ 128).view(torch.int8), "scales": weight.scales}
    stats = LayerStats()
    stats.add(x[150:260], ("range",))
    for name, inputs in (("static", STATIC), ("static_asymmetric", STATIC_ASYMMETRIC)):
        found = static_parameters(stats.finish(), inputs)
        given[f"{name}.scale"] = found[0]
        if not inputs.symmetric: given[f"{name}.zero"] = found[1]
    save_file(given, folder/"given.safetensors")
    files = folder/"given.safetensors", folder/"said.safetensors"
    subprocess.run([sys.executable, "-c", OPERATIONS, *files], check=True, env=child_environment(True))
    return given, load_file(folder/"said.safetensors"), weight


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="these operations are the CPU's")
@pytest.mark.parametrize("name, inputs", [("dynamic", DYNAMIC), ("asymmetric", ASYMMETRIC), ("static", STATIC),
                                          ("static_asymmetric", STATIC_ASYMMETRIC)])
def test_operations_to_the_bit(operations, name, inputs):
    "`simulate` gives the numbers that vLLM's codes mean, and a Linear vLLM's product."
    given, said, weight = operations
    scale, zero = given.get(f"{name}.scale"), given.get(f"{name}.zero")
    if scale is not None and zero is None: zero = torch.zeros(1, dtype=torch.int8)
    ours = simulate(given["x"], inputs, scale, zero)
    codes, s, z = said[f"{name}.codes"].float(), said[f"{name}.s"], said.get(f"{name}.z", torch.zeros(1)).float()
    theirs = torch.where(s == 0, 0, (codes - z) * s)
    assert torch.equal(ours, theirs), f"{(ours != theirs).sum()} of {ours.numel()} differ"
    linear = QuantLinear(replace(weight, scheme=grid(inputs), input_scale=scale, input_zero=zero))
    y = linear(given["x"])
    error = (y - said[f"{name}.y"]).norm(dim=1) / y.norm(dim=1).clamp(min=1e-30)
    assert error.max() <= 1e-5


@needs_vllm
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="the int8 kernel for AMX needs a CPU that has it")
def test_amx_operation(operations):
    "bfloat16 in, each token by its own maximum, bfloat16 out; without the grid, or with a static scale, far from that."
    given, said, weight = operations
    x, dequantized = given["x"].bfloat16().float(), weight.dequantize()
    def product(x): return (x @ dequantized.T).bfloat16().float()
    error = token_error(product(simulate(x, DYNAMIC)), said["amx.y"])
    others = x, simulate(x, STATIC, given["static.scale"])
    without, static = (token_error(product(other), said["amx.y"]) for other in others)
    print(f"simulated {error:.1e}, without grid {without:.1e}, with the static scale {static:.1e}")
    assert error < 5e-4 and without > 5e-3 and static > 5e-2


def scaled(tensors, config):
    "Every static scale eight times as large."
    for name in (n for n in tensors if n.endswith("input_scale")): tensors[name] *= 8


@pytest.fixture(scope="module")
def answers(folder):
    "What a stock vLLM says in the dtype that its kernels take, and with the plugin under the method's own name."
    prompts = served_model.teacher_tokens(folder/"dynamic", {"vocab_size": 512})
    edited(folder/"static", folder/"scaled", scaled)
    names = [*EXPORTS, "scaled"]
    jobs = [Job(str(folder/name), prompts, "float32", flexible=True, linears=True) for name in names]
    stock = ask_vllm_many(jobs, True)
    jobs = [Job(str(folder/name), prompts, "float32", "minmax", flexible=True) for name in ("two_groups", "fp8")]
    named = ask_vllm_many(jobs, False)
    return prompts, dict(zip(names, stock, strict=True)), named


def divergence(logits, said):
    "Mean KL of vLLM's answer from logits."
    assert not said.error, said.error
    return served_model.divergences(logits, said)[0].mean().item()


def symmetric_integers(name):
    "Whether the AMX kernel takes the Linears of an export."
    return EXPORTS[name][0].activations.symmetric and name != "fp8"


@needs_vllm
@pytest.mark.parametrize("name", EXPORTS)
def test_served(folder, answers, name):
    "vLLM computes the simulation of the kernel that it took, and not the model without a grid for activations."
    prompts, stock, _ = answers
    said, export = stock[name], folder/name
    assert not said.error, said.error
    figures = served_check.compare(export, prompts, said)
    bare = load(export, torch.float32, served_in=getattr(torch, said.dtype), activations=False)
    without = divergence(served_model.forced_logits(bare, prompts), said)
    print(f"{name}: {said.dtype}, KL {figures['mean_kl']:.2e}, without activation grid {without:.2e}")
    assert served_check.objection(figures, said.dtype) == ""
    assert figures["linear_error_without_activation_quantization"] > 4 * figures["linear_bound"]
    if torch.cuda.is_available(): return
    taken = {PER_TOKEN in kernel for kernel in said.kernels.values()}
    assert taken == {AMX and symmetric_integers(name)}
    assert said.dtype == ("bfloat16" if True in taken else "float32")
    if said.dtype == "float32": assert figures["mean_kl"] <= 1e-4 < without and figures["linear_error"] <= 1e-5
    assert ("static_scales" in served_check.dropped_scales(json.loads((export/"config.json").read_text()), said)) == (
        AMX and name in ("static", "two_groups"))


@needs_vllm
@pytest.mark.parametrize("name", ["static", "asymmetric"])
def test_a_missing_grid_fails(folder, answers, name):
    "Outputs of the Linears as they would be if vLLM left the inputs as they are."
    prompts, stock, _ = answers
    said = stock[name]
    bare = load(folder/name, torch.float32, served_in=getattr(torch, said.dtype), activations=False)
    modules = {place(n): module for n, module in bare.named_modules()}
    def output(n, x): return torch.cat([modules[part](torch.tensor(x)) for part in fused_parts(n, said.parts)], -1)
    def served(y): return y.to(getattr(torch, said.dtype)).float().numpy()
    with torch.no_grad(): missing = {n: (x, served(output(n, x))) for n, (x, _) in said.linears.items()}
    figures = served_check.compare(folder/name, prompts, replace(said, linears=missing))
    assert "by other inputs than the quantized ones" in served_check.objection(figures, said.dtype)


@needs_vllm
@pytest.mark.skipif(not AMX, reason="only a CPU with AMX drops static scales")
def test_static_scales_are_dropped_there(answers):
    "The same answers with every static scale eight times as large; where vLLM uses them, another model."
    _, stock, _ = answers
    assert all(np.array_equal(*pair) for pair in zip(stock["scaled"].logprobs, stock["static"].logprobs, strict=True))


DECISIONS = """
import sys, json
from llmquant.evaluation.kernels import accepted_dtype, default_is_w4a8, prepare_process
prepare_process()
asked = json.loads(sys.argv[1])
print("ANSWER" + json.dumps([[accepted_dtype(path, dtype), default_is_w4a8(path)] for path, dtype in asked]))
"""


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="these decisions are the CPU's")
@pytest.mark.parametrize("amx", "01")
def test_decisions_on_either_kind_of_cpu(folder, tmp_path, amx):
    "With vLLM's predicate replaced any machine decides as the other kind; nothing is multiplied."
    tiny.make("llama", tmp_path/"bf16", torch.bfloat16)
    tiny.make("deepseek_v3", tmp_path/"latent")
    names = [*EXPORTS, "base"]
    asked = [(str(folder/name), "float32" if name in EXPORTS else "float16") for name in names]
    asked += [(str(tmp_path/"latent"), "float16"), (str(tmp_path/"bf16"), "float16")]
    environment = child_environment(True) | {"LLMQUANT_CPU_AMX": amx}
    done = subprocess.run([sys.executable, "-c", DECISIONS, json.dumps(asked)], env=environment, capture_output=True,
                          text=True, check=True)
    said = json.loads(done.stdout.partition("ANSWER")[2])
    dtypes, defaults = (dict(zip([*names, "latent", "bf16"], each)) for each in zip(*said, strict=True))
    takes = [name for name in EXPORTS if amx == "1" and symmetric_integers(name)]
    for name in EXPORTS: assert dtypes[name] == ("bfloat16" if name in takes else "float32"), name
    assert (dtypes["base"], dtypes["bf16"]) == ("float16", "float16")
    assert dtypes["latent"] == ("bfloat16" if amx == "1" else "float16")
    assert defaults["bf16"] == (amx == "1") and not defaults["base"]


@needs_vllm
def test_served_by_name(answers):
    "The plugin hands these layouts to vLLM's own code."
    _, stock, named = answers
    for name, said in zip(("two_groups", "fp8"), named, strict=True):
        assert not said.error, said.error
        assert all(np.array_equal(*pair) for pair in zip(said.logprobs, stock[name].logprobs, strict=True))


@needs_vllm
@pytest.mark.parametrize("amx", [pytest.param("", marks=WITH_AMX), "0"])
def test_verify_chooses_the_dtype(folder, monkeypatch, amx):
    "The whole verification, by itself, with AMX where there is some and without."
    if amx: monkeypatch.setenv("LLMQUANT_CPU_AMX", amx)
    found = verification.verify(folder/"two_groups", folder/"base")["vllm"]
    other = "float16" if torch.cuda.is_available() else "float32"
    assert (found["dtype"], found["loaded"]) == (other if amx else "bfloat16", "stock")
    assert found["mean_kl"] <= found["bound"] and found["own_noise"] < 1e-3
    if torch.cuda.is_available(): return
    assert list(found["kernels"]) == [f"CPUInt8ScaledMMLinearKernel {'onednn_scaled_mm' if amx else PER_TOKEN}"]
    assert found["linears"] == 8 and ("static_scales" in found) == (not amx)


RECIPES = {"static": ({"dynamic": False, "symmetric": False}, {}),
           "down_dynamic": ({"dynamic": False}, {"overrides": [{"match": r".*\.down_proj", "activations": 8}]}),
           "fp8": ({"type": "float"}, {})}


@needs_vllm
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(tmp_path, name):
    "The same through the entry point: calibrated, exported, verified."
    base = tiny.make("qwen2", tmp_path/"base")
    tiny_tokenizer.save(base)
    activations, more = RECIPES[name]
    config = {"quantization": {"activations": activations, **more}}
    if not activations.get("dynamic", True):
        config["calibration"] = {"num_samples": 8, "max_length": 64}
    report = llmquant.quantize(base, tmp_path/"out", bits=8, config=config)
    scheme = QuantScheme.from_dict(report["scheme"])
    assert scheme.activations is not None and scheme.activations.dynamic == activations.get("dynamic", True)
    found = verification.verify(tmp_path/"out", base, require_vllm=True)["vllm"]
    assert found["loaded"] == "stock" and found["mean_kl"] <= found["bound"]
