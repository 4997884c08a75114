"What a run says of its own outliers: numbers in the report, a picture beside it, and both survive a kill."
import json
import sys
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
import yaml
from outliers import inject_outliers

from llmquant import quantize
from llmquant.cli.summary import report_text
from llmquant.export.export import PICTURE, REPORT
from llmquant.sequential.decoder_loop import BlockLoop

TEXT = {"num_samples": 4, "max_length": 48, "batch_size": 2}
LEADERS = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A tiny Llama with channels 5 and 33 behind each norm 24 times as large."
    path = tmp_path_factory.mktemp("base") / "llama"
    model = inject_outliers(tiny.build("llama", torch.float32), [5, 33], 24.0)
    model.save_pretrained(path)
    tiny_tokenizer.save(path)
    return path


def run(base, out, suppressors, method="minmax", **rest):
    "A run to W8A8."
    section = {"outlier_suppression": suppressors, "activations": 8, **rest}
    return quantize(base, out, method, config={"quantization": section, "calibration": TEXT})


def sizes_of(out):
    "What the file says."
    return yaml.safe_load((out / REPORT).read_text())["outlier_suppression"].get("sizes", [])


@pytest.mark.parametrize("method, rest", [("minmax", {}), ("gptq", {}), ("gptq", {"gptq": {"true_sequential": True}})])
def test_the_report_compares_before_and_after(base, tmp_path, method, rest):
    run(base, tmp_path / "out", "smooth_quant", method, **rest)
    stage, = sizes_of(tmp_path / "out")
    assert stage["by"] == "smooth_quant" and stage["tokens"] == "192 tokens of the calibration text"
    assert set(stage["largest_over_median"]) == {0, 1}
    for block in stage["largest_over_median"].values():
        assert set(block) == LEADERS
        for norm in "self_attn.q_proj", "mlp.gate_proj": assert block[norm]["before"] > 15 > 10 > block[norm]["after"]
    worst = stage["worst"]
    assert worst["channels"] == 128 == len(worst["before"]) == len(worst["after"])
    assert sorted(range(128), key=worst["before"].__getitem__)[-2:] in ([5, 33], [33, 5])
    assert (tmp_path / "out" / PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_sizes_are_those_of_the_model_before_and_after(base, tmp_path):
    "Measured by plain hooks on transformers' own models: the original, and the one that `apply` edits."
    from transformers import AutoModelForCausalLM

    from llmquant.calibration.data import load_calibration
    from llmquant.outlier_suppression.smooth_quant import SmoothQuantSuppressor
    run(base, tmp_path / "out", "smooth_quant", smooth_quant={"alpha": 0.5})
    stage, = sizes_of(tmp_path / "out")
    tokens = load_calibration(None, base, 512, TEXT["num_samples"], TEXT["max_length"], 42).tokens
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    smooth = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    SmoothQuantSuppressor().configure({"alpha": 0.5}).apply(smooth, tokens)
    for side, model in ("before", plain), ("after", smooth):
        seen = {}
        gate = model.model.layers[0].mlp.gate_proj
        hook = gate.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(inputs=args[0]))
        with torch.no_grad(): model(tokens)
        hook.remove()
        maxima = seen["inputs"].flatten(0, 1).abs().amax(0)
        ratio = float(maxima.max() / maxima.median())
        assert stage["largest_over_median"][0]["mlp.gate_proj"][side] == pytest.approx(ratio, rel=0.02)


def test_only_what_was_measured_is_told(base, tmp_path):
    "A rotation is seen on the tokens of its comparison; a run without suppressors has neither numbers nor a picture."
    report = run(base, tmp_path / "rotated", "rotation")
    stage, = report["outlier_suppression"]["sizes"]
    assert stage["by"] == "rotation" and stage["tokens"] == "32 random tokens"
    gate = stage["largest_over_median"][0]["mlp.gate_proj"]
    assert gate["after"] < 5 < gate["before"]
    assert (tmp_path / "rotated" / PICTURE).exists()
    quantize(base, tmp_path / "plain", "minmax", bits=4, group_size=32)
    assert not (tmp_path / "plain" / PICTURE).exists()


def test_two_stages_are_two_rows(base, tmp_path):
    report = run(base, tmp_path / "out", "rotation,smooth_quant", "gptq")
    assert [stage["by"] for stage in report["outlier_suppression"]["sizes"]] == ["rotation", "smooth_quant"]
    shown = report_text(report, "out")
    assert shown.count("largest channel over median") == 2 and "in block" in shown
    assert json.loads(json.dumps(report["outlier_suppression"]["sizes"]))  # plain values


def test_no_pass_is_added_where_the_method_measures(base, tmp_path, monkeypatch):
    "What the method measures and what the report tells come from one pass."
    wanted, plain = [], BlockLoop.measure

    def noting(self, index, block, leaders, *args, **kwargs):
        wanted.append(kwargs.get("wanted") or self.wanted)
        return plain(self, index, block, leaders, *args, **kwargs)

    monkeypatch.setattr(BlockLoop, "measure", noting)
    run(base, tmp_path / "out", "smooth_quant", "gptq")
    assert len(wanted) == 2 * 2 and all("maxima" in names for names in wanted)
    wanted.clear()
    run(base, tmp_path / "more", "smooth_quant", "minmax")
    assert len(wanted) == 2 * 2 and wanted[1] == ("maxima",)


def test_a_killed_run_tells_the_same(base, tmp_path, monkeypatch):
    run(base, tmp_path / "whole", "smooth_quant")
    from llmquant.checkpoint.journal import Journal
    plain = Journal.finish_block

    def dying(self, index, results):
        plain(self, index, results)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish_block", dying)
        with pytest.raises(KeyboardInterrupt): run(base, tmp_path / "out", "smooth_quant")
    report = run(base, tmp_path / "out", "smooth_quant")
    assert report["resumed"]["at_block"] == 1
    assert sizes_of(tmp_path / "out") == sizes_of(tmp_path / "whole")
    assert (tmp_path / "out" / PICTURE).read_bytes() == (tmp_path / "whole" / PICTURE).read_bytes()


def test_the_tool_that_measures_activations(monkeypatch):
    "Kurtosis against its definition in plain sums, and what the codes of a picture keep."
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent.parent / "tools"), *sys.path])
    from measure_activations import codes, excess, figures
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) ** 3
    values = [float(v) for v in x.flatten()]
    mean = sum(values) / len(values)
    second, fourth = (sum((v - mean) ** power for v in values) / len(values) for power in (2, 4))
    assert float(excess(x.double())) == pytest.approx(fourth / second**2 - 3, rel=1e-9)
    assert excess(x.double(), -1).tolist() == pytest.approx([float(excess(row)) for row in x.double()], rel=1e-9)
    assert abs(float(excess(torch.randn(10**6, generator=torch.Generator().manual_seed(0)).double()))) < 0.02
    found, maxima = figures(x), x.abs().amax(0)
    assert found["ratio"] == pytest.approx(float(maxima.max() / maxima.median()))
    magnitudes = torch.tensor([0.0, 1e-9, 1 / 32, 0.5, 1.0, 3.7, 2600.0])
    back = 2 ** ((codes(magnitudes.numpy()).astype(float) - 128) / 3)
    assert back == pytest.approx([1 / 32, 1 / 32, 1 / 32, 0.5, 1, 3.7, 2600], rel=2 ** (1 / 6) - 1)


def test_what_a_stage_cannot_reach_is_told_and_hides_nothing(base, tmp_path):
    "A rotation does nothing to the input of down_proj, however far that stands out."
    from safetensors.torch import load_file, save_file
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][7] *= 400
    (tmp_path / "base").mkdir()
    for other in base.iterdir(): (tmp_path / "base" / other.name).write_bytes(other.read_bytes())
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    report = run(tmp_path / "base", tmp_path / "out", "rotation")
    stage, = report["outlier_suppression"]["sizes"]
    worst, stays = stage["worst"], stage["stays"]
    sizes = stage["largest_over_median"][worst["block"]][worst["layer"]]
    assert worst["layer"] != "mlp.down_proj" and sizes["after"] < 5 < sizes["before"]
    assert (stays["block"], stays["layer"]) == (1, "mlp.down_proj") and stays["size"] > 100
    assert stays["size"] == stage["largest_over_median"][1]["mlp.down_proj"]["after"]
    shown = report_text(report, "out")
    assert f"that of mlp.down_proj in block 1 stays at {stays['size']:g}" in shown
    assert (tmp_path / "out" / PICTURE).read_bytes()[:4] == b"\x89PNG"
