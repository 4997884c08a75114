"""Checkpoints as they are found: what transformers accepts is quantized, what would be misread is refused by name."""
import json
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
from safetensors.torch import load_file, save_file

from llmquant import load, quantize
from llmquant.calibration.data import load_calibration
from llmquant.core.errors import UsageError
from llmquant.pipeline import check
from llmquant.utils.config import resolve

GRID = dict(bits=4, group_size=32)
TEXT = {"calibration.num_samples": 2, "calibration.max_length": 32}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "Tiny checkpoints of one file with a tokenizer, made when they are asked for."
    made, root = {}, tmp_path_factory.mktemp("checkpoints")

    def get(kind: str, **changes) -> Path:
        key = str((kind, sorted(changes.items())))
        if key not in made:
            made[key] = root / str(len(made))
            tiny.make(kind, made[key], torch.bfloat16, **changes)
            tiny_tokenizer.save(made[key])
        return made[key]

    return get


def variant(source: Path, folder: Path, tensors=None, **config) -> Path:
    "A copy of a checkpoint with other tensors and other values in config.json."
    shutil.copytree(source, folder)
    if tensors is not None: save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def tensors_of(folder: Path) -> dict:
    "All tensors of an export or a checkpoint."
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def refusal(model: Path, **keys) -> str:
    "What `check` says; a run must say the same before it writes anything."
    with pytest.raises(UsageError) as checked: check(resolve({"model_path": str(model), **GRID, **keys}))
    with pytest.raises(UsageError) as ran: quantize(model, model.parent / f"{model.name}-out", **GRID, **keys)
    assert str(checked.value) == str(ran.value) and "\n" not in str(ran.value)
    assert not list(model.parent.glob(f"*{model.name}-out*"))
    return str(ran.value)


@pytest.mark.parametrize("method", ["minmax", "gptq"])
def test_prediction_layers_are_copied(checkpoints, tmp_path, method):
    model = checkpoints("deepseek_v3")
    extra = {name.replace(".layers.1.", ".layers.2."): tensor.clone()
             for name, tensor in tensors_of(model).items() if ".layers.1." in name}
    extra["model.layers.2.eh_proj.weight"] = torch.randn(128, 256).bfloat16()
    model = variant(model, tmp_path / "model", {**tensors_of(model), **extra}, num_nextn_predict_layers=1)
    quantize(model, tmp_path / "out", method, **GRID, **TEXT)
    found = tensors_of(tmp_path / "out")
    assert len(extra) > 10 and all(found[name].equal(tensor) for name, tensor in extra.items())


def test_the_index_decides(checkpoints, tmp_path):
    "Between shards that it names and a single file that it does not."
    model = variant(checkpoints("llama"), tmp_path / "model")
    whole = tensors_of(model)
    save_file(whole, model / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(whole, "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"other.weight": torch.ones(2, 2)}, model / "model.safetensors", metadata={"format": "pt"})
    quantize(model, tmp_path / "out", **GRID)
    quantize(checkpoints("llama"), tmp_path / "plain", **GRID)
    found, plain = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert found.keys() == plain.keys() and all(found[name].equal(plain[name]) for name in plain)


def test_side_files_may_be_links(checkpoints, tmp_path):
    model = variant(checkpoints("llama"), tmp_path / "model")
    (tmp_path / "shared.json").write_bytes((model / "tokenizer.json").read_bytes())
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(tmp_path / "shared.json")
    quantize(model, tmp_path / "out", **GRID)
    copy = tmp_path / "out" / "tokenizer.json"
    assert not copy.is_symlink() and copy.read_bytes() == (tmp_path / "shared.json").read_bytes()


@pytest.mark.parametrize("section", [
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}])
def test_a_stale_section_is_left_out(checkpoints, tmp_path, section, caplog):
    base = checkpoints("llama")
    model = variant(base, tmp_path / "model", **section)
    quantize(model, tmp_path / "out", **GRID)
    assert "the section quantization_config is left out" in caplog.text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llmquant_method"] == "minmax"
    assert "quantization_config" not in config.get("text_config", {})
    if "text_config" in section: return
    found, plain = load(model).state_dict(), load(base).state_dict()
    assert all(found[name].equal(plain[name]) for name in plain)


def test_a_byte_level_tokenizer_under_another_class_is_read_as_it_is(checkpoints, tmp_path, caplog):
    "tokenizer_config.json names a class of SentencePiece; the windows are pieces of the text all the same."
    from tokenizers import Tokenizer
    model = variant(checkpoints("llama"), tmp_path / "model")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>"}')
    text = "".join(f"{number} bottles, {number * number} glasses;\n" for number in range(400))
    (tmp_path / "text.txt").write_text(text)
    data = load_calibration(tmp_path / "text.txt", model, 512, 4, 50)
    alone = Tokenizer.from_file(str(model / "tokenizer.json"))
    windows = [alone.decode(window.tolist()) for window in data.tokens]
    assert "".join(windows) == text[:len("".join(windows))] and all(" bottles, " in window for window in windows)
    assert "gives other ids than tokenizer.json" in caplog.text
