"The package as people install it: a wheel, without nbdev, Jupyter or this repository."
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
TRY = '''
import importlib, pkgutil, sys
for name in ("nbdev", "IPython", "jupyter_core", "jupyterlab", "execnb", "pytest", "hypothesis"):
    sys.modules[name] = None
from importlib.metadata import distribution
import llmquant
home = sys.argv[1]
assert llmquant.__file__.startswith(home), llmquant.__file__
walked = pkgutil.walk_packages(llmquant.__path__, "llmquant.")
modules = [m.name for m in walked if not m.name.endswith(("_render", "_modidx"))]
for name in modules: importlib.import_module(name)
points = {(p.group, p.name): p.value for p in distribution("llmquant").entry_points}
assert points["vllm.general_plugins", "llmquant"] == "llmquant.serving.plugin:register", points
assert points["console_scripts", "llmquant"] == "llmquant.cli.main:main", points
report = llmquant.quantize(sys.argv[2], sys.argv[3], bits=4, group_size=32)
print(len(modules), len(report["layers"]))
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder that holds nothing but the installed wheel."
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = tmp_path_factory.mktemp("source") / "llmquant"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)  # builds leave files beside their source
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    wheel, = wheels.glob("llmquant-*.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith((".ipynb", ".json"))]
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def test_the_wheel_imports_quantizes_and_registers_the_plugin(site, tmp_path):
    base = tiny.make("llama", tmp_path / "base")
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", TRY, site, base, tmp_path / "out"], env=env, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    modules, layers = map(int, done.stdout.split())
    assert modules > 30 and layers == 14 and (tmp_path / "out" / "config.json").exists()


def test_importing_the_package_is_light(site, tmp_path):
    "vLLM imports it in each of its processes."
    code = "import sys, llmquant; print(sorted({'torch', 'transformers', 'vllm', 'numpy', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
