"A share of `make fuzz`, always the same inputs; and the sentences of the kinds that once ended in a traceback."
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import fuzz  # noqa: E402

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
        monkeypatch.setattr("llmquant.cli.main", act)
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


CONFIGS = [  # model, key, value, what `check` says
    ("llama", "hidden_size", "x", "config.json of model type 'llama': transformers cannot read it"),
    ("llama", "num_attention_heads", 0, "transformers cannot read it (ZeroDivisionError"),
    ("llama", "dtype", "float61", "dtype is 'float61', which is no dtype of torch"),
    ("llama", "dtype", [1], "config.json: dtype is [1], must be a word or null"),
    ("llama", "architectures", 3, "config.json: architectures is 3, must be a list of words or null"),
    ("llama", "text_config", [1], "config.json: text_config is [1], must be a section or null"),
    ("olmo2", "model_type", ["olmo2"], "config.json: model_type is ['olmo2'], must be a word or null"),
    ("olmo2", "num_key_value_heads", -1, "config.json"),
    ("olmo2", "hidden_size", 10**30, "config.json"), ("olmo2", "intermediate_size", 255, "[256, 128]"),
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
