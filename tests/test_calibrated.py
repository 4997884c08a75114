"""Calibrated runs: both entry points give the same codes, killed runs resume, wrong ones are refused."""
import hashlib
import json
import os
import re
import shutil
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
from llmquant.core.quantizer_registry import QuantizerRegistry
from llmquant.in_memory.quant_linear import QuantLinear
from llmquant.pipeline.run import check
from llmquant.utils.config import resolve
from llmquant.sequential import block_flow

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
    return yaml.safe_load((export / "quantization_report.yaml").read_text())["verification"]["digests"]


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


SUPPRESSED = {"outlier_suppression": "rotation,smooth_quant", "bits": 8, "group_size": -1, "quantization.gptq.sym": True,
              "quantization.activations": {"granularity": "tensor"}}


@pytest.mark.parametrize("method, kills, more", [("gptq", 20, {}), ("awq", 5, {}), ("gptq", 4, SUPPRESSED)])
def test_a_killed_run_goes_on_and_ends_the_same(checkpoints, tmp_path, method, kills, more):
    path, out = checkpoints("llama", 6), tmp_path / "out"
    keys = {**KEYS, "method": method, "bits": 4, "group_size": 32, "max_shard_size": "1MB", **more}
    command = [sys.executable, Path(__file__).with_name("killed_runs.py"), path, out, str(kills), "1", json.dumps(keys)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["killed"] == kills
    assert bytes_of(out) == bytes_of(Path(f"{out}-timed")) and len(bytes_of(out)) > 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-timed"]


def stopped(monkeypatch, path, out, behind, **keys):
    "Run until a block is finished, then stop as Ctrl-C does."
    import llmquant.sequential.decoder_loop as decoder_loop
    step = decoder_loop.BlockLoop.step

    def once(self, index, *rest):
        if index == behind: raise KeyboardInterrupt
        return step(self, index, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(decoder_loop.BlockLoop, "step", once)
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
    assert report["calibration"]["forward_passes_per_block"] < 2  # nothing runs behind the last quantized block


def changed(path, source, **values):
    "A copy of a checkpoint in which the middle of some tensors is another one."
    from safetensors.torch import load_file, save_file
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    for name, value in values.items(): tensors[name].flatten()[1000:1003] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("name", ["mlp.up_proj", "input_layernorm", "self_attn.o_proj"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_broken_tensor_is_named(checkpoints, tmp_path, name, method):
    from safetensors.torch import load_file, save_file
    path = changed(tmp_path / "model", checkpoints("llama", 6))
    tensors = load_file(path / "model.safetensors")
    tensors[f"model.layers.1.{name}.weight"].view(-1)[5:8] = float("inf")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    size = tensors[f"model.layers.1.{name}.weight"].numel()
    said = f"tensor model.layers.1.{name}.weight: 3 of {size} values are NaN or infinite"
    with pytest.raises(UsageError, match=said) as error:
        quantize(path, tmp_path / "out", method, bits=4, group_size=32, **KEYS)
    note, = error.value.__notes__
    assert "1 finished block kept in" in note and "the same command resumes" not in note


def test_another_model_with_the_same_ends_does_not_go_on(checkpoints, tmp_path, monkeypatch):
    "What differs is in the middle of one tensor of a finished block."
    path, out = checkpoints("llama", 6), tmp_path / "out"
    stopped(monkeypatch, path, out, 3, bits=4, group_size=32)
    other = changed(tmp_path / "other", path, **{"model.layers.1.self_attn.q_proj.weight": 0.5})
    said = "3 finished blocks of another model .tensor model.layers.1.self_attn.q_proj.weight is not what"
    with pytest.raises(UsageError, match=said) as error:
        quantize(other, out, "gptq", bits=4, group_size=32, **KEYS)
    assert "--no-resume" in str(error.value) and not hasattr(error.value, "__notes__")
    # the same bytes at another path go on, and so does a model that differs in what is still to come
    later = changed(tmp_path / "later", path, **{"model.layers.4.self_attn.q_proj.weight": 0.5})
    report = quantize(later, out, "gptq", bits=4, group_size=32, **KEYS)
    assert report["resumed"]["at_block"] == 3 and report["resumed"]["seconds_before"]["cpu"] > 0
    quantize(later, tmp_path / "whole", "gptq", bits=4, group_size=32, **KEYS)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_a_resumed_report_counts_all_passes(checkpoints, tmp_path, monkeypatch):
    path, out = checkpoints("llama", 6), tmp_path / "out"
    whole = quantize(path, tmp_path / "whole", "gptq", bits=4, group_size=32, **KEYS)
    stopped(monkeypatch, path, out, 4, bits=4, group_size=32)
    same = shutil.copytree(path, tmp_path / "elsewhere")
    report = quantize(same, out, "gptq", bits=4, group_size=32, **KEYS)
    assert "resumed" not in whole and report["resumed"]["at_block"] == 4
    # a resumed run looks once more which Linears share an input
    once = report["calibration"]["forward_passes_per_block"] - whole["calibration"]["forward_passes_per_block"]
    assert 0 <= once <= 0.1
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_another_tokenizer_does_not_go_on(checkpoints, tmp_path, monkeypatch):
    "Other tokens are another calibration."
    path, out = checkpoints("llama", 6), tmp_path / "out"
    stopped(monkeypatch, path, out, 3, bits=4, group_size=32)
    other = shutil.copytree(path, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, e = (next(n for n in vocabulary if n == letter) for letter in "ae")
    vocabulary[a], vocabulary[e] = vocabulary[e], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="calibration: .*--no-resume"):
        quantize(other, out, "gptq", bits=4, group_size=32, **KEYS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError])
def test_a_failed_run_leaves_a_model_in_memory_as_it_was(monkeypatch, method, error, dtype):
    from llmquant.sequential.block_loop import BlockLoop
    model, solve = tiny.build("llama", dtype), BlockLoop.solve
    before = {name: (p, p.clone()) for name, p in model.state_dict(keep_vars=True).items()}
    kinds = {name: type(module) for name, module in model.named_modules()}

    def failing(self, modules, plans, stats):
        if any("layers.1.mlp.down" in name for name in modules): raise error("in the last group of block 1")
        return solve(self, modules, plans, stats)

    monkeypatch.setattr(BlockLoop, "solve", failing)
    with pytest.raises(error):
        QuantizerRegistry.get(method)().quantize(model, bits=4, group_size=32,
                                                 calibration_data=torch.randint(3, 512, (4, 32)))
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and {n: type(m) for n, m in model.named_modules()} == kinds
    for name, (parameter, value) in before.items():
        assert after[name] is parameter and torch.equal(parameter, value) and parameter.dtype == value.dtype
    assert not getattr(model, "edited_tensors", None) and not getattr(model.config, "quantization_config", None)


def test_windows_beyond_the_models_positions(checkpoints, tmp_path):
    path = checkpoints("llama")
    said = "calibration.max_length: windows of 513 tokens, and the model has positions for 512"
    with pytest.raises(UsageError, match=said):
        quantize(path, tmp_path / "out", "gptq", group_size=32, **{**KEYS, "calibration.max_length": 513})
    keys = {name: value for name, value in KEYS.items() if name != "calibration.max_length"}
    facts = quantize(path, tmp_path / "out", "gptq", bits=4, group_size=32, **keys)["calibration"]
    assert facts["max_length"] == 512 and facts["max_length_because"].startswith("2048 by default")
    model, run = tiny.build("llama"), QuantizerRegistry.get("gptq")().quantize
    for tokens, said in ((torch.zeros(1, 513).long(), "calibration_data: windows of 513 tokens.*positions for 512"),
                         (torch.full((1, 8), 512), "has ids up to 512, and the model's vocab_size is 512")):
        with pytest.raises(UsageError, match=said): run(model, bits=4, group_size=32, calibration_data=tokens)


def test_self_in_memory_is_the_model_at_hand(monkeypatch, tmp_path):
    "No folder is asked for its tokenizer, not even the working directory."
    tiny_tokenizer.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = {"calibration": {"dataset": "self", "num_samples": 2, "max_length": 16}}
    model = tiny.build("llama")
    assert not model.name_or_path
    QuantizerRegistry.get("gptq")().quantize(model, bits=4, group_size=32, config=config)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    with pytest.raises(UsageError, match="gptq measures activations and the model does not say which folder"):
        QuantizerRegistry.get("gptq")().quantize(tiny.build("llama"), bits=4, group_size=32)


def test_self_is_written_by_the_distribution_itself(checkpoints, tmp_path):
    "A generation_config.json that allows one token only, and a start of one's own, changes nothing."
    keys = {**KEYS, "calibration.dataset": "self", "bits": 4, "group_size": 32}
    told = shutil.copytree(checkpoints("llama"), tmp_path / "told")
    (told / "generation_config.json").write_text(json.dumps({
        "do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 5.0, "max_length": 4}))
    prints = [quantize(path, tmp_path / f"out-{n}", "gptq", **keys)["calibration"]["fingerprint"]
              for n, path in enumerate((checkpoints("llama"), told))]
    assert prints[0] == prints[1]


def test_the_output_folder_is_looked_at_first(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UsageError, match="full: is not empty"):
        quantize(tmp_path / "no-model", tmp_path / "full", "gptq", bits=4)
    from llmquant.pipeline.run import check
    from llmquant.utils.config import resolve
    with pytest.raises(UsageError, match="full: is not empty"):
        check(resolve({"model_path": str(tmp_path / "no-model"), "output_path": str(tmp_path / "full")}))


MEASURED = """
import json, sys
from pathlib import Path
from llmquant.pipeline.run import quantize
out, path, keys = sys.argv[1:]
report = quantize(path, out, "gptq", bits=4, group_size=32, device="cpu", **json.loads(keys))
peak, = [int(line.split()[1]) >> 10 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(json.dumps([peak, report["memory"]["predicted_peak_mib"], report["calibration"]["hidden_states"]]))
"""


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_decoder_is_looked_at_once(checkpoints, tmp_path, monkeypatch, method):
    "How blocks are called is found before the run, by a pass without weights, and not once more when it begins."
    passes, real = [], block_flow.watch_calls
    monkeypatch.setattr(block_flow, "watch_calls", lambda *given: passes.append(given) or real(*given))
    quantize(checkpoints("llama"), tmp_path / "out", method=method, group_size=32, **KEYS)
    assert len(passes) == 1


def test_a_peak_is_this_process_own():
    "A process that a larger one starts does not report the other's memory, as `ru_maxrss` does after fork and exec."
    large = b"x" * (2**30)
    script = """
from pathlib import Path
from llmquant.export.report import peak_memory_mib
peak, = [int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(peak >> 10, peak_memory_mib())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    own, reported = map(int, done.stdout.split())
    assert len(large) >> 20 > own and abs(reported - own) <= 1


@pytest.mark.parametrize("limited", [False, True])
def test_the_predicted_peak_is_the_measured_one(tmp_path, limited):
    "Windows of 4096 tokens, four at a time; under a memory limit hidden states go to files and the peak stays below it."
    tiny.make("llama", tmp_path / "model", torch.float16, layers=2, max_position_embeddings=4096, hidden_size=256,
              intermediate_size=1024)
    tiny_tokenizer.save(tmp_path / "model")
    keys = {"calibration.num_samples": 8, "calibration.max_length": 4096, "calibration.batch_size": 2}

    def run(name, **more):
        done = subprocess.run([sys.executable, "-c", MEASURED, tmp_path / name, tmp_path / "model",
                               json.dumps(keys | more)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else done.stderr

    peak, predicted, where = run("out")
    print(peak, predicted, where)
    assert peak <= predicted < 1.2 * peak and where == "in memory, and in files for resuming"
    if not limited: return
    allowed = predicted - 20
    peak, predicted, where = run("under", max_memory=f"{allowed}MiB")
    print(peak, predicted, where)
    assert peak <= allowed and where == "in files"


def test_a_memory_limit_holds_or_is_refused(checkpoints, tmp_path):
    path = checkpoints("llama")
    with pytest.raises(UsageError, match="max_memory 143 MiB is too little: this run takes [0-9]+ MiB"):
        quantize(path, tmp_path / "out", "gptq", bits=4, group_size=32, max_memory="150MB", **KEYS)
    assert not (tmp_path / "out").exists()
    said = []
    for limit in "100MiB", "150MB": # whatever is allowed, what is said to be needed is the calibrated run's need
        with pytest.raises(UsageError, match=r" \+ statistics [0-9]+ MiB ") as refused:
            quantize(path, tmp_path / "out", "gptq", bits=4, group_size=32, max_memory=limit, **KEYS)
        said.append(int(re.search(r"takes ([0-9]+) MiB", str(refused.value))[1]))
    assert abs(said[0] - said[1]) < 30, said
    plenty = quantize(path, tmp_path / "out", "gptq", bits=4, group_size=32, max_memory="8GB", **KEYS)
    assert plenty["calibration"]["hidden_states"] == "in memory, and in files for resuming"


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


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_time_of_a_search_is_told_for_the_device_of_the_run(checkpoints, tmp_path, monkeypatch, device):
    "`check` times a product where the run will compute."
    seen = []
    monkeypatch.setattr("llmquant.pipeline.calibrated.products_per_second", lambda where: seen.append(where) or 1e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
    check(resolve({"model_path": str(checkpoints("llama")), "method": "minmax", "group_size": 32,
                   "quantization.outlier_suppression": "smooth_quant", **KEYS}))
    assert seen == [device]


def test_layers_with_fewer_tokens_than_inputs_are_warned_of(checkpoints, tmp_path, caplog):
    "In one line, with a layer and its figures; nothing where the text is long enough."
    def warned(**more):
        caplog.clear()
        report = quantize(checkpoints("llama"), tmp_path / "out", "gptq", bits=4, group_size=32, overwrite=True, **more)
        lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "in_features" in r.getMessage()]
        return lines, sum("few_tokens" in layer for layer in report["layers"].values())
    keys = lambda samples, length: {"config": {"calibration": {"num_samples": samples, "max_length": length}}}
    (line,), few = warned(**keys(1, 8))
    assert line.startswith(f"{few} of ") and "(8 for " in line and "calibration.num_samples" in line
    assert warned(**keys(40, 32)) == ([], 0)
