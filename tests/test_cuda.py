"""Calibrated methods on a GPU: the CPU's errors, the same codes through both entry points. Skipped where there is none."""
import sys
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import measure_statistics as statistics

from llmquant import quantize
from llmquant.core.quantizer_registry import QuantizerRegistry
from llmquant.in_memory.quant_linear import QuantLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
METHODS = {"minmax": {}, "gptq": {}, "gptq, true_sequential": {"true_sequential": True},
           "gptq, order": {"desc_act": True}, "awq": {}, "hqq": {}, "hqq, float zeros": {"float_zeros": True}}


def errors(name, device, model=None):
    "Relative error of each Linear of a tiny model quantized on a device."
    quantizer = QuantizerRegistry.get(name.split(",")[0])()
    model = (tiny.build("llama", torch.float32) if model is None else model).to(device)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(3, vocabulary, (8, 64), generator=torch.Generator().manual_seed(0))
    config = {**METHODS[name], **({} if quantizer.data_free else {"calibration": {"batch_size": 4}})}
    quantizer.quantize(model, bits=4, group_size=32, calibration_data=None if quantizer.data_free else tokens,
                       config=config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert all(m.qweight.device.type == device for m in layers.values())
    return {n: m.relative_error for n, m in layers.items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_gives_the_errors_of_the_cpu(name):
    here, there = errors(name, "cpu"), errors(name, "cuda")
    assert here.keys() == there.keys() and len(here) == 14
    for layer, error in here.items(): assert there[layer] == pytest.approx(error, rel=0.02), layer


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text", "glm_moe_dsa", "deepseek_v3", "qwen3_next", "whisper"])
def test_what_travels_between_blocks_travels_on_a_gpu(kind):
    "Decoders whose blocks hand on more than hidden states, or whose arguments differ by window."
    here, there = (errors("gptq", device, statistics.build(kind)) for device in ("cpu", "cuda"))
    assert here.keys() == there.keys() and here
    for layer, error in here.items(): assert there[layer] == pytest.approx(error, rel=0.05, abs=1e-3), layer


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_both_doors_give_the_same_codes_on_a_gpu(method, tmp_path):
    from transformers import AutoModelForCausalLM
    path = tmp_path / "model"
    tiny.make("llama", path, torch.float16)
    tiny_tokenizer.save(path)
    config = {"calibration": {"num_samples": 6, "max_length": 48, "batch_size": 2}}
    quantize(path, tmp_path / "out", method, config=config, bits=4, group_size=32, device="cuda")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").cuda()
    QuantizerRegistry.get(method)().quantize(model, bits=4, group_size=32, config=config)
    wanted = yaml.safe_load((tmp_path / "out" / "quantization_report.yaml").read_text())["verification"]["digests"]
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    digests = {m.checkpoint_name: m.quantized_weight().digest() for m in layers}
    assert digests == wanted and len(wanted) == 14
