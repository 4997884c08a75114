"Children of vLLM checks come from one process that has imported vLLM."
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from llmquant.evaluation import vllm_check

started = vllm_check.start_child
# imports start no thread, which a fork would lose: no pool of torch's, no background thread of pyarrow's allocator
environment = vllm_check.child_environment(False) | {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class Forks:
    "The process that forks them, started by the first that is asked for."

    def __init__(self): self.server, self.usable = None, True

    def start(self):
        "Whether there is a process to fork from; where it cannot be, children are started one by one, which is slower."
        if self.server is None and self.usable:
            command = [sys.executable, str(Path(__file__).with_name("vllm_forks.py"))]
            self.server = subprocess.Popen(command, env=environment, text=True, bufsize=1, stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.usable = self.server.stdout.readline() == "ready\n"
            if not self.usable: warnings.warn(f"vLLM is imported for each child: {self.server.stderr.read()[-500:]}", stacklevel=2)
        return self.usable

    def __call__(self, folder, stock):
        if not self.start(): return started(folder, stock)
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
