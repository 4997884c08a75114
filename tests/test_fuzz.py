"A share of `make fuzz`, always the same inputs; and the sentences of the kinds that once ended in a traceback."
import json
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file, save_file

from llmquant.checkpoint.source import JSON_DEPTH, is_deep
from llmquant.cli.main import main
from llmquant.plan.memory import forward_bytes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import fuzz  # noqa: E402
import tiny  # noqa: E402

NORM = "model.norm.weight"

SHARE = {"config": 12, "recipe": 20, "command_line": 12, "header": 8, "tensor": 6, "tokenizer": 4, "text": 4,
         "export": 10, "gguf": 6}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    small = {"models": ("llama", "olmo2"), "exports": ("mixed", "gptq", "activations")}
    with fuzz.prepared(tmp_path_factory.mktemp("fuzz"), **small) as bases: yield bases


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_inputs(kind, bases):
    "Each ends well: done, failed in verification, or refused in one line."
    for number in range(SHARE[kind]):
        what, found = fuzz.try_one(bases, kind, number, seed=2026)
        for command, _, fault in found: assert not fault, f"{kind}:{number} ({what}): {command}: {fault}"


def test_the_tool_sees_faults(bases, monkeypatch):
    "An exception, a slow end, another status, no line and two lines are each told from a good end."
    def ends(act):
        monkeypatch.setattr("llmquant.cli.main.main", act)
        return fuzz.fault_of(["info"], bases.folder, seconds=0.2)[0]
    def raises(words): raise KeyError("x")
    def slow(words):
        while True: pass
    def talks(words):
        print("llmquant: error: one line is enough", "llmquant: error: two are too many", sep="\n", file=sys.stderr)
        return 2
    assert ends(raises) == "KeyError in ?" and ends(slow) == "TooLong in ?"
    assert ends(lambda words: 130) == "status 130"
    assert ends(lambda words: 2) == "status 2 with 0 lines" and ends(talks) == "status 2 with 2 lines"
    assert ends(lambda words: 0) == ""


WHOLE = "must be a whole number from 0 to 2147483647, a list of them or null; fetch the file again"
CONFIGS = [  # model, key, value, what `check` says
    ("llama", "num_hidden_layers", "x", "config.json of model type 'llama': transformers cannot read it"),
    ("llama", "hidden_size", "x", f"config.json: hidden_size is 'x', {WHOLE}"),
    ("olmo2", "num_key_value_heads", [[]], f"config.json: num_key_value_heads is [[]], {WHOLE}"),
    ("llama", "num_key_value_heads", {"": None}, f"config.json: num_key_value_heads is {{'': None}}, {WHOLE}"),
    ("llama", "hidden_size", -128, f"config.json: hidden_size is -128, {WHOLE}"),
    ("llama", "head_dim", True, f"config.json: head_dim is True, {WHOLE}"),
    ("llama", "num_attention_heads", 0, "zero); compare its values with the config.json that the model was"),
    ("llama", "dtype", "float61", "dtype is 'float61', which is no dtype of torch"),
    ("llama", "dtype", [1], "config.json: dtype is [1], must be a word or null"),
    ("llama", "architectures", 3, "config.json: architectures is 3, must be a list of words or null"),
    ("llama", "text_config", [1], "config.json: text_config is [1], must be a section or null"),
    ("olmo2", "model_type", ["olmo2"], "config.json: model_type is ['olmo2'], must be a word or null"),
    ("olmo2", "num_key_value_heads", -1, f"num_key_value_heads is -1, {WHOLE}"),
    ("olmo2", "hidden_size", 10**30, f"hidden_size is {10**30}, {WHOLE}"),
    ("olmo2", "intermediate_size", 255, "[256, 128]"),
    ("olmo2", "hidden_act", "none", "transformers cannot build the model (KeyError: 'none')"),
    ("olmo2", "rms_norm_eps", {}, "transformers cannot"), ("olmo2", "num_hidden_layers", 10**7, "cannot hold so many"),
    ("llama", "num_hidden_layers", 2**31, "(21 at most)"), ("olmo2", "head_dim", 10**9, "head_dim is 1000000000, and"),
]


def refusal(command):
    "The one line of a command that ends with status 2."
    status, said = fuzz.carry_out(command)
    lines = [line for line in said.splitlines() if line.startswith("llmquant: error: ")]
    assert (status, len(lines)) == (2, 1), (status, said)
    return lines[0]


def check(model):
    "The arguments of `check`."
    return ["check", "--model-path", str(model), "--bits", "4", "--group-size", "32"]


@pytest.mark.parametrize("model,key,value,expected", CONFIGS)
def test_values_of_config_json(model, key, value, expected, bases, tmp_path):
    "A wrong value is refused by `check`, in a line that says where it stands."
    folder = bases.copy(model, tmp_path)
    file = folder / "config.json"
    fuzz.rewrite(file, json.dumps({**json.loads(file.read_text()), key: value}))
    assert expected in refusal(check(folder))


GGUFS = [  # what stands in the header, bytes behind it, what they become, what `check` says
    (b"llama.attention.head_count\4\0\0\0", 0, (0).to_bytes(4, "little"), "cannot read this GGUF (ZeroDivisionError: "),
    (b"llama.embedding_length\4\0\0\0", 0, (9).to_bytes(4, "little"), "The hidden size (9) is not a multiple of"),
    (b"token_embd.weight\2\0\0\0", 8, bytes(8), "transformers cannot build this model (IndexError: "),
]


@pytest.mark.parametrize("key,behind,value,expected", GGUFS)
def test_header_of_a_gguf(key, behind, value, expected, bases, tmp_path):
    "What transformers raises for a size in a GGUF's header is refused in a line that names the file and the remedy."
    data = (bases.folder / "model.gguf").read_bytes()
    at = data.index(key) + len(key) + behind
    (tmp_path / "m.gguf").write_bytes(data[:at] + value + data[at + len(value):])
    said = refusal(check(tmp_path / "m.gguf"))
    assert f"{tmp_path / 'm.gguf'}: transformers cannot" in said and expected in said
    assert said.endswith("; give safetensors instead")


O_PROJ, QKV = "model.layers.0.self_attn.o_proj.weight", "gpt_neox.layers.0.attention.query_key_value.weight"
ROTATED = [  # model, tensor, what becomes of it (None: it is not there), what every command that rotates the model reports
    ("llama", "model.embed_tokens.weight", lambda t: t[0, 0].clone(), "shape [] in the checkpoint, [512, 128] by"),
    ("llama", O_PROJ, lambda t: t.reshape(-1), "shape [16384] in the checkpoint, [128, 128] by config.json"),
    ("llama", "lm_head.weight", None, "not in the checkpoint, and LlamaForCausalLM of config.json needs it"),
    ("gpt_neox", QKV, None, "not in the checkpoint, and GPTNeoXForCausalLM of config.json needs it"),
]


@pytest.mark.parametrize("kind,name,change,expected", ROTATED)
def test_checkpoints_to_rotate(kind, name, change, expected, tmp_path):
    "A tensor that is missing or of another shape is refused before a rotation looks at it, by `check` and by a run."
    model = tiny.make(kind, tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    old = tensors.pop(name)
    if change: tensors[name] = change(old)
    save_file(tensors, file, metadata={"format": "pt"})
    asked = [*check(model), "--outlier-suppression", "rotation"]
    assert f"tensor {name}: {expected}" in refusal(asked)
    assert f"tensor {name}: {expected}" in refusal(["quantize", *asked[1:], "--output-path", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


REPORTS = [  # what becomes of the report, what `verify` says
    (lambda report: {**report, "method": nested(150)}, "nested more than 100 levels deep"),
    (lambda report: {**report, "layers": {name: {**layer, "scheme": []} for name, layer in report["layers"].items()}},
     "the scheme of model.layers.0.mlp.down_proj must be a word"),
]


def nested(levels):
    "A list in a list in a list."
    value = []
    for _ in range(levels): value = [value]
    return value


@pytest.mark.parametrize("change,expected", REPORTS)
def test_reports(change, expected, bases, tmp_path):
    "A report that is deeper, or says something else, than any that was written."
    export = bases.copy("mixed", tmp_path)
    file = export / "quantization_report.yaml"
    fuzz.rewrite(file, yaml.safe_dump(change(yaml.safe_load(file.read_text()))))
    said = refusal(["verify", str(export), "--reference", str(bases.folder / "llama")])
    assert f"{file}: " in said and expected in said


def test_what_an_alias_repeats_is_looked_at_once():
    "Depth is that of the tree, and twice as many paths at each level take no longer; what holds itself is too deep."
    value = []
    for _ in range(JSON_DEPTH - 2): value = [value, value]
    assert not is_deep(value) and is_deep(nested(JSON_DEPTH))
    value.append(value)
    assert is_deep(value)


def test_names_that_are_no_utf8(bases, tmp_path, capsys):
    "A folder of any name is written into, and its report is YAML; a line holds no character that moves a cursor."
    out = tmp_path / "o\udce1"
    assert main(["quantize", *check(bases.folder / "llama")[1:], "--output-path", str(out), "--quiet"]) == 0
    report = yaml.safe_load((out / "quantization_report.yaml").read_bytes())
    assert report["recipe"]["output_path"]["value"] == f"{tmp_path}/o\\udce1"
    capsys.readouterr()
    assert main(["info", str(tmp_path / "a\x1b[2J\x1cb\udce1")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/a\\x1b[2J\\x1cb\\udce1: does not exist" in said and len(said.splitlines()) == 1


def test_sizes_that_each_block_has():
    "The prediction is that of the hungriest block, whatever the others have."
    plan, each = SimpleNamespace(quantized=()), {"hidden_size": 64, "num_attention_heads": 4}
    need = [forward_bytes({**each, "num_key_value_heads": said}, plan, 16, ()) for said in ([1, None, 4], 4, 1)]
    assert need[0] == need[1] > need[2]


def test_what_is_drawn_stays(bases, tmp_path):
    "An input is made from its number alone: no mutation changes the values that later ones draw."
    before = repr(fuzz.ODD)
    for number in range(300):
        value = {"a": {"b": [1, "x"]}, "c": [[], {}]}
        for _ in range(4): fuzz.mutate(value, Random(number))
    assert repr(fuzz.ODD) == before


def test_other_kinds(bases, tmp_path):
    "Deep YAML, a name that no file can have, a tensor of odd rank, a renamed norm, a GGUF that contradicts itself."
    recipe = tmp_path / "deep.yaml"
    recipe.write_text("quantization: " + "[" * 20000)
    assert "deep.yaml: nested too deeply" in refusal([*check(bases.folder / "llama"), "--config", str(recipe)])
    shards = bases.copy("shards", tmp_path)
    index = shards / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    fuzz.rewrite(index, json.dumps({"weight_map": dict.fromkeys(names, "x" * 300 + ".safetensors")}))
    assert "no file can have a name of more than 255 bytes" in refusal(check(shards))
    for name, change, expected in (("rank", lambda t: {**t, NORM: t[NORM][None, None]}, f"{NORM}: shape [1, 1, "),
                                   ("name", lambda t: {f"{n}x": v for n, v in t.items()}, "not in the checkpoint"),
                                   ("norm", lambda t: {n.replace(NORM, "x"): v for n, v in t.items()}, NORM)):
        model = bases.copy("llama", tmp_path / name)
        file = model / "model.safetensors"
        tensors = load_file(file)
        file.unlink()
        save_file(change(tensors), file, metadata={"format": "pt"})
        assert expected in refusal(check(model))
    data, key = (bases.folder / "model.gguf").read_bytes(), b"llama.attention.head_count_kv"
    at = data.index(key) + len(key) + 4
    (tmp_path / "m.gguf").write_bytes(data[:at] + (4).to_bytes(4, "little") + data[at + 4:])
    assert "tensor blk.0.attn_k.weight is [32, 64], and" in refusal(check(tmp_path / "m.gguf"))
