"""Runs that are killed, stopped or starved of disk go on, and end with the bytes of a run that was not."""
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from itertools import product
from pathlib import Path

import pytest
import torch

from llmquant.checkpoint.writer import ExportWriter
from llmquant.core.errors import LLMQuantError, UsageError
from llmquant.sequential.decoder_loop import Storage

BLOCKS, IDENTITY = 4, {"method": "gptq", "bits": 4, "calibration": {"fingerprint": "e3b0", "num_samples": 8}}
LAYOUT = {"embed.weight": (torch.float16, (6, 4)), "norm.weight": (torch.bfloat16, (5,))}
for number in range(BLOCKS):
    LAYOUT |= {f"layers.{number}.codes": (torch.int32, (7, 3)), f"layers.{number}.scales": (torch.float16, (7,))}


def noise(seed, shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def export(output, stop=lambda block: None, started=None, journal=IDENTITY, **options):
    "Each block follows from the hidden states that the one before left; the report holds every block's results."
    with ExportWriter(output, LAYOUT, 150, journal=journal, **options) as writer:
        done, storage = len(writer.journal.done), Storage(torch.bfloat16, None, writer.journal.place, [(7, 3)])
        storage.clean(done)
        if started: started.write_text(str(done))
        for name in ("embed.weight", "norm.weight"): writer.write(name, noise(99, LAYOUT[name][1]).to(LAYOUT[name][0]))
        hidden = storage.place("quantized", done).get(0) if done else noise(98, (7, 3)).to(torch.bfloat16)
        for block in range(done, BLOCKS):
            hidden = (hidden * 1.7 + noise(block, (7, 3))).to(torch.bfloat16)
            stop(block)
            writer.write(f"layers.{block}.codes", hidden.view(torch.int16).to(torch.int32))
            writer.write(f"layers.{block}.scales", hidden.abs().amax(1).to(torch.float16))
            storage.place("quantized", block + 1).put(0, hidden)
            writer.finish_block(block, {"error": float(hidden.norm())})
            storage.place("quantized", block).drop()
        (writer.folder / "extra").mkdir()
        writer.write_json("extra/report.json", writer.journal.done)
        writer.finish()
        stop(BLOCKS)
        writer.publish()


def export_at_once(output, stop=lambda block: None, **options):
    "The same export by a run that keeps no journal."
    with ExportWriter(output, LAYOUT, 150, **options) as writer:
        for name in ("embed.weight", "norm.weight"): writer.write(name, noise(99, LAYOUT[name][1]).to(LAYOUT[name][0]))
        for block in range(BLOCKS):
            stop(block)
            writer.write(f"layers.{block}.codes", torch.full((7, 3), block, dtype=torch.int32))
            writer.write(f"layers.{block}.scales", torch.full((7,), block, dtype=torch.float16))
        writer.write_text("quantization_report.yaml", "llmquant: 0\n")
        writer.finish()
        writer.publish()


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left(folder): return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "What an uninterrupted run writes."
    folder = tmp_path_factory.mktemp("reference") / "out"
    export(folder)
    files = content(folder)
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    assert set(files) - {name for name in files if name.endswith(".safetensors")} == {
        "model.safetensors.index.json", "extra/report.json"}
    assert len(json.loads(files["extra/report.json"])) == BLOCKS
    return files


def fork(work):
    "Run something in a process of its own, which is there in milliseconds."
    child = os.fork()
    if child: return child
    try: work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def fork_export(folder): return fork(lambda: export(folder / "out"))


def ended(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finished_blocks(folder):
    "Whole lines of the journals on the disk, wherever they are at the moment."
    journals = [*folder.glob("out.partial-*/journal/blocks.jsonl"), *folder.glob("out.journal-*/blocks.jsonl")]
    assert len(journals) <= 1
    return journals[0].read_bytes().count(b"\n") if journals else 0


def goes_on(folder, reference):
    "The same command after a kill: starts where the journal ends, and gives the reference's bytes."
    if not (folder / "out").exists():
        done = finished_blocks(folder)
        export(folder / "out", started=folder / "started")
        assert int((folder / "started").read_text()) == done
        assert left(folder) == ["out", "started"]
    assert content(folder / "out") == reference
    return (folder / "started").exists() and int((folder / "started").read_text())


def kill_at(count, half):
    "Let this process die at its `count`-th change of the disk, before it or halfway through a write."
    calls = iter(range(count))
    def lethal(function):
        def call(*args, **options):
            if next(calls, None) is None:
                if half: pwrite(args[0], args[1][:len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return None if function is fsync else function(*args, **options)
        return call
    pwrite, fsync = os.pwrite, os.fsync
    for name in ("pwrite",) if half else ("pwrite", "fsync", "rename", "truncate", "unlink", "mkdir", "rmdir"):
        setattr(os, name, lethal(getattr(os, name)))


def killed_export(folder, count, half):
    "How an export ends that is killed at its `count`-th change of the disk."
    def work():
        kill_at(count, half)
        export(folder / "out")
    return ended(fork(work))


@pytest.mark.parametrize("half", [False, True], ids=["before", "within"])
def test_killed_at_every_change_of_the_disk(tmp_path, reference, half, monkeypatch):
    "Not at random moments but at all of them: between any two changes of the disk, and halfway through each write."
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # kill -9 takes nothing from the system's buffers
    started = set()
    for count in range(1000):
        folder = tmp_path / str(count)
        folder.mkdir()
        status = killed_export(folder, count, half)
        assert status in (0, -signal.SIGKILL)
        started.add(goes_on(folder, reference))
        if status == 0: break
    print(f"killed at {count} moments")
    assert count >= (17 if half else 60) and {*range(BLOCKS + (not half))} <= started


def test_killed_at_random_moments(tmp_path, reference):
    "20 kills whenever the clock says, each followed by the same command."
    moments, start = random.Random(0), time.perf_counter()
    assert ended(fork_export(tmp_path / "whole")) == 0
    lasts, killed = time.perf_counter() - start, 0
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        child = fork_export(folder)
        time.sleep(moments.uniform(0, lasts))
        os.kill(child, signal.SIGKILL)
        killed += ended(child) == -signal.SIGKILL
        goes_on(folder, reference)
        if killed == 20: break
    assert killed == 20


def test_killed_again_and_again(tmp_path, reference):
    "A run that never gets further than one more block still comes to its end."
    def work():
        start = finished_blocks(tmp_path)
        export(tmp_path / "out", stop=lambda block: block == start + 1 and os.kill(os.getpid(), signal.SIGKILL))

    assert next(kills for kills in range(20) if ended(fork(work)) == 0) == BLOCKS
    assert content(tmp_path / "out") == reference and left(tmp_path) == ["out"]


def raising(error, at):
    def stop(block):
        if block == at: raise error
    return stop


def interrupted(folder, at=2, error=None, **options):
    "An unfinished run in `folder`, with `at` finished blocks; its partial folder."
    stop = raising(error or KeyboardInterrupt(2), at)
    with pytest.raises(BaseException) as caught: export(folder / "out", stop, **options)
    return next(folder.glob("out.partial-*"), None), caught.value


@pytest.mark.parametrize("error", [KeyboardInterrupt(15), UsageError("block 2: NaN"), ZeroDivisionError(),
                                   MemoryError(), OSError(errno.EIO, "broken"), SystemExit(3), LLMQuantError("x")],
                         ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [0, 2, BLOCKS])
def test_whatever_ends_it(tmp_path, reference, error, at):
    "With finished blocks the folder stays and the error says so; without, nothing is left. What is complete is kept."
    error = type(error)(*error.args)
    partial, caught = interrupted(tmp_path, at, error)
    assert caught is error
    if at == 0: assert left(tmp_path) == [] and not hasattr(error, "__notes__")
    elif at == BLOCKS:
        assert error.__notes__ == [f"the export is complete and lies in {tmp_path / 'out.failed'}"]
        assert content(tmp_path / "out.failed") == reference and left(tmp_path) == ["out.failed"]
        shutil.rmtree(tmp_path / "out.failed")
    else:
        note, = error.__notes__
        assert str(partial) in note and f"{at} finished blocks" in note
        helps = isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError, OSError))
        assert ("the same command resumes" in note) == helps and ("when the cause is mended" in note) != helps
    export(tmp_path / "out")
    assert content(tmp_path / "out") == reference and left(tmp_path) == ["out"]


@pytest.mark.parametrize("torn", [b'{"block": 2, "res', b"\0\0\0", b"\xff{", b'{"block": 2' * 99,
                                  b'{"block": 2, "results": {}, "tensors": []}'])
def test_torn_line(tmp_path, reference, torn):
    partial, _ = interrupted(tmp_path)
    with open(partial / "journal/blocks.jsonl", "ab") as file: file.write(torn)
    (partial / "journal/quantized-3.bin").write_bytes(b"newer than the last line")
    for at, done in ((3, "2"), (None, "3")):  # what the next line leaves of a longer torn one is no line either
        if at: interrupted(tmp_path, at, started=tmp_path / "started")
        else: export(tmp_path / "out", started=tmp_path / "started")
        assert (tmp_path / "started").read_text() == done
    assert content(tmp_path / "out") == reference


OTHERS = [({"bits": 3}, "bits: 4 there, 3 here"), ({"method": "awq"}, 'method: "gptq" there, "awq" here'),
          ({"calibration": {"fingerprint": "77", "num_samples": 8}},
           'calibration.fingerprint: "e3b0" there, "77" here'),
          ({"damp": 0.1}, "damp: nothing there, 0.1 here")]


@pytest.mark.parametrize(("change", "said"), OTHERS)
def test_another_identity_is_refused(tmp_path, change, said):
    partial, _ = interrupted(tmp_path)
    before = content(partial)
    with pytest.raises(UsageError) as caught: export(tmp_path / "out", journal=IDENTITY | change)
    for part in (str(partial), f"({said})", "2 finished blocks", "--no-resume", "old command"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and not hasattr(caught.value, "__notes__")
    assert content(partial) == before
    export(tmp_path / "out", journal=IDENTITY | change, resume=False, started=tmp_path / "started")
    assert (tmp_path / "started").read_text() == "0" and left(tmp_path) == ["out", "started"]


@pytest.mark.parametrize("journal", [IDENTITY, None])
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("at", [0, 2])
def test_a_living_run_is_left_alone(tmp_path, reference, journal, resume, at):
    "Two runs at once to the same output: the second is refused, whatever it is; the first never notices."
    ready, go = os.pipe(), os.pipe()
    def wait(block):
        if block == at:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
    child = fork(lambda: export(tmp_path / "out", wait))
    os.read(ready[0], 1)
    before = content(tmp_path)
    with pytest.raises(UsageError, match="another run is writing it, in .*out.partial-[0-9]+;"):
        ExportWriter(tmp_path / "out", LAYOUT, 150, journal=journal, resume=resume, overwrite=True)
    assert content(tmp_path) == before
    os.write(go[1], b"x")
    assert ended(child) == 0 and content(tmp_path / "out") == reference and left(tmp_path) == ["out"]


TWO_RUNS = {"containers, where every run is process 1": 1, "hosts, where this is no process here": 10**7}


@pytest.mark.parametrize("number", TWO_RUNS.values(), ids=TWO_RUNS)
@pytest.mark.parametrize("first", [export, export_at_once])
@pytest.mark.parametrize("second", [export, export_at_once])
def test_two_runs_with_one_process_number(tmp_path, number, first, second, monkeypatch):
    "A run that lives keeps its folder, whatever its number: the lock counts. The second to publish is OUT.failed."
    monkeypatch.setattr(os, "getpid", lambda: number)
    ready, go = os.pipe(), os.pipe()
    def wait(block):
        if block == 2:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
    child = fork(lambda: first(tmp_path / "out", wait))
    os.read(ready[0], 1)
    before, keeps_journal = content(tmp_path), first is export
    if keeps_journal:
        with pytest.raises(UsageError, match=f"another run is writing it, in .*out.partial-{number};"):
            second(tmp_path / "out")
        assert content(tmp_path) == before
    else:
        second(tmp_path / "out")
        assert {name: data for name, data in content(tmp_path).items() if name in before} == before
    os.write(go[1], b"x")
    assert ended(child) == (0 if keeps_journal else 1)
    assert left(tmp_path) == (["out"] if keeps_journal else ["out", "out.failed"])
    assert len(content(tmp_path / left(tmp_path)[-1])) == 6


def test_threads_of_one_process(tmp_path):
    "Four runs at once in one process: each has a folder of its own, and one gets the name."
    barrier, said = threading.Barrier(4), []
    def run():
        try: export_at_once(tmp_path / "out", lambda block: block == 1 and barrier.wait(60))
        except UsageError as error: said.append(error)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(said) == 3 and all("appeared meanwhile" in str(error) for error in said)
    assert len(content(tmp_path / "out")) == 6 and "out.failed" in left(tmp_path)
    assert not [name for name in left(tmp_path) if "partial" in name or "journal" in name]


def test_many_runs_at_once_some_of_them_killed(tmp_path, monkeypatch):
    "Six at a time with one process number, two of them killed: the others end well, and the last one leaves no trace."
    monkeypatch.setattr(os, "getpid", lambda: 1)
    draw = random.Random(0)
    for _ in range(8):
        pauses = [draw.random() * 0.003 for _ in range(6)]
        children = [fork(lambda pause=pause: export_at_once(tmp_path / "out", lambda block: time.sleep(pause),
                                                            overwrite=True)) for pause in pauses]
        time.sleep(draw.random() * 0.03)
        for child in children[:2]: os.kill(child, signal.SIGKILL)
        assert [ended(child) for child in children[2:]] == [0] * 4
        for child in children[:2]: ended(child)
    export_at_once(tmp_path / "out", overwrite=True)
    assert left(tmp_path) == ["out"] and len(content(tmp_path / "out")) == 6


def test_folders_that_no_run_has_made_stay(tmp_path):
    "Names like ours with somebody's files in them, and no lock of a run."
    for kind in ("partial", "old", "journal"):
        (tmp_path / f"out.{kind}-7").mkdir()
        (tmp_path / f"out.{kind}-7/mine").touch()
    before = left(tmp_path)
    for overwrite in (False, True): export_at_once(tmp_path / "out", resume=False, overwrite=overwrite)
    assert left(tmp_path) == ["out", *before] and all((tmp_path / name / "mine").exists() for name in before)


def test_a_number_that_somebody_else_has_by_now(tmp_path, reference):
    "After a restart the dead run's process number may be anybody's; what counts is the lock."
    partial, _ = interrupted(tmp_path)
    partial.rename(tmp_path / f"out.partial-{os.getppid()}")
    export(tmp_path / "out", started=tmp_path / "started")
    assert content(tmp_path / "out") == reference and (tmp_path / "started").read_text() == "2"


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path, reference, call, code, monkeypatch):
    "A disk that is full during block 2 costs that block at most; the sentence says what is kept and where."
    def full(*_, **__): raise OSError(code, os.strerror(code))
    with pytest.raises(UsageError, match="no space left on the disk") as caught:
        export(tmp_path / "out", lambda block: block == 2 and monkeypatch.setattr(os, call, full))
    monkeypatch.undo()
    partial, = tmp_path.iterdir()
    assert caught.value.__notes__ == [f"2 finished blocks kept in {partial}, and the same command resumes from there"]
    export(tmp_path / "out", started=tmp_path / "started")
    assert content(tmp_path / "out") == reference and (tmp_path / "started").read_text() == "2"


def test_room_for_hidden_states_is_looked_for(tmp_path, monkeypatch):
    "Files that are there already take no new room; what is missing is said in bytes."
    with ExportWriter(tmp_path / "out", LAYOUT, 150, journal=IDENTITY) as writer:
        free = writer.shards.total + 1000
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
        writer.need_room(1000)
        with pytest.raises(UsageError, match=f"no space left on the disk .{free + 1} bytes needed, {free} free"):
            writer.need_room(1001)
        assert not writer.folder.exists()
    with ExportWriter(tmp_path / "out", LAYOUT, 150, journal=IDENTITY) as writer:
        (writer.journal.place / "quantized-0.bin").write_bytes(b"x" * 500)
        writer.need_room(1500)
        writer.discard()


def flip_header(path):
    raw = bytearray(path.read_bytes())
    raw[20] ^= 1
    path.write_bytes(raw)


SHARD, INPUTS = "model-00002-of-*.safetensors", "journal/quantized-2.bin"
RESIZED = [lambda p: os.truncate(p, p.stat().st_size - 1), Path.unlink, lambda p: os.truncate(p, p.stat().st_size + 8)]


@pytest.mark.parametrize(("file", "damage"), [(SHARD, flip_header), *product((SHARD, INPUTS), RESIZED)])
def test_damaged_files_are_not_gone_on_with(tmp_path, file, damage):
    partial, _ = interrupted(tmp_path)
    path, = partial.glob(file)
    damage(path)
    with pytest.raises(UsageError, match="--no-resume") as caught: export(tmp_path / "out")
    folder, = tmp_path.iterdir()
    assert str(caught.value).startswith(f"{folder / path.relative_to(partial)}: is ")
    assert not hasattr(caught.value, "__notes__")
    export(tmp_path / "out", resume=False)
    assert left(tmp_path) == ["out"]


def test_another_layout_is_not_gone_on_with(tmp_path):
    "Shards are compared with what this run would write, byte by byte of their headers."
    interrupted(tmp_path)
    with pytest.raises(UsageError, match="is not the shard that this run would resume"):
        ExportWriter(tmp_path / "out", LAYOUT | {"norm.weight": (torch.float16, (5,))}, 150, journal=IDENTITY)


def test_a_run_without_journal_deletes_no_unfinished_one(tmp_path, reference, caplog):
    partial, _ = interrupted(tmp_path)
    before = content(partial)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="unfinished run with 2 finished blocks; finish it by its own command"):
            ExportWriter(tmp_path / "out", LAYOUT, overwrite=overwrite)
    assert content(partial) == before
    with caplog.at_level("INFO"): ExportWriter(tmp_path / "out", LAYOUT, resume=False).discard()
    assert partial.name in caplog.text and left(tmp_path) == []


def test_written_names_survive(tmp_path):
    "The next run knows what it need not write, the kept tensors from before the first block included."
    interrupted(tmp_path, 1)
    with ExportWriter(tmp_path / "out", LAYOUT, 150, journal=IDENTITY) as writer:
        assert writer.written == {"embed.weight", "norm.weight", "layers.0.codes", "layers.0.scales"}
        writer.journal.finish_block(1, {})
        with pytest.raises(LLMQuantError, match="6 tensors were never written"): writer.finish()
        writer.discard()


def test_no_journal_in_what_is_published_or_rejected(tmp_path):
    for end in ("publish", "reject"):
        writer = ExportWriter(tmp_path / end, {}, journal=IDENTITY)
        writer.finish_block(0, {})
        writer.finish()
        assert (writer.folder / "journal").is_dir()
        getattr(writer, end)()
        assert "journal" not in left(writer.folder)
    assert left(tmp_path) == ["publish", "reject.failed"]


STOPPED = """
import os, sys, types
sys.path.insert(0, {tests!r})
from llmquant.cli import main as cli
import test_journal
def run(recipe):
    stop = lambda block: block == 3 and {number} and os.kill(os.getpid(), {number})
    test_journal.export(test_journal.Path(recipe.output_path), stop)
    sys.exit(0)
sys.modules["llmquant.pipeline.run"] = types.SimpleNamespace(run=run)
sys.exit(cli.main(["--model-path", "m", "--output-path", "o"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_what_is_kept(tmp_path, reference, number):
    "Ctrl-C and SIGTERM: one line that says where the blocks are; the same command resumes."
    code = STOPPED.format(tests=str(Path(__file__).parent), number=int(number))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    partial, = tmp_path.iterdir()
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == (f"llmquant: stopped; 3 finished blocks kept in {partial}, and the same command resumes "
                           "from there\n")
    export(tmp_path / "o")
    assert content(tmp_path / "o") == reference and left(tmp_path) == ["o"]


NO_LOCKS = {name: getattr(errno, name) for name in ("ENOSYS", "ENOTSUP", "ENOLCK")}


@pytest.fixture(params=NO_LOCKS.values(), ids=NO_LOCKS)
def no_locks(request, monkeypatch):
    "A disk that refuses every lock; processes of this one's see the same."
    def refused(*_): raise OSError(request.param, os.strerror(request.param))
    monkeypatch.setattr("fcntl.flock", refused)


def killed_after(folder, block, run=export):
    "A run that is killed before a block."
    child = fork(lambda: run(folder / "out", lambda number: number == block and os.kill(os.getpid(), signal.SIGKILL)))
    assert ended(child) == -signal.SIGKILL
    return [path for path in folder.glob("out.partial-*")]


def test_without_locks_a_run_leaves_nothing(tmp_path, reference, no_locks):
    "The file that names the owner moves with the folder, and goes with the run."
    export(tmp_path / "out")
    assert content(tmp_path / "out") == reference and left(tmp_path) == ["out"]


def test_without_locks_a_dead_run_of_this_machine_is_gone_on_with(tmp_path, reference, no_locks):
    "Where the owner's file alone is left, as newer versions of filelock leave it, and beside an empty lock."
    for lock in (False, True):
        (partial,) = killed_after(tmp_path, 2)
        assert (partial / "journal/lock.owner").is_file()
        (partial / "journal/lock").touch() if lock else (partial / "journal/lock").unlink(missing_ok=True)
        export(tmp_path / "out", started=tmp_path / "started")
        assert content(tmp_path / "out") == reference and (tmp_path / "started").read_text() == "2"
        assert left(tmp_path) == ["out", "started"]
        shutil.rmtree(tmp_path / "out")


def test_without_locks_a_dead_run_without_journal_is_removed(tmp_path, no_locks):
    (partial,) = killed_after(tmp_path, 2, export_at_once)
    (partial / "journal/lock").unlink(missing_ok=True)
    export_at_once(tmp_path / "out")
    assert left(tmp_path) == ["out"]


def test_without_locks_the_same_process_goes_on(tmp_path, reference, no_locks):
    "A run that an error ended gives its folder back, though that was renamed meanwhile."
    with pytest.raises(OSError): export(tmp_path / "out", lambda block: block == 2 and exec("raise OSError(5, 'no')"))
    export(tmp_path / "out", started=tmp_path / "started")
    assert content(tmp_path / "out") == reference and (tmp_path / "started").read_text() == "2"


def test_without_locks_a_run_of_another_machine_counts_as_alive(tmp_path, no_locks):
    (partial,) = killed_after(tmp_path, 2)
    owner = partial / "journal/lock.owner"
    number, _, *more = owner.read_text().splitlines()
    owner.write_text("\n".join([number, "another-machine", *more]) + "\n")
    before = content(tmp_path)
    with pytest.raises(UsageError, match="another run is .*no locks: .*lock.owner names .*delete the folder"):
        export(tmp_path / "out")
    assert content(tmp_path) == before


def test_a_disk_on_which_no_folder_can_be_locked_is_one_error(tmp_path, monkeypatch):
    "Whatever the lock's package answers: attempts end, and nothing is left."
    def busy(folder): raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(folder))
    monkeypatch.setattr("llmquant.checkpoint.journal.lock_folder", busy)
    with pytest.raises(UsageError, match="out: none of 20 new folders beside it could be locked; choose"):
        export(tmp_path / "out")
    assert left(tmp_path) == []


@pytest.mark.parametrize("run", [export, export_at_once])
@pytest.mark.parametrize("resume", [True, False])
def test_a_complete_export_that_could_not_be_moved_is_no_litter(tmp_path, run, resume, monkeypatch):
    "The disk takes neither the name nor OUT.failed: what is complete stays, whatever runs come after."
    rename = os.rename
    def refused(old, new):
        if Path(new).name.partition("-")[0] in ("out", "out.failed"): raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)
    with monkeypatch.context() as disk, pytest.raises(UsageError) as error:
        disk.setattr(os, "rename", refused)
        run(tmp_path / "out")
    (partial,) = tmp_path.glob("out.partial-*")
    assert [f"the export is complete and lies in {partial}"] == error.value.__notes__
    kept = content(partial)
    export_at_once(tmp_path / "out", resume=resume)
    export(tmp_path / "out", overwrite=True, resume=resume)
    assert content(partial) == kept and left(tmp_path) == ["out", partial.name]
