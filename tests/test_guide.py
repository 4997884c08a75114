"""The guide's pages: both languages have one code, what they build is served by vLLM, and the guide's script runs.

A page's package is taken from its cells and installed in an empty folder, as a reader would.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from llmquant.evaluation.verification import verify
from llmquant.export.loading import load

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
CHINESE = sorted(path for path in NBS.rglob("*.zh.ipynb")
                 if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts))
GUIDE = ("new_quantizer", "new_model", "new_suppressor", "questions")
FILE = re.compile(r"%%writefile (package/\S+)\n")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def cells(page, kind="code"): return [c for c in json.loads(page.read_text("utf-8"))["cells"] if c["cell_type"] == kind]
def source(cell): return "".join(cell["source"])


def test_every_page_of_the_guide_is_there_in_chinese():
    assert {f"{name}.zh.ipynb" for name in GUIDE} <= {path.name for path in CHINESE if path.parent.name == "guide"}


@pytest.mark.parametrize("chinese", CHINESE, ids=lambda path: path.relative_to(NBS).as_posix())
def test_both_languages_have_one_code(chinese):
    "The Chinese cells are marked as not to be run again, and show what the English ones printed."
    english = chinese.with_name(chinese.name.replace(".zh.", "."))
    one, other = cells(english), cells(chinese)
    assert [f"#| eval: false\n{source(cell)}" for cell in one] == [source(cell) for cell in other]
    assert [cell["outputs"] for cell in one] == [cell["outputs"] for cell in other]
    assert len(cells(english, "markdown")) == len(cells(chinese, "markdown"))
    titles = [[re.match(r"#*", source(c))[0] for c in cells(page, "markdown")] for page in (english, chinese)]
    assert titles[0] == titles[1] and "- lang: zh" in source(cells(chinese, "markdown")[0])


@pytest.mark.parametrize("name", GUIDE)
def test_a_page_ends_in_vllm(name):
    "Its last check was run, and its output says so."
    served = [cell for cell in cells(NBS / "guide" / f"{name}.ipynb") if source(cell).startswith("#| slow")]
    assert len(served) == 1 and "vLLM" in "".join(served[0]["outputs"][0]["text"])


def installed(page, folder):
    "Install a page's package; the environment in which commands find it."
    files = {found[1]: source(cell)[found.end():] for cell in cells(page) if (found := FILE.match(source(cell)))}
    assert len(files) == 3, list(files)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target",
                    folder / "site", folder / "package"], check=True)
    paths = [str(folder / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def tiny_llama(folder):
    config = AutoConfig.for_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=512,
                                  num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).half().save_pretrained(folder)


def test_the_readers_quantizer_is_served(tmp_path):
    "From the page's files alone: installed, run by the command line with an option of its own, served by stock vLLM."
    environment = installed(NBS / "guide" / "new_quantizer.ipynb", tmp_path)
    tiny_llama(tmp_path / "tiny")
    done = subprocess.run([sys.executable, "-m", "llmquant", "quantize", "--model-path", "tiny", "--output-path", "out",
                           "--method", "my_hqq", "--group-size", "64", "--set", "quantization.my_hqq.lp_norm=0.5",
                           "--quiet"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = yaml.safe_load((tmp_path / "out" / "quantization_report.yaml").read_text())
    assert report["recipe"]["options.lp_norm"]["value"] == 0.5 and report["method"] == "my_hqq"
    assert verify(tmp_path / "out", reference=tmp_path / "tiny", require_vllm=True)["vllm"]["mean_kl"] < 1e-4


def test_a_method_of_25_lines_is_served(tmp_path):
    "Powers of two, as the page writes them, registered from a module outside of this repository."
    page = NBS / "guide" / "new_quantizer.ipynb"
    code, = [source(cell) for cell in cells(page) if "class PowersOfTwo" in source(cell)]
    text = "import torch\nfrom llmquant.core.quantizer_registry import BaseQuantizer\n" + code.partition("\nprint(")[0]
    assert len([line for line in text.splitlines() if line.strip()]) <= 25
    (tmp_path / "powers.py").write_text(text)
    tiny_llama(tmp_path / "tiny")
    environment = declared(tmp_path, "powers", "powers_of_two = powers:PowersOfTwo")
    done = subprocess.run([sys.executable, "-m", "llmquant", "quantize", "--model-path", "tiny", "--output-path", "out",
                           "--method", "powers_of_two", "--group-size", "32", "--quiet"],
                          cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weight = load(tmp_path / "out", torch.float32).model.layers[0].mlp.down_proj.weight
    steps = weight.unflatten(1, (-1, 32))
    steps = steps.abs() / steps.abs().amax(-1, keepdim=True)
    assert torch.isin((steps * 4).round(decimals=2), torch.tensor([0., 1, 2, 4])).all()
    assert verify(tmp_path / "out", reference=tmp_path / "tiny", require_vllm=True)["vllm"]["mean_kl"] < 1e-4


def declared(folder, name, entry):
    "What an installed package leaves for Python to find its entry point; the environment in which commands find it."
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[llmquant.quantizers]\n{entry}\n")
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def test_the_guides_script():
    "`python test_framework.py` prints a line for each check and ends with 0."
    done = subprocess.run([sys.executable, "test_framework.py"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "all passed", done.stdout + done.stderr
    assert all(line.startswith("ok ") for line in lines[:-1])
    for part in ("registries: awq, gptq, hqq", "method hqq", "adapter deepseek", "suppressor rotation", "export"):
        assert f"ok      {part}" in done.stdout, part


def test_the_guides_script_fails(tmp_path):
    "A class that changes what it is given, and one that cannot be registered: a line for each, exit status 1."
    (tmp_path / "bad.py").write_text("from llmquant.quantizers.minmax_quantizer import MinMaxQuantizer\n"
                                     "class Bad(MinMaxQuantizer):\n    name = 'bad'\n"
                                     "    def quantize_weight(self, weight, stats, scheme):\n"
                                     "        weight.zero_()\n"
                                     "        return super().quantize_weight(weight, stats, scheme)\n"
                                     "class Empty: pass\n")
    done = subprocess.run([sys.executable, "test_framework.py"], cwd=ROOT, capture_output=True, text=True,
                          env=declared(tmp_path, "bad", "bad = bad:Bad\nempty = bad:Empty"))
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "2 failed", done.stdout + done.stderr
    assert "FAILED  method bad: UsageError: Bad fails the check" in done.stdout and "ok      export" in done.stdout
    assert "FAILED  method empty: UsageError: method 'empty': Empty" in done.stdout


def blocks(name): return [found.groups() for found in FENCE.finditer((ROOT / name).read_text("utf-8"))]


def test_the_chinese_readme_has_the_same_commands():
    "Every block of code in it is README.md's, letter for letter, and none of README.md's commands is missing."
    english, chinese = blocks("README.md"), blocks("README.zh-CN.md")
    assert [block for block in chinese if block not in english] == []
    assert [block for block in english if block[0] in ("sh", "yaml", "toml")] == [
        block for block in chinese if block[0] in ("sh", "yaml", "toml")]
    flags = [set(re.findall(r"(?<![\w-])--[a-z][\w-]+", (ROOT / name).read_text("utf-8")))
             for name in ("README.md", "README.zh-CN.md")]
    assert flags[1] <= flags[0]
