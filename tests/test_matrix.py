"""A share of tools/matrix.py: every pair of settings on llama, four rows of each other family, some without plugins;
edits of outlier suppressors and grids for activations.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import matrix  # noqa: E402

from llmquant.evaluation.kernels import W4A8_PRODUCT  # noqa: E402
from llmquant.evaluation.vllm_check import vllm_installed  # noqa: E402

needs_vllm = pytest.mark.skipif(not vllm_installed(), reason="vLLM is not installed")
FOUR = [
    dict(bits=bits, symmetric=symmetric, granularity=granularity)  # each width and granularity once, both grids twice
    for bits, symmetric, granularity in (
        (2, False, "group 64"),
        (3, True, "channel"),
        (4, False, "tensor"),
        (8, True, "group 32"),
    )
]
PLUGIN = [matrix.Row("llama", **grid) for grid in matrix.pairwise(matrix.GRID)]
PLUGIN += [matrix.Row(model, **grid) for model in matrix.FAMILIES for grid in FOUR]
PLUGIN += [row for row in matrix.methods() if row.model == "llama"]
STOCK = [
    matrix.Row("llama", 4, False, "group 64", loader="stock"),
    matrix.Row("llama", 4, True, "channel", loader="stock"),
    matrix.Row("llama", 2, False, "group 32", loader="stock"),
    matrix.Row("llama", 3, True, "group 32", container="int4", loader="stock"),
    matrix.Row("llama", 4, True, "group 64", format="gptq", loader="stock"),
    matrix.Row("llama", 4, False, "group 32", format="awq", loader="stock"),
    matrix.Row("llama", 4, True, "group 64", format="gptq", loader="stock", method="gptq"),
    matrix.Row("qwen2", 4, False, "group 64", format="awq", loader="stock", method="awq"),
    matrix.Row("deepseek_v3", 4, False, "group 64", loader="stock", method="gptq"),
    matrix.Row("qwen3", 3, False, "group 64", loader="stock", method="hqq"),
]
SUPPRESSED = ("llama outlier_suppression_v2 W4", "gpt_neox rotation+smooth_quant W4", "llama outlier_suppression_v2 W8",
              "llama tied smooth_quant gptq W8", "qwen3 rotation+smooth_quant W8")
STOCK += [row for row in matrix.suppressed() + matrix.activations() if row.name.startswith(SUPPRESSED)]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    "What vLLM made of all rows, by name: one child with the plugin, one without."
    paths = [matrix.plugin_path(tmp_path_factory.mktemp("path")), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        done = [matrix.run_rows(rows, tmp_path_factory.mktemp(rows[0].loader)) for rows in (PLUGIN, STOCK)]
    return {row["name"]: row for rows in done for row in rows}


@needs_vllm
@pytest.mark.parametrize("name", [row.name for row in PLUGIN + STOCK])
def test_row(figures, name):
    row = figures[name]
    assert "error" not in row, row["error"]
    assert row["passed"] and row["positions"] == 192 and row["judged"] >= 96
    assert 0 <= row["mean_kl"] <= row["bound"] <= (1e-4 if row["dtype"] != "bfloat16" else 2e-2)
    assert row["dtype"] != "bfloat16" or row["inputs"] or "deepseek" in row["model"]   # AMX takes no other there
    assert not any(W4A8_PRODUCT in kernel for kernel in row["kernels"])
    assert row["layers"] >= (8 if row["model"] == "gpt_neox" else 14)
    if row["suppressors"] == "outlier_suppression_v2":
        assert row["shifts"] == 2
    if row["inputs"]:
        exact = row["dtype"] == "float32"
        assert row["linear_error"] <= row["linear_bound"] and (not exact or row["linear_error"] <= 1e-5)
        assert row["mean_kl_without_activation_quantization"] > 1e-4 or not exact   # in half precision only Linears tell a grid from none
        assert row["linear_error_without_activation_quantization"] > (1e-3 if exact else 4e-3)
    assert row["quant_method"] == {"plugin": "llmquant"}.get(row["loader"], row["quant_method"])
    assert (row["loader"] == "stock") == (row["quant_method"] != "llmquant")


def test_pairwise_holds_every_pair_once_or_more():
    chosen = matrix.pairwise(matrix.GRID)
    assert set().union(*map(matrix.pairs, chosen)) == set().union(*map(matrix.pairs, matrix.product(matrix.GRID)))
    assert (
        len(chosen) == 16 == len({tuple(grid.items()) for grid in chosen})
    )  # 4 widths x 4 granularities, so no fewer will do
    assert (
        matrix.pairwise({"a": (1, 2), "b": (1, 2), "c": (1, 2)})
        and len(matrix.pairwise(dict(a=(1, 2), b=(1, 2), c=(1, 2)))) < 8
    )


def test_matrix_is_whole_on_llama_and_pairwise_elsewhere():
    rows = matrix.all_rows("cpu")
    assert len({row.name for row in rows}) == len(rows)
    count = {
        model: sum(row.model == model and row.loader == "plugin" and row.method == "minmax" for row in rows)
        for model in ("llama", *matrix.FAMILIES)
    }
    assert count == {"llama": 32, "qwen2": 16, "qwen3": 16, "deepseek_v3": 16}
    stock = [row for row in rows if row.loader == "stock"]
    assert all(row.stored_bits == 4 or row.inputs for row in stock) and {row.format for row in stock} == {
        "compressed_tensors",
        "gptq",
        "awq",
    }
    assert any(row.stored_bits == 8 for row in matrix.all_rows("cuda") if row.loader == "stock")


def test_chosen_rows_run_again_and_the_others_stay(tmp_path, monkeypatch):
    "With --fresh; a row from another machine than the file's says so, and all say what vLLM was told."
    import json

    planned = matrix.all_rows("cpu")[:3]
    rows = [row.name for row in planned]
    out, ran = tmp_path / "matrix.json", []

    def run_rows(part, folder):
        ran.append([row.name for row in part])
        return [{"name": row.name, "passed": True, "environment": matrix.setting(), "run": len(ran)} for row in part]

    def run(*arguments, processor):
        about = matrix.header("cpu") | {"machine": {"processor": processor}}
        monkeypatch.setattr(matrix, "header", lambda _: about)
        monkeypatch.setattr(sys, "argv", ["matrix.py", "--out", str(out), *arguments])
        with pytest.raises(SystemExit) as end:
            matrix.main()
        assert end.value.code == 0

    monkeypatch.setattr(matrix, "run_rows", run_rows)
    monkeypatch.setattr(matrix, "plugin_path", lambda _: "")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(matrix, "all_rows", lambda _: planned)
    run(processor="first")
    run(processor="second")  # nothing is missing
    run("--rows", f"^{rows[1]}$", "--fresh", processor="second")
    found = json.loads(out.read_text())
    assert ran == [rows, [rows[1]]] and found["machine"] == {"processor": "first"}
    kept = {row["name"]: row for row in found["rows"]}
    assert {name: (row["run"], row.get("machine")) for name, row in kept.items()} == {
        rows[0]: (1, None), rows[1]: (2, {"processor": "second"}), rows[2]: (1, None)}
    assert {row["environment"] for row in kept.values()} == {"VLLM_CPU_INT4_W4A8=0"}
