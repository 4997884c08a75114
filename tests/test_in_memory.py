"A model in memory gets what the same recipe gives a checkpoint, and refuses what the recipe refuses."
import pytest
import tiny
import tiny_tokenizer
import torch
import yaml

from llmquant import quantize
from llmquant.core.errors import UsageError
from llmquant.core.quant_linear import QuantLinear
from llmquant.core.quantizer_registry import QuantizerRegistry
from llmquant.utils.config import resolve


def linears(model): return {m.checkpoint_name: m for m in model.modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("section", [{"activations": {"bits": 8}}, {"activations": 8, "bits": 8}, {"bits": 3}])
def test_what_is_implied_is_implied_in_memory_too(section, tmp_path):
    "The same codes through both doors when the call says neither bits nor group_size."
    from transformers import AutoModelForCausalLM
    tiny_tokenizer.save(tiny.make("llama", tmp_path / "base"))
    config = {"quantization": section}
    quantize(tmp_path / "base", tmp_path / "out", config=config)
    report = yaml.safe_load((tmp_path / "out" / "quantization_report.yaml").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    found = linears(QuantizerRegistry.get("minmax")().quantize(model, config=config))
    assert {name: m.quantized_weight().digest() for name, m in found.items()} == report["proof"]["digests"]


def test_weights_of_four_bits_under_activations_are_asked_for():
    "W4A8 stays possible in memory, where it can be simulated, when the call says so."
    model = QuantizerRegistry.get("minmax")().quantize(tiny.build("llama"), bits=4, group_size=32,
                                                       config={"quantization": {"activations": {"bits": 8}}})
    assert {(m.bits, m.group_size, m.scheme.activations.bits) for m in linears(model).values()} == {(4, 32, 8)}


@pytest.mark.parametrize("names", [["rotation", "rotation"], ["none", "rotation"], "none,rotation", "[]", "smooth"])
def test_suppressors_are_refused_with_the_recipes_sentence(names):
    "Duplicates, `none` beside a name, brackets and unknown names."
    section = {"quantization": {"outlier_suppression": names}}
    with pytest.raises(UsageError) as recipe: resolve(config=section)
    with pytest.raises(UsageError) as memory:
        QuantizerRegistry.get("minmax")().quantize(tiny.build("llama"), bits=4, group_size=32, config=section)
    assert str(recipe.value) == str(memory.value)
    assert str(memory.value).startswith("quantization.outlier_suppression: ")


HINTS = {"activation_bits": (8, "did you mean the keyword 'activations'?"),
         "bitz": (4, "did you mean the keyword 'bits'?"),
         "calibration": ({"num_samples": 4}, """did you mean config={"calibration": ...}?""")}


@pytest.mark.parametrize("keyword", HINTS)
def test_a_wrong_keyword_is_told_the_right_one(keyword):
    "A Python call is answered in keywords, not in paths."
    value, said = HINTS[keyword]
    with pytest.raises(UsageError) as caught: quantize("m", "o", **{keyword: value})
    assert said in str(caught.value)


def test_a_call_gives_keys_of_activations():
    "A dictionary as a keyword is merged with the document's section, and a width is still a width."
    config = {"quantization": {"activations": {"bits": 4, "symmetric": False}}}
    found = resolve({"activations": {"dynamic": False}}, config=config, origin="call")
    assert str(found.activations) == "A4 tensor static asym" and found.origins["activations"] == "call over config"
    for wrong, said in ((99, "quantization.activations: 99"), ({"bits": 1}, "quantization.activations.bits: 1")):
        with pytest.raises(UsageError, match=f"^{said} is out of range"): resolve({"activations": wrong}, origin="call")


def test_the_report_of_an_export_from_memory_names_suppressors(tmp_path):
    from llmquant.models.llama_adapter import LlamaAdapter
    model, ids = tiny.build("llama", torch.float16), torch.randint(3, 500, (4, 64))
    config = {"quantization": {"outlier_suppression": ["rotation", "smooth_quant"], "activations": 8,
                               "rotation": {"seed": 3}, "smooth_quant": {"alpha": 0.6}}}
    model = QuantizerRegistry.get("minmax")().quantize(model, calibration_data=ids, config=config)
    LlamaAdapter().save_quantized(model, str(tmp_path / "out"))
    said = yaml.safe_load((tmp_path / "out" / "quantization_report.yaml").read_text())["outlier_suppression"]
    assert list(said) == ["rotation", "smooth_quant"] and said["rotation"]["seed"] == 3
    assert said["rotation"]["residual"] == "Hadamard 128" and said["smooth_quant"]["alpha"] == 0.6
