"The front door: the guide's YAML and commands as they stand, bad input, exit status. No model is needed here."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

import llmquant
from llmquant.cli import main as cli
from llmquant.core.errors import LLMQuantError, UsageError, VerificationError
from llmquant.core.options import SYMMETRIC, Option
from llmquant.core.quantizer_registry import BaseQuantizer, QuantizerRegistry
from llmquant.core.scheme import QuantScheme
from llmquant.utils.config import recipe_to_dict, resolve
from llmquant.utils.recipe_keys import KEYS

ROOT = Path(__file__).parents[1]

HQQ = """
# HQQ量化配置文件
quantization:
  method: "hqq"
  bits: 4
  group_size: 128
  layer_wise: false
  outlier_suppression: null
  
  # HQQ特定参数
  hqq:
    # 添加HQQ特定的配置参数
    pass

model:
  trust_remote_code: true
  device_map: "auto"
  torch_dtype: "float16"

calibration:
  dataset: null
  num_samples: 100
  batch_size: 1
  max_length: 2048

output:
  save_format: "safetensors"
  save_quantization_config: true
"""
MINMAX = """
quantization:
  method: "minmax"
  bits: 8
  group_size: 0  # 0表示不使用分组
  
  minmax:
    symmetric: false      # 是否使用对称量化
    per_channel: false    # 是否使用逐通道量化
    dynamic_range: "minmax"  # 动态范围计算方式
"""
CUSTOM = """
quantization:
  method: "custom"
  custom_param1: "value1"
  custom_param2: "value2"
"""


@pytest.fixture
def dummies():
    "Two methods that the guide mentions; its hqq takes no option of its own, its custom one takes two texts."
    class Dummy(BaseQuantizer):
        def quantize_weight(self, weight, stats, scheme): return None

    class HQQ(Dummy):
        name, supported_bits = "hqq", (2, 3, 4, 8)

    class Custom(Dummy):
        name = "custom"
        options = (SYMMETRIC, Option("custom_param1", str, "a"), Option("custom_param2", str, "b"))
        def needed_statistics(self): return ("maxima",)

    registry = QuantizerRegistry._registry
    registry.names()
    before = dict(registry.classes), dict(registry.patterns)
    QuantizerRegistry.register("hqq", HQQ)
    QuantizerRegistry.register("custom", Custom)
    yield
    registry.classes, registry.patterns = before


def recipe(text, tmp_path, command_line=None):
    "What `resolve` makes of YAML text."
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return resolve(command_line, config_path=path)


@pytest.mark.parametrize(("text", "expected", "options", "given"), [
    (HQQ, dict(method="hqq", bits=4, group_size=128, layer_wise=False, outlier_suppression=(), trust_remote_code=True,
               device_map="auto", torch_dtype="float16", save_format="safetensors", save_quantization_config=True,
               calibration=dict(dataset=None, column=None, num_samples=100, batch_size=1, max_length=2048, seed=None)),
     dict(symmetric=False), 14),
    (MINMAX, dict(method="minmax", bits=8, group_size=0),
     dict(symmetric=False, per_channel=False, dynamic_range="minmax"), 6),
    (CUSTOM, dict(method="custom", bits=4), dict(custom_param1="value1", custom_param2="value2"), 3),
], ids=["hqq", "minmax", "custom"])
def test_guide_yaml(text, expected, options, given, tmp_path, dummies):
    "Every YAML block of the guide parses as it stands, and each of its keys arrives."
    found = recipe(text, tmp_path)
    assert {key: getattr(found, key) for key in expected} == expected
    assert {key: found.options[key] for key in options} == options
    assert sum(origin.startswith("file ") for origin in found.origins.values()) == given
    assert json.loads(json.dumps(recipe_to_dict(found)))["bits"]["value"] == expected["bits"]


def test_every_key_of_a_block_matters(tmp_path, dummies):
    "No key of the guide's blocks is decoration: misspelling any one of them is refused, by file, line and name."
    for block in HQQ, MINMAX, CUSTOM:
        for number, line in enumerate(block.splitlines(), 1):
            key = line.split("#")[0].partition(":")[0].strip()
            if ":" not in line.split("#")[0]:
                continue
            text = block.replace(line, line.replace(key, key + "zzz", 1), 1)
            if key == "method":   # without it minmax is chosen, and the misspelt key is unknown to it
                text = text.replace("custom_param", "#")
            with pytest.raises(UsageError) as error:
                recipe(text, tmp_path)
            assert f"recipe.yaml:{number}: " in str(error.value) and f"{key}zzz" in str(error.value), str(error.value)


def test_shared_file(tmp_path, dummies):
    "A file may hold sections of several methods: the chosen one's counts, the others' are checked all the same."
    text = "quantization: {minmax: {symmetric: true}, hqq: pass, custom: {custom_param1: x}}"
    assert recipe(text, tmp_path).options["symmetric"] is True
    chosen = recipe(text, tmp_path, {"method": "custom"})
    assert (chosen.options["custom_param1"], chosen.options["symmetric"]) == ("x", False)
    with pytest.raises(UsageError, match="custom_param1: 3 is int"):
        recipe(text.replace(": x", ": 3"), tmp_path)
    with pytest.raises(UsageError, match="quantization.quip: unknown key"):
        recipe("quantization: {quip: {}}", tmp_path)


def test_unregistered_method(tmp_path):
    "A file for a method that does not exist is refused because of the method, not because of its section."
    with pytest.raises(UsageError, match="unknown method 'quip'"):
        recipe(HQQ.replace("hqq", "quip"), tmp_path)


def test_calibration_dataset(tmp_path, dummies):
    "A dataset is refused by data-free methods and taken by the others; the command line overrules the file."
    text = "calibration: {dataset: wikitext}"
    with pytest.raises(UsageError, match="minmax needs no calibration data; remove calibration.dataset"):
        recipe(text, tmp_path)
    assert recipe(text, tmp_path, {"method": "custom"}).calibration["dataset"] == "wikitext"
    assert recipe(text, tmp_path, {"calibration.dataset": None}).calibration["dataset"] is None


def test_precedence(tmp_path):
    "Command line over YAML over default, key by key, and `origins` says so."
    found = recipe("quantization: {bits: 8, group_size: 64, minmax: {symmetric: true}}", tmp_path, {"bits": 3})
    assert (found.bits, found.group_size, found.seed, found.options["symmetric"]) == (3, 64, 0, True)
    origins = [found.origins[key] for key in ("bits", "group_size", "seed", "options.symmetric")]
    assert origins == ["command line", f"file {tmp_path}/recipe.yaml", "default", f"file {tmp_path}/recipe.yaml"]


STATIC = "{bits: 8, dynamic: false, granularity: tensor, dynamic_range: mse}"
ACTIVATIONS = [  # what the file says, what the command line says, the grid, the origin without the file's path
    (STATIC, {"quantization.activations.dynamic_range": "minmax"}, "A8 tensor static", "command line over file"),
    (STATIC, {"activations": 4}, "A4 tensor static", "command line over file"),
    (STATIC, {"activations": 16}, "None", "command line"),
    (STATIC, {"quantization.activations": None}, "None", "command line"),
    ("{bits: 8, type: float}", {"quantization.activations.symmetric": True}, "A8 float token",
     "command line over file"),
    ("8", {"quantization.activations.dynamic": False}, "A8 tensor static", "command line over file"),
    ("{bits: 8, sym: true}", {"quantization.activations.zero_point": True}, "A8 token asym", "command line over file"),
    ("null", {"quantization.activations.bits": 8, "quantization.activations.dynamic": False}, "A8 tensor static",
     "command line"),
    ("null", {"activations": 8, "quantization.activations.dynamic": False}, "A8 tensor static", "command line"),
    (STATIC, {}, "A8 tensor static", "file"),
]


@pytest.mark.parametrize("file, given, grid, origin", ACTIVATIONS)
def test_activations_merge_key_by_key(file, given, grid, origin, tmp_path):
    "The command line's keys of the section over the file's over the defaults."
    found = recipe(f"quantization: {{activations: {file}}}", tmp_path, given)
    assert str(found.activations) == grid
    assert found.origins["activations"].replace(f" {tmp_path}/recipe.yaml", "") == origin
    if file == STATIC and found.activations:
        assert found.activations.range_rule == given.get("quantization.activations.dynamic_range", "mse")


def test_activations_contradict_across_origins(tmp_path):
    "What does not fit together is refused, and both places are named."
    given = {"quantization.activations.dynamic": True, "quantization.activations.granularity": "token"}
    with pytest.raises(UsageError, match="^--set quantization.activations and .*:1: quantization.activations: .* mse"):
        recipe(f"quantization: {{activations: {STATIC}}}", tmp_path, given)


def test_supported_bits_is_a_value_error():
    "The guide's promise: a width that is not supported raises ValueError, which names the list."
    with pytest.raises(ValueError, match="2, 3, 4, 8, 16"):
        resolve({"bits": 5})
    assert resolve({"bits": 16}).bits == 16


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CHINESE = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")


def test_committed_configs_are_the_guides():
    "Every line of the guide's blocks stands in our files, in its order; what is more are comments."
    for name, block in {"minmax": MINMAX, "hqq": HQQ}.items():
        lines = (ROOT / "configs" / f"{name}_config.yaml").read_text(encoding="utf-8").splitlines()
        more = list(lines)
        for line in block.strip().splitlines():
            assert line in lines, line
            more.remove(line)
        assert all(line.lstrip().startswith("#") for line in more), more
        assert [line for line in lines if line in block.splitlines()] == block.strip().splitlines()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_committed_config_is_read_and_commented_in_english(path):
    "Each value that PyYAML reads arrives; whoever reads no Chinese finds a line in English above each that is."
    sections, found = yaml.safe_load(path.read_text(encoding="utf-8")), resolve(config_path=path)
    for section, values in sections.items():
        for key, value in values.items():
            if isinstance(value, dict) or value == "pass": continue
            got = found.calibration[key] if section == "calibration" else getattr(found, key)
            assert got == value or key == "outlier_suppression" and list(got) == (value.split(",") if value else []), key
    for name, value in (sections["quantization"].get(found.method) or {}).items() if found.method != "hqq" else ():
        own, wanted = {"sym": ("symmetric", value), "zero_point": ("symmetric", not value)}.get(name, (name, value))
        assert found.options[own] == wanted, name
    for name in found.outlier_suppression:
        for option, value in sections["quantization"][name].items():
            assert found.suppressor_options[f"{name}.{option}"] == value, option
    lines = path.read_text(encoding="utf-8").splitlines()
    for above, line in zip(["", *lines], lines):
        if CHINESE.search(line): assert above.lstrip().startswith("# ") and not CHINESE.search(above), line
    assert lines[0].startswith("# ")


BAD = {
    "": "nothing to do",
    "quantise --bits 4": "did you mean 'quantize'?",
    "MODEL --bitz 4": "did you mean '--bits'?",
    "--model-pth m --output-path o": "did you mean '--model-path'?",
    "--bits 4": "--model-path and --output-path must be given (see llmquant quantize --help)",
    "check --bits 4": "--model-path must be given (see llmquant check --help)",
    "check /": "unknown argument /; it stands behind no flag, and a model is given as --model-path /",
    "/ --bits 4": "unknown command '/'; known: quantize, check, verify, evaluate, compare, info, list; to quantize it write --model-path /",
    "version": "did you mean '--version'?",
    "MODEL --set bits=": "--set quantization.bits: None",
    "MODEL --set rounds=": "--set quantization.rounds: unknown key",
    "MODEL --set model_path=": "--model-path and --set model_path contradict",
    "MODEL --bits": "--bits: expected one argument",
    "MODEL --bits four": "--bits: 'four' is str",
    "MODEL --bits 5": "2, 3, 4, 8",
    "MODEL --bits true": "True is bool",
    "MODEL --group-size -2": "--group-size: -2",
    "MODEL --layers 3-1": "write 1-3",
    "MODEL --layers 0 --no-layer-wise": "contradict",
    "MODEL --method gtpq": "unknown method 'gtpq'; known: ",
    "MODEL --format gguf": "unknown format 'gguf'; known: ",
    "MODEL --outlier-suppression smooth": "unknown outlier suppressor 'smooth'",
    "MODEL --outlier-suppression []": "'[]' is not a name; write a name, names with commas between them, or none",
    "MODEL --outlier-suppression none,rotation": "write none alone for no suppressor",
    "MODEL --calibration-dataset wikitext": "minmax needs no calibration data; remove --calibration-dataset",
    "MODEL --device gpu": "'gpu' is no device",
    "MODEL --container zip": "'zip' is not one of",
    "MODEL --max-shard-size big": "'big' is no size",
    "MODEL --max-shard-size 1KB": "below 1MB",
    "MODEL --bits 4 --bits 8": "--bits is given twice with different values, 4 and 8",
    "MODEL --bits 4 --config a.yaml --config=b.yaml": "--config is given twice with different values, a.yaml and b.yaml",
    "MODEL --output-path p": "--output-path is given twice with different values, o and p",
    "MODEL --no-resume --resume": "--no-resume and --resume contradict",
    "verify a --reference b --bound 1 --bound 2": "--bound is given twice",
    "MODEL --layer-wise": "--layer-wise has no effect without layers: minmax quantizes all of them",
    "MODEL --set quantization.gptq.sym=true": "gptq is not in use (method: minmax); use --method gptq",
    "MODEL --bits 4 --set bits=8": "--bits and --set bits contradict",
    "MODEL --bits 4 --set quantization.bits=8": "contradict",
    "MODEL --activation-bits 8 --set quantization.activations.bits=4":
        "--activation-bits and --set quantization.activations.bits contradict",
    "MODEL --set quantization.activations.sym=true --set quantization.activations.zero_point=true": "contradict",
    "MODEL --set quantization.activations.bits=16 --set quantization.activations.dynamic=false": "bits 16 leaves",
    "MODEL --set model_path=x": "--model-path and --set model_path contradict",
    "MODEL --set .=1": "--set .=1",
    "MODEL --set a.b=1": "--set a",
    "MODEL --config=": "--config is empty",
    "info nope": "nope: does not exist",
    "MODEL --seed -1": "--seed: -1",
    "MODEL --set quantization.minmax.symetric=true": "did you mean 'quantization.minmax.symmetric'?",
    "MODEL --set model.torch_dtype=float61": "float61",
    "MODEL --set symmetric": "KEY=VALUE",
    "MODEL --config nowhere.yaml": "nowhere.yaml: No such file",
    "MODEL --verify=yes": "--verify",
    "verify out": "--reference",
    "verify out --reference base --bound 0": "no positive number",
    "info": "PATH",
    "list --everything": "unknown argument --everything",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text or "nothing")
def test_bad_input(text, capsys, tmp_path, monkeypatch):
    "Exit status 2, one line on stderr, nothing on stdout, nothing written."
    monkeypatch.chdir(tmp_path)
    status = cli.main(text.replace("MODEL", "--model-path m --output-path o").split())
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("llmquant: error: ") and err.count("\n") == 1 and BAD[text] in err
    assert not list(tmp_path.iterdir())


BAD_FILES = {
    "quantization:\n  bitz: 4": "r.yaml:2: quantization.bitz: unknown key",
    "quantization:\n\tbits: 4": "r.yaml:2: ",
    "quantization:\n  bits: 4\n  bits: 8": "r.yaml:3: quantization.bits is given twice, first in line 2",
    "- bits": "the top level is list",
    "quantization: [bits]": "must be a section",
    "quantization: {bits: '8'}": "'8' is str, must be int",
    "quantization: {bits: 8.0}": "8.0 is float, must be int",
    "quantization: {sym: true, zero_point: true}": "contradict",
    "quantization: {sym: true, minmax: {symmetric: false}}": "contradict",
    "model: {device_map: {'': 0}}": "no device",
    "output: {save_quantization_config: false}": "vLLM could not load",
    "output: {save_format: pytorch}": "safetensors",
    "calibration: {batch_size: 0}": "at least 1",
    "quantization: {bits: null}": "None",
    "quantization: {activations: {granuralty: token}}": "did you mean 'granularity'?",
    "quantization:\n  activations:\n    bits: 1": "r.yaml:3: quantization.activations.bits: 1 is out of range",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_file(text, capsys, tmp_path, monkeypatch):
    "The same for a recipe file, whose name is in the message."
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    status = cli.main(["--model-path", "m", "--output-path", "o", "--config", "r.yaml"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("llmquant: error: r.yaml:") and err.count("\n") == 1 and BAD_FILES[text] in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (VerificationError("mean KL 0.3"), 1),
                                               (UsageError("no"), 2)], ids=lambda x: type(x).__name__)
def test_exit_status(error, status, monkeypatch, capsys):
    "Ctrl-C, a failed verification and a refusal end differently."
    def run(recipe): raise error
    monkeypatch.setattr("llmquant.pipeline.run.run", run)
    assert cli.main(["--model-path", "m", "--output-path", "o"]) == status
    assert capsys.readouterr().err.count("\n") == 1


STOPPED = """
import os, signal, sys, types
from pathlib import Path
from llmquant.cli import main as cli
from llmquant.checkpoint.writer import ExportWriter
def run(recipe):
    with ExportWriter(recipe.output_path, {}): os.kill(os.getpid(), int(sys.argv[1]))
sys.modules["llmquant.pipeline.run"] = types.SimpleNamespace(run=run)
sys.exit(cli.main(["--model-path", "m", "--output-path", "new/o"]))
"""


@pytest.mark.parametrize("number", [2, 15])
def test_signals_stop_cleanly(number, tmp_path):
    "Ctrl-C and SIGTERM: one line, 128 + the signal, nothing partial."
    done = shell("-c", STOPPED, str(number), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, "llmquant: stopped\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", ["--version", "list"])
def test_full_stdout(arguments):
    "What cannot be printed is one line and status 1."
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "quantize.py"), arguments], stdout=full,
                              stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be printed" in done.stderr, done.stderr


def test_bugs_keep_their_traceback(monkeypatch):
    "An error that is nobody's input is not swallowed."
    def run(recipe): raise ZeroDivisionError
    monkeypatch.setattr("llmquant.pipeline.run.run", run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["--model-path", "m", "--output-path", "o", "--verbose"])


def test_flags_reach_the_recipe(monkeypatch, capsys):
    "The guide's flags, and ours, one by one."
    seen = []
    sizes = {"checkpoint": 10, "export": 3, "quantized_layers": 5, "quantized_layers_dense": 5}
    report = {"method": "minmax", "sizes": sizes, "layers": {}, "left_in_float": {}}
    monkeypatch.setattr("llmquant.pipeline.run.run", lambda recipe: seen.append(recipe) or report)
    text = ("--verbose --model-path a --output-path b --method minmax --bits 8 --group-size -1 --layer-wise "
            "--layers 0,2-3 --outlier-suppression none --calibration-dataset none --format compressed-tensors "
            "--container dense --verify --report --overwrite --seed 7 --device cpu --max-shard-size 1GB --torch-dtype float16 "
            "--resume --max-memory 8GiB --activation-bits 8 --set quantization.zero_point=false")
    assert cli.main(text.split()) == 0
    expected = dict(verbose=True, model_path="a", output_path="b", method="minmax", bits=8, group_size=-1,
                    layer_wise=True, layers=(0, 2, 3), outlier_suppression=(), format="compressed_tensors",
                    container="dense", verify=True, overwrite=True, seed=7, device_map="cpu",
                    max_shard_size=10**9, torch_dtype="float16", resume=True, max_memory=2**33)
    assert seen[0].origins["resume"] == "command line" and seen[0].activations.bits == 8
    assert {key: getattr(seen[0], key) for key in expected} == expected
    assert seen[0].options["symmetric"] is True and seen[0].calibration["dataset"] is None
    flags = {key.flag for key in KEYS if key.flag}
    assert flags - {"--quiet"} <= set(text.split()), flags - set(text.split())
    assert "0.300 of the checkpoint's" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "expected"), [
    ("", dict(bound=None, stock=None, require_vllm=False)),
    ("--stock", dict(bound=None, stock=True, require_vllm=True)),
    ("--bound 1e-3", dict(bound=1e-3, stock=None, require_vllm=True))])
def test_verify_flags(flags, expected, monkeypatch, capsys):
    "What verify is asked for; without a bound the default for the dtype holds."
    seen = []

    def verify(export, reference, **kwargs):
        seen.append((str(export), str(reference), kwargs))
        return {"vllm": {"mean_kl": 2e-6}}

    monkeypatch.setattr("llmquant.evaluation.verification.verify", verify)
    assert cli.main(f"verify out --reference org/name {flags}".split()) == 0
    assert seen == [("out", "org/name", expected)]
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("verified: files, and served by vLLM") and "mean KL 2e-06" in first
    assert rest == ["vllm.mean_kl  2e-06", "not written into quantization_report.yaml"]


def test_verify_writes_what_it_found_into_the_report(tmp_path, monkeypatch, capsys):
    "The verdict is the new one, everything else is kept; a report that was replaced meanwhile is left alone."
    file = tmp_path/"quantization_report.yaml"
    old = {"llmquant": "1", "verdict": "not verified", "layers": {"a": 1}, "verification": {"digests": {"a": "5f"}}}
    found = {"files": {"layers": 1}, "vllm": {"version": "0.32", "mean_kl": 2e-6, "bound": 1e-4, "kernels": {"x.y": 3}}}
    file.write_text(yaml.safe_dump(old))
    monkeypatch.setattr("llmquant.evaluation.verification.verify", lambda *_, **__: found)
    assert cli.main(["verify", str(tmp_path), "--reference", "base"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "verified: files, and served by vLLM 0.32 with mean KL 2e-06 (at most 0.0001)"
    assert "kernels" not in said and said.endswith("\nwritten into quantization_report.yaml\n")
    new = yaml.safe_load(file.read_text())
    assert new == old | {"verdict": said.splitlines()[0], "verification": old["verification"] | found}
    assert [p.name for p in tmp_path.iterdir()] == [file.name]

    def replaced(*_, **__):
        file.write_text("another")
        return found
    monkeypatch.setattr("llmquant.evaluation.verification.verify", replaced)
    assert cli.main(["verify", str(tmp_path), "--reference", "base", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert "vllm.kernels.x.y" in said and said.endswith("\nnot written into quantization_report.yaml\n")
    assert file.read_text() == "another"


@pytest.mark.parametrize("error", [VerificationError("layer a: moved"), UsageError("shard 1: is no safetensors file"),
                                   LLMQuantError("vLLM ended with status 1")], ids=["verification", "usage", "other"])
def test_a_failed_verification_replaces_an_earlier_verdict(error, tmp_path, monkeypatch, capsys):
    "Of a damaged report, and where the reference cannot be opened, not a byte changes."
    file, model = tmp_path/"quantization_report.yaml", tiny.make("llama", tmp_path/"base")
    layers = {"a": {"shape": [8, 8], "scheme": "W4 g8"}}
    verification = {"digests": {"a": "5f"}, "within_one_step": True, "files": {"layers": 1}, "vllm": {"mean_kl": 2e-6}}
    old = {"llmquant": "1", "verdict": "verified: files", "layers": layers,
           "scheme": QuantScheme(4, group_size=8).to_dict(), "verification": verification}
    file.write_text(yaml.safe_dump(old))

    def fails(*_, **__): raise error
    monkeypatch.setattr("llmquant.evaluation.verification.verify", fails)
    before = file.read_bytes()
    assert cli.main(["verify", str(tmp_path), "--reference", str(tmp_path/"missing")]) == error.exit_status
    assert file.read_bytes() == before
    assert cli.main(["verify", str(tmp_path), "--reference", str(model)]) == error.exit_status
    assert capsys.readouterr().err.count(f"llmquant: error: {error}") == 2
    own = {"digests": verification["digests"], "within_one_step": True}
    assert yaml.safe_load(file.read_text()) == old | {"verdict": f"failed: {error}", "verification": own}
    file.write_text("llmquant: 1\nverdict: verified\nverification: 3\n")
    before = file.read_bytes()
    assert cli.main(["verify", str(tmp_path), "--reference", str(model)]) == error.exit_status
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["output={quiet: true}", "calibration={num_samples: 4}", "quantization={bits: 3}"])
def test_a_section_can_be_set(text, monkeypatch):
    "As a recipe file has it; an unknown key in it is named with its section."
    seen = []
    monkeypatch.setattr("llmquant.pipeline.run.preflight", lambda recipe: seen.append(recipe) or (None, None))
    monkeypatch.setattr("llmquant.cli.summary.plan_text", lambda plan: "")
    assert cli.main(["check", "--model-path", "m", "--method", "gptq", "--set", text]) == 0
    (recipe,) = seen
    assert {"output": recipe.quiet, "calibration": recipe.calibration["num_samples"] == 4,
            "quantization": recipe.bits == 3}[text.partition("=")[0]]


def test_a_section_that_is_set_wrongly(capsys):
    "The sentence names the key, and a value that is no section."
    for text, part in {"output={loud: true}": "output.loud: unknown key", "calibration=4": "must be a section"}.items():
        assert cli.main(["check", "--model-path", "m", "--set", text]) == 2
        assert part in capsys.readouterr().err


def shell(*command, **kwargs):
    "Run a command as a user does."
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=300, **kwargs)


def test_quantize_script(tmp_path):
    "The guide's own command, from any folder, with a model that is not there."
    done = shell(str(ROOT / "quantize.py"), "--model-path", "/path/to/model", "--output-path", "out", "--method",
                 "minmax", "--bits", "8", "--config", str(ROOT / "configs" / "minmax_config.yaml"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "/path/to/model" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_version_is_fast(tmp_path):
    "`--version` and a mistyped flag answer without torch."
    probe = "import sys\nfrom llmquant.cli.main import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    done = shell("-c", probe, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"llmquant {llmquant.__version__}\nFalse\n"), done.stderr
    done = shell("-c", probe, "--bitz", "4", cwd=tmp_path)
    assert done.stdout == "False\n" and "did you mean '--bits'?" in done.stderr


def test_python_dash_m(tmp_path):
    "`python -m llmquant` is the command `llmquant`: the same texts and the same exit status, from any folder."
    for arguments in ["--version"], ["check", "--help"], ["--bitz", "4"], ["check", "--model-path", "nowhere"]:
        module = shell("-m", "llmquant", *arguments, cwd=tmp_path)
        script = shell(str(ROOT / "quantize.py"), *arguments, cwd=tmp_path)
        assert (module.returncode, module.stdout, module.stderr) == (script.returncode, script.stdout, script.stderr)
    assert module.returncode == 2 and "nowhere: does not exist" in module.stderr


RARELY = ("llmquant.checkpoint.gguf", "llmquant.checkpoint.gguf_config", "llmquant.checkpoint.gguf_model", "gguf",
          "llmquant.evaluation.verification", "llmquant.evaluation.verification_config", "llmquant.evaluation.vllm_check",
          "llmquant.formats.unpackers", "llmquant.outlier_suppression.site_trial", "tqdm.auto",
          "datasets", "matplotlib", "transformers", "vllm")


def test_a_run_imports_what_it_needs(tmp_path):
    "Weights alone: nothing is read that only a GGUF, a search, a verification, a report page or a notebook needs."
    base = tiny.make("llama", tmp_path / "base")
    probe = ("import sys\nfrom llmquant.cli.main import main\nstatus = main(sys.argv[1:])\n"
             "print(*sorted(sys.modules), sep='\\n', file=open('modules', 'w'))\nsys.exit(status)")
    done = shell("-c", probe, "--model-path", str(base), "--output-path", "out", "--group-size", "32",
                 "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    read = (tmp_path / "modules").read_text().split()
    assert "llmquant.quantizers.minmax_quantizer" in read and "torch" in read
    assert not {*RARELY} & {*read}, sorted({*RARELY} & {*read})


def test_options_of_a_suppressor_that_is_not_in_use_are_refused_on_a_command_line(tmp_path):
    "A file may hold them; said on a command line they would be dropped without a word."
    file = tmp_path / "r.yaml"
    file.write_text("quantization: {smooth_quant: {alpha: 0.5}}")
    assert resolve(config_path=file).suppressor_options == {}
    with pytest.raises(UsageError, match="smooth_quant is not in use .outlier_suppression: none.; use --outlier-suppr"):
        resolve({"quantization.smooth_quant.alpha": 0.5})
    file.write_text("quantization: {gptq: {sym: true}, hqq: {lp_norm: 0.5}, layer_wise: true}")
    assert resolve(config_path=file).options == resolve().options
    assert resolve({"quantization.hqq.lp_norm": 0.5, "method": "hqq"}).options["lp_norm"] == 0.5


def test_a_flag_is_repeated_with_the_same_value_only():
    "Every flag of every verb that holds one value; only --set may come again with something else."
    for verb, parser in cli._make_parser()[1].items():
        for action in parser._actions:
            flags, switch = action.option_strings, action.nargs == 0
            if not flags or action.dest in ("help", "assignments", "gates") or switch and len(flags) == 1: continue
            needs = {"info": ["p"], "verify": ["e", "--reference=4"], "evaluate": ["e", "--base=4"], "compare": ["a", "b"]}.get(verb, [])
            one, other = ([flags[1]], [flags[0]]) if switch else ([flags[0], "4"], [flags[0], "8"])
            assert cli._make_parser()[1][verb].parse_all([*one, *one, *needs])
            with pytest.raises(UsageError, match="given twice with different values, 4 and 8|contradict each other"):
                cli._make_parser()[1][verb].parse_all([*one, *other, *needs])
    repeated = cli._make_parser()[1]["check"].parse_all(["--set", "a=1", "--set", "b=2"])
    assert repeated.assignments == ["a=1", "b=2"]


def test_activation_bits_that_change_nothing_are_said_so(caplog, tmp_path):
    "Beside a file that asks for a grid they overrule it, and nothing is to be said."
    file = tmp_path / "r.yaml"
    with caplog.at_level("INFO", "llmquant"):
        resolve({"activations": 16}, config={"quantization": {"activations": 8}})
        file.write_text("quantization: {activations: {bits: 16}}")
        resolve(config_path=file), resolve({"activations": 16, "quiet": True})
        assert not caplog.messages
        assert resolve({"activations": 16}).activations is None
    assert caplog.messages == ["--activation-bits has no effect: activations stay as they are without it"]
