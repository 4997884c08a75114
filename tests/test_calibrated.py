"""Calibrated runs: both doors give the same codes, killed runs go on, wrong ones are refused."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
import yaml

from llmquant import quantize
from llmquant.core.errors import UsageError
from llmquant.core.quant_linear import QuantLinear
from llmquant.core.quantizer_registry import QuantizerRegistry

TEXT = dict(num_samples=6, max_length=48, batch_size=2)
KEYS = {f"calibration.{key}": value for key, value in TEXT.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "Tiny checkpoints with a tokenizer, made when they are asked for."
    made, root = {}, tmp_path_factory.mktemp("checkpoints")

    def get(kind: str, layers: int = 2) -> Path:
        if (kind, layers) not in made:
            path = root / f"{kind}-{layers}"
            tiny.make(kind, path, torch.float16, layers=layers)
            tiny_tokenizer.save(path)
            made[kind, layers] = path
        return made[kind, layers]

    return get


def digests(export: Path) -> dict:
    "What each layer's codes, scales and zeros came to."
    return yaml.safe_load((export / "quantization_report.yaml").read_text())["proof"]["digests"]


def bytes_of(export: Path) -> dict:
    "SHA-256 of shards, index and configuration."
    files = sorted([*export.glob("*.safetensors"), export / "model.safetensors.index.json", export / "config.json"])
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("kind, method, options", [
    ("llama", "gptq", {}), ("qwen2", "gptq", {"true_sequential": True}), ("deepseek_v3", "gptq", {"propagate": 0.0}),
    ("llama", "awq", {}), ("qwen3", "awq", {"symmetric": True})])
def test_both_doors_give_the_same_codes(checkpoints, tmp_path, kind, method, options):
    from transformers import AutoModelForCausalLM
    path = checkpoints(kind)
    config = {"quantization": {method: options}, "calibration": TEXT}
    quantize(path, tmp_path / "out", method, config=config, bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    QuantizerRegistry.get(method)().quantize(model, bits=4, group_size=32, config=config)
    found = {m.checkpoint_name: m.quantized_weight().digest() for m in model.modules() if isinstance(m, QuantLinear)}
    assert found == digests(tmp_path / "out") and found
    from llmquant.core.model_registry import ModelRegistry
    ModelRegistry.for_config(model.config.to_dict()).save_quantized(model, tmp_path / "saved", source=path)
    assert bytes_of(tmp_path / "saved") == bytes_of(tmp_path / "out")


@pytest.mark.parametrize("method, kills", [("gptq", 20), ("awq", 5)])
def test_a_killed_run_goes_on_and_ends_the_same(checkpoints, tmp_path, method, kills):
    path, out = checkpoints("llama", 6), tmp_path / "out"
    keys = {**KEYS, "method": method, "bits": 4, "group_size": 32, "max_shard_size": "1MB"}
    command = [sys.executable, Path(__file__).with_name("killed_runs.py"), path, out, str(kills), "1", json.dumps(keys)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["killed"] == kills
    assert bytes_of(out) == bytes_of(Path(f"{out}-timed")) and len(bytes_of(out)) > 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-timed"]


def stopped(monkeypatch, path, out, behind, **keys):
    "Run until a block is finished, then stop as Ctrl-C does."
    import llmquant.core.decoder_walk as decoder_walk
    step = decoder_walk.BlockWalk.step

    def once(self, index, *rest):
        if index == behind: raise KeyboardInterrupt
        return step(self, index, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(decoder_walk.BlockWalk, "step", once)
        with pytest.raises(KeyboardInterrupt): quantize(path, out, "gptq", **KEYS, **keys)


def test_another_recipe_does_not_go_on(checkpoints, tmp_path, monkeypatch):
    path, out = checkpoints("llama", 6), tmp_path / "out"
    stopped(monkeypatch, path, out, 3, bits=4, group_size=32)
    with pytest.raises(UsageError, match="bits: 4 there, 3 here.*--no-resume"):
        quantize(path, out, "gptq", bits=3, group_size=32, **KEYS)
    with pytest.raises(UsageError, match="model: "):
        quantize(checkpoints("qwen3", 6), out, "gptq", bits=4, group_size=32, **KEYS)
    report = quantize(path, out, "gptq", bits=3, group_size=32, resume=False, **KEYS)
    assert len(report["layers"]) == 42 and report["scheme"]["bits"] == 3


def test_target_layers_and_overrides(checkpoints, tmp_path):
    overrides = [{"match": r".*\.down_proj", "bits": 8},
                 {"match": r".*\.2\..*up_proj|.*\.2\..*gate_proj", "skip": True}]
    report = quantize(checkpoints("llama", 6), tmp_path / "out", "gptq", bits=4, group_size=32, layers=[1, 2],
                      overrides=overrides, **KEYS)
    layers = report["layers"]
    assert len(layers) == 12 and "model.layers.2.mlp.up_proj" not in layers
    in_8_bits = {name for name, layer in layers.items() if layer["scheme"].startswith("W8")}
    assert in_8_bits == {f"model.layers.{i}.mlp.down_proj" for i in (1, 2)}
    assert report["calibration"]["passes_over_each_block"] < 2  # nothing runs behind the last quantized block


@pytest.mark.parametrize("damage, says", [(float("nan"), "gives NaN or infinity")])
def test_a_broken_block_is_named(checkpoints, tmp_path, damage, says):
    from safetensors.torch import load_file, save_file
    path = tmp_path / "model"
    tiny.make("llama", path, torch.float16, layers=3)
    tiny_tokenizer.save(path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = damage
    tensors["model.layers.1.mlp.gate_proj.weight"][:] = damage
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=says) as error:
        quantize(path, tmp_path / "out", "gptq", bits=4, group_size=32, **KEYS)
    assert "layers.1" in str(error.value) or "block 1" in str(error.value)


def test_a_ceiling_is_kept_or_refused(checkpoints, tmp_path):
    path = checkpoints("llama")
    with pytest.raises(UsageError, match="max_memory 0.15 GB is too little: this run takes"):
        quantize(path, tmp_path / "out", "gptq", bits=4, group_size=32, max_memory="150MB", **KEYS)
    assert not (tmp_path / "out").exists()
    plenty = quantize(path, tmp_path / "out", "gptq", bits=4, group_size=32, max_memory="8GB", **KEYS)
    assert plenty["calibration"]["hidden_states"] == "in memory"


def test_self_writes_its_own_text(checkpoints, tmp_path):
    keys = {**KEYS, "calibration.dataset": "self", "bits": 4, "group_size": 32}
    first, again, other = (quantize(checkpoints("llama"), tmp_path / name, "gptq", seed=seed, **keys)["calibration"]
                           for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first["fingerprint"] == again["fingerprint"] != other["fingerprint"]


def test_awq_asks_for_pairs_before_any_work(checkpoints, tmp_path):
    said = "awq needs smoothing pairs, and the adapter default names none for model type 'gemma2'"
    with pytest.raises(UsageError, match=said):
        quantize(checkpoints("gemma2"), tmp_path / "out", "awq", bits=4, group_size=32, **KEYS)
    assert not (tmp_path / "out").exists()
    clipped = {"quantization": {"awq": {"n_grid": 0}}}  # clipping alone needs no pairs
    for name, method, config in ("a", "gptq", None), ("b", "awq", clipped):
        report = quantize(checkpoints("gemma2"), tmp_path / name, method, bits=4, group_size=32, config=config, **KEYS)
        assert len(report["layers"]) == 14
