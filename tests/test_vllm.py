"""Exports in a real vLLM: every entry of the plugin, what a stock vLLM does, and faults that the verification must see.

Two children are started, one with plugins and one without; each loads all of its models.
"""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
from safetensors.torch import load_file, save_file

from llmquant.core.errors import LLMQuantError, VerificationError
from llmquant.evaluation import verification, served_model
from llmquant.evaluation.vllm_check import Job, ask_vllm_many
from llmquant.export.loading import load
from llmquant.formats.packing import pack_bits, unpack_bits
from llmquant.pipeline.run import quantize

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")]
PER_CHANNEL = dict(group_size=0, config={"quantization": {"minmax": {"per_channel": True, "symmetric": True}}})
SYMMETRIC = {"quantization": {"minmax": {"symmetric": True}}}
EXPORTS = {
    "w4": dict(bits=4, group_size=32),
    "w4tensor": dict(bits=4, group_size=0, config={"quantization": {"minmax": {"per_channel": False}}}),
    "w2": dict(bits=2, group_size=32),
    "w3dense": dict(bits=3, group_size=64, config=SYMMETRIC),
    "w8": dict(bits=8, group_size=64),
    "w8channel": dict(bits=8, **PER_CHANNEL),
    "gptq8": dict(bits=8, group_size=64, format="gptq", config=SYMMETRIC),
    "awq4": dict(bits=4, group_size=64, format="awq"),
}
FALLBACK = ("w3dense", "w8", "w8channel", "gptq8")  # no kernel in a stock vLLM on a CPU
ACME = '''
from llmquant.quantizers.minmax_quantizer import MinMaxQuantizer

class AcmeQuantizer(MinMaxQuantizer):
    "Somebody else's method."
    name = "acme"
'''


def shard(folder):
    "The only file with tensors."
    file, = Path(folder).glob("*.safetensors")
    return file


def edited(source, target, edit):
    "A copy of an export with its tensors edited."
    shutil.copytree(source, target)
    tensors = load_file(shard(target))
    edit(tensors)
    save_file(tensors, shard(target), metadata={"format": "pt"})
    return target


def swap_nibbles(tensors):
    "Each byte's two codes change places."
    for name in (n for n in tensors if n.endswith("weight_packed")):
        data = tensors[name].view(torch.uint8)
        tensors[name] = ((data >> 4) | (data << 4)).view(torch.int32)


def shift_zeros(tensors):
    "Every zero point is one too high."
    for name in (n for n in tensors if n.endswith("weight_zero_point")):
        words = tensors[name].T.contiguous()
        codes = (unpack_bits(words, 4, words.shape[1] * 8) + 1).clamp(max=15).to(torch.uint8)
        tensors[name] = pack_bits(codes, 4).T.contiguous()


def double_column(tensors):
    "One column of scales, the first group of every output, is twice as large, in one layer."
    tensors["model.layers.0.mlp.down_proj.weight_scale"][:, 0] *= 2


def swap_projections(tensors):
    "q and k of one block change places."
    for q in [n for n in tensors if "layers.0.self_attn.q_proj." in n]:
        k = q.replace("q_proj", "k_proj")
        tensors[q], tensors[k] = tensors[k], tensors[q]


FAULTS = (swap_nibbles, shift_zeros, double_column, swap_projections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A base model and all exports of it."
    folder = tmp_path_factory.mktemp("vllm")
    base = tiny.make("llama", folder/"base", num_key_value_heads=4)
    tiny_tokenizer.save(base)
    for name, options in EXPORTS.items(): quantize(base, folder/name, **options)
    for fault in FAULTS: edited(folder/"w4", folder/fault.__name__, fault)
    shutil.copytree(folder/"w4", folder/"untagged")
    config = json.loads((folder/"untagged"/"config.json").read_text())
    del config["quantization_config"]["llmquant_method"]
    (folder/"untagged"/"config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def acme(folder):
    "An export by a method that lives in a folder outside the repository, found through its entry point."
    site = folder/"site"
    (site/"acme-1.0.dist-info").mkdir(parents=True)
    (site/"acme.py").write_text(ACME)
    (site/"acme-1.0.dist-info"/"METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (site/"acme-1.0.dist-info"/"entry_points.txt").write_text("[llmquant.quantizers]\nacme = acme:AcmeQuantizer\n")
    script = ("import sys; from llmquant.pipeline.run import quantize; "
              "quantize(*sys.argv[1:], method='acme', bits=4, group_size=32)")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, "-c", script, folder/"base", folder/"acme"], check=True,
                   env={**os.environ, "PYTHONPATH": path})
    return folder/"acme"


@pytest.fixture(scope="module")
def prompts(folder):
    return served_model.teacher_tokens(folder/"w4", json.loads((folder/"w4"/"config.json").read_text()))


@pytest.fixture(scope="module")
def plugin(folder, acme, prompts):
    "What vLLM says with the plugin: {(export, --quantization): answer}."
    asked = [(name, "minmax") for name in EXPORTS] + [(name, None) for name in ("w4", "w3dense", "gptq8")]
    asked += [("acme", "acme"), ("w4", "hqq"), ("acme", "minmax"), ("untagged", "minmax"), ("base", "minmax")]
    asked += [(fault.__name__, "minmax") for fault in FAULTS]
    answers = ask_vllm_many([Job(str(folder/name), prompts, quantization=method) for name, method in asked])
    return dict(zip(asked, answers, strict=True))


@pytest.fixture(scope="module")
def stock(folder, prompts):
    "What vLLM says without plugins."
    asked = [("w4", None), ("w2", None), ("w8", None), ("w4", "minmax")]
    answers = ask_vllm_many([Job(str(folder/name), prompts, quantization=method) for name, method in asked], stock=True)
    return dict(zip(asked, answers, strict=True))


def mean_kl(export, answer, prompts):
    "KL(dequantized reference || vLLM), mean over all positions."
    assert not answer.error, answer.error
    model = load(export, torch.float32, served_in=torch.float16)
    kl, _ = served_model.divergences(served_model.forced_logits(model, prompts), answer)
    assert len(kl) == 4 * 48
    return kl.mean().item()


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_by_the_name_of_its_method(name, folder, plugin, prompts):
    answer = plugin[name, "minmax"]
    assert mean_kl(folder/name, answer, prompts) < 1e-5
    assert answer.quantization == "llmquant" and answer.text


@pytest.mark.parametrize("name", ["w3dense", "gptq8"])
def test_no_name_and_no_kernel(name, folder, plugin, prompts):
    if torch.cuda.is_available(): pytest.skip("a GPU has kernels for these")
    assert plugin[name, None].quantization == "llmquant"
    assert mean_kl(folder/name, plugin[name, None], prompts) < 1e-5


def test_no_name_and_a_kernel_is_left_to_vllm(folder, plugin, prompts):
    assert plugin["w4", None].quantization == "compressed-tensors"
    assert mean_kl(folder/"w4", plugin["w4", None], prompts) < 1e-5


def test_a_third_partys_method(folder, plugin, prompts):
    assert mean_kl(folder/"acme", plugin["acme", "acme"], prompts) < 1e-5
    assert "quantized by acme, not by minmax" in plugin["acme", "minmax"].error


def test_other_methods_are_refused(plugin):
    assert "quantized by minmax, not by hqq" in plugin["w4", "hqq"].error
    assert "does not match" in plugin["untagged", "minmax"].error and "minmax" in plugin["untagged", "minmax"].error
    assert "Unknown quantization method: minmax" in plugin["base", "minmax"].error


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_move_vllm_a_hundredfold_over_the_bound(fault, folder, plugin, prompts):
    assert mean_kl(folder/"w4", plugin[fault.__name__, "minmax"], prompts) >= 1e-2


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail_verification(fault, folder):
    with pytest.raises(VerificationError, match=r"layer model\.layers\.\d.*: what is in the files is not what was computed"):
        verification.verify(folder/fault.__name__, folder/"base")


def test_a_stock_vllm(folder, stock, prompts):
    for name in ("w4", "w2"): assert mean_kl(folder/name, stock[name, None], prompts) < 1e-5
    assert "minmax" in stock["w4", "minmax"].error
    if not torch.cuda.is_available(): assert "cannot implement" in stock["w8", None].error


def test_moved_weights_and_float_tensors_fail_verification(folder, tmp_path):
    moved = edited(folder/"base", tmp_path/"moved", lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 5].add_(1))
    with pytest.raises(VerificationError, match="layer model.layers.1.mlp.up_proj: a weight moved by"):
        verification.check_files(folder/"w4", moved)
    norm = edited(folder/"base", tmp_path/"norm", lambda t: t["model.layers.1.input_layernorm.weight"][7].mul_(1.01))
    with pytest.raises(VerificationError, match="tensor model.layers.1.input_layernorm.weight: was not quantized"):
        verification.check_files(folder/"w4", norm)


def test_a_proof_falls_back_to_the_plugin_and_says_so(folder, started_children):
    if torch.cuda.is_available(): pytest.skip("a GPU has a kernel for 8 bits")
    found = verification.verify(folder/"w8", folder/"base", require_vllm=True)
    assert found["vllm"]["loaded"] == "plugin" and found["vllm"]["mean_kl"] < 1e-5
    assert found["vllm"]["top1_agreement"] > 0.9 and found["vllm"]["text"]
    assert found["vllm"]["kernels"] == {"RepackKernel > UnquantizedLinearMethod": 8}
    assert found["files"]["largest_step"] <= 1 and found["files"]["layers"] == 14


def test_a_child_that_dies_takes_one_job_only(folder, prompts, monkeypatch, tmp_path, started_children):
    dying = "import os, sys; sys.stderr.write('OSError: gone\\n'); sys.stderr.flush(); os._exit(7)"
    (tmp_path/"vllm.py").write_text(dying)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    for answer in ask_vllm_many([Job(str(folder/"w4"), prompts)] * 2):
        assert answer.error == "vLLM's process ended with status 7: OSError: gone"


def test_without_vllm_the_files_are_still_checked(folder, monkeypatch):
    monkeypatch.setattr(verification, "vllm_installed", lambda: False)
    found = verification.verify(folder/"w4", folder/"base")
    assert found["vllm"] == "not installed" and found["files"]["layers"] == 14
    with pytest.raises(LLMQuantError, match="no vLLM here"): verification.verify(folder/"w4", folder/"base", require_vllm=True)
