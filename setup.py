"Package metadata: every value stands in settings.ini; edit it there."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
readme = here / "README.md"


def words(key):
    "The words of a setting."
    return settings[key].split()


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else settings["description"],
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    package_data={settings["lib_path"]: ["harness/default_tasks/*"]},
    python_requires=">=" + settings["min_python"],
    install_requires=words("requirements"),
    extras_require={
        "gguf": words("gguf_requirements"),
        "data": words("data_requirements"),
        "vllm": words("vllm_requirements"),
        "eval": words("eval_requirements"),
        "dev": [word for key in ("gguf", "data", "eval", "dev") for word in words(f"{key}_requirements")],
        "lab": words("lab_requirements"),
    },
    entry_points={
        "console_scripts": words("console_scripts"),
        "vllm.general_plugins": words("vllm_plugins"),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
