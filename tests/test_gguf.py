"""A GGUF read tensor by tensor: the same bits as transformers' whole conversion, and nothing dropped without a word."""

import json
from contextlib import nullcontext

import pytest
import tiny_gguf
import torch

from llmquant.checkpoint.source import GGUFSource, open_checkpoint
from llmquant.core.errors import UsageError

MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SHARED = MOE | dict(shared_expert_intermediate_size=64)
MOE_KEYS = [("expert_count", 4, "UINT32"), ("expert_used_count", 2, "UINT32"),
            ("expert_feed_forward_length", 32, "UINT32")]  # fmt: skip
HEAD = [("attention.key_length", 16, "UINT32"), ("attention.value_length", 16, "UINT32")]
FAMILIES = {
    "llama": ("llama", "Q8_0", {}, [("rope.dimension_count", 16, "UINT32")]),
    "llama with biases": ("llama", "Q4_0", dict(attention_bias=True, mlp_bias=True), [("rope.dimension_count", 16, "UINT32")]),
    "llama, tied": ("llama", "Q5_1", dict(tie_word_embeddings=True), [("rope.dimension_count", 16, "UINT32")]),
    "qwen2": ("qwen2", "Q8_0", {}, []),
    "qwen3": ("qwen3", "Q4_1", dict(head_dim=128), [("attention.key_length", 128, "UINT32")]),
    "gemma2": ("gemma2", "Q8_0", dict(head_dim=16), [*HEAD, ("attention.sliding_window", 16, "UINT32"),
                                                     ("final_logit_softcapping", 20.0, "FLOAT32")]),
    "phi3": ("phi3", "F16", dict(sliding_window=24), [("attention.sliding_window", 24, "UINT32")]),
    "stablelm": ("stablelm", "Q8_0", {}, []),
    "gemma3_text": ("gemma3", "Q8_0", dict(head_dim=16), [*HEAD, ("attention.sliding_window", 16, "UINT32")]),
    "nemotron": ("nemotron", "Q8_0", {}, []),
    "starcoder2": ("starcoder2", "Q8_0", {}, []),
    "qwen2_moe": ("qwen2moe", "Q8_0", SHARED, [*MOE_KEYS, ("expert_shared_feed_forward_length", 64, "UINT32")]),
    "qwen3_moe": ("qwen3moe", "Q8_0", MOE | dict(head_dim=16), [*MOE_KEYS, *HEAD]),
}  # fmt: skip


def as_transformers_does(path, folder):
    "Names in a checkpoint and values, as transformers converts and saves a whole model."
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    found = load_file(folder / "model.safetensors")
    for name in [name for name in found if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stack, where = found.pop(name), name.rpartition(".")[0]  # saved as in memory; checkpoints have them apart
        for number, expert in enumerate(stack):
            parts = {"down_proj": expert} if name.endswith("down_proj") else dict(
                zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True)
            )
            found |= {f"{where}.{number}.{part}.weight": value for part, value in parts.items()}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_the_whole_conversion(family, tmp_path):
    architecture, type, settings, keys = FAMILIES[family]
    path, kind = tmp_path / "tiny.gguf", family.split()[0].rstrip(",")
    made = tiny_gguf.model(kind, **settings)
    tiny_gguf.write(path, made, architecture, type, keys)
    expected = None
    if family != "llama with biases":  # transformers drops these
        expected = as_transformers_does(path, tmp_path / "whole")
    made.save_pretrained(tmp_path / "own")
    from safetensors.torch import load_file

    own = load_file(tmp_path / "own" / "model.safetensors")
    with open_checkpoint(path) as source:
        got = {name: source.tensor(name) for name in source.tensors}
    assert got.keys() == own.keys()
    for name, value in got.items():
        assert expected is None or value.equal(expected[name]), name
        assert value.shape == own[name].shape
        step = own[name].abs().max() / (7 if "4" in type else 15 if "5" in type else 100)
        assert (value - own[name]).abs().max() <= step, name  # permuted rows or norms off by one would be far


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=256)  # fmt: skip
DIMENSIONS = ("rope.dimension_count", 64, "UINT32")
YARN_KEYS = [("rope.scaling.type", "yarn", "STRING"), ("rope.scaling.factor", 4.0, "FLOAT32"),
             ("rope.scaling.original_context_length", 32, "UINT32")]  # fmt: skip
SCALED = {
    "none": ({}, []),
    "yarn": (YARN, YARN_KEYS),
    "yarn, strength": (YARN | dict(attention_factor=0.5 * (1 + 0.1 * 1.3862943611198906)),
                       [*YARN_KEYS, ("rope.scaling.attn_factor", 0.5, "FLOAT32")]),
    "linear": (dict(rope_type="linear", factor=2.0),
               [("rope.scaling.type", "linear", "STRING"), ("rope.scaling.factor", 2.0, "FLOAT32")]),
    "llama3": (LLAMA3, []),
}  # fmt: skip


def frequencies(model):
    "What divides the rotary frequencies of a transformers model, as llama.cpp stores it."
    plain = 10000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    return (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()


@pytest.mark.parametrize("scaling", SCALED)
def test_biases_and_rotary_scaling_of_llama_are_carried_over(scaling, tmp_path):
    "The logits of the model that the file was made from, by weights and configuration read from the file."
    from transformers import AutoModelForCausalLM

    rope, keys = SCALED[scaling]
    made = tiny_gguf.model(
        "llama", attention_bias=True, mlp_bias=True, num_attention_heads=1, num_key_value_heads=1,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    more = {"rope_freqs.weight": frequencies(made)} if scaling == "llama3" else {}
    tiny_gguf.write(tmp_path / "tiny.gguf", made, "llama", "F32", [DIMENSIONS, *keys], more)
    tokens = torch.arange(96)[None] * 3 % 320
    with open_checkpoint(tmp_path / "tiny.gguf") as source:
        old = {key: source.config.get(key) for key in ("rope_theta", "rope_scaling")}
        again = AutoModelForCausalLM.from_pretrained(source.with_weights(), dtype=torch.float32).eval()
    assert old["rope_theta"] == 10000.0
    assert (old["rope_scaling"] or {}).get("rope_type") == rope.get("rope_type")
    with torch.no_grad():
        expected, got = made(tokens).logits, again(tokens).logits
        plain = tiny_gguf.model("llama", attention_bias=True, mlp_bias=True, num_attention_heads=1, num_key_value_heads=1)
        moved = (plain(tokens).logits - expected).abs().max()
    assert (got - expected).abs().max() < 1e-4
    assert moved > 0.05 or scaling == "none"  # the test would see scaling that was dropped


def test_short_and_long_divisors_of_phi3_are_carried_over(tmp_path):
    "On a text longer than the context before the extension, where the long ones count."
    from transformers import AutoModelForCausalLM

    short, long = torch.linspace(1, 1.5, 8), torch.linspace(1.2, 9, 8)
    rope = dict(rope_type="longrope", rope_theta=10000.0, short_factor=short.tolist(), long_factor=long.tolist())
    made = tiny_gguf.model("phi3", original_max_position_embeddings=32, rope_parameters=rope)
    tiny_gguf.write(tmp_path / "tiny.gguf", made, "phi3", "F32",
                    [("rope.scaling.original_context_length", 32, "UINT32"), ("rope.scaling.attn_factor", 1.1832, "FLOAT32")],
                    {"rope_factors_short.weight": short.numpy(), "rope_factors_long.weight": long.numpy()})  # fmt: skip
    with open_checkpoint(tmp_path / "tiny.gguf") as source:
        again = AutoModelForCausalLM.from_pretrained(source.with_weights(), dtype=torch.float32).eval()
        assert source.config["original_max_position_embeddings"] == 32
    with torch.no_grad():
        for length in 24, 96:
            tokens = torch.arange(length)[None] * 3 % 320
            assert (made(tokens).logits - again(tokens).logits).abs().max() < 1e-3 * made(tokens).logits.abs().max()


def renamed(old, new):
    "Tensors with one of them under another name."
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def without(name):
    "Tensors without one of them."
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


REFUSED = {
    "rope scaling of a kind unknown here": (dict(keys=[("rope.scaling.type", "longrope", "STRING")]), "longrope cannot be"),
    "rotary divisors that no rule gives": (dict(more={"rope_freqs.weight": torch.linspace(1, 3, 8)}), "rope_freqs.weight"),
    "experts that llama has no place for": (dict(keys=[("expert_count", 4, "UINT32")]), "expert_count is 4"),
    "a clamp": (dict(keys=[("attention.clamp_kqv", 8.0, "FLOAT32")]), "clamp_kqv is 8.0, and transformers' llama"),
    "heads of another width": (dict(keys=[("attention.key_length", 32, "UINT32")]), "key_length is 32"),
    "a key of the future": (dict(keys=[("swirl", 3, "UINT32")]), "llama.swirl is 3"),
    "a tensor too many": (dict(change=renamed("blk.1.ffn_norm", "blk.1.new_norm")), "new_norm.weight has no place"),
    "a tensor missing": (dict(change=without("blk.0.attn_v.weight")), "holds nothing for model.layers.0.self_attn.v_proj"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_over_is_refused(case, tmp_path):
    given, message = REFUSED[case]
    given = {**given, "keys": [("rope.dimension_count", 16, "UINT32"), *given.get("keys", [])]}
    tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.model("llama"), "llama", **given)
    with pytest.raises(UsageError, match=message):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_check_and_info_read_the_header_alone(tmp_path, monkeypatch, capsys):
    from llmquant.checkpoint import gguf_model
    from llmquant.cli.main import main

    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path, tiny_gguf.model("llama"), "llama", keys=[("rope.dimension_count", 16, "UINT32")])
    monkeypatch.setattr(gguf_model, "read_gguf_tensor", None)  # a call would be a TypeError
    monkeypatch.setattr(gguf_model, "write_tokenizer", None)
    assert main(["check", "--model-path", str(path), "--method", "minmax", "--group-size", "32"]) == 0
    assert "quantized: 14" in capsys.readouterr().out
    for given in (path, tmp_path):
        assert main(["info", str(given)]) == 0
        said = capsys.readouterr().out
        assert {"model_type llama", "vocab_size 320"} <= {" ".join(line.split()) for line in said.splitlines()}
        assert str(given) in said


def test_an_export_carries_names_that_older_readers_know(tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    from llmquant.pipeline.run import quantize

    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path, tiny_gguf.model("qwen2"), "qwen2")
    quantize(path, tmp_path / "out", method="minmax", group_size=32)
    config, tokenizer = (json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert config["rope_theta"] == 10000.0 and tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("the t").ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the t").input_ids == ids
    assert isinstance(open_checkpoint(path), GGUFSource)


def test_a_tokenizer_that_lies_beside_the_file_is_another_models(tmp_path):
    "In a folder of downloads: the file's own tokenizer is written, with or without one beside it."
    from tokenizers import Tokenizer, models

    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path, tiny_gguf.model("qwen2"), "qwen2")
    with open_checkpoint(path) as source:
        alone = {file.name: file.read_text() for file in source.side_files}
    Tokenizer(models.WordLevel({"other": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "other"}')
    with open_checkpoint(path) as source:
        assert {file.name: file.read_text() for file in source.side_files} == alone
    assert len(json.loads(alone["tokenizer.json"])["model"]["vocab"]) >= 256


@pytest.mark.parametrize("name", ["Q1_0", "Q8_1", "Q8_K"])
def test_a_type_that_cannot_be_unpacked_is_one_line(name, tmp_path, capsys):
    import gguf

    from llmquant.cli.main import main

    numbers = {"Q8_1": 9, "Q8_K": 15, "Q1_0": 41}
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path, tiny_gguf.model("llama", hidden_size=256, intermediate_size=256), "llama")
    data, entry = path.read_bytes(), b"blk.0.attn_q.weight" + (2).to_bytes(4, "little") + (256).to_bytes(8, "little") * 2
    assert data.count(entry) == 1
    at = data.index(entry) + len(entry)
    path.write_bytes(data[:at] + numbers[name].to_bytes(4, "little") + data[at + 4 :])
    assert main(["check", "--model-path", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "tensor blk.0.attn_q.weight has type" in said
    assert numbers[name] not in set(gguf.GGMLQuantizationType) or name in said


def test_what_is_converted_as_a_whole_gives_the_same_and_is_predicted(tmp_path, monkeypatch):
    "The way of architectures that transformers converts by rules for whole models, taken by one that has both."
    from llmquant.checkpoint import gguf_config, gguf_model
    from llmquant.pipeline.run import check
    from llmquant.utils.config import resolve

    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path, tiny_gguf.model("qwen2"), "qwen2")
    with open_checkpoint(path) as source:
        streamed, config = {name: source.tensor(name) for name in source.tensors}, source.config
        assert source.conversion_bytes() == 0
    for module in gguf_config, gguf_model:
        monkeypatch.setattr(module, "as_a_whole", lambda architecture: True)
    with open_checkpoint(path) as source:
        assert source.conversion_bytes() > 2 * sum(value.nbytes for value in streamed.values())
        assert source.tensors.keys() == streamed.keys() and source.config["hidden_size"] == config["hidden_size"]
        assert all(source.tensor(name).equal(value) for name, value in streamed.items())
    monkeypatch.setattr(GGUFSource, "conversion_bytes", lambda self: 2**40)
    with pytest.raises(UsageError, match=r"\(process [0-9]+ MiB \+ converting 1048576 MiB\)"):
        check(resolve({"model_path": str(path), "method": "minmax", "group_size": 32, "max_memory": "8GB"}))


def test_a_memory_limit_holds_without_calibration(tmp_path):
    "From the header and the shapes, before a tensor is read; the parts are those of such a run, and add up."
    from llmquant.pipeline.run import check, quantize
    from llmquant.utils.config import resolve

    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path, tiny_gguf.model("llama"), "llama", keys=[("rope.dimension_count", 16, "UINT32")])
    given = dict(method="minmax", group_size=32, max_memory="100MB")
    message = r"max_memory 95 MiB is too little: this run takes [0-9]+ MiB \(process [0-9]+ MiB \+ "
    with pytest.raises(UsageError, match=message):
        check(resolve({"model_path": str(path), **given}))
    with pytest.raises(UsageError, match=message):
        quantize(path, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    report = quantize(path, tmp_path / "out", **given | {"max_memory": "8GB"})
    assert report["memory"]["predicted_peak_mib"] > 200


STOPPED = torch.tensor([1.0] * 2 + [1e30] * 6)
SEVERAL = {
    "divisors of full attention alone": (torch.linspace(1, 8, 8), {}, "rope_freqs.weight of a gemma3_text"),
    "features that the configuration turns": (STOPPED, {}, "rope_freqs.weight of a gemma3_text"),
    "features that it stops too": (STOPPED, {"partial_rotary_factor": 0.25}, None),
    "no divisors": (torch.ones(8), {}, None),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_divisors_of_a_model_with_several_rotary_embeddings(case, tmp_path):
    "They have no place in its configuration: refused in one line, unless they only repeat what it says."
    from llmquant.checkpoint.gguf import read_gguf_header
    from llmquant.checkpoint.gguf_config import rope_scaling

    divisors, more, message = SEVERAL[case]
    made = tiny_gguf.model("gemma3_text", head_dim=16)
    tiny_gguf.write(tmp_path / "tiny.gguf", made, "gemma3", keys=FAMILIES["gemma3_text"][3],
                    more={"rope_freqs.weight": divisors})  # fmt: skip
    if not more:
        with pytest.raises(UsageError, match=message) if message else nullcontext():
            open_checkpoint(tmp_path / "tiny.gguf")
    made.config.rope_parameters["full_attention"] |= more
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        header = read_gguf_header(tmp_path / "tiny.gguf")
        assert rope_scaling(header, made.config, {"rope_freqs.weight": divisors}) == {}


def test_sizes_are_those_of_the_files(tmp_path, capsys):
    "Of a GGUF what lies on disk and its block types; of a rotated checkpoint not the float32 that is read, untied."
    from llmquant.cli.main import main
    from llmquant.pipeline import run as pipeline
    from llmquant.utils.config import resolve

    file, folder = tmp_path / "tiny.gguf", tmp_path / "base"
    made = tiny_gguf.model("llama", tie_word_embeddings=True)
    tiny_gguf.write(file, made, "llama", "Q4_1", [("rope.dimension_count", 16, "UINT32")])
    made.to(torch.bfloat16).save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    for path, more, expected in (
        (file, {}, file.stat().st_size),
        (folder, {}, size),
        (folder, {"outlier_suppression": "rotation"}, size),
    ):
        plan = pipeline.check(resolve({"model_path": str(path), "group_size": 32, **more}, origin="call"))
        assert plan.sizes()["checkpoint"] == expected
    assert pipeline.info(file)["bytes"] == file.stat().st_size
    assert main(["info", str(file)]) == 0
    kinds = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("quantization"))
    assert kinds.split()[0] == "quantization.gguf" and "Q4_1 x " in kinds and "F32 x " in kinds
    assert main(["info", str(folder)]) == 0
    assert "quantization  none" in capsys.readouterr().out
