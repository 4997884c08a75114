"Components of other packages: what they may leave out, and what nobody asks of them."
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.core.errors import LLMQuantError, UsageError
from llmquant.core.model_registry import ModelRegistry
from llmquant.core.options import Option
from llmquant.core.outlier_suppression_registry import BaseOutlierSuppressor, OutlierSuppressionRegistry
from llmquant.core.quantizer_registry import BaseQuantizer, QuantizerRegistry
from llmquant.in_memory.quant_linear import QuantLinear
from llmquant.outlier_suppression.site_suppressor import SiteSuppressor
from llmquant.pipeline.run import preflight, quantize
from llmquant.utils.config import resolve


class Evening(SiteSuppressor):
    "Looks at weights alone: the columns of each pair's consumers become about equally large."
    def edit_site(self, site):
        columns = site.column_maxima()
        site.scale_by((columns.mean() / columns).clamp(.25, 4))


@pytest.fixture
def evening():
    OutlierSuppressionRegistry.register("evening", Evening)
    yield {"quantization": {"outlier_suppression": "evening"}}
    OutlierSuppressionRegistry._registry.classes.pop("evening")


def test_a_data_free_suppressor_asks_for_no_text(evening, tmp_path):
    "A checkpoint without a tokenizer and a model that lies in no folder: the same codes, and the report names no text."
    base, given = tiny.make("llama", tmp_path / "base"), dict(bits=4, group_size=32, config=evening)
    report = quantize(base, tmp_path / "out", **given)
    assert report["calibration"]["tokens"] == 32 and report["calibration"]["dataset"].startswith("none: 32 random tokens")
    assert all(0 < block["evening"]["change"] < 1e-5 for block in report["outlier_suppression"]["blocks"].values())
    model = QuantizerRegistry.get("minmax")().quantize(tiny.build("llama"), **given)
    digests = {name: m.quantized_weight().digest() for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert digests == report["verification"]["digests"]
    plain = quantize(base, tmp_path / "plain", bits=4, group_size=32)["verification"]["digests"]
    assert all(digests[name] != plain[name] for name in plain)
    few = preflight(resolve({"model_path": str(base), "calibration.num_samples": 4096, "group_size": 32}, config=evening))[1]
    assert few.peak == preflight(resolve({"model_path": str(base), "group_size": 32}, config=evening))[1].peak
    ids, model = torch.randint(3, 500, (1, 16)), tiny.build("llama", torch.float32)
    logits = model(ids).logits
    assert 0 < (Evening().apply(model)(ids).logits - logits).norm() < 1e-5 * logits.norm()


def test_who_measures_is_named(evening):
    "The method that looks at weights alone is not blamed for what a suppressor asks for."
    config = {"quantization": {"outlier_suppression": "smooth_quant"}}
    with pytest.raises(UsageError, match="^smooth_quant measures activations and the model does not say"):
        QuantizerRegistry.get("minmax")().quantize(tiny.build("llama"), bits=4, group_size=32, config=config)
    with pytest.raises(UsageError, match="^gptq measures activations"):
        QuantizerRegistry.get("gptq")().quantize(tiny.build("llama"), bits=4, group_size=32, config=evening)
    config = {"quantization": {"activations": {"bits": 8, "dynamic": False}}}
    with pytest.raises(UsageError, match="^static activation quantization measures"):
        QuantizerRegistry.get("minmax")().quantize(tiny.build("llama"), config=config)


class OwnGrid(BaseQuantizer):
    "Goes over the Linears itself: symmetric, one scale a row, which is neither the recipe's groups nor its zero points."
    name, bent = "own_grid", False

    def quantize(self, model, bits=4, group_size=128, **kw):
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or name == "lm_head": continue
            weight = module.weight.data.float()
            step = weight.abs().amax(1, True) / (2**(bits - 1) - 1)
            codes = (weight / step).round()
            if self.bent: codes = codes.sign() * codes.abs().sqrt()  # a grid that is not even
            module.weight.data = (codes * step).to(module.weight.dtype)
        return model


@pytest.fixture
def own_grid():
    QuantizerRegistry.register("own_grid", OwnGrid)
    yield
    OwnGrid.bent = False
    QuantizerRegistry._registry.classes.pop("own_grid")


def test_what_a_class_quantized_is_not_rounded_again(own_grid, tmp_path):
    "Its grid is found, and the report's error is that against the checkpoint; who made it is named."
    base = tiny.make("llama", tmp_path / "base")
    report = quantize(base, tmp_path / "out", method="own_grid", bits=4, group_size=32)
    assert report["components"] == {"method own_grid": f"module {OwnGrid.__module__}"}
    name = "model.layers.0.mlp.down_proj"
    weight = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_submodule(name).weight.detach()
    step = weight.abs().amax(1, True) / 7
    made = (weight / step).round() * step
    served = llmquant.load(tmp_path / "out", dtype=torch.float32).get_submodule(name).weight.detach()
    assert (served - made).norm() < 2e-3 * made.norm()
    expected = float((made - weight).norm() / weight.norm())
    assert expected > .05 and abs(report["layers"][name]["relative_error"] - expected) < 2e-3


def test_a_class_on_no_grid_is_refused(own_grid, tmp_path):
    OwnGrid.bent = True
    with pytest.raises(UsageError, match=r"own_grid quantized it to values that no scale and zero point of W4 g32 asym hold"):
        quantize(tiny.make("llama", tmp_path / "base"), tmp_path / "out", method="own_grid", bits=4, group_size=32)
    assert not (tmp_path / "out").exists()


def test_a_class_that_overlooks_the_layers_is_refused(own_grid, tmp_path):
    base = tiny.make("llama", tmp_path / "base")
    with pytest.raises(UsageError, match=r"own_grid changed \d+ tensors that stay in float, such as model.layers.1."):
        quantize(base, tmp_path / "out", method="own_grid", bits=4, group_size=32, layers=[0])
    assert not (tmp_path / "out").exists()


BAD = {"supported_bits": 4, "options": Option("x", int, 1), "stacks_rows": "yes", "name": None}


@pytest.mark.parametrize("attribute", BAD)
def test_declared_attributes_are_checked_at_register(attribute):
    cls = type("Bad", (QuantizerRegistry.get("minmax"),), {attribute: BAD[attribute]})
    with pytest.raises(UsageError, match=f"^method 'bad': {attribute} of Bad is "): QuantizerRegistry.register("bad", cls)


@pytest.mark.parametrize("attribute,value", [("model_types", None), ("model_types", "mymodel"), ("patterns", "my"), ("linears", "mlp.fc"),
                                             ("floats", ("mlp.gate",)), ("fused", ("q_proj", "k_proj"))])
def test_tables_of_an_adapter_are_checked_at_register(attribute, value):
    cls = type("Bad", (ModelRegistry.get("default"),), {attribute: value})
    with pytest.raises(UsageError, match=f"^model adapter 'bad': {attribute} of Bad is .*must be"): ModelRegistry.register("bad", cls)


def named(*words): return {word: lambda self, *given: None for word in words}


@pytest.mark.parametrize("members,said", [
    (named("quantize_weight") | {"options": (Option("bits", int, 4),)}, "the name 'bits' is taken by quantization.bits"),
    (named("quantize_weight") | {"needed_statistics": lambda self: ("hesian",)}, "did you mean 'hessian'"),
    ({"quantize_weight": lambda self, weight, scheme: None}, "quantize_weight of Bad takes .self, weight, scheme., must take"),
    (named("quantize_weight") | {"__init__": lambda self, steps: None}, "Bad cannot be made without arguments")])
def test_a_quantizer_nobody_could_use_is_refused(members, said):
    with pytest.raises(UsageError, match=said): QuantizerRegistry.register("bad", type("Bad", (BaseQuantizer,), members))


def test_a_method_that_fails_is_named_with_its_layer():
    class Fails(BaseQuantizer):
        name = "fails"
        def quantize_weight(self, weight, stats, scheme): raise ValueError("boom")
    with pytest.raises(LLMQuantError, match=r"^tensor model.layers.0.\S+.weight: Fails raised ValueError: boom$"):
        Fails().quantize(tiny.build("llama"), bits=4, group_size=32)


class Edits(SiteSuppressor):
    name = "edits"
    def edit_site(self, site): type(self).how(site)


def spoiled(site):
    site.scale_by(torch.ones(len(site.producer.weight)))
    site.producer.weight.data[0] = float("nan")


@pytest.mark.parametrize("how,said", [
    (lambda site: site.scale_by(torch.full((len(site.producer.weight),), float("nan"))), "the factor of channel 0 is nan"),
    (lambda site: site.scale_by(2.), "the factor 2.0; must be a tensor of"),
    (spoiled, "edits left NaN or infinity in model.layers.0"),
    (lambda site: site.producer.weight.data.mul_(2), "edits changed parameters and named none in view.edited"),
    (lambda site: None, "edits found nothing to edit")])
def test_a_suppressor_is_told_what_it_did(how, said):
    Edits.how = staticmethod(how)
    with pytest.raises(UsageError, match=said): Edits().apply(tiny.build("llama", torch.float32))


def test_a_misspelt_hook_is_refused_at_register():
    cls = type("Bad", (SiteSuppressor,), {"edit_sites": lambda self, site: None})
    with pytest.raises(UsageError, match="Bad does not define edit_site; did you mean 'edit_sites'"):
        OutlierSuppressionRegistry.register("bad", cls)


def test_a_transform_returns_a_checkpoint():
    class Forgets(BaseOutlierSuppressor):
        name, scope = "forgets", "model"
        def transform(self, source, adapter): pass
    with pytest.raises(UsageError, match="forgets: transform returned NoneType"): Forgets().apply(tiny.build("llama", torch.float32))


def test_every_suppression_has_sizes_and_a_picture(evening, tmp_path):
    "One that looks at weights alone, before one that measures as well as by itself."
    base = tiny.make("llama", tmp_path / "base")
    report = quantize(base, tmp_path / "out", bits=4, group_size=32, config=evening)
    stage, = report["outlier_suppression"]["sizes"]
    assert stage["by"] == "evening" and "random" in stage["tokens"] and (tmp_path / "out" / "outlier_suppression.png").exists()


def test_an_adapter_whose_blocks_lie_elsewhere_is_refused():
    "Its table of Linears would be ignored, and all of them quantized."
    config = tiny.config("llama").to_dict()
    shapes = {name: tuple(value.shape) for name, value in tiny.build("llama").state_dict().items()}
    for blocks, said in ("model.blocks", "has its blocks in 'model.blocks', and this model's are in 'model.layers'"), ("", "blocks in ''"):
        cls = type("Half", (ModelRegistry.get("llama"),), {"blocks": blocks, "linears": ("mlp.gate_proj", "mlp.up_proj"), "needs": ()})
        with pytest.raises(UsageError, match=said): cls().linear_sites(config, shapes)
    cls = type("Half", (ModelRegistry.get("llama"),), {"linears": ("mlp.gate_proj", "mlp.up_proj"), "needs": (), "model_types": ()})
    assert {s.name.rpartition(".")[2] for s in cls().linear_sites(config, shapes) if s.quantize} == {"gate_proj", "up_proj"}


def test_what_a_file_says_of_others_is_told(tmp_path, caplog):
    "A section of what is not in use, and calibration of a method that looks at weights alone."
    path = tmp_path / "recipe.yaml"
    path.write_text("quantization:\n  gptq: {symmetric: true}\n  smooth_quant: {alpha: 0.5}\n")
    with caplog.at_level("INFO", "llmquant"): resolve({"calibration.num_samples": 4}, path)
    said = [r.getMessage() for r in caplog.records]
    assert said == [f"{path}:2: quantization.gptq has no effect: gptq is not in use",
                    f"{path}:3: quantization.smooth_quant has no effect: smooth_quant is not in use",
                    "calibration.num_samples has no effect: minmax looks at weights alone"]
    caplog.clear()
    with caplog.at_level("INFO", "llmquant"): resolve({"method": "gptq", "outlier_suppression": "smooth_quant"}, path)
    assert not caplog.records


def test_a_report_does_not_flood_a_notebook(tmp_path):
    report = quantize(tiny.make("llama", tmp_path / "base"), tmp_path / "out", bits=4, group_size=32)
    assert isinstance(report, dict) and len(repr(report)) < 500 and "layers" in repr(report)
