"""Runs a quantization again and again, kills it at random moments, and lets the last one finish.

A program of its own, so that each run is a fork of a process that has imported everything: 20 runs take seconds.
"""
import json
import os
import random
import signal
import sys
import time

import torch


def fork(work) -> int:
    "A child that runs `work` and exits; its process number."
    pid = os.fork()
    if pid: return pid
    try: work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main(path: str, out: str, kills: int, seed: int, keys: dict) -> dict:
    "Kill `kills` runs, finish the last; what happened."
    import transformers  # noqa: F401 (imported once, for all children)

    from llmquant.pipeline.run import quantize
    torch.set_num_threads(1)

    def work(): quantize(path, out, **keys)

    start = time.monotonic()
    if os.waitpid(fork(lambda: quantize(path, f"{out}-timed", **keys)), 0)[1]:
        raise SystemExit("the run fails by itself")
    whole, draw, killed, finished = time.monotonic() - start, random.Random(seed), 0, 0
    while killed < kills:
        pid = fork(work)
        time.sleep(draw.random() * whole * 0.9)
        if os.waitpid(pid, os.WNOHANG)[0]: # it was done before the blow fell
            finished += 1
            os.system(f"rm -rf '{out}'")
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
    if os.waitpid(fork(work), 0)[1]: raise SystemExit("the last run failed")
    return {"killed": killed, "finished_early": finished, "seconds_of_one": whole}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))))
