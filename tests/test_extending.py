"The page \"Extending llmquant\": its package is taken from its own cells, installed in an empty folder, run and served."
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

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "nbs" / name for name in ("extending.ipynb", "extending.zh.ipynb")]
FILE = re.compile(r"%%writefile (\S+)\n")


def code_of(page):
    "Its code, without the line that keeps the translation from being run a second time."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]).removeprefix("#| eval: false\n") for c in cells if c["cell_type"] == "code"]


def outputs_of(page): return [c["outputs"] for c in json.loads(page.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The package as the page writes it, installed in a folder of its own; a tiny Gemma lies beside it."
    home = tmp_path_factory.mktemp("acme")
    files = {found[1]: source[found.end():] for source in code_of(PAGES[0]) if (found := FILE.match(source))}
    assert len(files) == 5, list(files)
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text + "\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target",
                    home / "site", home / "acme"], check=True)
    config = AutoConfig.for_model("gemma", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=32, vocab_size=512, max_position_embeddings=512,
                                  initializer_range=.1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).half().save_pretrained(home / "tiny")
    return home


def llmquant(home, *arguments):
    path = os.pathsep.join([str(home / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-m", "llmquant", *map(str, arguments)], cwd=home, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path})


def common(out): return ["quantize", "--model-path", "tiny", "--output-path", out, "--method", "shrink", "--bits", 4,
                         "--group-size", 32, "--quiet"]


def test_both_languages_have_the_same_code():
    one, other = map(code_of, PAGES)
    assert one == other and outputs_of(PAGES[0]) == outputs_of(PAGES[1])
    sizes = [len(source.splitlines()) for source in one if "class " in source and FILE.match(source)]
    assert len(sizes) == 3 and max(sizes) <= 32, sizes  # with the line that names the file, imports and blank lines


def test_the_package_is_listed(site):
    listed = llmquant(site, "list", "--verbose")
    assert listed.returncode == 0, listed.stderr
    for name in ("shrink", "smallest", "equalize", "limit", "gemma"): assert name in listed.stdout, name


def test_its_adapter_brings_awq_to_a_family_that_had_none(site):
    "Without the package AWQ is refused for Gemma, with it the plan is made."
    asked = ["--model-path", "tiny", "--method", "awq", "--group-size", 32, "--calibration-dataset", "self",
             "--set", "calibration.num_samples=2", "--set", "calibration.max_length=16"]
    assert llmquant(site, "check", *asked).returncode == 0
    done = subprocess.run([sys.executable, "-m", "llmquant", "check", *map(str, asked)], cwd=site, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "awq needs smoothing pairs" in done.stderr, done.stderr


def test_a_misspelt_option_is_refused(site):
    done = llmquant(site, *common("no"), "--set", "quantization.shrink.step=3")
    assert done.returncode == 2 and "did you mean 'quantization.shrink.steps'" in done.stderr and not (site / "no").exists()


def test_vllm_serves_what_the_package_makes(site):
    "Quantizer, adapter and suppressor in one run, verified in vLLM; the model lies without a tokenizer, and no text is asked for."
    done = llmquant(site, *common("served"), "--outlier-suppression", "equalize", "--verify")
    assert done.returncode == 0, done.stderr
    report = yaml.safe_load((site / "served" / "quantization_report.yaml").read_text())
    assert report["verdict"].startswith("verified: files, and served by vLLM") and report["model"]["adapter"] == "gemma", report["verdict"]
    edited = report["outlier_suppression"]["blocks"][1]["equalize"]["pairs"]
    assert {name.rpartition(".")[2] for name in edited} == {"v_proj", "up_proj"}
    assert report["calibration"]["tokens"] == 32
