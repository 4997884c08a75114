"The checks for components: every built-in one passes all of them, and one with a single fault fails the right one."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from llmquant.core.errors import UsageError
from llmquant.core.model_registry import ModelRegistry
from llmquant.core.options import Option
from llmquant.core.outlier_suppression_registry import BaseOutlierSuppressor, OutlierSuppressionRegistry
from llmquant.core.qtensor import QuantizedWeight, round_to_nearest
from llmquant.core.quantizer_registry import BaseQuantizer, QuantizerRegistry
from llmquant.core.smoothing import SmoothingPair
from llmquant.evaluation.check_components import LLAMA_64, check_adapter, check_quantizer, check_suppressor
from llmquant.models.llama_adapter import LlamaAdapter
from llmquant.outlier_suppression.site_suppressor import SiteSuppressor

OWN = "llmquant."  # other tests of this process register components, too


def built_in(registry): return [n for n in registry._registry.names() if registry.get(n).__module__.startswith(OWN)]


@pytest.mark.parametrize("name", built_in(QuantizerRegistry))
def test_built_in_quantizers_pass(name): assert "models_are_quantized" in check_quantizer(QuantizerRegistry.get(name))


@pytest.mark.parametrize("name", built_in(OutlierSuppressionRegistry))
def test_built_in_suppressors_pass(name):
    assert "float_function_stays" in check_suppressor(OutlierSuppressionRegistry.get(name))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_built_in_adapters_pass(kind):
    config = tiny.config(kind)
    adapter = type(ModelRegistry.for_config(config.to_dict()))
    assert "rotation_sites_keep_the_function" in check_adapter(adapter, config)


class Nearest(BaseQuantizer):
    name = "nearest"
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight, scheme)


class Nameless(Nearest): name = ""
class Empty(BaseQuantizer): name = "empty"
class LooseOptions(Nearest): options = ("factor",)


class Deaf(Nearest):
    def configure(self, values, where=""): return super().configure({})


class Sticky(Nearest):
    def configure(self, values, where=""):
        super().configure(values, where)
        Sticky.settings = self.settings
        return self


class AsksTooMuch(Nearest):
    def needed_statistics(self): return ("gradients",)


class AsksTooLittle(Nearest):
    def needed_statistics(self): return ("maxima",)
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight + 0 * stats.hessian.sum(), scheme)


class OffGrid(Nearest):
    def quantize_weight(self, weight, stats, scheme):
        found = round_to_nearest(weight, scheme)
        return QuantizedWeight(found.codes + (scheme.qmax + 1) % 256, found.scales, found.zeros, scheme)


class OneDtype(Nearest):
    def quantize_weight(self, weight, stats, scheme):
        assert weight.dtype == torch.float32
        return super().quantize_weight(weight, stats, scheme)


class InPlace(Nearest):
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight.mul_(.99), scheme)


class Random(Nearest):
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight + .01 * torch.randn(weight.shape), scheme)


class NoZeros(Nearest):
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight * (weight.abs().max() / weight.abs().max()), scheme)


class Halved(Nearest):
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight / 2, scheme)


class OverPromising(Nearest):
    def within_one_step(self, scheme): return True
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight * .95, scheme)


class Entangled(Nearest):
    stacks_rows = True
    def quantize_weight(self, weight, stats, scheme): return round_to_nearest(weight + .05 * weight.mean(0), scheme)


class Remembering(Nearest):
    calls = 0
    def quantize_weight(self, weight, stats, scheme):
        self.calls += 1
        return round_to_nearest(weight * (1 - .001 * self.calls), scheme)
    def quantize(self, model, *args, **kwargs):
        Remembering.calls += 5
        return super().quantize(model, *args, **kwargs)


QUANTIZERS = {Nameless: "is_a_quantizer", Empty: "is_a_quantizer", LooseOptions: "is_a_quantizer",
              Deaf: "unknown_options_are_refused", Sticky: "settings_are_each_instances_own",
              AsksTooMuch: "is_a_quantizer", AsksTooLittle: "declared_statistics_are_enough",
              OffGrid: "results_are_on_the_grid", OneDtype: "every_dtype_is_taken", InPlace: "input_is_not_changed",
              Random: "results_are_repeatable", NoZeros: "edges_are_quantized", Halved: "widest_grid_is_close",
              OverPromising: "promises_are_kept", Entangled: "promises_are_kept", Remembering: "models_are_quantized"}


@pytest.mark.parametrize("cls", QUANTIZERS, ids=lambda cls: cls.__name__)
def test_a_quantizer_with_one_fault_fails_its_check(cls):
    with pytest.raises(UsageError, match=f"^{cls.__name__} fails the check {QUANTIZERS[cls]}: .") as failed: check_quantizer(cls)
    assert "\n" not in str(failed.value)


def test_a_quantizer_without_fault_passes(): assert len(check_quantizer(Nearest)) == 13


class NoFamily(LlamaAdapter): model_type = ""


class Overlooking(LlamaAdapter):
    def linear_sites(self, config, shapes): return [s for s in super().linear_sites(config, shapes) if "up_proj" not in s.name]


class Backwards(LlamaAdapter):
    def get_layers(self, model): return super().get_layers(model)[::-1]


class HalfFused(LlamaAdapter):
    def linear_sites(self, config, shapes):
        return [replace(s, quantize=False, reason="left") if "q_proj" in s.name else s for s in super().linear_sites(config, shapes)]


class ForgetsAReader(LlamaAdapter):
    def smoothing_pairs(self, config, block):
        at = f"model.layers.{block}"
        return (SmoothingPair(f"{at}.post_attention_layernorm", (f"{at}.mlp.gate_proj",)),)


class WrongHeads(LlamaAdapter):
    def smoothing_pairs(self, config, block):
        return tuple(replace(p, head_dim=p.head_dim // 2) if p.head_dim else p for p in super().smoothing_pairs(config, block))


class ForgetsAWriter(LlamaAdapter):
    def rotation_sites(self, config, shapes):
        sites = super().rotation_sites(config, shapes)
        return replace(sites, writers=sites.writers[1:])


class HoldsATensor(LlamaAdapter):
    def get_model_info(self): return {"weight": torch.ones(1)}


ADAPTERS = {NoFamily: "is_an_adapter", Overlooking: "sites_cover_the_linears", Backwards: "blocks_are_found",
            HalfFused: "fused_groups_are_whole", ForgetsAReader: "smoothing_pairs_keep_the_function",
            WrongHeads: "smoothing_pairs_keep_the_function", ForgetsAWriter: "rotation_sites_keep_the_function",
            HoldsATensor: "facts_are_plain"}


@pytest.mark.parametrize("cls", ADAPTERS, ids=lambda cls: cls.__name__)
def test_an_adapter_with_one_fault_fails_its_check(cls):
    with pytest.raises(UsageError, match=f"^{cls.__name__} fails the check {ADAPTERS[cls]}: ."): check_adapter(cls, LLAMA_64)


class Evening(SiteSuppressor):
    name = "evening"
    options = (Option("reach", float, 4., "largest factor", minimum=1),)
    def edit_site(self, site):
        columns, reach = site.column_maxima(), self.current()["reach"]
        site.scale_by((columns.mean() / columns).clamp(1 / reach, reach))


class NoName(Evening): name = ""
class NoHook(BaseOutlierSuppressor): name = "no_hook"


class HearsNothing(Evening):
    def configure(self, values, where=""): return super().configure({})


class Unmeasured(Evening):
    def needed_statistics(self): return ("temperature",)


class LooksAtInputs(Evening):
    def edit_site(self, site): site.scale_by(site.gather(site.stats.maxima).clamp(min=.1))


class HalfAnEdit(Evening):
    def edit_site(self, site):
        site.producer.weight.mul_(2)
        site.view.edited.add(site.pair.producer)


class Idle(BaseOutlierSuppressor):
    name = "idle"
    def apply(self, model, calibration_data=None): return model


class Dice(Evening):
    def edit_site(self, site): site.scale_by(torch.rand(len(site.producer.weight)) + .5)


SUPPRESSORS = {NoName: "is_a_suppressor", NoHook: "is_a_suppressor", HearsNothing: "unknown_options_are_refused",
               Unmeasured: "is_a_suppressor", LooksAtInputs: "declared_statistics_suffice",
               HalfAnEdit: "float_function_stays", Idle: "something_is_edited", Dice: "edits_are_repeatable"}


@pytest.mark.parametrize("cls", SUPPRESSORS, ids=lambda cls: cls.__name__)
def test_a_suppressor_with_one_fault_fails_its_check(cls):
    with pytest.raises(UsageError, match=f"^{cls.__name__} fails the check {SUPPRESSORS[cls]}: ."): check_suppressor(cls)


def test_a_suppressor_without_fault_passes(): assert len(check_suppressor(Evening)) == 8


class Powers(BaseQuantizer):
    "Codes whose distance from zero is a power of two: the error of such a grid does not shrink with bits."
    name, supported_bits = "powers", (8,)
    def quantize_weight(self, weight, stats, scheme):
        found = round_to_nearest(weight, scheme)
        zeros = found.zeros.float().repeat_interleave(scheme.width(weight.shape[1]), 1)
        away = found.codes.float() - zeros
        codes = zeros + away.sign() * 2 ** away.abs().clamp(min=1).log2().round()
        return QuantizedWeight(codes.clamp(0, scheme.qmax).to(torch.uint8), found.scales, found.zeros, scheme)


class PowersByDeclaration(Powers): expected_error = .25


def test_a_class_declares_the_error_of_its_grid():
    with pytest.raises(UsageError, match="widest_grid_is_close: .*at most 0.1 is expected.*set expected_error"): check_quantizer(Powers)
    assert "widest_grid_is_close" in check_quantizer(PowersByDeclaration)


@pytest.mark.parametrize("check,given", [(check_quantizer, Nearest()), (check_quantizer, Evening), (check_adapter, Nearest),
                                         (check_suppressor, LlamaAdapter())])
def test_other_things_than_a_class_of_the_kind_are_refused(check, given):
    with pytest.raises(UsageError, match=f"^{check.__name__} takes a subclass of Base"):
        check(given, LLAMA_64) if check is check_adapter else check(given)


def test_an_adapter_is_checked_with_a_config_of_its_family():
    for types in ((), ("granite",)):
        cls = type("Foreign", (LlamaAdapter,), {"model_types": types})
        with pytest.raises(UsageError, match="is_an_adapter: it is not found for the model type 'llama'"): check_adapter(cls, LLAMA_64)


def test_the_method_of_the_first_page_passes():
    cells = json.loads((Path(__file__).parent.parent / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "class StochasticQuantizer" in "".join(c["source"]))
    names = {"torch": torch, "Option": Option, "QuantizedWeight": QuantizedWeight, "round_to_nearest": round_to_nearest,
             "BaseQuantizer": BaseQuantizer}
    exec(source.partition("QuantizerRegistry")[0], names)
    assert "results_are_repeatable" in check_quantizer(names["StochasticQuantizer"])
