"""Every notebook runs from top to bottom, in a process of its own; its inline tests fail it.

One runner forks these processes, so that torch and transformers are imported once.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))


@pytest.fixture(scope="module")
def runner():
    "A runner that waits for the names of notebooks."
    command = [sys.executable, "tools/run_nbs.py", "--test", "-"]
    with subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as started:
        yield started
        started.stdin.close()


def run(runner, path):
    "All that the runner prints until `path` has ended; the last line says how."
    print(path, file=runner.stdin)
    lines = []
    for line in runner.stdout:
        lines.append(line)
        if line in (f"ran {path.name}\n", f"failed {path.name}\n"): break
    return lines


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, runner):
    "It ends without an error, cells flagged `slow` or `gpu` left out."
    path = Path("nbs", name)
    said = run(runner, path)
    assert said and said[-1] == f"ran {path.name}\n", "".join(said)


def test_the_runner_outlives_a_failure(tmp_path, runner):
    "Each notebook is a process of its own: what one leaves behind, or dies of, is not the next one's."
    cells = {"leaves": "import sys, os\nos.environ['LEFT'] = sys.left = '1'", "dies": "import os\nos._exit(3)",
             "fails": "raise ValueError('by design')",
             "is_clean": "import os, sys\nassert not hasattr(sys, 'left') and 'LEFT' not in os.environ"}
    for name, source in cells.items():
        cell = dict(cell_type="code", source=source, id=name, metadata={}, outputs=[], execution_count=None)
        (tmp_path/f"{name}.ipynb").write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    said = {name: run(runner, tmp_path/f"{name}.ipynb") for name in cells}
    assert [lines[-1].split()[0] for lines in said.values()] == ["ran", "failed", "failed", "ran"]
    assert "by design" in "".join(said["fails"])


def test_a_failing_notebook_fails(tmp_path):
    "The runner reports a failure, and does not stop being able to."
    source = ROOT / "nbs" / "evaluation" / "demo.ipynb"
    broken = source.read_text().replace('"#| default_exp evaluation.demo"', '"assert 1 == 2"')
    assert "assert 1 == 2" in broken
    (tmp_path / "broken.ipynb").write_text(broken)
    command = [sys.executable, "tools/run_nbs.py", "--test", str(tmp_path / "broken.ipynb")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "AssertionError" in done.stderr and "assert 1 == 2" in done.stderr
