"""Checkpoints as they are found: what transformers accepts is quantized, what would be misread is refused by name."""
import importlib.util
import json
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmquant import load, quantize
from llmquant.calibration.data import load_calibration
from llmquant.checkpoint.source import open_checkpoint
from llmquant.core.errors import UsageError, VerificationError
from llmquant.pipeline.run import check, run
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


@pytest.mark.parametrize("kind,announced", [
    ("llama", {}), ("phi3", {}), ("deepseek_v3", {"num_nextn_predict_layers": 0})])
def test_blocks_behind_the_last_are_refused(checkpoints, tmp_path, kind, announced):
    "A number of blocks that is too small by one; the export would lack a block, and vLLM would refuse it."
    model = variant(checkpoints(kind), tmp_path / "model", num_hidden_layers=1, **announced)
    said = refusal(model)
    assert "announces 1 decoder blocks (num_hidden_layers) and 0 prediction layers behind them" in said
    assert "the checkpoint has model.layers.1 as well; write 2 for num_hidden_layers" in said


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
    {"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}},
    {"text_config": {"quantization_config": "fp8"}}])
def test_a_stale_section_is_left_out(checkpoints, tmp_path, section, caplog):
    base = checkpoints("llama")
    model = variant(base, tmp_path / "model", **section)
    with closing(open_checkpoint(model)) as source: read = source.config
    assert "quantization_config" not in read and "quantization_config" not in read.get("text_config", {})
    assert "the section quantization_config is left out" in caplog.text
    if "text_config" in section: return # as wrappers have it; transformers builds no llama with one
    quantize(model, tmp_path / "out", **GRID)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llmquant_method"] == "minmax"
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


BLOCK = "model.layers.1."
WRONG = {
    "no norm": ({BLOCK + "input_layernorm.weight": None}, "input_layernorm.weight: not in the checkpoint, and LlamaFor"),
    "a renamed norm": ({BLOCK + "input_layernorm.weight": None, BLOCK + "norm_1.weight": torch.ones(128)},
                       "input_layernorm.weight: not in the checkpoint"),
    "no embedding": ({"model.embed_tokens.weight": None}, "tensor model.embed_tokens.weight: not in the checkpoint"),
    "no head": ({"lm_head.weight": None}, "tensor lm_head.weight: not in the checkpoint.*tie_word_embeddings: true"),
    "a wide norm": ({BLOCK + "input_layernorm.weight": torch.ones(256)}, r"shape \[256\] in the checkpoint, \[128\] by"),
    "more rows": ({BLOCK + "mlp.up_proj.weight": torch.ones(320, 128)}, r"shape \[320, 128\] in the checkpoint, \[256, 12"),
}


@pytest.mark.parametrize("method", ["minmax", "gptq"])
@pytest.mark.parametrize("wrong", WRONG)
def test_missing_and_misshapen_tensors_are_named(checkpoints, tmp_path, wrong, method):
    changes, message = WRONG[wrong]
    base = checkpoints("llama")
    tensors = {**tensors_of(base), **changes}
    model = variant(base, tmp_path / "model", {name: t.bfloat16() for name, t in tensors.items() if t is not None})
    assert re.search(message, refusal(model, method=method, **TEXT))


def test_config_of_another_model(checkpoints, tmp_path):
    model = variant(checkpoints("qwen3"), tmp_path / "model", head_dim=64)
    assert re.search(r"q_proj.weight: shape \[128, 128\] in the checkpoint, \[256, 128\] by config.json", refusal(model))


def digests(folder: Path) -> list:
    "Codes, scales and zeros of each layer, in order."
    return [*yaml.safe_load((folder / "quantization_report.yaml").read_text())["verification"]["digests"].values()]


@pytest.mark.parametrize("kind, prefix", [("llama", "model."), ("opt", "model."), ("qwen3_moe", "model."),
                                          ("gpt_neox", "gpt_neox.")])
@pytest.mark.parametrize("method", ["minmax", "gptq"])
def test_names_without_the_prefix(checkpoints, tmp_path, kind, prefix, method):
    "As the base model's class saves them; transformers adds the prefix when it loads, and the codes are the same."
    base = checkpoints(kind)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors_of(base).items()}
    model = variant(base, tmp_path / "model", tensors)
    quantize(base, tmp_path / "plain", method, **GRID, **TEXT)
    quantize(model, tmp_path / "out", method, **GRID, **TEXT)
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    found, plain = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert found.keys() == plain.keys() and all(found[name].equal(plain[name]) for name in plain)
    loaded, right = load(model).state_dict(), load(base).state_dict()
    assert all(loaded[name].equal(right[name]) for name in right)


SMALL = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.1, bos_token_id=1,
             eos_token_id=2, tie_word_embeddings=False)


def made(config, path: Path, kind=None) -> Path:
    "A checkpoint with random weights of the class that `kind` (AutoModelForCausalLM) builds."
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    (kind or AutoModelForCausalLM).from_config(config).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer.save(path)
    return path


def test_a_wrapper_saved_whole(tmp_path):
    "Its model type maps to the class of its language model, whose names lie under another prefix on disk."
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    text = {**SMALL, "linear_num_key_heads": 2, "linear_num_value_heads": 32, "linear_key_head_dim": 32,
            "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"]}
    vision = dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128)
    whole = AutoConfig.for_model("qwen3_5", text_config={**text, "model_type": "qwen3_5_text"}, vision_config=vision)
    made(whole, tmp_path / "whole", AutoModelForImageTextToText)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").config.model_type == "qwen3_5_text"
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto").save_pretrained(tmp_path / "text")
    tiny_tokenizer.save(tmp_path / "text")
    for method in ("minmax", "gptq"):
        for model in ("whole", "text"): quantize(tmp_path / model, tmp_path / f"{method}-{model}", method, **GRID, **TEXT)
        assert digests(tmp_path / f"{method}-whole") == digests(tmp_path / f"{method}-text")
    tensors, out = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "gptq-whole")
    vision = [name for name in tensors if ".visual." in name]
    assert len(vision) > 5 and all(out[name].equal(tensors[name]) for name in vision)
    found, plain = load(tmp_path / "gptq-whole").state_dict(), load(tmp_path / "gptq-text").state_dict()
    assert all(found[name].equal(plain[name]) for name in plain)


def test_keys_and_values_that_sharing_layers_carry(tmp_path):
    "Gemma 4's later layers read the keys and values of earlier ones; published checkpoints hold projections for them."
    from transformers import AutoConfig
    config = AutoConfig.for_model("gemma4_text", **{
        **SMALL, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 32, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 64, "global_head_dim": 32, "tie_word_embeddings": True})
    base = made(config, tmp_path / "base")
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (2, 3) for part in "kv"]
    assert not tensors_of(base).keys() & set(names)
    extra = {name: torch.randn(64, 128).bfloat16() for name in names}
    model = variant(base, tmp_path / "model", {**tensors_of(base), **extra})
    quantize(base, tmp_path / "plain", **GRID)
    quantize(model, tmp_path / "out", **GRID)
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert all(tensors_of(tmp_path / "out")[name].equal(tensor) for name, tensor in extra.items())


OTHER_NAMES = {
    "gpt_bigcode": dict(vocab_size=512, n_embd=128, n_layer=2, n_head=4, n_inner=256, n_positions=512),
    "granitemoehybrid": {**SMALL, "mamba_n_heads": 32, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 32,
                         "mamba_expand": 2, "num_local_experts": 0, "shared_intermediate_size": 256,
                         "layer_types": ["mamba", "attention"]},
}


@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_config_under_other_names_and_with_infinity(tmp_path, kind):
    from transformers import AutoConfig, AutoModelForCausalLM
    model = made(AutoConfig.for_model(kind, **OTHER_NAMES[kind]), tmp_path / "model")
    text = (model / "config.json").read_text()
    assert '"hidden_size"' not in text or '"__float__": "Infinity"' in text.replace("Infinity}", '"Infinity"}')
    quantize(model, tmp_path / "out", "gptq", **GRID, **TEXT)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    was = json.loads(text)
    assert {key: written[key] for key in was if key not in ("dtype", "quantization_config")} == {
        key: was[key] for key in was if key != "dtype"}
    assert AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out")).config.vocab_size == 512


def scale_of(weight: torch.Tensor, blocks: tuple) -> torch.Tensor:
    "Powers of two that bring each block under 448, so that products are exact in bfloat16."
    rows, columns = (torch.arange(size) * count // size for size, count in zip(weight.shape, blocks))
    largest = torch.zeros(blocks).index_put_((rows[:, None].expand_as(weight), columns.expand_as(weight)),
                                             weight.float().abs(), accumulate=True)
    return torch.exp2(torch.ceil(torch.log2(largest.clamp_min(1e-6) / 448)))


FP8 = {  # suffix, shape of the scales from that of the weight, section, scale's dtype
    "a tensor": ("_scale", lambda rows, columns: (), None, torch.float32),
    "a tensor, inverse": ("_scale_inv", lambda rows, columns: (1,), None, torch.bfloat16),
    "rows": ("_scale", lambda rows, columns: (rows, 1), None, torch.float32),
    "blocks": ("_scale_inv", lambda rows, columns: (-(-rows // 128), -(-columns // 128)), None, torch.float32),
    "blocks of ModelOpt": ("_scale", lambda rows, columns: (-(-rows // 128), 1, -(-columns // 128), 1), None, torch.float32),
    "a section with blocks": ("_scale_inv", lambda rows, columns: (rows // 64, columns // 64),
                              {"quant_method": "fp8", "weight_block_size": [64, 64]}, torch.float8_e8m0fnu),
}


@pytest.fixture(scope="module")
def coded(checkpoints, tmp_path_factory):
    "A checkpoint with float8 codes, and the same weights without codes."
    made, root = {}, tmp_path_factory.mktemp("coded")

    def get(kind: str) -> tuple[Path, Path]:
        if kind in made: return made[kind]
        suffix, shape_of, section, dtype = FP8[kind]
        base, stored, plain = checkpoints("llama"), {}, {}
        for name, tensor in tensors_of(base).items():
            stored[name] = plain[name] = tensor
            if not name.endswith(("proj.weight", "embed_tokens.weight")): continue
            shape = shape_of(*tensor.shape)
            blocks = tuple(size for size in shape if size > 1 or len(shape) == 2) or (1, 1)
            scale = scale_of(tensor, (*blocks, 1)[:2] if len(blocks) < 2 else blocks)
            rows, columns = (torch.arange(size) * count // size for size, count in zip(tensor.shape, scale.shape))
            full = scale[rows][:, columns]
            stored[name] = (tensor.float() / full).to(torch.float8_e4m3fn)
            stored[f"{name}{suffix}"] = scale.reshape(shape).to(dtype)
            stored[name.replace(".weight", ".input_scale")] = torch.tensor(0.7)
            plain[name] = (stored[name].float() * full).bfloat16()
        made[kind] = (variant(base, root / f"{len(made)}-codes", stored, **({"quantization_config": section} if section else {})),
                      variant(base, root / f"{len(made)}-plain", plain))
        return made[kind]

    return get


@pytest.mark.parametrize("kind", FP8)
def test_float8_codes_are_multiplied_with_their_scales(coded, tmp_path, kind, caplog):
    model, plain = coded(kind)
    for path in (model, plain): quantize(path, tmp_path / path.name, **GRID)
    assert "tensors hold float8 codes and are read as codes times scales" in caplog.text
    assert digests(tmp_path / model.name) == digests(tmp_path / plain.name)
    found, right = tensors_of(tmp_path / model.name), tensors_of(tmp_path / plain.name)
    assert found.keys() == right.keys() and all(found[name].equal(right[name]) for name in right)
    assert not any("scale" in name and not name.endswith("weight_scale") for name in found)
    config = json.loads((tmp_path / model.name / "config.json").read_text())
    assert config["quantization_config"]["llmquant_method"] == "minmax"
    loaded, reference = load(model).state_dict(), load(plain).state_dict()
    assert all(loaded[name].equal(reference[name]) for name in reference)


@pytest.mark.parametrize("keys", [dict(method="hqq"), dict(method="gptq", **TEXT), dict(method="awq", **TEXT),
                                  dict(method="gptq", **TEXT, **{"calibration.dataset": "self"})])
def test_other_methods_read_float8_codes(coded, tmp_path, keys):
    for path in coded("blocks"): quantize(path, tmp_path / path.name, **keys, **GRID)
    codes, plain = (digests(tmp_path / path.name) for path in coded("blocks"))
    assert codes == plain


def test_a_run_on_float8_codes_is_verified_against_them(coded, tmp_path):
    from llmquant.evaluation.verification import check_files
    model, plain = coded("rows")
    quantize(model, tmp_path / "out", **GRID)
    for reference in (model, plain): assert check_files(tmp_path / "out", reference)["float_tensors"] == 7
    with pytest.raises(VerificationError, match="model.embed_tokens.weight"):
        check_files(tmp_path / "out", variant(plain, tmp_path / "other", {
            name: tensor + (1 if "embed" in name else 0) for name, tensor in tensors_of(plain).items()}))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_an_export_of_float8_codes_is_served(coded, tmp_path):
    "By a vLLM without plugins; the reference has the weights that codes and scales multiply to, on the same grid."
    from llmquant.evaluation import served_check
    from llmquant.evaluation.served_model import divergences, forced_logits, teacher_tokens
    from llmquant.evaluation.vllm_check import Job, ask_vllm_many
    model, plain = coded("rows")
    for path in (model, plain): quantize(path, tmp_path / path.name, **GRID)
    out = tmp_path / model.name
    prompts = teacher_tokens(out, {"vocab_size": 512})
    said, = ask_vllm_many([Job(str(out), prompts, "float16")], stock=True)
    assert not said.error and served_check.compare(out, prompts, said)["mean_kl"] < 1e-4
    right = load(tmp_path / plain.name, torch.float32, served_in=torch.float16)
    assert divergences(forced_logits(right, prompts), said)[0].mean() < 1e-4


UP = "model.layers.1.mlp.up_proj.weight"
UNREADABLE = {
    "no scale": ({UP + "_scale": None}, f"tensor {UP} holds float8_e4m3fn codes, and no scales lie beside it"),
    "other shape": ({UP + "_scale": torch.ones(7)}, f"its scale {UP}_scale has shape \\[7\\]"),
    "a second scale": ({UP.replace("weight", "weight_scale_2"): torch.ones(1)}, "up_proj.weight_scale_2 lies beside it"),
    "integers": ({UP: torch.ones(256, 128).to(torch.int8)}, f"tensor {UP} holds integers \\(int8\\)"),
    "16 bits": ({UP: torch.ones(256, 128).bfloat16()}, f"tensor {UP} is bfloat16, and a scale {UP}_scale lies beside it"),
}


@pytest.mark.parametrize("wrong", UNREADABLE)
def test_codes_that_nobody_can_read_are_named(coded, tmp_path, wrong):
    changes, message = UNREADABLE[wrong]
    base = coded("a tensor")[0]
    tensors = {name: t for name, t in {**tensors_of(base), **changes}.items() if t is not None}
    model = variant(base, tmp_path / "model", tensors)
    assert re.search(message, refusal(model))
    with pytest.raises(UsageError, match=message): load(model)


@pytest.mark.parametrize("values", [{"rms_norm_eps": "1e-5"}, {"hidden_act": "nope"}, {"rope_parameters": {"rope_type": "yarn"}},
                                    {"use_cache": "yes"}, {"num_attention_heads": 3}],
                         ids=lambda values: next(iter(values)))
def test_values_that_transformers_cannot_read_are_refused_by_every_method(checkpoints, tmp_path, values):
    "An export beside such a config.json could be loaded by nobody; a method without calibration says so as well."
    model = variant(checkpoints("llama"), tmp_path / "model", **values)
    assert "config.json of model type 'llama': transformers cannot" in refusal(model)


@pytest.mark.parametrize("method", ["minmax", "hqq", "gptq"])
def test_no_quantized_weight_is_infinite(checkpoints, tmp_path, method):
    "65504 is the largest float16; a scale that is rounded up would make it infinite, which bfloat16 holds."
    base = checkpoints("llama")
    weight = tensors_of(base)[UP].clone()
    weight[3, :16] = 65504
    model = variant(base, tmp_path / "model", {**tensors_of(base), UP: weight})
    try: quantize(model, tmp_path / "out", method, **GRID, **TEXT, torch_dtype="float16")
    except UsageError as error:
        assert re.search("^tensor .*up_proj.*overflows float16; set model.torch_dtype to bfloat16$", str(error))
    else: assert all(tensor.isfinite().all() for tensor in load(tmp_path / "out").state_dict().values())
    quantize(model, tmp_path / "wide", "minmax", **GRID, torch_dtype="bfloat16")
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "wide").state_dict().values())


@pytest.mark.parametrize("keys,says", [({"output_path": "file/deep/out"}, "is a file and no folder"),
                                       ({"device_map": "cuda"}, "this torch sees no CUDA device"),
                                       ({"verify": True}, "verify needs vLLM")], ids=["output", "device", "vllm"])
def test_check_refuses_what_a_run_refuses(checkpoints, tmp_path, monkeypatch, keys, says):
    "Before anything is opened: a file where a folder must be, a GPU and a server that are not there."
    (tmp_path / "file").touch()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("llmquant.evaluation.vllm_check.vllm_installed", lambda: False)
    recipe = {"model_path": str(checkpoints("llama")), **GRID, "output_path": "out", **keys}
    recipe["output_path"] = str(tmp_path / recipe["output_path"])
    for act in check, run:
        with pytest.raises(UsageError, match=says): act(resolve(recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_class_of_another_model_type_is_named(checkpoints, tmp_path):
    "What vLLM would build from it is no Llama; what is fused is that of the model all the same."
    base = checkpoints("llama")
    plans = [check(resolve({"model_path": str(path), **GRID})) for path in (
        base, variant(base, tmp_path / "model", architectures=["BertModel"]))]
    assert [note for note in plans[0].server_notes if "architectures" in note] == []
    assert "architectures has BertModel, a class of model type bert and not of llama" in plans[1].server_notes[0]
    assert "BertModel" not in plans[1].fused_by and plans[0].layout == plans[1].layout
