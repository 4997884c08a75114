"What stays in float: projections that no layout can hold and what is fused with them, stacked experts, and the count."
import ast

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from llmquant.cli.main import main
from llmquant.core.errors import UsageError
from llmquant.core.model_registry import ModelRegistry
from llmquant.core.quantizer_registry import QuantizerRegistry
from llmquant.models.served_class import class_alone, module_file, syntax_tree, vllm_folder
from llmquant.models.skeleton import on_disk, saved_state, skeleton
from llmquant.plan.plan import make_plan

SMALL = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LINEAR = dict(linear_key_head_dim=32, linear_value_head_dim=32, linear_num_key_heads=4, linear_num_value_heads=8)
MIXTURE = dict(moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
MODELS = {
    "qwen3_next": dict(**LINEAR, **MIXTURE),
    "qwen3_5_text": LINEAR,
    "gemma3n_text": dict(hidden_size_per_layer_input=32, vocab_size_per_layer_input=512, laurel_rank=16, altup_num_inputs=4,
                         num_kv_shared_layers=0, sliding_window=64,
                         layer_types=["sliding_attention", "full_attention"] * 2),
    "zamba2": dict(mamba_d_state=16, n_mamba_heads=4, mamba_headdim=64, mamba_ngroups=1, num_mem_blocks=1,
                   layers_block_type=["mamba", "hybrid"] * 2, hybrid_layer_ids=[1, 3]),
}
DSA = dict(q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, index_topk=16,
           moe_intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, index_head_dim=64,
           first_k_dense_replace=1, n_group=1, topk_group=1, num_key_value_heads=4, index_n_heads=32)
FEW = {"qwen3_next": "in_proj_ba", "qwen3_5_text": "in_proj_a", "gemma3n_text": "prediction_coefs", "zamba2": "in_proj"}


def plan_of(kind, method="minmax", values=None, **given):
    "The plan of a model that is never built: configuration, names and shapes."
    config = AutoConfig.for_model(kind, **{**SMALL, **(values or MODELS.get(kind, {}))}).to_dict()
    model = skeleton(config)
    shapes = {name: tuple(t.shape) for name, t in on_disk(model, saved_state(model)).items()}
    config["architectures"] = [type(model).__name__]
    adapter = ModelRegistry.for_config(config)
    tensors = {name: (torch.float16, shape) for name, shape in shapes.items()}
    given = dict(bits=4, group_size=32) | given
    plan = make_plan(adapter, config, tensors, torch.float16, QuantizerRegistry.get(method)(), **given)
    return plan, adapter


@pytest.mark.parametrize("kind", MODELS)
def test_few_rows_stay_in_float(kind):
    "Exactly the Linears that 4-bit codes cannot hold are left, each with its reason; the rest is quantized."
    plan, adapter = plan_of(kind)
    plan.check_servable()
    unfit = {l.name: l for l in plan.ignored if l.reason.startswith(("does not fit", "fused with"))}
    assert any(name.endswith(FEW[kind]) for name in unfit), sorted(unfit)
    for layer in plan.quantized: assert layer.out_features % 32 == layer.in_features % 32 == 0, layer
    fused = [set(group) for group in adapter.fused_groups(adapter.seen["sites"])]
    for name, layer in unfit.items():
        odd = layer.out_features % 32 or layer.in_features % 32
        assert odd or any(name in group and group <= set(unfit) for group in fused), layer
    for group in fused: assert group <= set(unfit) or not group & set(unfit), group


def test_what_vllm_builds_unquantized():
    "The indexer of sparse attention reads both of its narrow projections as one float Linear, however many rows they have."
    plan, _ = plan_of("glm_moe_dsa", values=DSA)
    left = {l.name.rpartition(".")[2] for l in plan.ignored if l.reason == "vLLM builds it unquantized"}
    assert left == {"wk", "weights_proj"} and any(l.name.endswith("indexer.wq_b") for l in plan.quantized)
    if (folder := vllm_folder()) is None: pytest.skip("vLLM is not installed")
    calls = [node.value for node in ast.walk(syntax_tree(module_file(folder, "vllm.model_executor.models.deepseek_v2")))
             if isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", "") == "wk_weights_proj"]
    assert calls and all(ast.unparse(k.value) == "None" for call in calls for k in call.keywords if k.arg == "quant_config")


def test_names_that_vllm_changes():
    "Gemma 3n's projections around the blocks are listed as they are called in the checkpoint and in vLLM's inner module."
    plan, _ = plan_of("gemma3n_text")
    ignored = set(plan.quantization_config["ignore"])
    for name in "altup_projections.0", "per_layer_model_projection":
        assert {f"model.{name}", f"model.self_decoder.{name}"} <= ignored, sorted(ignored)
    assert ignored - {l.name for l in plan.ignored} == {n for n in ignored if n.startswith("model.self_decoder.")}


def test_eight_bits_hold_more():
    "What 4 bits cannot hold is no reason at 8 bits, where a row of 8 still fills whole words."
    names = lambda **given: {l.name for l in plan_of("qwen3_5_text", **given)[0].quantized}
    assert {name.rpartition(".")[2] for name in names(bits=8) - names(bits=4)} == {"in_proj_a", "in_proj_b"}


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "deepseek_v2", "gemma3n"])
def test_a_class_parsed_alone_is_that_of_its_file(name):
    "Cutting a class out of vLLM's source gives the tree that the whole file gives, decorators aside."
    if (folder := vllm_folder()) is None: pytest.skip("vLLM is not installed")
    file = module_file(folder, f"vllm.model_executor.models.{name}")
    classes = [node for node in syntax_tree(file).body if isinstance(node, ast.ClassDef)]
    assert len(classes) > 3
    for cls in classes:
        cls.decorator_list = []
        assert ast.dump(class_alone(file, cls.name)) == ast.dump(cls)


def test_a_wrong_group_size_is_still_refused():
    "A group that most layers cannot have is the user's mistake; one that a few narrow layers cannot have is not."
    with pytest.raises(UsageError, match="group_size 192 does not divide in_features"):
        plan_of("qwen3_5_text", group_size=192)
    narrow = {l.reason for l in plan_of("gemma3n_text", group_size=64)[0].ignored if "fewer than a group" in l.reason}
    assert narrow == {"does not fit: its 32 columns are fewer than a group of 64"}


def test_an_override_for_what_cannot_be_held_is_refused():
    "It would change nothing, so it is named with the reason."
    with pytest.raises(UsageError, match=r"overrides\[0\].*stay in float anyway .*does not fit"):
        plan_of("qwen3_next", overrides=[{"match": r".*\.in_proj_ba", "symmetric": True}])


def test_plan_names_who_fuses():
    "vLLM's own class where it is installed, the adapter's table elsewhere."
    plan, _ = plan_of("qwen3_5_text")
    if vllm_folder() is None: assert plan.fused_by == "the adapter's table; vLLM is not installed"
    else: assert plan.fused_by.startswith("vLLM ") and plan.fused_by.endswith("'s Qwen3_5ForCausalLM")


def test_without_vllm_the_adapter_decides(monkeypatch):
    "The same layers are left where there is no vLLM to ask."
    with_vllm = [l.name for l in plan_of("qwen3_5_text")[0].quantized]
    monkeypatch.setattr("llmquant.models.base_adapter.vllm_folder", lambda: None)
    plan, _ = plan_of("qwen3_5_text")
    assert plan.fused_by == "the adapter's table; vLLM is not installed"
    assert [l.name for l in plan.quantized] == with_vllm


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    "A tiny mixture whose experts are stacked in one tensor."
    torch.manual_seed(0)
    config = AutoConfig.for_model("granitemoe", **{**SMALL, "num_hidden_layers": 1, "num_local_experts": 8,
                                                   "num_experts_per_tok": 2, "tie_word_embeddings": False})
    folder = tmp_path_factory.mktemp("mixture")/"model"
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder


def elements(folder):
    "Tensor name to number of elements."
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        return {name: file.get_tensor(name).numel() for name in file.keys()}


def test_share_of_parameters(mixture, tmp_path, capsys):
    "check, the screen at the end and the report give the share that a count over the files gives."
    given = ["--model-path", str(mixture), "--group-size", "32", "--method", "minmax"]
    assert main(["check", *given]) == 0
    checked = capsys.readouterr().out
    assert main([*given, "--output-path", str(tmp_path/"out")]) == 0
    ended = capsys.readouterr().out
    before, after = elements(mixture), elements(tmp_path/"out")
    in_float, experts = (sum(n for name, n in before.items() if test(name)) for test in
                         (after.__contains__, lambda name: "input_linear" in name or "output_linear" in name))
    share, part = in_float / sum(before.values()), experts / sum(before.values())
    line = f"left in float: {share:.1%} of {sum(before.values()) / 1e3:.3g} k parameters ({part:.1%} routed expert: stays in"
    assert any(text.startswith(line) for text in checked.splitlines()), checked
    assert ended.splitlines()[-1].startswith(line), ended
    report = yaml.safe_load((tmp_path/"out"/"quantization_report.yaml").read_text())
    assert report["parameters"]["total"] == sum(before.values()) and report["parameters"]["in_float"] == in_float
    assert next(iter(report["parameters"]["in_float_by_reason"].items()))[1] == experts
    assert list(report)[:6] == ["llmquant", "verdict", "sizes", "parameters", "seconds", "peak_memory_mib"]
    assert list(report).index("recipe") > list(report).index("peak_memory_mib") and report["verdict"] == "not verified"
    assert report["fused_by"]


def test_routed_experts_have_one_reason():
    "Whether they are stacked or stored one by one, and whichever adapter finds them, they are left for the same reason."
    for kind in "qwen3_moe", "granitemoe":
        adapter = ModelRegistry.for_config({"model_type": kind})
        config = AutoConfig.for_model(kind, **SMALL, num_experts=4, num_experts_per_tok=2).to_dict()
        model = skeleton(config)
        shapes = {name: tuple(t.shape) for name, t in on_disk(model, saved_state(model)).items()}
        reasons = {s.reason for s in adapter.linear_sites(config, shapes) if not s.quantize}
        assert any(reason.startswith("routed expert") for reason in reasons), (kind, reasons)
