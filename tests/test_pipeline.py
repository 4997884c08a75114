"Both entry points, the guide's style, third parties, bad input: what crosses modules."
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.core.errors import UsageError
from llmquant.core.model_registry import ModelRegistry
from llmquant.core.quantizer_registry import BaseQuantizer, QuantizerRegistry
from llmquant.export.export import REPORT
from llmquant.in_memory.adopt import is_adopted
from llmquant.pipeline.run import check
from llmquant.quantizers.minmax_quantizer import MinMaxQuantizer
from llmquant.utils.config import resolve

ROOT = Path(__file__).parents[1]
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "gemma2", "olmo2", "gpt_neox", "phi3", "opt")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A tiny llama in two shards, with side files."
    path = tiny.make("llama", tmp_path_factory.mktemp("base") / "llama", shards=2)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "LICENSE").write_text("free")
    return path


def all_tensors(folder):
    "Every tensor of a checkpoint, read by safetensors' own library."
    files = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    found = {}
    for file in files:
        with safe_open(folder / file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}
    return found


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_both_doors_give_the_same_export(kind, tie, tmp_path):
    if tie and kind in ("gpt_neox",): pytest.skip("tiny gpt_neox has an untied head by its architecture")
    source = tiny.make(kind, tmp_path / "base", tie=tie)
    llmquant.quantize(source, tmp_path / "streamed", bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    MinMaxQuantizer().quantize(model, bits=4, group_size=32)
    ModelRegistry.for_config(model.config.to_dict()).save_quantized(model, tmp_path / "memory", source=source)
    weights = [p.name for p in (tmp_path / "streamed").glob("model*")]
    assert len(weights) >= 2
    for name in weights:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes(), name
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("streamed", "memory")]
    assert configs[0] == configs[1]
    reports = [yaml.safe_load((tmp_path / d / REPORT).read_text()) for d in ("streamed", "memory")]
    assert reports[0]["verification"]["digests"] == reports[1]["verification"]["digests"] and reports[0]["verification"]["digests"]


@pytest.mark.parametrize("more,says", [
    ({"num_hidden_layers": 3}, "num_hidden_layers 3 there, 2 in memory"),
    ({"vocab_size": 1024}, "vocab_size 1024 there"),
    ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}, "num_attention_heads 8 there, 4 in memory"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings True there, False in memory"),
    ({"attention_bias": True}, "does not fit the model in memory, tensor model.layers.0.self_attn.k_proj.bias")])
def test_the_source_is_the_models_own_checkpoint(base, tmp_path, more, says):
    "config.json of another model is not put beside the tensors of this one."
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    MinMaxQuantizer().quantize(model, bits=4, group_size=32)
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | more))
    save = ModelRegistry.for_config(model.config.to_dict()).save_quantized
    with pytest.raises(UsageError, match=re.escape(says)) as found: save(model, tmp_path / "out", source=other)
    assert "leave source out" in str(found.value) and not (tmp_path / "out").exists()


def test_folder_holds_what_it_must(base, tmp_path):
    report = llmquant.quantize(base, tmp_path / "out", bits=4, group_size=32)
    out = tmp_path / "out"
    for name in "chat_template.jinja", "LICENSE", "generation_config.json":
        assert (out / name).read_bytes() == (base / name).read_bytes()
    config, vllm_config = (json.loads((out / n).read_text()) for n in ("config.json", "vllm_config.json"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert set(vllm_config) == {"model", "tokenizer", "quantization"}
    assert vllm_config["quantization"] == vllm_config["model"]["quantization"] == config["quantization_config"]
    assert vllm_config["model"]["dtype"] == config["dtype"] == "float16"
    assert report["recipe"]["bits"] == {"value": 4, "from": "call"} and report["recipe"]["method"]["from"] == "default"
    assert yaml.safe_load((out / REPORT).read_text())["layers"] == report["layers"]
    written = sum(t.numel() * t.element_size() for t in all_tensors(out).values())
    assert report["sizes"]["export"] == written  # predicted before writing, counted after


def test_codes_on_disk_dequantize_to_the_weights(base, tmp_path):
    "Against a plain loop over the checkpoint: no code shared with the package."
    config = {"quantization": {"minmax": {"per_channel": True}}}
    llmquant.quantize(base, tmp_path / "out", bits=8, group_size=0, config=config)
    tensors = all_tensors(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    weight = {n: t for f in base.glob("*.safetensors") for n, t in _read(f).items()}[f"{name}.weight"].double()
    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].double()
    codes = torch.from_numpy(packed.numpy().view("uint8")).double()
    zero_words = tensors[f"{name}.weight_zero_point"]
    zeros = torch.tensor([(int(zero_words[r // 4, 0]) >> (8 * (r % 4))) & 255 for r in range(len(weight))]).double()
    back = (codes - zeros[:, None]) * scale
    assert ((back - weight).abs() <= scale).all() and not torch.equal(back, weight)


def _read(file):
    with safe_open(file, "pt") as shard: return {name: shard.get_tensor(name) for name in shard.keys()}


def test_layers_are_left_alone(base, tmp_path):
    llmquant.quantize(base, tmp_path / "out", bits=4, group_size=32, layers="1")
    names = all_tensors(tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight_packed" in names and "model.layers.0.mlp.up_proj.weight" in names
    report = yaml.safe_load((tmp_path / "out" / REPORT).read_text())
    assert "model.layers.0.mlp.up_proj" in report["left_in_float"]["not among the layers asked for"]
    assert report["recipe"]["layer_wise"]["value"] is True
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.layers.0.mlp.up_proj" in config["quantization_config"]["ignore"]


def test_16_bits_is_a_plain_checkpoint(base, tmp_path):
    llmquant.quantize(base, tmp_path / "out", bits=16)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    before = {n: t for f in base.glob("*.safetensors") for n, t in _read(f).items()}
    after = all_tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_float32_becomes_float16_unless_told(tmp_path):
    source = tiny.make("llama", tmp_path / "base", dtype=torch.float32)
    llmquant.quantize(source, tmp_path / "half", bits=4, group_size=32)
    llmquant.quantize(source, tmp_path / "brain", bits=4, group_size=32, torch_dtype="bfloat16")
    for name, dtype in ("half", torch.float16), ("brain", torch.bfloat16):
        tensors = all_tensors(tmp_path / name)
        assert tensors["model.norm.weight"].dtype == tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
    with pytest.raises(UsageError, match="float16 or bfloat16"):
        llmquant.quantize(source, tmp_path / "full", bits=4, group_size=32, torch_dtype="float32")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_transformers_loads_compressed_tensors(kind, tmp_path):
    source = tiny.make(kind, tmp_path / "base")
    llmquant.quantize(source, tmp_path / "out", bits=4, group_size=32)
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        ours = llmquant.load(tmp_path / "out", dtype=torch.float32)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
    assert (theirs - ours).abs().max() < 1e-2 * (plain - ours).abs().max()


class GuideStyle(BaseQuantizer):
    "As the guide writes it: float weights in place, attributes on every module, its own config words."
    def __init__(self): self.name = "guide_style"

    def quantize(self, model, bits=4, group_size=128, layer_wise=False, target_layers=None,
                 calibration_data=None, config=None):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                parts = module.weight.data.float().view(module.out_features, -1, group_size)
                scale = (parts.abs().amax(-1, True) / (2**(bits - 1) - 1)).half().float()
                module.weight.data = ((parts / scale).round() * scale).view_as(module.weight).to(module.weight.dtype)
        self._add_vllm_compatibility(model, bits, group_size)
        return model

    def _add_vllm_compatibility(self, model, bits, group_size):
        model.config.quantization_config = {"quantization_method": "guide_style", "bits": bits,
                                            "group_size": group_size}
        for _, module in model.named_modules():
            if hasattr(module, "weight") and module.weight is not None:
                module.qweight, module.scales, module.zeros = module.weight.data, torch.tensor(1.0), torch.tensor(0.0)
                module.bits, module.group_size, module.quantization_method = bits, group_size, "guide_style"


@pytest.fixture
def guide_style():
    QuantizerRegistry.register("guide_style", GuideStyle)
    yield
    QuantizerRegistry._registry.classes.pop("guide_style")


def test_a_class_in_the_guides_style_is_exported(guide_style, base, tmp_path):
    llmquant.quantize(base, tmp_path / "out", method="guide_style", bits=4, group_size=32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["llmquant_method"] == "guide_style"
    assert all_tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    model = GuideStyle().quantize(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), 4, 32)
    expected = model.model.layers[0].mlp.up_proj.weight.data.float().clone()
    ModelRegistry.get("llama")().save_quantized(model, tmp_path / "saved", source=base)
    assert is_adopted(model)
    served = llmquant.load(tmp_path / "saved", dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    error = (served - expected).norm() / expected.norm()
    assert error < 2e-3  # its own grid was not left behind, and is found again


THIRD_PARTY = '''
from llmquant.core.options import Option
from llmquant.core.qtensor import round_to_nearest
from llmquant.core.quantizer_registry import BaseQuantizer

class Half(BaseQuantizer):
    name = "thirdparty"
    options = (Option("factor", float, 1.0, "scale of everything", minimum=0.5, maximum=2.0),)
    def quantize_weight(self, weight, stats, scheme):
        return round_to_nearest(weight * self.settings["factor"], scheme)
'''


@pytest.fixture
def third_party(tmp_path):
    "A package outside this repository, found through its entry point."
    home = tmp_path / "elsewhere"
    (home / "thirdparty_quant").mkdir(parents=True)
    (home / "thirdparty_quant" / "__init__.py").write_text(THIRD_PARTY)
    info = home / "thirdparty_quant-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty-quant\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llmquant.quantizers]\nthirdparty = thirdparty_quant:Half\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(home), str(ROOT)])}


def run(env, *arguments):
    command = [sys.executable, str(ROOT / "quantize.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_third_partys_quantizer_is_a_method_with_known_options(third_party, base, tmp_path):
    done = run(third_party, "list", "--verbose")
    assert done.returncode == 0 and "thirdparty" in done.stdout and "factor" in done.stdout
    common = ["--model-path", base, "--bits", 4, "--group-size", 32, "--method", "thirdparty"]
    (tmp_path / "c.yaml").write_text("quantization:\n  factor: 0.5\n")
    done = run(third_party, *common, "--output-path", tmp_path / "out", "--config", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llmquant_method"] == "thirdparty"
    (tmp_path / "c.yaml").write_text("quantization:\n  thirdparty:\n    facter: 0.5\n")
    done = run(third_party, *common, "--output-path", tmp_path / "no", "--config", tmp_path / "c.yaml")
    assert done.returncode == 2 and "did you mean" in done.stderr and not (tmp_path / "no").exists()


def missing(path): return "--model-path", path / "nowhere"
def no_checkpoint(path): [f.unlink() for f in path.iterdir()]
def missing_shard(path): next(path.glob("model-00002*")).unlink()
def truncated(path): os.truncate(next(path.glob("model-00001*")), 20_000)
def unsupported_bits(path): return "--bits", 5
def not_dividing(path): return "--group-size", 256
def unknown_method(path): return "--method", "gptk"
def unknown_suppressor(path): return "--outlier-suppression", "smoth_quant"
def missing_layer(path): return "--layers", "0,9"
def wrong_type(path): return "--bits", "four"


def outside(path):
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))


def quantized_already(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    file = next(f for f in path.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in _read(f))
    save_file({**_read(file), "model.layers.1.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32)}, file)


def hub_code(path):
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "fancy", "auto_map": {"AutoModelForCausalLM": "m.M"}}
    (path / "config.json").write_text(json.dumps(config))


def not_a_number(path):
    file = next(f for f in path.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in _read(f))
    tensors = _read(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def pickles(path):
    for f in path.glob("*.safetensors*"): f.unlink()
    torch.save({}, path / "pytorch_model.bin")


BAD = [(missing, "nowhere"), (no_checkpoint, "no checkpoint"), (missing_shard, "model-00002"), (truncated, "truncated"),
       (outside, "outside"), (quantized_already, "already quantized (awq, tensor model.layers.1.mlp.up_proj.qweight)"), (hub_code, "trust_remote_code"),
       (not_a_number, "tensor model.layers.1.mlp.up_proj.weight: 1 of"), (pickles, "pickles"),
       (unsupported_bits, "2, 3, 4, 8"), (not_dividing, "use 32, 64, 128 or -1"), (unknown_method, "minmax"),
       (unknown_suppressor, "unknown outlier suppressor"), (missing_layer, "layers 0 to 1"), (wrong_type, "four")]


@pytest.mark.parametrize("spoil,says", BAD, ids=[b[0].__name__ for b in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(spoil, says, base, tmp_path):
    import shutil
    model = tmp_path / "model"
    shutil.copytree(base, model)
    extra = spoil(model) or ()
    arguments = {"--model-path": model, "--output-path": tmp_path / "out", "--bits": 4, "--group-size": 32}
    arguments |= dict(zip(extra[::2], extra[1::2], strict=True))
    before = {p.name for p in tmp_path.iterdir()}
    done = run(os.environ, *[word for pair in arguments.items() for word in pair])
    assert done.returncode == 2 and says in done.stderr, done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if " INFO " not in line]
    assert "Traceback" not in done.stderr and len(lines) == 1, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == before


def test_the_same_run_without_a_fault_succeeds(base, tmp_path):
    "Or the test above could pass for the wrong reason."
    done = run(os.environ, "--model-path", base, "--output-path", tmp_path / "out", "--bits", 4, "--group-size", 32)
    assert done.returncode == 0, done.stderr
    again = run(os.environ, "--model-path", base, "--output-path", tmp_path / "out", "--bits", 4, "--group-size", 32)
    assert again.returncode == 2 and "--overwrite" in again.stderr
    over = run(os.environ, "--model-path", base, "--output-path", tmp_path / "out", "--bits", 8, "--group-size", 32,
               "--overwrite")
    assert over.returncode == 0 and yaml.safe_load((tmp_path / "out" / REPORT).read_text())["scheme"]["bits"] == 8
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_full_disk_leaves_nothing(base, tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    for call in ("pwrite", "pwritev"): monkeypatch.setattr(os, call, full)
    with pytest.raises(UsageError, match="space"): llmquant.quantize(base, tmp_path / "out", bits=4, group_size=32)
    assert not list(tmp_path.iterdir())


class Returns(GuideStyle):
    "Edits a copy and returns it, as the guide's `return quantized_model` suggests."
    def __init__(self): self.name = "another_name"

    def quantize(self, model, **arguments):
        from copy import deepcopy
        copy = deepcopy(model)
        for name, module in copy.named_modules():
            if name.endswith("up_proj"): module.weight.data *= 0.5
        return super().quantize(copy, **{k: v for k, v in arguments.items() if k in ("bits", "group_size")})


def test_a_returned_model_is_the_one_that_is_exported(base, tmp_path):
    QuantizerRegistry.register("returns", Returns)
    try: llmquant.quantize(base, tmp_path / "out", method="returns", bits=8, group_size=32)
    finally: QuantizerRegistry._registry.classes.pop("returns")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = {n: t for f in base.glob("*.safetensors") for n, t in _read(f).items()}[name].float()
    served = llmquant.load(tmp_path / "out", dtype=torch.float32).get_parameter(name)
    assert (served - 0.5 * weight).norm() < 0.02 * weight.norm()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llmquant_method"] == "returns"  # the registered name, which vLLM is asked for


def test_a_proof_without_vllm_is_refused_before_the_work(base, tmp_path, monkeypatch):
    monkeypatch.setattr("llmquant.evaluation.vllm_check.vllm_installed", lambda: False)
    with pytest.raises(UsageError, match="not installed"):
        llmquant.quantize(base, tmp_path / "out", bits=4, group_size=32, verify=True)
    assert not list(tmp_path.iterdir())


def test_a_broken_package_stops_only_itself(third_party, base, tmp_path):
    "The other methods work beside one warning; who asks for the broken one is told which package to repair."
    (tmp_path / "elsewhere" / "thirdparty_quant" / "__init__.py").write_text("import no_such_module")
    common = ["--model-path", base, "--group-size", 32]
    said = "package thirdparty-quant 1.0 cannot be loaded"
    done = run(third_party, *common, "--output-path", tmp_path / "out")
    assert done.returncode == 0 and done.stderr.count(said) == 1, done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "out" / "config.json").exists()
    done = run(third_party, *common, "--output-path", tmp_path / "no", "--method", "thirdparty")
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "no").exists()


def test_shards_are_as_large_as_asked_and_hold_everything(tmp_path):
    base = tiny.make("llama", tmp_path / "base", layers=12)
    llmquant.quantize(base, tmp_path / "whole", bits=8, group_size=32)
    llmquant.quantize(base, tmp_path / "parts", bits=8, group_size=32, max_shard_size="1MB")
    shards = list((tmp_path / "parts").glob("*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 1_100_000 for shard in shards)
    whole, parts = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[n], parts[n]) for n in whole)


def test_a_shard_smaller_than_a_tensor_is_refused(tmp_path):
    "A tensor cannot be divided; the smallest size that is allowed is named, and is right."
    base = tiny.make("llama", tmp_path / "base", layers=1, vocab_size=4608)
    keys = dict(bits=8, group_size=32, model_path=str(base))
    said = r"max_shard_size 1000000 bytes: tensor .* takes 1179648 and cannot be divided between files; give 2MB or more"
    with pytest.raises(UsageError, match=said): check(resolve({**keys, "max_shard_size": "1MB"}))
    with pytest.raises(UsageError, match=said): llmquant.quantize(base, tmp_path / "out", group_size=32, max_shard_size="1MB")
    assert not (tmp_path / "out").exists()
    check(resolve({**keys, "max_shard_size": "2MB"})), check(resolve({**keys, "max_shard_size": 1179648}))


def test_overwrite_never_reaches_the_model_through_links(base, tmp_path):
    "A hub cache: the snapshot's files are links into a folder of blobs."
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in base.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / file.name)
    before = {p.name: p.read_bytes() for p in blobs.iterdir()}
    with pytest.raises(UsageError): llmquant.quantize(snapshot, blobs, bits=4, group_size=32, overwrite=True)
    assert {p.name: p.read_bytes() for p in blobs.iterdir()} == before
