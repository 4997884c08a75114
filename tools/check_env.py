"""Make the environment that holds compressed-tensors 0.19, an independent reader of this package's exports.

It borrows torch, transformers and the rest from the environment that runs this script, by a path file, and shadows one
distribution only. usage: check_env.py FOLDER
"""
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

WANTED = "compressed-tensors==0.19.*"


def main():
    "Create the environment, or bring it up to date."
    folder = Path(sys.argv[1])
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    own = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                              check=True, capture_output=True, text=True).stdout.strip())
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", WANTED],
                   check=True)
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    tell = ("from importlib.metadata import version; import compressed_tensors, torch; "
            "print('  compressed-tensors', version('compressed-tensors'), 'torch', torch.__version__)")
    subprocess.run([python, "-c", tell], check=True)


if __name__ == "__main__":
    main()
