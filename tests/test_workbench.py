"""The workbench notebooks run by papermill with small parameters, one kernel at a time; their conclusions follow."""
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "nbs" / "workbench").glob("*.ipynb"))


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    "What a notebook printed, cell after cell; each runs once, in an empty folder."
    papermill = pytest.importorskip("papermill")
    found = {}

    def run(name, **parameters):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
                for key, value in {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
                                   "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}.items(): patch.setenv(key, value)
                book = papermill.execute_notebook(ROOT / "nbs" / "workbench" / f"{name}.ipynb", folder / "run.ipynb",
                                                  {"small": True, **parameters}, kernel_name="python3", cwd=folder,
                                                  progress_bar=False)
            outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
            text = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
            pictures = sum("image/png" in output.get("data", {}) for output in outputs)
            left = sorted(path.name for path in folder.iterdir())
            assert left == ["run.ipynb"], left
            found[name] = text, pictures
        return found[name]

    return run


def test_every_notebook_has_parameters_and_says_which_run_it_shows():
    assert len(PAGES) == 5
    for page in PAGES:
        cells = [cell for cell in json.loads(page.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1 and 'base = "demo"' in "".join(tagged[0]["source"]), page.name
        shown = "".join("".join(o.get("text", "")) for cell in cells for o in cell["outputs"])
        assert re.search(r"^a (small|full) run", shown, re.M), f"{page.name}: its outputs are not stored"


def test_choose_a_method(printed):
    "The choice is the one that the printed table and the limit ask for; at 2 bits every method loses most."
    text, pictures = printed("choose_a_method")
    assert pictures == 2
    in_float = float(re.search(r"perplexity in float ([\d.]+)", text)[1])
    lines = [(name, list(map(float, values.split())))
             for name, values in re.findall(r"^(minmax|gptq|awq|hqq) +([\d. ]+)$", text, re.M)]
    table, sizes = dict(lines[:4]), dict(lines[4:])
    assert len(table) == len(sizes) == 4 and all(len(row) == 4 for _, row in lines)
    assert all(row[0] == max(row) > 1.02 * row[3] for row in table.values()), table
    assert all(abs(row[3] / in_float - 1) < 0.02 for row in table.values()), table
    assert all(row[3] > 1.2 * max(row[:3]) for row in sizes.values()), sizes
    found = re.search(r"choose (\w+) at (\d) bits: ([\d.]+) kB, perplexity ([\d.]+)", text).groups()
    good = [(sizes[name][place], table[name][place], name, bits) for name in table
            for place, bits in enumerate((2, 3, 4, 8)) if table[name][place] <= 1.05 * in_float]
    assert (float(found[2]), float(found[3]), found[0], int(found[1])) == min(good)


def test_where_it_hurts(printed):
    "The place it names is the one with the largest printed worth, and the worth is what was won over the bytes."
    text, pictures = printed("where_it_hurts")
    assert pictures == 3
    rows = {name.strip(): list(map(float, values.split())) for name, values in
            re.findall(r"^(.+?(?:blocks|block \d+|error is)) +((?:-?[\d.]+ *){4})$", text, re.M)}
    assert len(rows) == 4 + 3 + 1, text
    assert all(kb > 0 for _, _, kb, _ in rows.values())
    plain = float(re.search(r"at 4 bits ([\d.]+)", text)[1])
    for perplexity, won, kb, worth in rows.values():
        assert won == pytest.approx(plain - perplexity, abs=0.002) and worth == pytest.approx(1e3 * won / kb, abs=0.05)
    best = re.search(r"8 bits in (.+): -?[\d.]+ for", text)[1]
    assert rows[best][3] == max(row[3] for row in rows.values())


def test_suppress_outliers(printed):
    "Planted outlier channels become smaller, and perplexity comes nearer to that in float."
    text, pictures = printed("suppress_outliers")
    assert pictures == 1
    blocks = re.findall(r"^block +\d+, input of \S+ +([\d.]+) +([\d.]+)$", text, re.M)
    assert len(blocks) == 3 and all(float(before) > 10 and float(after) < float(before) / 2 for before, after in blocks)
    in_float = float(re.search(r"perplexity in float ([\d.]+)", text)[1])
    before, after = (float(re.search(rf"W8A8 {how} +([\d.]+),", text)[1]) for how in ("as it is", "after smooth_quant"))
    assert in_float < before and abs(after - in_float) < 0.5 * (before - in_float)


def test_task_scores(printed):
    "16 items cannot tell two points of accuracy; two bits lose more than four, in every figure of the comparison."
    text, pictures = printed("task_scores")
    assert pictures == 2
    assert "16 items" in text and re.search(r"gate acc>=-0.02 (undecided|failed) on llmquant_\w+: .*16 items", text)
    kl = {name: float(value) for name, value in re.findall(r"^(w[24]) .*MiB.* (\S+)$", text, re.M)}
    assert "4 bits: kl<=0.01 passed" in text and "2 bits: kl<=0.01 failed" in text
    assert kl["w2"] > kl["w4"] > 0 and "w4 is nearest to the base" in text


def test_your_model(printed):
    "From a folder to a report that has the evaluation, and the command that serves it."
    text, pictures = printed("your_model")
    assert pictures == 2
    assert "21 layers quantized by gptq" in text and "'layers': 21" in text
    assert "Quality" in re.search(r"report.html: (.*)", text)[1] and re.search(r"^vllm serve \./export", text, re.M)
    assert "gate acc>=-0.02" in text
