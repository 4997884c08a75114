"""Outlier suppressors through both entry points: the function stays, the files are right, wrong recipes are refused."""
import json
import sys
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
import yaml

from llmquant import load, quantize
from llmquant.core.errors import UsageError
from llmquant.core.quantizer_registry import QuantizerRegistry
from llmquant.evaluation.verification import check_files
from llmquant.evaluation.served_model import forced_logits
from llmquant.in_memory.quant_linear import QuantLinear
from llmquant.utils.config import resolve

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
import matrix  # noqa: E402

TEXT = {"num_samples": 4, "max_length": 48, "batch_size": 2}
STATIC = {"granularity": "tensor"}
RECIPES = [  # family, tied, suppressors, method, the rest of the section
    ("llama", False, "smooth_quant", "minmax", {"activations": 8}),
    ("llama", True, "rotation", "minmax", {"bits": 4, "group_size": 32}),
    ("llama", True, "rotation,smooth_quant", "gptq", {"activations": 8}),
    ("llama", False, "outlier_suppression_v2", "minmax", {"activations": STATIC}),
    ("qwen2", False, "outlier_suppression_v2", "gptq", {"activations": {**STATIC, "dynamic_range": "mse", "symmetric": False}}),
    ("qwen3", True, "smooth_quant", "gptq", {"bits": 4, "group_size": 32}),
    ("deepseek_v3", False, "rotation", "gptq", {"bits": 4, "group_size": 32}),
    ("llama", False, "smooth_quant", "awq", {"bits": 4, "group_size": 32}),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "Tiny checkpoints with a tokenizer, made when they are asked for."
    made, root = {}, tmp_path_factory.mktemp("checkpoints")

    def get(kind: str, tie: bool = False) -> Path:
        if (kind, tie) not in made:
            path = root / f"{kind}-{tie}"
            tiny.make(kind, path, torch.float16, tie=tie)
            tiny_tokenizer.save(path)
            made[kind, tie] = path
        return made[kind, tie]

    return get


def config_of(suppressors, rest):
    "A recipe as YAML gives it."
    return {"quantization": {"outlier_suppression": suppressors, **rest}, "calibration": TEXT}


@pytest.mark.parametrize("kind, tie, suppressors, method, rest", RECIPES)
def test_an_export_is_what_the_report_says(checkpoints, tmp_path, kind, tie, suppressors, method, rest):
    base, out = checkpoints(kind, tie), tmp_path / "out"
    report = quantize(base, out, method, config=config_of(suppressors, rest))
    counts = check_files(out, base)
    assert counts["layers"] == len(report["layers"]) > 10 and counts["float_tensors"] > 4
    done = report["outlier_suppression"]
    for name in suppressors.split(","):
        if name == "rotation":
            assert 0 < done["change"]["logits"] <= 1e-5 and done["change"]["blocks"] <= 1e-5
            continue
        assert len(done["blocks"]) == 2
        for block in done["blocks"].values(): assert block[name]["modified"] and block[name]["change"] <= 1e-4
    if tie and "rotation" in suppressors:
        assert report["config_changes"] == {"tie_word_embeddings": False}
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tensor_that_a_suppressor_edited_is_held_to_its_digest(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file
    base, out = checkpoints("llama"), tmp_path / "out"
    quantize(base, out, "minmax", config=config_of("smooth_quant", {"activations": 8}))
    file = next(out.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("input_layernorm.weight"))
    tensors[name] = tensors[name] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=name): check_files(out, base)


def test_shifted_values_of_llama_are_biases_in_the_files(tmp_path):
    "The row of the matrix that vLLM serves would notice if a bias were left out."
    from safetensors.torch import load_file
    row = matrix.Row("llama", 4, False, "group 64", loader="stock", suppressors="outlier_suppression_v2")
    out = matrix.export(row, tmp_path, 0)
    assert json.loads((out / "config.json").read_text())["attention_bias"] is True
    tensors = load_file(next(out.glob("*.safetensors")))
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("bias")}
    assert len(biases) == 8
    for name, bias in biases.items(): assert bool(bias.any()) == ("v_proj" in name or "o_proj" in name), name
    model = load(out, torch.float32)
    prompts = torch.randint(3, 512, (2, 48), generator=torch.Generator().manual_seed(0)).tolist()
    whole = torch.cat(forced_logits(model, prompts)).log_softmax(-1)
    for layer in model.model.layers: layer.self_attn.o_proj.bias.data.zero_()
    without = torch.cat(forced_logits(model, prompts)).log_softmax(-1)
    assert (whole.exp() * (whole - without)).sum(-1).mean() > 1e-3


@pytest.mark.parametrize("kind, tie, suppressors, method, rest", [RECIPES[2], RECIPES[3], RECIPES[5]])
def test_both_doors_give_the_same_codes(checkpoints, tmp_path, kind, tie, suppressors, method, rest):
    from transformers import AutoModelForCausalLM

    from llmquant.core.model_registry import ModelRegistry
    base, out = checkpoints(kind, tie), tmp_path / "out"
    quantize(base, out, method, config=config_of(suppressors, rest))
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    bits, group_size = rest.get("bits", 8), rest.get("group_size", -1)
    config = config_of(suppressors, {k: v for k, v in rest.items() if k not in ("bits", "group_size")})
    QuantizerRegistry.get(method)().quantize(model, bits=bits, group_size=group_size, config=config)
    found = {m.checkpoint_name: m.quantized_weight().digest() for m in model.modules() if isinstance(m, QuantLinear)}
    report = yaml.safe_load((out / "quantization_report.yaml").read_text())
    if "rotation" not in suppressors:  # a model in memory keeps rotated weights in its own dtype, a checkpoint in float32
        assert found == report["verification"]["digests"]
    ModelRegistry.for_config(model.config.to_dict()).save_quantized(model, tmp_path / "saved", source=base)
    assert check_files(tmp_path / "saved", base)["layers"] == len(found) == len(report["layers"])


def test_statistics_are_those_of_the_suppressed_block(checkpoints):
    "What the quantizer is given after an edit equals a measurement of the edited model."
    from llmquant.core.qtensor import round_to_nearest
    from llmquant.core.quantizer_registry import BaseQuantizer
    seen = {}

    class Looking(BaseQuantizer):
        name = "looking"
        def needed_statistics(self): return ("hessian", "maxima")
        def quantize_weight(self, weight, stats, scheme):
            seen.setdefault(len(seen), (weight.clone(), stats.hessian.clone(), stats.maxima.clone()))
            return round_to_nearest(weight, scheme)

    model, tokens = tiny.build("llama", torch.float32), torch.randint(3, 512, (4, 32))
    plain = tiny.build("llama", torch.float32)
    from llmquant.outlier_suppression.smooth_quant import SmoothQuantSuppressor
    section = {"quantization": {"outlier_suppression": "smooth_quant", "smooth_quant": {"alpha": .5}, "activations": 8}}
    Looking().quantize(model, bits=8, group_size=-1, calibration_data=tokens, target_layers=[0], layer_wise=True, config=section)
    joint = dict(seen)
    seen.clear()
    SmoothQuantSuppressor().configure({"alpha": .5}).apply(plain, tokens)
    Looking().quantize(plain, bits=8, group_size=-1, calibration_data=tokens, target_layers=[0], layer_wise=True)
    assert joint.keys() == seen.keys() and len(seen) == 7
    for place, parts in seen.items():
        for ours, theirs in zip(joint[place], parts): torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_both_doors_refuse_another_order(checkpoints, tmp_path):
    config = config_of("smooth_quant,rotation", {"activations": 8})
    with pytest.raises(UsageError, match="rotation edits the whole model and is named after smooth_quant"):
        quantize(checkpoints("llama"), tmp_path / "out", "minmax", config=config)
    model = tiny.build("llama", torch.float32)
    with pytest.raises(UsageError, match="rotation edits the whole model and is named after smooth_quant"):
        QuantizerRegistry.get("minmax")().quantize(model, bits=8, group_size=-1, config=config, calibration_data=torch.zeros(2, 9).long())


def test_a_model_in_memory_is_not_turned_by_a_wrong_recipe_or_wrong_sites(monkeypatch):
    from dataclasses import replace

    from llmquant.models.llama_adapter import LlamaAdapter
    model = tiny.build("llama", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotated = {"quantization": {"outlier_suppression": "rotation"}}
    with pytest.raises(UsageError, match="group_size 96 does not divide"):
        QuantizerRegistry.get("minmax")().quantize(model, bits=4, group_size=96, config=rotated)
    sites = LlamaAdapter.rotation_sites
    forgetful = lambda self, config, shapes: replace(found := sites(self, config, shapes), writers=found.writers[1:])
    monkeypatch.setattr(LlamaAdapter, "rotation_sites", forgetful)
    with pytest.raises(UsageError, match="rotation"):
        QuantizerRegistry.get("minmax")().quantize(model, bits=4, group_size=32, config=rotated)
    for name, value in model.state_dict().items(): assert torch.equal(value, before[name]), name


WRONG = [
    ("smooth_quant", {"smooth_quant": {"alpha": 1.5}}, "alpha"),
    ("smooth_quant", {"smooth_quant": {"alfa": .5}}, "did you mean"),
    ("smooth_quant", {"bits": 16}, "bits 16"),
    ("smoth_quant", {}, "unknown outlier suppressor"),
    ("smooth_quant", {"activations": {"granularity": "tensor", "dynamic": True}}, "tensor"),
    ("smooth_quant", {"activations": 8, "bits": 4, "group_size": -1}, "quantizes"),
    ("smooth_quant", {"activations": {"bits": 8, "granuralty": "token"}}, "did you mean"),
]


@pytest.mark.parametrize("suppressors, rest, says", WRONG)
def test_wrong_recipes_are_refused_before_any_work(checkpoints, tmp_path, suppressors, rest, says):
    with pytest.raises(UsageError, match=says) as caught:
        quantize(checkpoints("llama"), tmp_path / "out", "minmax", config=config_of(suppressors, rest))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_an_architecture_without_pairs_is_refused_by_name(checkpoints, tmp_path):
    path = tmp_path / "model"
    tiny.make("gemma2", path, torch.bfloat16)
    tiny_tokenizer.save(path)
    with pytest.raises(UsageError, match="smooth_quant needs smoothing pairs.*gemma2"):
        quantize(path, tmp_path / "out", "minmax", config=config_of("smooth_quant", {"activations": 8}))


def test_an_export_cannot_be_smoothed_again(checkpoints, tmp_path):
    quantize(checkpoints("llama"), tmp_path / "out", "minmax", config=config_of("smooth_quant", {"activations": 8}))
    with pytest.raises(UsageError, match="already quantized"):
        quantize(tmp_path / "out", tmp_path / "again", "minmax", config=config_of("smooth_quant", {"activations": 8}))


@pytest.mark.parametrize("suppressors", [None, "rotation"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_is_named(checkpoints, tmp_path, suppressors, name):
    "With and without a comparison before the walk; it is not blamed on the adapter."
    from safetensors.torch import load_file, save_file
    tiny.make("llama", tmp_path / "base", torch.float16)
    tiny_tokenizer.save(tmp_path / "base")
    file, = (tmp_path / "base").glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][:, 5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    rest = {"bits": 4, "group_size": 32}
    with pytest.raises(UsageError, match=f"tensor {name}: .* values are NaN or infinite; repair the checkpoint"):
        quantize(tmp_path / "base", tmp_path / "out", "minmax", config=config_of(suppressors, rest))


def test_a_refused_apply_declares_no_biases(monkeypatch):
    "Tokens that the model has no row for, or a block that fails: configuration and parameters are as they were."
    from llmquant.outlier_suppression.outlier_suppression_v2 import OutlierSuppressionV2
    model, tokens = tiny.build("llama", torch.float32), torch.randint(3, 512, (2, 24))
    before, config = {n: p.clone() for n, p in model.named_parameters()}, model.config.to_dict()
    with pytest.raises(UsageError): OutlierSuppressionV2().apply(model, torch.full((2, 24), 99999))

    def late(self, view):
        if view.index == 1: raise UsageError("no more")
        return plain(self, view)

    plain = OutlierSuppressionV2.apply_to_block
    monkeypatch.setattr(OutlierSuppressionV2, "apply_to_block", late)
    with pytest.raises(UsageError, match="no more"): OutlierSuppressionV2().apply(model, tokens)
    monkeypatch.undo()
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert model.config.to_dict() == config and not hasattr(model, "edited_tensors")
    OutlierSuppressionV2().apply(model, tokens)
    assert model.config.attention_bias and model.model.layers[0].self_attn.q_proj.bias is not None


@pytest.mark.parametrize("suppressors, rest, more", [
    ("smooth_quant", {"smooth_quant": {"alpha": 0.5}}, 0), ("smooth_quant", {}, 1), ("outlier_suppression_v2", {}, 1),
    ("smooth_quant", {"activations": {**STATIC, "dynamic_range": "mse"}, "smooth_quant": {"alpha": 0.5}}, 32)])
def test_a_search_is_part_of_the_predicted_peak(checkpoints, suppressors, rest, more):
    "At least, in MiB: copies of a pair and outputs on 2048 tokens; candidates on each number of a histogram."
    from llmquant.pipeline.run import preflight
    from llmquant.utils.config import resolve
    config = config_of(suppressors, {"activations": 8, **rest})
    _, need = preflight(resolve({"model_path": str(checkpoints("llama")), "method": "minmax"}, config=config))
    assert bool(need.searching) == bool(more) and need.searching >= more << 20


@pytest.mark.parametrize("suppressors, named", [("rotation", "minmax with rotation"), ([], "minmax")])
def test_text_that_nobody_would_look_at_is_refused(suppressors, named, tmp_path):
    "By both entry points, before anything is read or edited; a suppressor that measures takes it."
    config = {"quantization": {"outlier_suppression": suppressors}, "calibration": {"dataset": "wikitext"}}
    with pytest.raises(UsageError, match=rf"calibration\.dataset: {named} needs no calibration data; remove calibration\.dataset"):
        quantize(tmp_path / "base", tmp_path / "out", "minmax", config=config)
    with pytest.raises(UsageError, match=f"^{named} needs no calibration data; leave calibration_data out"):
        QuantizerRegistry.get("minmax")().quantize(tiny.build("llama"), bits=4, group_size=32, config=config_of(suppressors, {}),
                                                   calibration_data=torch.zeros(2, 9).long())
    measuring = {"quantization": {"outlier_suppression": ["rotation", "smooth_quant"]}, "calibration": {"dataset": "wikitext"}}
    assert resolve(config=measuring).calibration["dataset"] == "wikitext"
