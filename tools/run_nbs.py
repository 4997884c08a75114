"""Run notebooks, each in its own process, and store what they print, so that the pages show what the code really does.

Each is a fork of one process that has imported what most of them import. Cells that carry a test flag (`#| slow`, ...)
are skipped and keep the outputs they had, unless `--flags` names the flag. With `--test` nothing is written. An output
that holds a path of this machine is refused: it changes by the run.
"""
import argparse
import gc
import importlib
import os
import sys
import tempfile
import traceback
from pathlib import Path

# ruff: noqa: E402
ASKED = os.environ.get("OMP_NUM_THREADS")
os.environ["OMP_NUM_THREADS"] = "1"  # of this process, from the first import on: it forks, and a fork loses threads
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # pyarrow, where transformers finds one

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor

QUIET = {"IN_TEST": "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "MPLBACKEND": "agg",
         "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "120"}
SHARED = ("matplotlib.pyplot", "nbdev.showdoc", "pydantic", "torch", "transformers.models.auto.modeling_auto",
          "transformers.models.llama.modeling_llama")


def is_skipped(cell, flags):
    "Whether `cell` is not run: prose, an export call, a flagged cell, `#| eval: false`."
    directives = cell.directives_
    return (cell.cell_type != "code" or "nbdev_export(" in cell.source or bool(flags & directives.keys())
            or directives.get("eval:", [""])[0].lower() == "false")


def flagged(notebook, flags):
    "How many cells of `notebook` carry one of `flags`."
    cells = NBProcessor(notebook).nb.cells
    return sum(cell.cell_type == "code" and bool(flags & cell.directives_.keys()) for cell in cells)


def text_of(output):
    "All text of an output, pictures left out."
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    parts = [output.get("text", ""), *data.values()]
    return "".join(part if isinstance(part, str) else "".join(map(str, part)) for part in parts)


def refuse_paths(notebook, cells, root):
    "Stop where an output names a folder of this machine."
    places = {str(root), str(Path.home()) + os.sep, tempfile.gettempdir() + os.sep, sys.prefix}
    for number, cell in enumerate(cells):
        text = "".join(map(text_of, cell.get("outputs", [])))
        found = [place for place in places if place in text]
        if found:
            raise SystemExit(f"{notebook}, cell {number}: its output holds the path {found[0]}; print a name instead")


def run(notebook, flags, store, root):
    "Execute `notebook` in its folder; with `store`, write its outputs back."
    raw, processed = read_nb(notebook), NBProcessor(notebook).nb
    with working_directory(notebook.parent):
        shell = CaptureShell(notebook)
        for cell in (cell for cell in processed.cells if not is_skipped(cell, flags)):
            cell["outputs"] = []
            shell.cell(cell)
            if shell.exc:
                print(f"{notebook.name} fails in this cell:\n\n{cell.source}\n", file=sys.stderr, flush=True)
                raise shell.exc from None
    if not store:
        return
    for old, new in zip(raw.cells, processed.cells, strict=True):
        if not is_skipped(new, flags):
            old["outputs"] = new.get("outputs", [])
    clean_nb(raw, allowed_cell_metadata_keys=get_config().allowed_cell_metadata_keys.split())
    refuse_paths(notebook.name, raw.cells, root)
    write_nb(raw, notebook)


def import_shared():
    "Import what notebooks share. A fork has one thread, so this process must not have more: pools come after the fork."
    for name in SHARED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads > 1:
        raise SystemExit(f"{threads} threads run after importing {', '.join(SHARED)}: a fork would lose them")
    gc.freeze()


def use_threads():
    "As many threads as were asked for, in a fork."
    os.environ.pop("OMP_NUM_THREADS")
    if ASKED:
        os.environ["OMP_NUM_THREADS"] = ASKED
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(ASKED or os.cpu_count()))


def run_in_fork(notebook, *options):
    "Whether `notebook` ran through, in a fork of this process."
    child = os.fork()
    if child == 0:
        try:
            use_threads()
            run(notebook.absolute(), *options)
        except BaseException:
            traceback.print_exc()
            leave(1)
        leave(0)
    return not os.waitpid(child, 0)[1]


def leave(status):
    "End this process without the interpreter's end, at which compiled packages print what they leaked."
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main():
    "Run notebooks one by one."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="notebooks or folders; by default all, or all that have cells with "
                        "--flags; - reads them from lines")
    parser.add_argument("--flags", default="", help="test flags to run that are normally skipped, separated by spaces")
    parser.add_argument("--test", action="store_true", help="run only, store nothing")
    given = parser.parse_args()
    cfg = get_config()
    wanted = set(given.flags.split())
    skip = set(cfg.tst_flags.split()) - wanted
    os.environ.update(QUIET)
    sys.path.insert(0, str(cfg.config_path))
    asked = map(str.strip, sys.stdin) if given.paths == ["-"] else given.paths or [cfg.nbs_path]
    notebooks = (n for path in asked for n in sorted(nbglob(path, as_path=True)))
    if wanted and not given.paths:
        notebooks = [n for n in notebooks if flagged(n, wanted)]
    failed = []
    if len(given.paths) != 1 or given.paths == ["-"]:
        import_shared()
    for notebook in notebooks:
        good = run_in_fork(notebook, skip, not given.test, cfg.config_path)
        failed += [] if good else [notebook.stem]
        cells = f" with {flagged(notebook, wanted)} cells flagged {given.flags}" if wanted else ""
        print("ran" if good else "failed", f"{notebook.name}{cells}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    leave(bool(failed))


if __name__ == "__main__":
    main()
