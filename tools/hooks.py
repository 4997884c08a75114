"""Install the git hooks of this clone: before a commit, notebooks must be clean and the package exported from them.

The hook is written into the clone's own hooks folder; nothing outside the clone is changed. A hook that somebody else
put there is left alone.
"""
import subprocess
import sys
from pathlib import Path

MARK = "# llmquant: notebooks and package in sync"
HOOK = f"""#!/bin/sh
{MARK}
set -e
unset GIT_DIR GIT_INDEX_FILE
cd "$(git rev-parse --show-toplevel)"
{sys.executable} tools/sync.py --staged
"""


def main():
    "Write the pre-commit hook."
    command = ["git", "rev-parse", "--git-path", "hooks"]
    folder = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    hook = folder / "pre-commit"
    if hook.exists() and MARK not in hook.read_text():
        sys.exit(f"{hook} is somebody else's; add this line to it: {sys.executable} tools/sync.py --staged")
    folder.mkdir(parents=True, exist_ok=True)
    hook.write_text(HOOK)
    hook.chmod(0o755)
    print(f"installed {hook}; git commit --no-verify goes round it")


if __name__ == "__main__":
    main()
