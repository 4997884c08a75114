"The report of an export as the recipe of another one."
import hashlib
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import yaml

from llmquant.cli import main as cli
from llmquant.core.errors import UsageError
from llmquant.export.export import REPORT
from llmquant.utils.config import resolve

FILE = """
quantization:
  method: gptq
  bits: 8
  group_size: -1
  outlier_suppression: [rotation, smooth_quant]
  activations: {dynamic: false, dynamic_range: percentile, percentile: 99.5}
  overrides:
    - {match: '.*\\.down_proj', activations: {bits: 8, symmetric: true}}
    - {match: '.*\\.0\\.mlp\\..*', activations: 16}
    - {match: '.*\\.1\\.self_attn\\.o_proj', skip: true}
  gptq: {symmetric: true, damp_percent: 0.05}
  smooth_quant: {alpha: 0.4}
output: {max_shard_size: 1MB}
"""
CALIBRATED = "--set calibration.num_samples=3 --set calibration.max_length=40 --seed 5 --torch-dtype bfloat16"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny.make("llama", tmp_path_factory.mktemp("model") / "llama")
    tiny_tokenizer.save(path)
    return path


def shards(folder: Path) -> dict:
    "SHA-256 of every file of tensors, and of what says how to read them."
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("text, file", [
    ("--bits 4 --group-size 32 --layers 0 --format gptq --set quantization.minmax.dynamic_range=mse --overwrite "
     "--set quantization.sym=true", ""),
    ("--activation-bits 8", ""), (CALIBRATED, FILE)], ids=["flags", "implied", "calibrated"])
def test_a_report_makes_the_same_export(model, tmp_path, capsys, text, file):
    "Byte for byte; what is given beside it wins, and what concerned the first run alone is not taken."
    given = []
    if file:
        (tmp_path / "r.yaml").write_text(file)
        given = ["--config", str(tmp_path / "r.yaml")]
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    run = lambda out, *more: cli.main(["--model-path", str(model), "--output-path", str(out), "--quiet", *more])
    assert run(first, *given, *text.split()) == 0, capsys.readouterr().err
    assert run(second, "--config", str(first / REPORT)) == 0, capsys.readouterr().err
    assert shards(first) == shards(second) and len(shards(first)) > 1
    reports = [yaml.safe_load((folder / REPORT).read_text()) for folder in (first, second)]
    values = [{name: entry["value"] for name, entry in report["recipe"].items()} for report in reports]
    assert {name for name in values[0] if values[0][name] != values[1][name]} <= {"output_path", "overwrite"}
    assert not values[1]["overwrite"]
    other = "float16" if "bfloat16" in text else "bfloat16"
    assert run(third, "--config", str(first / REPORT), "--torch-dtype", other) == 0
    assert shards(third) != shards(first)


def test_what_a_report_cannot_say(model, tmp_path):
    "A model that was quantized in memory has no recipe; a changed report is refused where it is wrong."
    from llmquant.core.model_registry import ModelRegistry
    from llmquant.quantizers.minmax_quantizer import MinMaxQuantizer
    quantized = MinMaxQuantizer().quantize(tiny.build("llama", layers=1), bits=4, group_size=32)
    ModelRegistry.for_config(quantized.config.to_dict()).save_quantized(quantized, tmp_path / "out")
    with pytest.raises(UsageError, match="out/quantization_report.yaml: is a report without a recipe.*give a recipe file"):
        resolve(config_path=tmp_path / "out" / REPORT)
    (tmp_path / "changed.yaml").write_text("llmquant: '0.1'\nlayers:\n  0: {a: 1}\nrecipe:\n  bits:\n    value: 5\n    from: x\n")
    with pytest.raises(UsageError, match="changed.yaml:6: quantization.bits: minmax does not support 5"):
        resolve(config_path=tmp_path / "changed.yaml")


@pytest.mark.parametrize("text, said", [
    ("quantization:\n  overrides:\n    - match: a\n      bits: 4\n    - match: b\n", r"r.yaml:5: quantization.overrides\[1\]: names"),
    ("quantization:\n  overrides:\n    - bits: 4\n", r"r.yaml:3: quantization.overrides\[0\].match is missing"),
    ("quantization:\n  overrides:\n\n    - match: a\n      bits: 5\n", r"r.yaml:5: quantization.overrides\[0\].bits: minmax does not"),
    ("quantization:\n  overrides:\n    - {match: a, bits: 4}\n    - 3\n", r"r.yaml:4: quantization.overrides\[1\]: 3 is int"),
    ("calibration:\n  dataset:\n    - {dataset: a}\n    -\n      weight: 2\n", r"r.yaml:5: calibration.dataset\[1\].dataset: is missing"),
    ("quantization:\n  bits: five\n", r"r.yaml:2: quantization.bits: 'five'")])
def test_an_item_of_a_list_is_named_with_its_own_line(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=said): resolve(config_path=tmp_path / "r.yaml")
