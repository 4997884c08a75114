"Adapters against what is independent: transformers' own files, vLLM's fusion tables, a process without transformers."
import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open

from llmquant.core.model_registry import ModelRegistry
from llmquant.models.base_adapter import BaseHuggingFaceAdapter, explain
from llmquant.models.deepseek_adapter import DeepSeekAdapter
from llmquant.models.layernorm_adapters import GPTNeoXAdapter, OPTAdapter
from llmquant.models.llama_adapter import LlamaAdapter
from llmquant.models.qwen_adapter import QwenAdapter

FAMILIES = {"llama": LlamaAdapter, "mistral": LlamaAdapter, "qwen2": QwenAdapter, "qwen3": QwenAdapter,
            "qwen2_moe": QwenAdapter, "qwen3_moe": QwenAdapter, "deepseek_v2": DeepSeekAdapter,
            "deepseek_v3": DeepSeekAdapter, "gpt_neox": GPTNeoXAdapter, "opt": OPTAdapter}
# quantized Linears of a tiny checkpoint of two blocks, counted by hand from the model files
LINEARS = {"llama": 14, "mistral": 14, "qwen2": 14, "qwen3": 14, "qwen2_moe": 14, "qwen3_moe": 8, "deepseek_v2": 16,
           "deepseek_v3": 16, "gemma2": 14, "olmo2": 14, "gpt_neox": 8, "phi3": 8, "opt": 12}


def read(path: Path):
    "config.json and every tensor."
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as shard: tensors |= {name: shard.get_tensor(name) for name in shard.keys()}
    return json.loads((path/"config.json").read_text()), tensors


def shapes_of(tensors): return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "One tiny checkpoint of every kind, in several shards."
    folder = tmp_path_factory.mktemp("tiny")
    return {kind: tiny.make(kind, folder/kind, shards=2) for kind in tiny.KINDS}


def same(mine: dict, stored: dict):
    "Names, dtypes, shapes and bytes are equal."
    assert sorted(mine) == sorted(stored)
    for name, tensor in stored.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (mine[name], tensor))
        assert torch.equal(left, right), name


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_sites_and_reasons(kind, checkpoints):
    config, tensors = read(checkpoints[kind])
    adapter = ModelRegistry.for_config(config)
    assert type(adapter) is FAMILIES.get(kind, BaseHuggingFaceAdapter)
    sites = adapter.linear_sites(config, shapes_of(tensors))
    assert sum(site.quantize for site in sites) == LINEARS[kind]
    assert all(site.quantize == (not site.reason) for site in sites)
    for site in sites:
        if site.quantize:
            assert (site.out_features, site.in_features) == tuple(tensors[f"{site.name}.weight"].shape)
            assert site.block == adapter.block_of(site.name)
    why = explain(adapter, config, shapes_of(tensors))
    quantized = {f"{site.name}.weight" for site in sites if site.quantize}
    assert quantized == {name for name, reason in why.items() if not reason}


@pytest.mark.parametrize("kind", FAMILIES)
def test_table_and_skeleton_agree(kind, checkpoints):
    config, tensors = read(checkpoints[kind])
    by_names = FAMILIES[kind]().linear_sites(config, shapes_of(tensors))
    by_skeleton = BaseHuggingFaceAdapter().linear_sites(config, shapes_of(tensors))
    assert [(s.name, s.quantize, s.block) for s in by_names] == [(s.name, s.quantize, s.block) for s in by_skeleton]


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tie", (False, True))
def test_memory_equals_disk(kind, tie, tmp_path):
    path = tiny.make(kind, tmp_path/kind, tie=tie)
    _, stored = read(path)
    model = tiny.build(kind, tie=tie)
    same(ModelRegistry.for_config(model.config.to_dict()).checkpoint_tensors(model), stored)


@pytest.mark.parametrize("kind", ("llama", "qwen3_moe", "deepseek_v3", "gpt_neox", "opt"))
def test_loaded_equals_disk(kind, checkpoints):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(checkpoints[kind], dtype=torch.float16)
    same(BaseHuggingFaceAdapter().checkpoint_tensors(model), read(checkpoints[kind])[1])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_reload_gives_the_same_model(kind, tmp_path):
    from transformers import AutoModelForCausalLM
    ids = (torch.arange(1, 33)*7 % 512)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tiny.make(kind, tmp_path/kind, torch.float32), dtype=torch.float32)
    with torch.no_grad(): ours, theirs = tiny.build(kind, torch.float32)(ids).logits, loaded.eval()(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours.std() > 0.5


def test_quant_linears_leave_only_their_bias():
    class Packed(torch.nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
            self.register_buffer("scales", torch.ones(2, 1))
            self.bias = bias
    model = tiny.build("qwen2")
    before = set(BaseHuggingFaceAdapter().checkpoint_tensors(model))
    attention = model.model.layers[1].self_attn
    attention.q_proj, attention.o_proj = Packed(attention.q_proj.bias), Packed(None)
    after = BaseHuggingFaceAdapter().checkpoint_tensors(model)
    gone = {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qo"}
    assert before - set(after) == gone and set(after) < before
    assert QwenAdapter().get_layer_by_name(model, "model.layers.1.self_attn.q_proj") is attention.q_proj


def test_renamed_head_is_found_after_quantization():
    model = tiny.build("gpt_neox")
    assert BaseHuggingFaceAdapter().get_layer_by_name(model, "embed_out") is model.lm_head


def test_known_families_do_not_import_transformers(checkpoints):
    code = """if True:
        import json, sys
        from llmquant.core.model_registry import ModelRegistry
        from llmquant.models.deepseek_adapter import DeepSeekAdapter
        from llmquant.models.layernorm_adapters import GPTNeoXAdapter, OPTAdapter
        from llmquant.models.llama_adapter import LlamaAdapter
        from llmquant.models.qwen_adapter import QwenAdapter
        for config, shapes in json.load(sys.stdin):
            families = LlamaAdapter, QwenAdapter, DeepSeekAdapter, GPTNeoXAdapter, OPTAdapter
            adapter = next(a for a in families if config["model_type"] in a.model_types)()
            adapter.fused_groups(adapter.linear_sites(config, shapes))
        sys.exit("transformers" in sys.modules)"""
    given = [(config, shapes_of(tensors)) for config, tensors in map(read, (checkpoints[kind] for kind in FAMILIES))]
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(given), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def vllm_tables():
    "packed_modules_mapping of vLLM's model files, read as text: {file: {fused name: parts}}."
    found = importlib.util.find_spec("vllm")
    if found is None: pytest.skip("vLLM is not installed")
    tables = {}
    files = "llama", "granite", "hyperclovax", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2", "gemma2"
    for name in files:
        file = Path(found.origin).parent/"model_executor"/"models"/f"{name}.py"
        table = tables.setdefault(name, {})
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            target = None
            if isinstance(node, ast.AnnAssign): target = node.target
            if isinstance(node, ast.Assign): target = node.targets[0]
            if getattr(target, "id", "") == "packed_modules_mapping": table |= ast.literal_eval(node.value)
            if isinstance(target, ast.Subscript) and getattr(target.value, "attr", "") == "packed_modules_mapping":
                table[ast.literal_eval(target.slice)] = ast.literal_eval(node.value)
    return tables


@pytest.mark.parametrize("adapter,files", ((LlamaAdapter, ("llama", "granite", "hyperclovax")),
                                           (DeepSeekAdapter, ("deepseek_v2",)),
                                           (QwenAdapter, ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"))))
def test_fused_groups_are_those_of_vllm(adapter, files):
    tables = vllm_tables()
    parts = {tuple(group) for name in files for group in tables[name].values()}
    assert parts == set(adapter.fused)


def test_patterns_of_other_types_use_the_skeleton(checkpoints):
    config, tensors = read(checkpoints["gemma2"])
    sites = LlamaAdapter().linear_sites(config, shapes_of(tensors))     # as if a pattern had chosen it
    assert sum(site.quantize for site in sites) == LINEARS["gemma2"]


@pytest.mark.parametrize("kind", ("llama", "qwen3_moe", "deepseek_v3", "gpt_neox"))
def test_quantized_in_memory_keeps_everything_else(kind, checkpoints):
    "After the in-memory door the adapter gives exactly the tensors of the checkpoint that were not quantized."
    from llmquant.core.quantizer_registry import QuantizerRegistry
    _, stored = read(checkpoints[kind])
    model = tiny.build(kind)
    adapter = ModelRegistry.for_config(model.config.to_dict())
    sites = adapter.linear_sites(model.config.to_dict(), shapes_of(stored))
    model = QuantizerRegistry.get("minmax")().quantize(model, bits=4, group_size=32)
    quantized = {f"{site.name}.weight" for site in sites if site.quantize}
    same(adapter.checkpoint_tensors(model), {name: tensor for name, tensor in stored.items() if name not in quantized})
    for site in sites:
        if site.quantize: assert "qweight" in dict(adapter.get_layer_by_name(model, site.name).named_buffers())


@pytest.mark.parametrize("kind", ("qwen3", "deepseek_v3", "gemma2"))
def test_saved_files_agree(kind, checkpoints, tmp_path):
    "save_quantized writes a vllm_config.json that repeats config.json, and config.json ignores what stays in float."
    from llmquant.core.quantizer_registry import QuantizerRegistry
    model = QuantizerRegistry.get("minmax")().quantize(tiny.build(kind), bits=4, group_size=32)
    adapter = ModelRegistry.for_config(model.config.to_dict())
    adapter.save_quantized(model, tmp_path/"out", checkpoints[kind])
    config, saved = (json.loads((tmp_path/"out"/name).read_text()) for name in ("config.json", "vllm_config.json"))
    assert saved["quantization"] == saved["model"]["quantization"] == config["quantization_config"]
    assert saved["model"]["type"] == {"qwen3": "qwen", "deepseek_v3": "deepseek", "gemma2": "gemma2"}[kind]
    assert saved["model"]["dtype"] == config["dtype"] == "float16"
    if kind == "deepseek_v3":
        ignored = set(config["quantization_config"]["ignore"])
        assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.experts.7.up_proj"} <= ignored
        assert "model.layers.1.mlp.shared_experts.up_proj" not in ignored
