"""Export the notebooks to the package, and find modules that no notebook writes.

`python tools/sync.py` exports; with `--check` it exports, cleans, and fails when that (or anything else) left the
working tree different from the last commit.
"""
import re
import subprocess
import sys
from pathlib import Path

from execnb.nbio import read_nb
from fastcore.script import call_parse
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export, nbglob

HAND_WRITTEN = {"__init__.py", "_modidx.py", "_render.py"}
DEFAULT_EXP = re.compile(r"^#\s*\|\s*default_exp\s+(\S+)", re.M)


def written_modules(cfg):
    "The module that each notebook writes, as {path of the module: notebook}."
    modules = {}
    for notebook in sorted(nbglob(cfg.nbs_path, as_path=True)):
        for cell in read_nb(notebook).cells:
            found = DEFAULT_EXP.search(cell.source) if cell.cell_type == "code" else None
            if not found:
                continue
            module = cfg.lib_path.joinpath(*found[1].split(".")).with_suffix(".py")
            if module in modules:
                raise SystemExit(f"{found[1]} is written by both {modules[module].name} and {notebook.name}")
            modules[module] = notebook
    return modules


def orphans(cfg):
    "Modules and folders of the package that no notebook writes."
    written = written_modules(cfg)
    files = [p for p in cfg.lib_path.rglob("*.py") if p.name not in HAND_WRITTEN and p not in written]
    used = {parent for module in written for parent in module.parents}
    packages = [p.parent for p in cfg.lib_path.rglob("__init__.py") if p.parent not in used | {cfg.lib_path}]
    return sorted([*files, *packages])


def git_status(root):
    "What `git status --porcelain` says, line by line."
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()


@call_parse
def main(
    check: bool = False,  # Fail when notebooks, package and the last commit differ
):
    "Export every notebook"
    cfg = get_config()
    root = Path(cfg.config_path)
    nbdev_export.__wrapped__()
    problems = [f"{p.relative_to(root)}: no notebook writes it; delete it, or restore its notebook" for p in orphans(cfg)]
    if check:
        nbdev_clean.__wrapped__()
        problems += [f"{line}: differs from the last commit; see `git diff`, then commit it" for line in git_status(root)]
    if problems:
        sys.exit("\n".join(["notebooks and package are not in sync:", *problems]))
    print("notebooks and package are in sync")
