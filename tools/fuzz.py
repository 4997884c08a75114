"""Mutated inputs through the command line and `load`, in this process: none may end in a traceback.

    fuzz.py                          ten minutes, every kind of input in turn
    fuzz.py --seconds 60 --seed 7    shorter, and other inputs
    fuzz.py --kinds recipe export    only these kinds
    fuzz.py --one config:812         one input again, with its traceback

An input is a tiny checkpoint, recipe, command line, text or export with something changed: a value of another type,
huge, negative, nested, absent; bytes cut, flipped, repeated; a tensor of another shape. It is made from the seed, its
kind and its number alone. Good ends are status 0, 1 or 2; what is refused is refused in one line on stderr, within 30
seconds and 8 GiB, and leaves no partial folder but one that the line names. The exit status is 1 when an input had
another end.
"""
import argparse
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from itertools import count
from pathlib import Path
from random import Random
from time import monotonic
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")

import torch  # noqa: E402
import yaml  # noqa: E402

MODELS = ("llama", "olmo2", "gpt_neox", "qwen2_moe", "gemma2", "deepseek_v3", "opt", "phi3")
SECONDS, MEMORY = 30, 8 * 2**30
RUNS = (  # what a run with text is asked for, beside its width
    ["--method", "gptq"], ["--method", "gptq"], ["--method", "awq"],
    ["--method", "minmax", "--outlier-suppression", "smooth_quant"], ["--outlier-suppression", "rotation"],
    ["--method", "gptq", "--outlier-suppression", "outlier_suppression_v2"],
    ["--method", "minmax", "--bits", "8", "--group-size", "-1",
     "--set", "quantization.activations={dynamic: false, granularity: tensor}"])
EXPORTS = {  # options of the exports, one for each layout
    "packed": ["--bits", "4", "--group-size", "32"],
    "mixed": ["--bits", "4", "--group-size", "32", "--set", "quantization.overrides=[{match: '.*o_proj', bits: 8}]"],
    "gptq": ["--bits", "4", "--group-size", "32", "--format", "gptq", "--set", "quantization.minmax.symmetric=true"],
    "awq": ["--bits", "4", "--group-size", "32", "--format", "awq"],
    "activations": ["--bits", "8", "--set", "quantization.activations={symmetric: false}"],
    "float_zeros": ["--method", "hqq", "--bits", "4", "--group-size", "32"],
    "plain": ["--bits", "16"],
}
RECIPE = """
quantization:
  method: minmax
  bits: 4
  group_size: 32
  layer_wise: true
  layers: [0, 1]
  outlier_suppression: null
  overrides:
    - {match: ".*down_proj", bits: 8, symmetric: true}
    - {match: ".*o_proj", skip: true}
  activations: null
  minmax: {symmetric: false, per_channel: true, dynamic_range: minmax}
  gptq: {damp_percent: 0.01}
model: {trust_remote_code: false, device_map: cpu, torch_dtype: float16}
calibration: {num_samples: 2, batch_size: 1, max_length: 16}
output: {save_format: safetensors, save_quantization_config: true, max_shard_size: 1GB}
"""
DEEP = object()  # written as thousands of brackets, which no tree in memory can be
ODD = (None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e-9, 1e308, float("inf"), float("nan"), 2**31, 2**63, 10**30,
       -2**63, "", " ", "x", "7", "null", "true", "cpu", "é\n", "\0", "../x", "/", "a" * 300, "(a+)+$", "re:(", [], [1],
       ["x"], [None], [[]], {}, {"x": 1}, {"": None}, DEEP)


class Input(NamedTuple):
    "One mutated input."
    what: str           # what was changed
    commands: list      # arguments of the command line; a path stands for `load`


# --- mutations --------------------------------------------------------------------------------------------------------
def places(value):
    "Every place in a JSON value that can be changed, as (container, key)."
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def nudge(value, draw):
    "Something near a value."
    if isinstance(value, bool): return not value
    if isinstance(value, int):
        return draw.choice([value + 1, value - 1, -value, 2 * value, value * 10**draw.randint(1, 20)])
    if isinstance(value, float): return draw.choice([-value, value * 1e9, 1 / value if value else 1.0, str(value)])
    if isinstance(value, str): return draw.choice([value + "x", value[:-1], value.upper(), value * 100])
    return draw.choice([[value], {"x": value}, str(value)])


def fresh(value):
    "A copy, so that no later mutation changes what is drawn from."
    return value if value is DEEP else deepcopy(value)


def mutate(value, draw):
    "Change one place of a JSON value, in place; says what was done."
    container, key = draw.choice(list(places(value)) or [({"": value}, "")])
    way = draw.randrange(10)
    if way == 0: del container[key]
    elif way == 1 and isinstance(container, dict):
        container[draw.choice(["x", "dtype", "", f"{key}x"])] = container.pop(key)
    elif way == 2:
        other, theirs = draw.choice(list(places(value)) or [(container, key)])
        container[key] = json.loads(json.dumps(other[theirs], default=lambda deep: "deep"))
    elif way < 5: container[key] = nudge(container[key], draw)
    else: container[key] = fresh(draw.choice(ODD))
    now = "gone" if way == 0 else repr(container.get(key) if isinstance(container, dict) else container[key:key + 1])
    return f"{key}: {now[:60]}"


def text_of(value, dump=json.dumps):
    "A mutated JSON value as text."
    mark = "deep-5f3a"
    text = dump(json.loads(json.dumps(value, default=lambda deep: mark)))
    return text.replace(f'"{mark}"', mark).replace(mark, "[" * 20000 + "]" * 20000)


def cut_up(data, draw):
    "Bytes with one thing done to them."
    at, stop = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    stop = min(stop, at + draw.choice([1, 8, 100, 10**6]))
    way = draw.randrange(7)
    if way == 0: return data[:at]
    if way == 1: return data[:at] + data[stop:]
    if way == 2: return data[:at] + data[at:stop] * draw.choice([2, 50]) + data[stop:]
    if way == 3: return data[:at] + draw.randbytes(draw.choice([1, 4, 200])) + data[at:]
    if way == 4: return data[:at] + draw.choice([b"[", b"{", b"- ", b"? ", b'{"a":']) * 20000 + data[at:]
    if way == 5: return data[:at] + draw.choice([b"\0", b"\xff\xfe", b"&a ", b"*a ", b"!!python/none ", b"9" * 5000,
                                                b"1e999", b"NaN", b"\n", b"'", b"${", b"%"]) + data[at:]
    return data[:at] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[at:at + 1]) + data[at + 1:]


def rewrite(file, content):
    "Replace a file, and not the one that it is a link of."
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)


def change_file(file, draw):
    "Mutate one JSON or YAML file, as a tree or as bytes."
    data = file.read_bytes()
    if draw.random() < 0.1 or file.suffix not in (".json", ".yaml"):
        rewrite(file, cut_up(data, draw))
        return f"bytes of {file.name}"
    value = {"": yaml.safe_load(data) if file.suffix == ".yaml" else json.loads(data)}
    done = [mutate(value, draw) for _ in range(draw.choice([1, 1, 1, 2, 4]))]
    value = value.get("", {})
    rewrite(file, text_of(value, yaml.safe_dump if file.suffix == ".yaml" else json.dumps))
    return f"{file.name}: {', '.join(done)}"


def change_header(file, draw):
    "Mutate the header of a safetensors file."
    data = file.read_bytes()
    size, = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    if draw.random() < 0.2:
        rewrite(file, cut_up(data[:8 + size], draw) + body)
        return f"bytes of the header of {file.name}"
    done = mutate(header, draw)
    text = text_of(header).encode()
    length = len(text) if draw.random() < 0.9 else draw.choice([0, 7, len(text) + 1, 2**40, 2**64 - 1])
    rewrite(file, struct.pack("<Q", length) + text + body)
    return f"header of {file.name}: {done}"


def change_tensor(folder, draw):
    "Give one tensor another shape, dtype, name or content, or drop it; the file stays well-formed."
    from safetensors.torch import load_file, save_file
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    old, way = tensors.pop(name), draw.randrange(8)
    if way == 1: tensors[draw.choice([f"{name}x", name.replace("norm", "nrm"), "x", "a" * 300])] = old
    elif way == 2: tensors[name] = old[..., :-1].contiguous() if old.dim() else old
    elif way == 3: tensors[name] = old.reshape(draw.choice([(-1,), (1, *old.shape), (*old.shape, 1), (1, -1)]))
    elif way == 4: tensors[name] = old.mT.contiguous() if old.dim() > 1 else old[:0]
    elif way == 5: tensors[name] = old.to(draw.choice([torch.int32, torch.bool, torch.float64, torch.int8]))
    elif way == 6: tensors[name] = torch.full_like(old, draw.choice([0, 1]) if not old.is_floating_point()
                                                   else draw.choice([0., float("nan"), float("inf"), 6e4]))
    elif way == 7: tensors[name] = draw.choice([torch.zeros(()), torch.zeros(0), torch.zeros(2, 3, 4, 5)])
    file.unlink()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return f"tensor {name}, way {way}"


def change_gguf(file, draw):
    "Mutate the value of a key, or any byte in front of the tensors."
    from llmquant.checkpoint.gguf import read_gguf_header
    data, header = file.read_bytes(), read_gguf_header(file)
    start = min(info.offset for info in header.tensors.values())
    names = [*header.kinds, *header.tensors]
    if draw.random() < 0.3:
        rewrite(file, cut_up(data[:start], draw) + data[start:])
        return f"bytes of the header of {file.name}"
    name = draw.choice(names)
    at = data.index(name.encode()) + len(name.encode()) + draw.choice([0, 4, 4, 4, 8, 16])
    number = draw.choice([0, 1, 2, 7, 8, 9, 127, 2**16, 2**31, 2**32 - 1, draw.randrange(2**32)])
    new = struct.pack("<I", number) if draw.random() < 0.7 else struct.pack("<Q", draw.choice([number, 2**40, 2**63]))
    rewrite(file, data[:at] + new + data[at + len(new):])
    return f"{name} in the header of {file.name}"


# --- kinds of input ---------------------------------------------------------------------------------------------------
class Bases:
    "What the inputs are made from; `copy` is a folder that may be changed."

    def __init__(self, folder, models=MODELS, exports=tuple(EXPORTS)):
        import tiny
        import tiny_gguf
        import tiny_tokenizer

        from llmquant.cli.main import main
        self.folder, self.models, self.exports = Path(folder), models, exports
        for kind in models: tiny_tokenizer.save(tiny.make(kind, self.folder / kind))
        tiny_tokenizer.save(tiny.make("llama", self.folder / "shards", shards=2))
        tiny_gguf.write(self.folder / "model.gguf", tiny_gguf.model("llama"), "llama")
        (self.folder / "text.txt").write_text("some words to look at, again and again. " * 60)
        rows = [json.dumps({"text": f"row {i} of a table"}) for i in range(60)]
        (self.folder / "rows.jsonl").write_text("\n".join(rows))
        (self.folder / "recipe.yaml").write_text(RECIPE)
        for name in exports:
            words = ["--model-path", str(self.folder / "llama"), "--output-path", str(self.folder / name), "--quiet"]
            with redirect_stdout(io.StringIO()): status = main([*words, *EXPORTS[name]])
            if status: sys.exit(f"the export {name} that inputs are made from failed")

    def copy(self, name, scratch):
        "A copy of a base: files are links, and `rewrite` replaces them."
        return Path(shutil.copytree(self.folder / name, scratch / name, copy_function=os.link))

    def text(self, name="text.txt"):
        "Options of a calibrated run."
        return ["--calibration-dataset", str(self.folder / name), "--set", "calibration.num_samples=2",
                "--set", "calibration.max_length=16"]


def commands(model, scratch, draw, bases):
    "Commands that read a checkpoint: always cheap ones, sometimes a run."
    width, folder = ["--bits", "4", "--group-size", "32"], model
    model, out = ["--model-path", str(model)], ["--output-path", str(scratch / "out")]
    found = [["info", model[1]], ["check", *model, *width]]
    if draw.random() < 0.2: found.append(folder)
    if draw.random() < 0.2: found.append(["verify", str(bases.folder / bases.exports[0]), "--reference", model[1]])
    if draw.random() < 0.4: found.append(["quantize", *model, *out, *width])
    elif draw.random() < 0.5:
        verb, run = draw.choice(["quantize", "check", "check"]), draw.choice(RUNS)
        text = [] if "rotation" in run else bases.text()
        found.append([verb, *model, *out, *(() if "--bits" in run else width), *run, *text])
    return found


def config(bases, scratch, draw):
    "config.json of a checkpoint."
    model = bases.copy(draw.choice(bases.models), scratch)
    return Input(change_file(model / "config.json", draw), commands(model, scratch, draw, bases))


def recipe(bases, scratch, draw):
    "A recipe file."
    file = scratch / "recipe.yaml"
    shutil.copy(bases.folder / "recipe.yaml", file)
    what = change_file(file, draw)
    return Input(what, [["check", "--model-path", str(bases.folder / "llama"), "--config", str(file)]])


def command_line(bases, scratch, draw):
    "Words of the command line."
    out, model = str(scratch / "out"), str(bases.folder / "llama")
    words = draw.choice([
        ["quantize", "--model-path", model, "--output-path", out, "--bits", "4", "--group-size", "32", "--overwrite"],
        ["check", "--model-path", model, "--method", "minmax", "--bits", "8", "--layers", "0,1", "--torch-dtype",
         "float16", "--set", "quantization.activations.dynamic=true", "--max-memory", "4GB", "--format",
         "compressed_tensors"],
        ["check", "--model-path", model, "--method", "gptq", *bases.text(), "--device-map", "cpu", "--seed", "0",
         "--outlier-suppression", "smooth_quant", "--set", "quantization.overrides=[{match: '.*o_proj', bits: 8}]"],
        ["verify", str(bases.folder / bases.exports[0]), "--reference", model],
        ["info", str(bases.folder / bases.exports[0])], ["list", "--verbose"]])
    at = draw.randrange(len(words))
    way = draw.randrange(5)
    odd = draw.choice([value for value in ODD if value is not DEEP])
    odd = odd.replace("\0", "") if isinstance(odd, str) else text_of(odd)   # no process can be given a null character
    before = words[at]
    if way == 0: del words[at]
    elif way == 1: words.insert(at, odd)
    elif way == 2 and "=" in before: words[at] = f"{before.partition('=')[0]}={odd}"
    elif way == 3:
        words[at] = cut_up(before.encode(), draw).replace(b"\0", b"").decode(errors="surrogateescape")[:10**5]
    else: words[at] = odd
    return Input(f"{before} -> {words[at:at + 1]!r:.80}", [words])


def header(bases, scratch, draw):
    "The header or the index of a checkpoint."
    model = bases.copy(draw.choice([*bases.models, "shards"]), scratch)
    index = model / "model.safetensors.index.json"
    change = change_file(index, draw) if index.exists() and draw.random() < 0.7 else \
        change_header(draw.choice(sorted(model.glob("*.safetensors"))), draw)
    return Input(change, commands(model, scratch, draw, bases))


def tensor(bases, scratch, draw):
    "A tensor of a checkpoint."
    model = bases.copy(draw.choice(bases.models), scratch)
    return Input(change_tensor(model, draw), commands(model, scratch, draw, bases))


def tokenizer(bases, scratch, draw):
    "The tokenizer's files, or another side file."
    model = bases.copy("llama", scratch)
    file = draw.choice(sorted(path for path in model.glob("*.json") if path.name != "config.json"))
    what = change_file(file, draw)
    verb = draw.choice(["check", "check", "quantize"])
    return Input(what, [[verb, "--model-path", str(model), "--output-path", str(scratch / "out"), "--group-size", "32",
                         "--method", "gptq", *bases.text()]])


def text(bases, scratch, draw):
    "A calibration text."
    name = draw.choice(["text.txt", "rows.jsonl"])
    file = scratch / draw.choice([name, name, "x.parquet", "x.csv", "x.json"])
    rewrite(file, cut_up((bases.folder / name).read_bytes(), draw))
    return Input(f"bytes of {file.name}", [["check", "--model-path", str(bases.folder / "llama"), "--group-size", "32",
                                           "--method", "gptq", *bases.text(file)]])


def export(bases, scratch, draw):
    "An export: its config.json, report, header, tensors or another file."
    folder = bases.copy(draw.choice(bases.exports), scratch)
    way = draw.random()
    if way < 0.4: what = change_file(folder / "config.json", draw)
    elif way < 0.6: what = change_file(folder / "quantization_report.yaml", draw)
    elif way < 0.75: what = change_header(draw.choice(sorted(folder.glob("*.safetensors"))), draw)
    elif way < 0.95: what = change_tensor(folder, draw)
    else: what = change_file(draw.choice(sorted(folder.iterdir())), draw)
    verify = ["verify", str(folder), "--reference", str(bases.folder / "llama")]
    return Input(what, [["info", str(folder)], verify, folder])


def gguf(bases, scratch, draw):
    "A GGUF."
    file = scratch / "model.gguf"
    os.link(bases.folder / "model.gguf", file)
    what = change_gguf(file, draw)
    return Input(what, commands(file, scratch, draw, bases))


KINDS = {made.__name__: made for made in (config, recipe, command_line, header, tensor, tokenizer, text, export, gguf)}


# --- running them -----------------------------------------------------------------------------------------------------
class TooLong(BaseException):
    "An input took too long."


@contextmanager
def time_limit(seconds):
    "Interrupt what computes longer than that, or takes ten times as long on a busy machine."
    def stop(number, frame): raise TooLong(f"more than {seconds} s")
    kinds = (signal.SIGVTALRM, signal.ITIMER_VIRTUAL, 1), (signal.SIGALRM, signal.ITIMER_REAL, 10)
    old = [signal.signal(number, stop) for number, _, _ in kinds]
    for _, timer, times in kinds: signal.setitimer(timer, times * seconds)
    try: yield
    finally:
        for (number, timer, _), handler in zip(kinds, old):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def carry_out(command):
    "The exit status of a command, and what it wrote to stderr."
    from llmquant.cli.main import main
    from llmquant.core.errors import LLMQuantError
    from llmquant.export.loading import load
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        if isinstance(command, list): return main(command), said.getvalue()
        try: load(command)
        except LLMQuantError as error: return error.exit_status, f"llmquant: error: {error}\n"
        return 0, ""


def fault_of(command, scratch, seconds=SECONDS):
    "What is wrong with the end of a command; empty when nothing is. Then its status."
    try:
        with time_limit(seconds): status, said = carry_out(command)
    except (Exception, TooLong) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if f"llmquant{os.sep}" in f.filename and "fuzz.py" not in f.filename]
        where = f"{Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else "?"
        return f"{type(error).__name__} in {where}", None
    if status not in (0, 1, 2): return f"status {status}", status
    lines = [line for line in said.splitlines() if line.startswith("llmquant: ")]
    if status and (len(lines) != 1 or len(lines[0]) < 20): return f"status {status} with {len(lines)} lines", status
    left = [path.name for path in scratch.glob("out*") if ".partial" in path.name and path.name not in said]
    if left: return "left a partial folder and did not say so", status
    return "", status


def name_of(command):
    "A command in one word."
    return command[0] if isinstance(command, list) and command and command[0][:1] != "-" else \
        "load" if isinstance(command, Path) else "quantize"


def try_one(bases, kind, number, seed, loud=False):
    "Make one input and run its commands: [(command, status, fault)]."
    found = []
    with tempfile.TemporaryDirectory(dir=bases.folder, prefix="scratch-") as scratch:
        scratch = Path(scratch)
        made = KINDS[kind](bases, scratch, Random(f"{seed}/{kind}/{number}"))
        for command in made.commands:
            fault, status = fault_of(command, scratch)
            found.append((name_of(command), status, fault))
            if loud:
                print(f"{made.what}\n{command}\n  {status} {fault}")
                try: print(" ", carry_out(command)[1])
                except Exception: traceback.print_exc()
    return made.what, found


@contextmanager
def prepared(folder, **what):
    "The bases in `folder`, no vLLM, and what a mutated input may make libraries print kept off the screen."
    import warnings
    with mock.patch("llmquant.evaluation.verification.vllm_installed", return_value=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Bases(folder, **what)


def warm(bases):
    "What nobody has changed ends with 0; what libraries import for it need not be imported in each forked process."
    width, reference = ["--bits", "4", "--group-size", "32"], ["--reference", str(bases.folder / "llama")]
    models = (*bases.models, "shards", "model.gguf")
    runs = [["check", "--model-path", str(bases.folder / model), *width] for model in models]
    runs += [["verify", str(bases.folder / name), *reference] for name in bases.exports]
    runs += [[*runs[0], "--method", "gptq", *bases.text()], [*runs[0], "--config", str(bases.folder / "recipe.yaml")]]
    for command in (*runs, *(bases.folder / name for name in bases.exports)):
        status, said = carry_out(command)
        if status: sys.exit(f"{command} must end with 0 before anything is changed: {said}")


def in_children(bases, tasks, seed):
    "Try inputs in forked processes, for a library may end one: yields (kind, number, what, found) of each."
    while tasks:
        ours, theirs = os.pipe()
        if child := os.fork():
            os.close(theirs)
            with os.fdopen(ours) as pipe: answers = [json.loads(line) for line in pipe]
            os.waitpid(child, 0)
            for task, answer in zip(tasks, answers): yield *task, *answer
            if len(answers) < len(tasks): yield *tasks[len(answers)], "?", [("?", None, "the process died")]
            tasks = tasks[len(answers) + 1:]
            continue
        try:  # whatever happens, this process must not go on with what is the other's, and delete its folders
            with os.fdopen(theirs, "w") as pipe:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                for kind, number in tasks:
                    signal.setitimer(signal.ITIMER_PROF, 4 * SECONDS)  # ends the process where no Python runs any more
                    print(json.dumps(try_one(bases, kind, number, seed)), file=pipe, flush=True)
        finally: os._exit(0)


def table(ends, faults, examples):
    "What was run, and what went wrong."
    rows = [f"{'kind':14}{'inputs':>8}{'commands':>10}{'done':>8}{'failed':>8}{'refused':>9}{'faults':>8}"]
    for kind in KINDS:
        mine = ends[kind]
        if mine["inputs"]:
            rows.append(f"{kind:14}{mine['inputs']:8}{mine['commands']:10}{mine[0]:8}{mine[1]:8}{mine[2]:9}{mine['faults']:8}")
    return rows + [f"{n:5} {kind} {verb}: {fault}   {examples[kind, verb, fault]}"
                   for (kind, verb, fault), n in faults.most_common()]


def main():
    "Run inputs until the time is over."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--inputs", type=int, default=10**9, help="of each kind, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--one", metavar="KIND:NUMBER", help="one input again")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other threads
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    start, ends, faults, examples = monotonic(), {kind: Counter() for kind in KINDS}, Counter(), {}
    with tempfile.TemporaryDirectory(prefix="llmquant-fuzz-") as folder, prepared(folder) as bases:
        if given.one:
            kind, _, number = given.one.partition(":")
            return print(try_one(bases, kind, int(number), given.seed, loud=True))
        warm(bases)
        for first in count(0, 2):
            if first >= given.inputs or monotonic() - start > given.seconds: break
            tasks = [(kind, number) for number in range(first, min(first + 2, given.inputs)) for kind in given.kinds]
            for kind, number, what, found in in_children(bases, tasks, given.seed):
                ends[kind]["inputs"] += 1
                for verb, status, fault in found:
                    ends[kind].update(["commands", "faults" if fault else status])
                    if fault:
                        faults[kind, verb, fault] += 1
                        examples.setdefault((kind, verb, fault), f"{kind}:{number} {what[:100]!r}")
    print("\n".join(table(ends, faults, examples)), f"{monotonic() - start:.0f} s, seed {given.seed}", sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
