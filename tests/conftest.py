"Children of vLLM checks come from one process that has imported vLLM."
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmquant.evaluation import vllm_check

started, environment = vllm_check.start_child, vllm_check.child_environment(False)


class Forks:
    "The process that forks them, started by the first that is asked for."

    def __init__(self): self.server = None

    def __call__(self, folder, stock):
        if self.server is None or self.server.poll() is not None:
            command = [sys.executable, str(Path(__file__).with_name("vllm_forks.py"))]
            self.server = subprocess.Popen(command, env=environment, text=True, bufsize=1,
                                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        request = dict(jobs=str(folder/"jobs.json"), environment=vllm_check.child_environment(stock),
                       log=str(folder/"log"))
        print(json.dumps(request), file=self.server.stdin)
        status = int(self.server.stdout.readline())
        return status, (folder/"log").read_text(errors="replace")

    def close(self):
        if self.server is None: return
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="session", autouse=True)
def forked_children():
    "Children are forked, not started."
    forks = Forks()
    vllm_check.start_child = forks
    yield
    vllm_check.start_child = started
    forks.close()


@pytest.fixture
def started_children(monkeypatch):
    "Children are started, as users have them."
    monkeypatch.setattr(vllm_check, "start_child", started)
