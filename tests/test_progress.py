"""What a run shows while it lasts: a bar on a terminal, lines in a pipe, a bar in a notebook, nothing when quiet."""
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch

from llmquant import quantize
from llmquant.cli import main as cli
from llmquant.utils.logging import setup_logging

ROOT = Path(__file__).parents[1]
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("TQDM", "HF_HUB_DISABLE"))}
ENV |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}
TEXT = ("--set", "calibration.num_samples=8", "--set", "calibration.max_length=32")
CALIBRATED = ("--method", "gptq", "--bits", "4", "--group-size", "64", *TEXT)
TIMES = r"\d\d:\d\d elapsed, 00:00 left, +[0-9.?]+\S*"
WORDS = r"\d+ MiB, 1\.\S+ error 0\.\d+"
PLAIN = ("--bits", "4", "--group-size", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A tiny Llama with a tokenizer."
    path = tmp_path_factory.mktemp("progress") / "model"
    tiny.make("llama", path, torch.float16)
    tiny_tokenizer.save(path)
    return path


def run(*arguments, stderr=subprocess.PIPE):
    "The command line in a process of its own."
    return subprocess.run([sys.executable, str(ROOT / "quantize.py"), *map(str, arguments)], text=True, env=ENV,
                          stdout=subprocess.PIPE, stderr=stderr, timeout=300)


def test_lines_in_a_pipe(model, tmp_path):
    "A model's own text, blocks: lines that can be read and nothing that redraws itself."
    done = run("--model-path", model, "--output-path", tmp_path / "a", *CALIBRATED, "--set", "calibration.dataset=self")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr and "%|" not in done.stderr, done.stderr
    assert all(re.match(r"\d\d:\d\d:\d\d INFO llmquant", line) for line in lines), lines
    assert re.search(rf"writing calibration text: 32 of 32 tokens done, {TIMES}", lines[1]), lines
    assert re.search(rf"quantizing: 2 of 2 blocks done, {TIMES}, {WORDS}$", lines[-1]), lines


def test_a_resumed_run_counts_on(tmp_path, monkeypatch, caplog):
    "Blocks have numbers from 0, as --layers gives them; progress says how many of all are done."
    from llmquant.sequential.decoder_loop import BlockLoop
    path, out = tiny.make("llama", tmp_path / "model", layers=4), tmp_path / "out"
    tiny_tokenizer.save(path)
    keys = {"bits": 4, "group_size": 64, "calibration.num_samples": 2, "calibration.max_length": 32}
    step = BlockLoop.step

    def stopping(self, index, *rest):
        if index == 3: raise KeyboardInterrupt
        return step(self, index, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(BlockLoop, "step", stopping)
        with pytest.raises(KeyboardInterrupt): quantize(path, out, "gptq", **keys)
    caplog.clear()  # of the first run, where an earlier test has turned the log on
    with caplog.at_level("INFO", "llmquant"): report = quantize(path, out, "gptq", **keys)
    assert "resuming at block 3 of 0 to 3" in caplog.messages and report["resumed"]["at_block"] == 3
    done = [found[0] for message in caplog.messages if (found := re.search(r"quantizing: .* done", message))]
    assert done == ["quantizing: 4 of 4 blocks done"], caplog.messages
    assert any(re.search(r"4 blocks done.* 3\.\S+ error", message) for message in caplog.messages), caplog.messages


def test_quiet(model, tmp_path, capfd):
    "Nothing at all, whoever asks for it; the flag in a process of its own."
    arguments = ["--model-path", str(model), "--output-path", str(tmp_path / "out"), *PLAIN, "--overwrite"]
    done = run(*arguments, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and (tmp_path / "out/config.json").exists()
    (tmp_path / "quiet.yaml").write_text("output:\n  quiet: true\n")
    with restored_logging():
        assert cli.main([*arguments, "--config", str(tmp_path / "quiet.yaml")]) == 0
        assert tuple(capfd.readouterr()) == ("", "")
        setup_logging()
        quantize(model, tmp_path / "out", bits=4, group_size=64, overwrite=True, quiet=True)
        assert tuple(capfd.readouterr()) == ("", "")
        quantize(model, tmp_path / "out", bits=4, group_size=64, overwrite=True)
        last = capfd.readouterr().err.splitlines()[-1]
    assert re.search(rf"quantizing: (\d+) of \1 tensors done, {TIMES}, {WORDS}$", last), last


@contextmanager
def restored_logging():
    "What `setup_logging` changes is put back."
    loggers = [logging.getLogger(), logging.getLogger("llmquant")]
    before = [(each, each.level, list(each.handlers)) for each in loggers]
    try: yield
    finally:
        for each, level, handlers in before: each.level, each.handlers = level, handlers
        logging.Logger.manager._clear_cache()


def test_quiet_still_complains(model, tmp_path, capfd):
    "Errors are told, and silence contradicts debug messages."
    paths = ["--model-path", str(model), "--output-path", str(tmp_path / "out")]
    both = "--verbose and quiet contradict each other; keep one"
    for flags, says in (["--bits", "5"], "bits"), (["--verbose"], both):
        with restored_logging(): assert cli.main([*paths, "--quiet", *flags]) == 2
        said = capfd.readouterr()
        assert said.out == "" and said.err.startswith("llmquant: error: ") and says in said.err
        assert said.err.count("\n") == 1


@pytest.mark.parametrize("alpha", ["auto", "0.5"])
def test_check_predicts_the_search(model, alpha, caplog):
    "How long the search for factors will take is said before anything is done, where there is one."
    with restored_logging():
        assert cli.main(["check", "--model-path", str(model), *PLAIN, "--outlier-suppression", "smooth_quant", *TEXT,
                         "--set", f"quantization.smooth_quant.alpha={alpha}"]) == 0
    said = re.search(r"smooth_quant: the search for factors will take about [1-9]\d* s$", caplog.text, re.M)
    assert bool(said) == (alpha == "auto"), caplog.text


def test_bar_on_a_terminal(model, tmp_path):
    "One bar that is drawn over."
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    done = run("--model-path", model, "--output-path", tmp_path / "out", *CALIBRATED, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536): shown += part
    except OSError: pass # the other end is closed
    shown = shown.decode()
    assert done.returncode == 0, shown
    last = shown.replace("\r\n", "\n").rstrip("\n").rpartition("\r")[2]
    assert re.search(r"quantizing: 100%.*2/2 .*block.*\d+ MiB, 1\.\S+ error 0\.\d+", last), shown
    assert "elapsed" not in shown


@pytest.mark.parametrize("columns", [80, 100])
def test_a_narrow_bar_shows_the_memory(columns, monkeypatch):
    "In the middle of a run of many blocks with slow ones; what is cut is the name's end."
    import io
    from types import SimpleNamespace

    from tqdm import tqdm

    from llmquant.sequential.layer import worst_of
    layer = SimpleNamespace(name="model.layers.11.self_attn.q_a_proj")
    text = worst_of([SimpleNamespace(layer=layer, relative_error=.12345)])
    stream = io.StringIO()
    bar = tqdm(total=130, desc="quantizing", unit="block", initial=100, file=stream, ncols=columns)
    bar.set_postfix_str(text, refresh=True)
    line = stream.getvalue().rpartition("\r")[2]
    assert len(line) <= columns and re.search(r"\d+ MiB, 11\.", line), line


def test_bar_in_a_notebook(model, tmp_path):
    "In a kernel a library call shows a bar, and none where quiet is asked for."
    import nbclient
    import nbformat
    call = (f"import llmquant\nllmquant.quantize({str(model)!r}, {str(tmp_path)!r} + '/%s', 'gptq', bits=4, "
            "group_size=64, config={'calibration': {'num_samples': 8, 'max_length': 32}}%s);")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(call % how)
                                               for how in (("loud", ""), ("quiet", ", quiet=True"))])
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute(env=ENV)
    loud, quiet = notebook.cells
    assert [output.output_type for output in loud.outputs] == ["display_data"] and quiet.outputs == []
    assert "0/2" in loud.outputs[0].data["text/plain"]
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    words = [widget["state"].get("value") for widget in widgets if widget["model_name"] == "HTMLModel"]
    last = r"2/2\s.*\d+\sMiB,\s1\.\S+\serror\s0\.\d+"
    assert any(re.search(last, str(word)) for word in words), words
