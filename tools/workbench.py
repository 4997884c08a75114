"""Run the workbench notebooks by papermill, one kernel after another, and store what they print.

By default on the demo model with full parameters, which takes long on a CPU; the pages get the outputs. `--small`
takes the tiny model and minutes. With `--base` or `--output`, executed copies go to a folder and the pages stay as they
are.
"""
import argparse
import os
import sys
import tempfile
from pathlib import Path

import papermill
from execnb.nbio import read_nb, write_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config
from run_nbs import QUIET, refuse_paths, use_threads

ORDER = ("choose_a_method", "where_it_hurts", "suppress_outliers", "task_scores", "your_model")


def joined(outputs):
    "Outputs without bars and what libraries say on stderr; neighbouring parts of stdout as one."
    found = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if output["output_type"] != "stream":
            found.append(output)
        elif output["name"] == "stdout" and found and found[-1]["output_type"] == "stream":
            found[-1]["text"] += output["text"]
        elif output["name"] == "stdout":
            found.append(output)
    for output in found:
        if output["output_type"] == "stream":
            output["text"] = "".join(output["text"]).splitlines(keepends=True)
    return found


def store(page, executed, root):
    "Write the outputs of an executed copy into its page, cell by cell."
    raw, outputs = read_nb(page), {cell.id: cell.get("outputs", []) for cell in read_nb(executed).cells}
    for cell in raw.cells:
        if cell.cell_type == "code":
            cell["outputs"] = joined(outputs[cell.id])
    clean_nb(raw, allowed_cell_metadata_keys=["tags"])
    refuse_paths(page.name, raw.cells, root)
    write_nb(raw, page)


def main():
    "Run them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ORDER)}; all by default")
    parser.add_argument("--small", action="store_true", help="small parameters")
    parser.add_argument("--base", help="a checkpoint's folder in place of the demo model; needs --output")
    parser.add_argument("--output", help="a folder for the executed copies; the pages stay as they are")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in ORDER]:
        parser.error(f"{unknown[0]}: is no workbench notebook; use one of {', '.join(ORDER)}")
    if given.base and not given.output:
        parser.error("--base needs --output FOLDER, for the pages show the demo model")
    root, parameters = Path(get_config().config_path), {"small": given.small}
    if given.base:
        parameters["base"] = str(Path(given.base).resolve())
    use_threads()
    os.environ |= {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
                   **{key: value for key, value in QUIET.items() if key not in ("IN_TEST", "MPLBACKEND")}}
    with tempfile.TemporaryDirectory() as home:
        copies = Path(given.output or home).resolve()
        copies.mkdir(parents=True, exist_ok=True)
        for name in given.names or ORDER:
            page, executed = root / "nbs" / "workbench" / f"{name}.ipynb", copies / f"{name}.ipynb"
            papermill.execute_notebook(page, executed, parameters, kernel_name="python3", cwd=home, progress_bar=False)
            if not given.output:
                store(page, executed, root)
            print("ran", name, flush=True)


if __name__ == "__main__":
    sys.exit(main())
