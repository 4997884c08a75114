"""vLLM's own HTTP server, started as its users start it, with `--quantization minmax`."""
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import tiny
import tiny_tokenizer

from llmquant.pipeline.run import quantize

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")]


def free_port():
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fetch(url, body=None, timeout=60):
    "GET, or POST of JSON; the parsed answer."
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer: return json.loads(answer.read() or "null")


def wait_until_ready(url, server, log, seconds=240):
    "Until the server answers; fails when it ends first."
    for _ in range(seconds):
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try: return fetch(f"{url}/v1/models", timeout=5)
        except (urllib.error.URLError, TimeoutError, ConnectionError): time.sleep(1)
    raise AssertionError(f"no answer after {seconds} s:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    "A running server of an 8-bit export, which on a CPU only the plugin can serve."
    folder = tmp_path_factory.mktemp("server")
    base = tiny.make("llama", folder/"base")
    tiny_tokenizer.save(base)
    quantize(base, folder/"export", bits=8, group_size=64)
    port, log = free_port(), folder/"log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder/"export"),
               "--quantization", "minmax", "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
               "--dtype", "float16", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4",
               "--kv-cache-memory-bytes", str(2**28)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGINT)
        server.wait(60)
    finally:
        if server.poll() is None: os.killpg(server.pid, signal.SIGKILL)


def test_a_completion_over_http(url):
    body = {"model": "tiny", "prompt": "def f(x):", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = fetch(f"{url}/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 8 and answer["usage"]["prompt_tokens"] == len("def f(x):")
    assert answer["choices"][0]["finish_reason"] == "length"
    assert fetch(f"{url}/v1/completions", body)["choices"][0]["text"] == answer["choices"][0]["text"]


def test_the_model_is_the_one_that_was_asked_for(url):
    assert [model["id"] for model in fetch(f"{url}/v1/models")["data"]] == ["tiny"]
