"Every notebook runs from top to bottom, in a process of its own; its inline tests fail it."
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name):
    "It ends without an error, cells flagged `slow` or `gpu` left out."
    command = [sys.executable, "tools/run_nbs.py", "--test", f"nbs/{name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
    assert f"ran {Path(name).name}" in done.stdout


def test_a_failing_notebook_fails(tmp_path):
    "The runner reports a failure, and does not stop being able to."
    source = ROOT / "nbs" / "evaluation" / "demo.ipynb"
    broken = source.read_text().replace('"#| default_exp evaluation.demo"', '"assert 1 == 2"')
    assert "assert 1 == 2" in broken
    (tmp_path / "broken.ipynb").write_text(broken)
    command = [sys.executable, "tools/run_nbs.py", "--test", str(tmp_path / "broken.ipynb")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "AssertionError" in done.stderr and "assert 1 == 2" in done.stderr
