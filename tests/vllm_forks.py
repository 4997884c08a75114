"""Children of vLLM checks, forked from one process that has imported vLLM: the import is 5 s of CPU for each child.

A program: each line that it reads is a request, each line that it writes the status of the child that answered it.
"""
import json
import os
import sys
import traceback

import torch


def become(environment, log):
    "Take the environment that a started child would have, and write all output to `log`."
    os.environ.clear()
    os.environ.update(environment)
    known = set(sys.path)
    sys.path[:0] = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p and p not in known]
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in 1, 2: os.dup2(file, stream)


def answer(jobs, environment, log):
    "Fork; the child's status, as subprocess has it."
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        become(environment, log)
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))  # of this process, after the fork
        from llmquant.evaluation.vllm_check import child_main
        child_main(jobs)
        status = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def main():
    "Import vLLM, then answer until there are no more requests."
    out = os.dup(1)
    os.dup2(2, 1) # vLLM logs to standard output
    from llmquant.evaluation.vllm_check import engine_class
    engine_class()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2) # nobody reads it from now on
    os.write(out, b"ready\n")
    for line in sys.stdin: os.write(out, f"{answer(**json.loads(line))}\n".encode())


if __name__ == "__main__": main()
