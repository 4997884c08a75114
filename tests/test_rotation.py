"Rotations against what is independent: transformers' own forward pass, saved files, a plain float64 computation."
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llmquant.checkpoint.edited_source import shapes_of
from llmquant.checkpoint.source import CheckpointSource
from llmquant.core.errors import UsageError
from llmquant.core.model_registry import ModelRegistry
from llmquant.models.base_adapter import BaseHuggingFaceAdapter
from llmquant.models.deepseek_adapter import DeepSeekAdapter
from llmquant.models.layernorm_adapters import GPTNeoXAdapter, OPTAdapter
from llmquant.models.llama_adapter import LlamaAdapter
from llmquant.models.qwen_adapter import QwenAdapter
from llmquant.outlier_suppression.hadamard import hadamard_factor, paley
from llmquant.outlier_suppression.rotation import RotationSuppressor
from llmquant.outlier_suppression.rotations import make_rotation
from llmquant.sequential.block_source import for_checkpoint

ADAPTERS = {"llama": LlamaAdapter, "mistral": LlamaAdapter, "qwen2": QwenAdapter, "qwen3": QwenAdapter,
            "qwen2_moe": QwenAdapter, "qwen3_moe": QwenAdapter, "deepseek_v2": DeepSeekAdapter,
            "deepseek_v3": DeepSeekAdapter, "gpt_neox": GPTNeoXAdapter, "opt": OPTAdapter,
            "gemma": BaseHuggingFaceAdapter, "olmo2": BaseHuggingFaceAdapter, "gemma2": BaseHuggingFaceAdapter}
ROTATED = [kind for kind in ADAPTERS if kind not in ("olmo2", "gemma2")]
IDS = torch.randint(3, 500, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    "The first Gemma has norms in front, 1 + w; every family has its adapter, registered or not."
    monkeypatch.setitem(tiny.OWN, "gemma", dict(head_dim=32))
    asked = lambda cls, config: ADAPTERS.get(config["model_type"], BaseHuggingFaceAdapter)()
    monkeypatch.setattr(ModelRegistry, "for_config", classmethod(asked))


@torch.no_grad()
def logits(model): return model(IDS).logits


def off(found, wanted): return ((found - wanted).norm() / wanted.norm()).item()


def loaded(folder, view):
    "The transformers model of a transformed checkpoint, read back from files that it was written to."
    from transformers import AutoModelForCausalLM
    folder.mkdir()
    save_file({name: view.tensor(name).float().contiguous() for name in view.tensors}, folder/"model.safetensors",
              metadata={"format": "pt"})
    (folder/"config.json").write_text(json.dumps(view.config))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("tie", (False, True))
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_model_in_memory_keeps_its_function(kind, tie):
    model = tiny.build(kind, torch.float32, tie=tie)
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    suppressor = RotationSuppressor().configure({})
    assert suppressor.apply(model) is model
    assert off(logits(model), before) < 1e-5
    moved = {n for n, p in weights.items() if not torch.equal(p, dict(model.named_parameters())[n])}
    values = [n for n in weights if n.endswith(("v_proj.weight", "o_proj.weight", "out_proj.weight"))]
    assert moved.issuperset(values if "deepseek" not in kind else [])
    if kind in ROTATED:
        assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
        assert model.config.tie_word_embeddings is False
        norms = [p for n, p in model.named_parameters() if n.endswith("norm.weight") and len(p) == 128]
        assert len(norms) >= 5 and all(torch.equal(p, torch.full_like(p, kind != "gemma")) for p in norms)
    else: assert suppressor.basis() is None and moved == set(values)


SETTINGS = {"kind": "orthogonal"}, {"values": False}, {"residual": False}, {"seed": 7}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ("llama", "qwen2", "gpt_neox", "opt", "gemma"))
def test_parts_and_kinds(kind, settings):
    model = tiny.build(kind, torch.float32, tie=True)
    before = logits(model)
    RotationSuppressor().configure(settings).apply(model)
    assert off(logits(model), before) < 1e-5
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (settings == {"residual": False})


@pytest.mark.parametrize("kind", ("llama", "qwen3_moe", "gpt_neox", "opt", "gemma"))
def test_blocks_of_like_gain_keep_their_gain_in_the_norm(kind):
    "Gains of 1 and of about 1/100: the quiet channels are mixed among themselves, and 16 bits can hold what stays."
    model, quiet, offset = tiny.build(kind, torch.float32, tie=True), torch.arange(128) % 3 == 0, float(kind == "gemma")
    norms = [p for n, p in model.named_parameters() if n.endswith("norm.weight") and len(p) == 128]
    with torch.no_grad():
        for p in norms: p[quiet] = (p[quiet] + offset) * .01 - offset
        before = logits(model)
    suppressor = RotationSuppressor().configure({"block_size": 43})
    suppressor.apply(model)
    assert off(logits(model), before) < 1e-5 and "3 blocks of like gain" in suppressor.notes["residual"]
    assert not suppressor.basis().matrix()[quiet][:, ~quiet].any()
    for p in norms:
        assert torch.equal(p.bfloat16().float(), p) and len(p.unique()) >= 2
        assert (p + offset)[quiet].max() < .02 < .5 <= (p + offset)[~quiet].min()


@pytest.mark.parametrize("kind", ("llama", "qwen3", "qwen3_moe", "deepseek_v3", "gpt_neox", "opt", "olmo2"))
def test_the_checkpoint_on_disk_keeps_its_function(kind, tmp_path):
    tie = kind in ("llama", "opt", "gpt_neox")
    path = tiny.make(kind, tmp_path/"plain", torch.float32, tie=tie, shards=2)
    from transformers import AutoModelForCausalLM
    before = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
    with CheckpointSource(path) as source:
        view = RotationSuppressor().configure({}).transform(source, ADAPTERS[kind]())
        assert view.path == source.path and view.files() == source.files() and view.dtype == torch.float32
        model = loaded(tmp_path/"rotated", view)
    assert off(logits(model), before) < 1e-5
    again = tiny.build(kind, torch.float32, tie=tie)
    RotationSuppressor().configure({}).apply(again)
    assert off(logits(again), logits(model)) == 0.


def test_float16_rounds_once(tmp_path):
    path = tiny.make("llama", tmp_path/"half", torch.float16, tie=True)
    with CheckpointSource(path) as source:
        view = RotationSuppressor().configure({}).transform(source, LlamaAdapter())
        assert view.dtype == torch.float16 and view.tensors["lm_head.weight"].dtype == torch.float16
        found = view.tensor("model.layers.0.mlp.up_proj.weight")
        plain = {n: source.tensor(n).double() for n in source.tensors}
    Q = make_rotation(128, name="residual").matrix()
    gain = plain["model.layers.0.post_attention_layernorm.weight"]
    assert torch.equal(found, (plain["model.layers.0.mlp.up_proj.weight"] * gain @ Q).float()) or \
        off(found.double(), plain["model.layers.0.mlp.up_proj.weight"] * gain @ Q) < 1e-7


@pytest.mark.parametrize("kind", ("llama", "opt"))
def test_each_block_in_the_new_basis(kind, tmp_path):
    "f'(x Q) = f(x) Q for every block, filled as the walk fills it."
    path = tiny.make(kind, tmp_path/kind, torch.float32)
    adapter, suppressor = ADAPTERS[kind](), RotationSuppressor().configure({})
    with CheckpointSource(path) as source, torch.no_grad():
        view = suppressor.transform(source, adapter)
        plain, rotated = (for_checkpoint(s, adapter) for s in (source, view))
        one, two = plain.inputs(IDS, 2), rotated.inputs(IDS, 2)
        hidden = one.hidden[0]
        assert off(two.hidden[0], suppressor.basis()(hidden)) < 1e-6
        for index in range(2):
            out, _ = one.call(index, plain.load(index), hidden)
            changed, _ = two.call(index, rotated.load(index), suppressor.basis()(hidden))
            assert off(changed, suppressor.basis()(out)) < 1e-5
            plain.empty(), rotated.empty()
            hidden = out


@pytest.mark.parametrize("hidden,heads", ((576, 9), (100, 5), (60, 3), (84, 3)))
@pytest.mark.parametrize("kind", ("llama", "gpt_neox"))
def test_sizes_that_are_no_powers_of_two(kind, hidden, heads):
    dims = dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads)
    model = tiny.build(kind, torch.float32, **dims, **({"head_dim": hidden // heads} if kind == "llama" else {}))
    before = logits(model)
    suppressor = RotationSuppressor().configure({})
    suppressor.apply(model)
    assert off(logits(model), before) < 1e-5
    assert ("Hadamard" in suppressor.notes["residual"]) == (hadamard_factor(hidden) is not None)


def test_hadamard_matrices_of_every_order_we_claim():
    "Entries of one size, orthogonal rows, first column of ones; the orders below 200 that Paley's constructions give."
    orders = [n for n in range(4, 200, 4) if paley(n) is not None]
    assert {12, 20, 28, 36, 44, 60, 68, 108} <= set(orders) and 92 not in orders
    for order in orders:
        H = paley(order)
        assert torch.equal(H @ H.T, order * torch.eye(order).double()) and H[:, 0].eq(1).all() and H.abs().eq(1).all()


@pytest.mark.parametrize("kind", ("llama", "gpt_neox", "opt"))
def test_outliers_get_smaller(kind):
    "One channel of the embedding a thousand times larger: in the new stream no channel stands out."
    model = tiny.build(kind, torch.float32)
    with torch.no_grad(): model.get_input_embeddings().weight[:, 17] *= 1000
    peak = lambda x: (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean().item()
    stream = lambda: model.get_decoder()(IDS, output_hidden_states=True).hidden_states[1].detach()
    before = peak(stream())
    RotationSuppressor().configure({}).apply(model)
    assert before > 8 and peak(stream()) < 4.5


def test_saved_and_loaded(tmp_path):
    "The untied model goes through save_pretrained and back."
    from transformers import AutoModelForCausalLM
    for kind in "llama", "gpt_neox", "opt":
        model = tiny.build(kind, torch.float32, tie=True)
        before = logits(model)
        RotationSuppressor().configure({}).apply(model)
        model.save_pretrained(tmp_path/kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path/kind, dtype=torch.float32).eval()
        assert torch.equal(logits(again), logits(model)) and off(logits(again), before) < 1e-5


def test_a_layer_norm_bias_without_a_reader_that_takes_it():
    "The last norm's bias stays with the norm; where its weight is zero nothing can hold it, and that is said."
    model = tiny.build("opt", torch.float32)
    assert model.model.decoder.final_layer_norm.bias.abs().max() > 0 and model.lm_head.bias is None
    with torch.no_grad(): model.model.decoder.final_layer_norm.weight[3] = 0
    kept = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(UsageError, match="norm model.decoder.final_layer_norm: 1 channels have weight 0 and a bias"):
        RotationSuppressor().configure({}).apply(model)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters()), "a refused model must stay as it was"
    with torch.no_grad(): model.model.decoder.final_layer_norm.bias[3] = 0
    before = logits(model)
    RotationSuppressor().configure({}).apply(model)
    assert off(logits(model), before) < 1e-5


def test_everything_has_a_role(tmp_path):
    "A tensor that no table explains stops the rotation; a multi-token prediction block is left and named."
    path = tiny.make("deepseek_v3", tmp_path/"v3", torch.float32, layers=2)
    tensors, config = load_file(path/"model.safetensors"), json.loads((path/"config.json").read_text())
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    more = shapes | {n.replace("layers.1.", "layers.2."): s for n, s in shapes.items() if "layers.1." in n}
    sites = DeepSeekAdapter().rotation_sites(config, more | {"model.layers.2.eh_proj.weight": (128, 256)})
    assert "beyond block 1" in sites.left_out
    assert not any("layers.2." in n for n, _ in sites.norms) and not any("layers.2." in n for n in sites.writers)
    with pytest.raises(UsageError, match="tensor model.layers.0.mlp.odd.weight: the adapter does not declare"):
        DeepSeekAdapter().rotation_sites(config, shapes | {"model.layers.0.mlp.odd.weight": (8, 128)})
    readers = {r for _, names in sites.norms for r in names}
    roles = {n for n in (*readers, *sites.writers)}
    inner = [n for n in shapes if n.endswith(".weight") and len(shapes[n]) == 2 and "layers." in n]
    assert {n.removesuffix(".weight") for n in inner} - roles == {
        f"model.layers.{i}.self_attn.{x}" for i in range(2) for x in ("q_b_proj", "kv_b_proj")}


@pytest.mark.parametrize("kind", ("olmo2", "gemma2", "gemma3_text", "glm4"))
def test_norms_behind_the_sub_layers(kind):
    sites = BaseHuggingFaceAdapter().rotation_sites(
        {"model_type": kind, "num_attention_heads": 4, "hidden_size": 64, "head_dim": 16},
        {"model.layers.0.self_attn.v_proj.weight": (32, 64), "model.layers.0.self_attn.o_proj.weight": (64, 64)})
    assert sites.refusal and len(sites.values) == 1 and sites.values[0].repeats == 2


@pytest.mark.parametrize("kind,settings,says", (
    ("olmo2", {"residual": True}, "residual: true, and it cannot be done: norms behind"),
    ("deepseek_v3", {"values": True}, "values: true, and it cannot be done"),
    ("olmo2", {"values": False}, "nothing to rotate in model type 'olmo2'"),
    ("llama", {"values": False, "residual": False}, "nothing to rotate in model type 'llama'"),
    ("phi3", {}, "model type 'phi3'")))
def test_refusals(kind, settings, says):
    with pytest.raises(UsageError, match=says):
        RotationSuppressor().configure(settings).apply(tiny.build(kind, torch.float32))


def test_what_is_transformed_is_a_checkpoint(tmp_path):
    "The plan of the rotated checkpoint: an own head that stays in float, the same Linears."
    path = tiny.make("llama", Path(tmp_path)/"tied", torch.bfloat16, tie=True)
    adapter = LlamaAdapter()
    with CheckpointSource(path) as source:
        view = RotationSuppressor().configure({}).transform(source, adapter)
        plain, rotated = (adapter.linear_sites(s.config, shapes_of(s)) for s in (source, view))
    assert [s.name for s in plain if s.quantize] == [s.name for s in rotated if s.quantize]
    assert [s.reason for s in rotated if s.name == "lm_head"] == ["output head"]
    assert set(view.tensors) - set(source.tensors) == {"lm_head.weight"} and source.config["tie_word_embeddings"]
