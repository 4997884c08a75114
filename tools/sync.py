"""Export the notebooks to the package, and find modules that no notebook writes.

`python tools/sync.py` exports. `--check` exports, cleans, and fails when anything differs from the last commit.
`--staged`, for the git hook, exports, cleans, and fails when that changed a file: then it wants to be staged again.
"""
import argparse
import re
import subprocess
import sys
from pathlib import Path

from execnb.nbio import read_nb
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export, nbglob

HAND_WRITTEN = {"__init__.py", "__main__.py", "_modidx.py", "_render.py"}
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
    "Modules and subpackages that no notebook writes."
    written = written_modules(cfg)
    files = [p for p in cfg.lib_path.rglob("*.py") if p.name not in HAND_WRITTEN and p not in written]
    used = {parent for module in written for parent in module.parents}
    packages = [p.parent for p in cfg.lib_path.rglob("__init__.py") if p.parent not in used | {cfg.lib_path}]
    return sorted([*files, *packages])


def git(root, *words):
    "What git says, line by line."
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()


def contents(cfg):
    "Every notebook and module as it stands, as {path: bytes}."
    files = [*nbglob(cfg.nbs_path, as_path=True), *cfg.lib_path.rglob("*.py")]
    return {path: path.read_bytes() for path in files}


def main():
    "Export every notebook."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail when anything differs from the last commit")
    parser.add_argument("--staged", action="store_true", help="fail when exporting and cleaning change a file")
    given = parser.parse_args()
    cfg = get_config()
    root, before = Path(cfg.config_path), contents(cfg)
    nbdev_export.__wrapped__()
    if given.check or given.staged:
        nbdev_clean.__wrapped__()
    problems = [f"{p.relative_to(root)}: no notebook writes it; delete it, or restore that" for p in orphans(cfg)]
    if given.check:
        changed = git(root, "status", "--porcelain", "--untracked-files=all")
        problems += [f"{line}: not as in the last commit; see git diff, then commit or remove it" for line in changed]
    if given.staged:
        changed = [path for path, content in contents(cfg).items() if before.get(path) != content]
        problems += [f"{path.relative_to(root)}: was not exported or clean, and now is; stage it" for path in changed]
    if problems:
        sys.exit("\n".join(["notebooks and package are not in sync:", *problems]))
    print("notebooks and package are in sync")


if __name__ == "__main__":
    main()
