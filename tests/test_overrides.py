"""Layers on grids of their own: from the recipe's list to vLLM.

What a file holds is read by the independent unpacker and held against the grid that each layer should have; what vLLM
makes of it is held against the dequantized model. Two children are started, one with the plugin and one without.
"""
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
from safetensors.torch import load_file

from llmquant.cli import main as cli
from llmquant.core.errors import UsageError, VerificationError
from llmquant.core.model_registry import ModelRegistry
from llmquant.core.qtensor import round_to_nearest
from llmquant.core.scheme import QuantScheme, scheme_of
from llmquant.evaluation import verification, served_model
from llmquant.evaluation.vllm_check import Job, ask_vllm_many
from llmquant.export.loading import load
from llmquant.formats.unpackers import read_safetensors, unpack_layer
from llmquant.pipeline.run import check, quantize
from llmquant.utils.config import recipe_to_dict, resolve

SYMMETRIC = {"quantization": {"minmax": {"symmetric": True}}}
ATTENTION = r"model\.layers\.1\.self_attn\.[qkv]_proj"
EXPORTS = {
    "stock": dict(bits=4, group_size=64, overrides=[
        {"match": r".*\.(gate|up)_proj", "group_size": 32}, {"match": r".*\.down_proj", "group_size": -1},
        {"match": ATTENTION, "symmetric": True}, {"match": r"model\.layers\.1\.self_attn\.o_proj", "skip": True}]),
    "w4w8": dict(bits=4, group_size=64, overrides=[{"match": r".*\.down_proj", "bits": 8}]),
    "w3w8": dict(bits=3, group_size=64, config=SYMMETRIC, overrides=[
        {"match": ".*", "bits": 8, "group_size": 32}, {"match": r".*\.mlp\..*", "skip": False},
        {"match": ATTENTION, "bits": 3, "symmetric": False}]),
    "awq": dict(bits=4, group_size=64, format="awq", overrides=[{"match": r".*\.1\.mlp\.down_proj", "skip": True}]),
    "gptq": dict(bits=4, group_size=64, format="gptq", config=SYMMETRIC,
                 overrides=[{"match": ATTENTION, "skip": True}]),
}
# The grid of each layer, written out by hand: W bits, group, and s for symmetric; - for float.
GRIDS = {
    "stock": ["4g64"] * 4 + ["4g32", "4g32", "4c"] + ["4g64s"] * 3 + ["-", "4g32", "4g32", "4c"],
    "w4w8": (["4g64"] * 6 + ["8g64"]) * 2,
    "w3w8": ["8g32s"] * 4 + ["3g64s"] * 3 + ["3g64"] * 3 + ["8g32s"] + ["3g64s"] * 3,
    "awq": ["4g64"] * 13 + ["-"],
    "gptq": ["4g64s"] * 7 + ["-"] * 3 + ["4g64s"] * 4,
}
LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in (
    *(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))]


def grid(text):
    "The scheme that one entry of `GRIDS` stands for."
    if text == "-": return None
    symmetric, group = text.endswith("s"), text.rstrip("s")[2:]
    return QuantScheme(bits=int(text[0]), symmetric=symmetric, granularity="group" if group else "channel",
                       group_size=int(group or 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A base model and all exports of it."
    folder = tmp_path_factory.mktemp("overrides")
    tiny_tokenizer.save(tiny.make("llama", folder/"base", num_key_value_heads=4))
    for name, options in EXPORTS.items(): quantize(folder/"base", folder/name, **options)
    return folder


def config_of(export): return json.loads((export/"config.json").read_text())["quantization_config"]


# The recipe

@pytest.mark.parametrize(("entry", "said"), [
    ({"match": "(", "bits": 4}, "overrides[1].match: '(' is no regular expression"),
    ({"match": 3, "bits": 4}, "overrides[1].match: 3 is int, must be str"),
    ({"bits": 4}, "overrides[1].match is missing"),
    ({"match": "a"}, "overrides[1]: names layers and sets nothing for them"),
    ({"match": "a", "bits": 5}, "overrides[1].bits: minmax does not support 5 bits; use one of 2, 3, 4, 8, 16"),
    ({"match": "a", "bits": "4"}, "overrides[1].bits: '4' is str, must be int"),
    ({"match": "a", "group_size": -2}, "overrides[1].group_size: -2 is out of range"),
    ({"match": "a", "symmetric": 1}, "overrides[1].symmetric: 1 is int, must be bool"),
    ({"match": "a", "skip": True, "bits": 4}, "overrides[1]: skip leaves its layers in float"),
    ({"match": "a", "grupo_size": 4}, "overrides[1].grupo_size: unknown option; known: match, bits"),
    ("a", "overrides[1]: 'a' is str, must be a mapping")])
def test_a_wrong_entry_is_named(entry, said, tmp_path, capsys):
    "In one sentence, from YAML, from Python and from --set."
    entries = [{"match": ".*", "bits": 4}, entry]
    file = tmp_path/"recipe.yaml"
    file.write_text(f"quantization:\n  bits: 4\n  overrides: {json.dumps(entries)}\n")
    for given, where in ((dict(config_path=file), f"{file}:3: quantization."),
                         (dict(command_line={"overrides": entries}, origin="call"), "quantization.")):
        with pytest.raises(UsageError) as caught: resolve(**given)
        assert str(caught.value).startswith(where + said) and "\n" not in str(caught.value)
    assert cli.main(["check", "--model-path", "m", "--set", f"quantization.overrides={json.dumps(entries)}"]) == 2
    assert capsys.readouterr().err.startswith(f"llmquant: error: --set quantization.{said}")


def test_new_keys_reach_the_recipe_and_its_report(tmp_path):
    file = tmp_path/"recipe.yaml"
    file.write_text("quantization:\n  overrides:\n    - {match: 'a.*', bits: 8, zero_point: false}\n"
                    "model: {max_memory: 8GiB}\noutput: {resume: false}\n")
    report = recipe_to_dict(resolve(config_path=file))
    assert report["overrides"] == {"value": [{"match": "a.*", "bits": 8, "symmetric": True}], "from": f"file {file}"}
    assert report["max_memory"] == {"value": 2**33, "from": f"file {file}"}
    assert report["resume"] == {"value": False, "from": f"file {file}"}
    assert report["calibration.seed"] == report["calibration.column"] == {"value": None, "from": "default"}
    assert resolve({"resume": True}, config_path=file).resume is True


def test_a_flag_and_set_agree_by_what_they_mean(monkeypatch, capsys):
    def stop(recipe):
        seen.append(recipe)
        raise UsageError("far enough")
    seen, command = [], ["--model-path", "m", "--output-path", "o", "--no-resume", "--layers", "0,1", "--set"]
    monkeypatch.setattr("llmquant.pipeline.run.run", stop)
    assert cli.main([*command, "quantization.layers=[1, 0]"]) == 2
    assert capsys.readouterr().err == "llmquant: error: far enough\n"
    assert (seen[0].layers, seen[0].resume) == ((0, 1), False)
    assert cli.main([*command, "quantization.layers=[1, 2]"]) == 2
    assert "--layers and --set quantization.layers contradict each other" in capsys.readouterr().err


# The plan

def plan(path, **given): return check(resolve({"model_path": str(path), "bits": 4, "group_size": 64, **given}))


@pytest.mark.parametrize(("entry", "said"), [
    ({"match": "model.layers.0.mlp.down_prj", "bits": 8}, "did you mean 'model.layers.0.mlp.down_proj'?"),
    ({"match": "layers.0.mlp.down_proj", "bits": 8}, "matches no Linear of this model (the whole name must match)"),
    ({"match": "lm_head", "bits": 8}, "matches only layers that stay in float anyway (lm_head: "),
    ({"match": r".*\.q_proj", "bits": 8}, "q_proj: W8 g64 asym (by quantization.overrides[0]), model.layers.0.self_attn"
     ".k_proj: W4 g64 asym; let an override match all of them or none"),
    ({"match": r".*\.up_proj", "skip": True}, "up_proj: float (by quantization.overrides[0])"),
    ({"match": r".*\.down_proj", "group_size": 96}, "group_size 96 does not divide in_features 256; use 32, 64, 128, "
     "256 or -1 (per channel) (by quantization.overrides[0])"),
    ({"match": ".*", "skip": True}, "no layer of this llama model would be quantized")])
def test_an_override_that_cannot_be_is_refused(entry, said, folder):
    with pytest.raises(UsageError) as caught: plan(folder/"base", overrides=[entry])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_override_outside_the_layers_asked_for_is_refused(folder):
    with pytest.raises(UsageError, match="not among the layers asked for"):
        plan(folder/"base", layers="1", overrides=[{"match": r"model\.layers\.0\..*", "bits": 8}])


def test_experts_of_a_block_share_a_grid(tmp_path, monkeypatch):
    "With an adapter that has them quantized, which ours leave to a later version."
    base = tiny.make("qwen3_moe", tmp_path/"moe")
    family = type(ModelRegistry.for_config({"model_type": "qwen3_moe"}))
    sites = family.linear_sites
    taken = lambda s: replace(s, quantize=True, reason="") if ".experts." in s.name else s
    monkeypatch.setattr(family, "linear_sites", lambda *given: [taken(s) for s in sites(*given)])
    rule = lambda match: dict(overrides=[{"match": match, "bits": 8}])
    with pytest.raises(UsageError, match=r"vLLM fuses .*experts\.0\..*: W4 .*experts\.2\..*: W8"):
        plan(base, **rule(r".*\.0\.mlp\.experts\.2\..*"))
    with pytest.raises(UsageError, match=r"experts\.0\.down_proj: W8 .*gate_proj: W4"):
        plan(base, **rule(r".*down_proj"))
    found = plan(base, **rule(r".*\.0\.mlp\.experts\..*"))
    assert sum(s.bits == 8 for s in found.overrides.values()) == len(found.overrides) == 4 * 3


def test_formats_with_one_grid_refuse_a_mixture_and_auto_avoids_them(folder, monkeypatch):
    mixed = dict(overrides=[{"match": r".*\.down_proj", "bits": 8}])
    for format in "gptq", "awq":
        with pytest.raises(UsageError, match=f"format {format} has one quantization scheme for all layers.*use format compressed_ten"):
            plan(folder/"base", format=format, symmetric=True, **mixed)
    from llmquant.quantizers.minmax_quantizer import MinMaxQuantizer
    monkeypatch.setattr(MinMaxQuantizer, "preferred_format", lambda self, scheme: "gptq")
    assert plan(folder/"base", symmetric=True).format.name == "gptq"
    assert plan(folder/"base", symmetric=True, **mixed).format.name == "compressed_tensors"
    same = dict(overrides=[{"match": ".*", "group_size": 32}])      # one grid again, though not the recipe's
    assert plan(folder/"base", symmetric=True, **same).format.name == "gptq"


# The files

@pytest.mark.parametrize("name", EXPORTS)
def test_every_layer_has_its_grid_in_the_file(name, folder):
    "Read by the independent unpacker, against the base weights rounded to the grid written out above."
    base, tensors = load_file(next((folder/"base").glob("*.safetensors"))), read_safetensors(folder/name)
    config = config_of(folder/name)
    for layer, wanted in zip(LAYERS, map(grid, GRIDS[name]), strict=True):
        weight = base[f"{layer}.weight"]
        if wanted is None:
            assert bytes(tensors[f"{layer}.weight"].data) == weight.numpy().tobytes(), layer
            continue
        assert scheme_of(config, layer) == wanted, layer
        read = unpack_layer(tensors, layer, config, weight.shape[1], weight.shape[0])
        assert read.digest() == round_to_nearest(weight, wanted).digest(), layer
    loaded = load(folder/name, torch.float32)
    for layer, wanted in zip(LAYERS, map(grid, GRIDS[name]), strict=True):
        weight = base[f"{layer}.weight"]
        means = weight if wanted is None else round_to_nearest(weight, wanted).dequantize(torch.float16)
        assert torch.equal(loaded.get_submodule(layer).weight, means.float()), layer


def test_what_a_skip_leaves_is_said(folder):
    "In config.json, in the report, and with the reason."
    import yaml
    report = yaml.safe_load((folder/"stock"/"quantization_report.yaml").read_text())
    assert report["left_in_float"]["override"] == ["model.layers.1.self_attn.o_proj"]
    assert report["layers"]["model.layers.1.mlp.down_proj"]["scheme"] == "W4 channel asym"
    assert "model.layers.1.self_attn.o_proj" in config_of(folder/"stock")["ignore"]


def in_vllms_words(config):
    "A layer that vLLM would read on the main grid."
    config["config_groups"]["group_1"]["targets"].remove("model.layers.0.mlp.down_proj")


def in_our_words(config):
    "A layer that our keys give the main grid."
    del config["llmquant_overrides"]["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("fault", [in_vllms_words, in_our_words])
def test_a_wrong_entry_in_config_json_fails_verification(fault, folder, tmp_path):
    shutil.copytree(folder/"w4w8", tmp_path/"faulty")
    file = tmp_path/"faulty"/"config.json"
    config = json.loads(file.read_text())
    fault(config["quantization_config"])
    file.write_text(json.dumps(config))
    verification.check_files(folder/"w4w8", folder/"base")
    with pytest.raises(VerificationError, match=r"model\.layers\.0\.mlp\.down_proj"):
        verification.check_files(tmp_path/"faulty", folder/"base")


# vLLM

vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
STOCK, PLUGIN = ("stock", "awq", "gptq"), ("w4w8", "w3w8")


@pytest.fixture(scope="module")
def answers(folder):
    "{(export, door): vLLM's answer}"
    prompts = served_model.teacher_tokens(folder/"base", json.loads((folder/"base"/"config.json").read_text()))
    jobs = lambda names, method: [Job(str(folder/name), prompts, quantization=method) for name in names]
    stock = ask_vllm_many(jobs(STOCK, None), stock=True)
    plugin = ask_vllm_many(jobs(PLUGIN, "minmax"))
    return prompts, {**{(n, "stock"): a for n, a in zip(STOCK, stock, strict=True)},
                     **{(n, "minmax"): a for n, a in zip(PLUGIN, plugin, strict=True)}}


@vllm
@pytest.mark.parametrize(("name", "door"), [*((n, "stock") for n in STOCK), *((n, "minmax") for n in PLUGIN)])
def test_vllm_computes_the_same_model(name, door, folder, answers):
    prompts, said = answers
    assert not said[name, door].error, said[name, door].error
    model = load(Path(folder/name), torch.float32, served_in=torch.float16)
    kl, _ = served_model.divergences(served_model.forced_logits(model, prompts), said[name, door])
    assert len(kl) == 4 * 48 and kl.mean() <= 1e-4, kl.mean()
