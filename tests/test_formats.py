"""The three layouts, read by others: compressed-tensors' own library in two versions, transformers, vLLM's rules for
names and shapes, and plain loops written from the layouts' description."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llmquant.core.qtensor import QuantizedWeight, round_to_nearest
from llmquant.core.scheme import QuantScheme
from llmquant.formats.awq import AWQFormat
from llmquant.formats.compressed_tensors import CompressedTensorsFormat
from llmquant.formats.gptq import GPTQFormat
from llmquant.formats.unpackers import read_safetensors, unpack_layer
from llmquant.models.base_adapter import BaseHuggingFaceAdapter
from llmquant.models.served_class import served_table, vllm_folder

HERE = Path(__file__).parent
CHECK_PYTHON = HERE.parent/".check-venv/bin/python"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"],
         "in_proj_ba": ["in_proj_b", "in_proj_a"], "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}


def scheme(bits, symmetric, group=32, **kwargs):
    granularity = {-1: "channel", 0: "tensor"}.get(group, "group")
    return QuantScheme(bits=bits, symmetric=symmetric, granularity=granularity, group_size=max(group, 0), **kwargs)


def random_weight(grid, out_features, in_features, seed=0):
    "Any codes, scales and zeros that fit the grid: every code and every zero point occurs."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(0, grid.qmax + 1, shape, generator=generator, dtype=torch.uint8)
    groups = grid.groups(in_features)
    zeros = draw(out_features, groups)
    if grid.symmetric: zeros.fill_(grid.middle)
    scales = torch.rand(out_features, groups, generator=generator).add(0.01).to(grid.scale_dtype)
    return QuantizedWeight(draw(out_features, in_features), scales, zeros, grid)


# compressed-tensors' own library

def read_by_library(python, weights, folder):
    "Each weight packed by us and decompressed by the library in `python`; its version and the weights it read."
    cases = {}
    for name, (fmt, weight) in weights.items():
        save_file(fmt.pack("l", weight), folder/f"{name}.safetensors")
        cases[name] = fmt.quantization_config(weight.scheme, ["l"], ["lm_head"], "minmax")
    (folder/"cases.json").write_text(json.dumps(cases), encoding="utf-8")
    command = [str(python), str(HERE/"compressed_tensors_reader.py"), str(folder/"cases.json"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1], {name: load_file(folder/f"{name}.read.safetensors")["weight"] for name in weights}


def library_cases(grids, out_features=40, in_features=96):
    return {f"{container}-{grid}".replace(" ", "-"):
            (CompressedTensorsFormat(container), random_weight(grid, out_features, in_features))
            for container, grid in grids}


def test_library_of_vllm_reads_widths_that_divide_a_word(tmp_path):
    both = True, False
    grids = [("auto", scheme(bits, symmetric, group)) for bits in (4, 8) for symmetric in both for group in (32, -1, 0)]
    grids += [("auto", scheme(2, True)), *(("int4", scheme(bits, symmetric)) for bits in (2, 3) for symmetric in both)]
    cases = library_cases(grids) | library_cases([("dense", scheme(3, True))])
    version, read = read_by_library(sys.executable, cases, tmp_path)
    assert version.startswith("0.17"), f"this environment holds compressed-tensors {version}; vLLM pins 0.17"
    stream = read.pop("dense-W3-g32-sym")
    for name, weight in read.items():
        assert torch.equal(weight, cases[name][1].dequantize(torch.float16)), name
    expected = cases["dense-W3-g32-sym"][1].dequantize(torch.float16)
    assert not torch.equal(stream, expected), "0.17 reads dense 3-bit streams now?"


def test_newer_library_reads_every_width(tmp_path):
    assert CHECK_PYTHON.exists(), f"{CHECK_PYTHON} is missing: run `make check-env`"
    grids = [("dense", scheme(bits, True, group, scale_dtype=dtype)) for bits in (2, 3, 4, 5, 6, 7, 8)
             for group, dtype in ((32, torch.float16), (-1, torch.bfloat16))]
    grids += [("auto", scheme(bits, False, group)) for bits in (4, 8) for group in (32, -1)]
    grids += [("dense", scheme(bits, False)) for bits in (2, 3)]
    grids += [("int4", scheme(bits, symmetric)) for bits in (2, 3) for symmetric in (True, False)]
    cases = library_cases(grids)
    version, read = read_by_library(CHECK_PYTHON, cases, tmp_path)
    assert version.startswith("0.19"), f"{CHECK_PYTHON} holds compressed-tensors {version}; run `make check-env`"
    for name, weight in read.items():
        expected = cases[name][1]
        assert torch.equal(weight, expected.dequantize(expected.scheme.scale_dtype)), name


# Plain loops

def word(codes, bits):
    "Codes from the lowest bits up, as a signed 32-bit number."
    value = 0
    for place, code in enumerate(codes): value += code << (bits * place)
    return value - 2**32 if value >= 2**31 else value


def gptq_by_loops(weight):
    bits, (rows, columns) = weight.scheme.bits, weight.codes.shape
    per_word, codes, zeros = 32 // bits, weight.codes.tolist(), weight.zeros.tolist()
    groups = len(zeros[0])
    return {"qweight": [[word([codes[n][k + i] for i in range(per_word)], bits) for n in range(rows)]
                        for k in range(0, columns, per_word)],
            "qzeros": [[word([zeros[n + i][g] - 1 for i in range(per_word)], bits) for n in range(0, rows, per_word)]
                       for g in range(groups)],
            "scales": [[weight.scales[n, g].item() for n in range(rows)] for g in range(groups)],
            "g_idx": [k * groups // columns for k in range(columns)]}


def awq_by_loops(weight):
    order, (rows, columns) = (0, 2, 4, 6, 1, 3, 5, 7), weight.codes.shape
    codes, zeros = weight.codes.tolist(), weight.zeros.tolist()
    groups = len(zeros[0])
    return {"qweight": [[word([codes[n + i][k] for i in order], 4) for n in range(0, rows, 8)] for k in range(columns)],
            "qzeros": [[word([zeros[n + i][g] for i in order], 4) for n in range(0, rows, 8)] for g in range(groups)],
            "scales": [[weight.scales[n, g].item() for n in range(rows)] for g in range(groups)]}


@pytest.mark.parametrize("fmt, by_loops, grids", [
    (GPTQFormat(), gptq_by_loops, [scheme(bits, True, group) for bits in (4, 8) for group in (32, -1, 0)]),
    (AWQFormat(), awq_by_loops, [scheme(4, symmetric, group) for symmetric in (True, False) for group in (32, -1, 0)])])
def test_transposed_layouts_equal_plain_loops(fmt, by_loops, grids):
    for grid in grids:
        weight = random_weight(grid, 24, 96)
        packed = {name.removeprefix("l."): tensor.tolist() for name, tensor in fmt.pack("l", weight).items()}
        assert packed == by_loops(weight), grid


# A whole export in transformers

def export(model, path, fmt, grid, ignored):
    "Write `model` with every Linear but `ignored` quantized; put the dequantized weights into `model`."
    path.mkdir()
    tensors, quantized = dict(model.state_dict()), []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name in ignored: continue
        assert fmt.objection(grid, *module.weight.shape) == "", name
        weight = round_to_nearest(tensors.pop(f"{name}.weight"), grid)
        tensors.update(fmt.pack(name, weight))
        module.weight.data = weight.dequantize(torch.float16)
        quantized.append(name)
    config = fmt.quantization_config(grid, quantized, ignored, "minmax")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path/"model.safetensors", metadata={"format": "pt"})
    values = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float16",
              "quantization_config": config}
    (path/"config.json").write_text(json.dumps(values, default=str), encoding="utf-8")
    return quantized, config


@pytest.mark.parametrize("bits, symmetric, group, container", [
    (4, True, 64, "auto"), (4, False, 64, "auto"), (8, False, -1, "auto"), (3, False, 0, "auto"),
    (2, True, 32, "int4")])
def test_compressed_tensors_export_loads_in_transformers(tmp_path, bits, symmetric, group, container):
    from transformers import AutoModelForCausalLM
    model, grid = tiny.build("llama"), scheme(bits, symmetric, group)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    ignored = ["lm_head"] + [name for name in linears if ".layers.1." in name]
    quantized, config = export(model, tmp_path/"out", CompressedTensorsFormat(container), grid, ignored)
    assert len(quantized) == 7 and len(ignored) == 8
    stored = read_safetensors(tmp_path/"out")
    for name in quantized:
        linear = model.get_submodule(name)
        read = unpack_layer(stored, name, config, linear.in_features, linear.out_features)
        assert torch.equal(torch.from_numpy(read.dequantize()).half(), linear.weight), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path/"out", dtype=torch.float16)
    ids = torch.arange(3, 67)[None]
    with torch.no_grad(): ours, theirs = (m(ids).logits.float() for m in (model, loaded))
    assert ours.std() > 0.1 and (ours - theirs).abs().max() <= 1e-3 * ours.abs().max()


# vLLM's rules

def test_vllm_skips_exactly_what_is_left_in_float():
    """By vLLM's own functions and by vLLM's names: joined q, k, v, the narrow pair of linear attention, and lists of
    experts. And what was read of its classes' tables is what they say when they are imported."""
    attention = lambda n: [f"model.layers.{n}.self_attn.{p}_proj" for p in "qkvo"]
    mlp = lambda at: [f"{at}.{p}_proj" for p in ("gate", "up", "down")]
    experts = [name for e in range(2) for name in mlp(f"model.layers.11.mlp.experts.{e}")]
    linear = lambda parts: [f"model.layers.12.linear_attn.in_proj_{part}" for part in parts]
    ignored = ["lm_head", *attention(1), *mlp("model.layers.1.mlp"), "model.layers.11.mlp.gate", *experts, *linear("ba")]
    quantized = [*attention(0), *linear(("qkv", "z")), *mlp("model.layers.0.mlp"), *attention(10), *mlp("model.layers.10.mlp"), *attention(11),
                 *mlp("model.layers.11.mlp.shared_experts")]
    joined = lambda n: [f"model.layers.{n}.self_attn.qkv_proj", f"model.layers.{n}.self_attn.o_proj"]
    dense = lambda at: [f"{at}.gate_up_proj", f"{at}.down_proj"]
    expected = {**dict.fromkeys(["lm_head", *linear(["ba"]), *joined(1), *dense("model.layers.1.mlp"), "model.layers.11.mlp.gate",
                                 "model.layers.11.mlp.experts"], False),
                **dict.fromkeys([*linear(["qkvz"]), *joined(0), *dense("model.layers.0.mlp"), *joined(10), *dense("model.layers.10.mlp"),
                                 *joined(11), *dense("model.layers.11.mlp.shared_experts")], True)}
    formats = CompressedTensorsFormat(), GPTQFormat(), AWQFormat()
    for layout in formats: layout.fused = BaseHuggingFaceAdapter.joined  # as a plan hands them over
    configs = [fmt.quantization_config(scheme(4, True), quantized, ignored, "minmax") for fmt in formats]
    shapes = [(64, 64, 32), (64, 96, 96), (40, 64, 32), (64, 40, -1), (64, 96, 3), (64, 96, -1)]
    asked = dict(fused=FUSED, names=list(expected), configs={c["quant_method"]: c for c in configs}, shapes=shapes,
                 architectures=["LlamaForCausalLM", "Gemma3nForCausalLM", "OPTForCausalLM"])
    done = subprocess.run([sys.executable, str(HERE/"vllm_names.py")], input=json.dumps(asked), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.split("ANSWER")[-1])
    for name, table in answer["tables"].items():
        parts = {joined: tuple(names) for joined, names in table.items() if len(names) > 1}
        assert served_table(vllm_folder(), (name,))[0].joined == parts, name
    assert answer["quantized"] == {config["quant_method"]: expected for config in configs}
    objections = [formats[0].objection(scheme(4, False, group), *shape) for *shape, group in shapes]
    assert answer["kernel"] == [not objection for objection in objections], objections
