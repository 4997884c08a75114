"""Comparing exports: what the table shows is in the results files, what cannot stand side by side is refused, and what
differs between two folders is found without a model."""
import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmquant.core.errors import UsageError
from llmquant.harness.compare import compare_results, compare_text, pareto_front
from llmquant.harness.file_differences import file_differences, file_differences_text
from llmquant.harness.paired import compare_items
from llmquant.pipeline.run import run
from llmquant.utils.config import resolve


def results_of(lost, bits=4, size=1000, **settings):
    "Results of an evaluation on one task of 100 items, of which the export loses some."
    base = [1] * 70 + [0] * 30
    pair = compare_items(base, [0] * lost + base[lost:])
    text = {"name": "t", "digest": "d", "context": 64, "stride": 32, "windows": 9, "tokens": 288,
            "perplexity": {"base": 9.0, "export": 9.9, "ratio": 1.1, "interval": [1.05, 1.2]},
            "kl": {"mean": 0.02, "interval": [0.01, 0.03], "p99": 0.3, "max": 1.0, "top1_agreement": 0.9}}
    models = {"base": {"digest": "b", "bytes": 4000}, "export": {"method": "minmax", "bits": bits, "bytes": size}}
    acc = {**pair.to_dict(), "higher_is_better": True}
    return {"fingerprint": "f", "settings": {"backend": "hf", "limit": 100, **settings}, "text": text, "models": models,
            "tasks": {"piqa": {"version": 1, "n": 100, "metrics": {"acc": acc}}}}


def stored(folder, results):
    "An export with results beside it."
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
    return folder


def test_the_table_shows_what_the_files_hold(tmp_path):
    paths = [stored(tmp_path / name, results_of(lost, bits)) for name, lost, bits in (("a", 2, 8), ("b", 20, 3))]
    text = compare_text(paths, tmp_path / "plot.png")
    assert [row.name for row in compare_results(paths)] == ["base", "a", "b"]
    for path, name in zip(paths, "ab"):
        acc = json.loads((path / "evaluation/results.json").read_text())["tasks"]["piqa"]["metrics"]["acc"]
        line = next(line for line in text.splitlines() if line.split()[:1] == [name] and "minmax" not in line)
        assert f"{acc['difference']:+.4f}" in line and f"{acc['mcnemar_p']:.2g}" in line
        assert f"[{acc['interval'][0]:+.4f}, {acc['interval'][1]:+.4f}]" in line
    assert "x 1.1000 [1.0500, 1.2000]" in text and (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize(("change", "said"), [
    ({"settings": {"backend": "vllm", "limit": 100}}, "setting backend: hf and vllm"),
    ({"settings": {"backend": "hf", "limit": 50}}, "setting limit: 100 and 50"),
    ({"settings": {"backend": "hf", "limit": 100, "template": True}}, "setting template: None and True"),
    ({"models": {"base": {"digest": "other"}, "export": {}}}, "base: b and other"),
])
def test_other_questions_are_not_put_side_by_side(tmp_path, change, said):
    paths = [stored(tmp_path / "a", results_of(1)), stored(tmp_path / "b", results_of(1) | change)]
    with pytest.raises(UsageError, match=said): compare_text(paths)
    assert not (tmp_path / "plot.png").exists()


def test_every_difference_is_named_at_once(tmp_path):
    other = results_of(1, limit=7, seed=3)
    other["tasks"]["piqa"]["version"] = 9
    paths = [stored(tmp_path / "a", results_of(1)), stored(tmp_path / "b", other)]
    with pytest.raises(UsageError) as caught: compare_results(paths)
    for said in "limit: 100 and 7", "seed: None and 3", "task piqa, version: 1 and 9": assert said in str(caught.value)


def test_a_damaged_file_of_results_is_one_sentence(tmp_path):
    good = stored(tmp_path / "good", results_of(1))
    for name, text in (("torn", '{"fingerprint": '), ("list", "[]"), ("empty", ""), ("half", '{"fingerprint": "f"}')):
        bad = stored(tmp_path / name, {})
        (bad / "evaluation/results.json").write_text(text)
        with pytest.raises(UsageError, match="run llmquant evaluate"): compare_results([good, bad])


def test_no_point_of_the_front_is_beaten():
    points = list(product((1, 2, 3), (0.5, 0.1, 0.9)))
    front = pareto_front(points)
    better = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b
    assert {points[n] for n in front} == {p for p in points if not any(better(q, p) for q in points)} == {(1, 0.9)}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    "A base of two blocks and exports at 4 bits: one plain, one with an override."
    place = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).half().save_pretrained(place / "base")
    same = {"model_path": f"{place}/base", "method": "minmax", "bits": 4, "group_size": 32, "verify": False,
            "quiet": True}
    run(resolve({**same, "output_path": f"{place}/w4"}))
    wider = [{"match": ".*down_proj", "bits": 8}]
    run(resolve({**same, "output_path": f"{place}/mixed", "quantization.overrides": wider}))
    return place


def test_an_override_is_found_layer_by_layer(exports):
    found = file_differences(exports / "w4", exports / "mixed")["layers"]
    assert found["different"] == {f"model.layers.{n}.mlp.down_proj": ["W4 g32 asym", "W8 g32 asym"] for n in range(2)}
    assert found["equal"] == 12


def test_a_base_and_its_export_differ_in_the_quantized_layers_alone(exports):
    found = file_differences(exports / "base", exports / "w4")
    float_names = load_file(exports / "base/model.safetensors").keys()
    assert set(found["tensors"]["only_in_a"]) == {f"{layer}.weight" for layer in found["layers"]["different"]}
    assert found["tensors"]["equal"] == len(float_names) - 14 and not found["tensors"]["content"]
    assert [*found["config"]] == ["quantization_config"] and json.loads(json.dumps(found)) == found


def test_copies_are_equal_whatever_their_shards(exports, tmp_path):
    shutil.copytree(exports / "w4", tmp_path / "one")
    file, = (tmp_path / "one").glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    (tmp_path / "one/model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, tmp_path / "one/model.safetensors", {"format": "pt"})
    assert file_differences(exports / "w4", tmp_path / "one")["equal"]
    assert "no difference" in file_differences_text(exports / "w4", tmp_path / "one")


@pytest.mark.parametrize("fault", ["scale", "zero", "dtype", "missing", "bit"])
def test_a_planted_fault_is_named(exports, tmp_path, fault):
    shutil.copytree(exports / "w4", tmp_path / "x")
    file, = (tmp_path / "x").glob("*.safetensors")
    tensors, layer = load_file(file), "model.layers.0.self_attn.q_proj"
    match fault:
        case "scale": tensors[f"{layer}.weight_scale"][:, 1] *= 2
        case "zero": tensors[f"{layer}.weight_zero_point"] += 1
        case "dtype": tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        case "missing": del tensors["model.norm.weight"]
        case "bit": tensors["model.norm.weight"].view(torch.int16)[5] ^= 1
    save_file(tensors, file, {"format": "pt"})
    index = tmp_path / "x/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
    found = file_differences(exports / "w4", tmp_path / "x")["tensors"]
    named = {kind: [*items] for kind, items in found.items() if kind != "equal" and items}
    kind = {"dtype": "dtype", "missing": "only_in_a"}.get(fault, "content")
    changed = {"scale": f"{layer}.weight_scale", "zero": f"{layer}.weight_zero_point"}.get(fault, "model.norm.weight")
    assert named == {kind: [changed]}
    if fault == "bit": assert found["content"]["model.norm.weight"]["elements"] == 1


def test_what_cannot_be_compared_is_one_sentence(exports, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    shutil.copytree(exports / "w4", tmp_path / "cut")
    file, = (tmp_path / "cut").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    shutil.copytree(exports / "w4", tmp_path / "section")
    config = json.loads((tmp_path / "section/config.json").read_text())
    config["quantization_config"]["llmquant_scheme"] = {"bits": 77}
    (tmp_path / "section/config.json").write_text(json.dumps(config))
    for bad in tmp_path / "model.gguf", tmp_path / "nowhere", tmp_path / "cut", tmp_path / "section", Path(__file__):
        for pair in (bad, exports / "w4"), (exports / "w4", bad):
            with pytest.raises(UsageError): file_differences(*pair)
