"Components of other packages: what they may leave out, and what nobody asks of them."
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from llmquant.core.errors import UsageError
from llmquant.core.outlier_suppression_registry import OutlierSuppressionRegistry
from llmquant.core.quantizer_registry import QuantizerRegistry
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
