"""Whom a failed verification blames, with a server that is made up: it answers with transformers' own logits, with
wrong ones, or not at all. And what a real server does by default with 4-bit weights on a CPU with AMX.
"""
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny
import tiny_gguf
import tiny_tokenizer
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextModel

from llmquant.cli.main import main
from llmquant.core.errors import VerificationError
from llmquant.evaluation import verification, served_check, served_model, vllm_check
from llmquant.evaluation.demo import demo_text
from llmquant.evaluation.kernels import W4A8_PRODUCT
from llmquant.evaluation.served_model import forced_logits
from llmquant.evaluation.vllm_check import Answer, Job
from llmquant.export.loading import load
from llmquant.models.served_class import NO_HEAD_NOTE, PER_LAYER_NOTE
from llmquant.pipeline.run import quantize
from llmquant.serving.cpu_notes import STATIC_NOTE, W4A8_NOTE

AMX = torch.cpu._is_amx_tile_supported() and os.environ.get("LLMQUANT_CPU_AMX") != "0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny model and its 4-bit export."
    folder = tmp_path_factory.mktemp("served")
    base = tiny.make("llama", folder/"base", torch.bfloat16)
    quantize(base, folder/"w4", bits=4, group_size=32)
    return folder


def server(asked, wrong, refused=(), default=None):
    """A vLLM whose answers are wrong for some (name of the folder, dtype), and that cannot load others; it keeps what
    it was asked in `asked`, and answers `default` to what a server would do by itself."""
    def ask(jobs, stock=False):
        answers = []
        for job in jobs:
            name = job.path.rpartition("/")[2]
            asked.append((name, job.dtype, job.flexible))
            if job.only_w4a8: answers.append(default or Answer(skipped=True)); continue
            if (name, job.dtype) in refused: answers.append(Answer(error=f"KeyError: {job.path}/{job.dtype}")); continue
            model = load(job.path, torch.float32, served_in=getattr(torch, job.dtype))
            tables = [logits.log_softmax(-1).topk(job.top) for logits in forced_logits(model, job.prompts)]
            ids = [table.indices.numpy() for table in tables]
            if (name, job.dtype) in wrong: ids = [np.roll(each, 1, axis=-1) for each in ids]
            answers.append(Answer(ids, [table.values.numpy() for table in tables], dtype=job.dtype,
                                  kernels={"model.layers.0.mlp.down_proj": "SomeKernel"}))
        return answers
    return ask


def verify(folder, monkeypatch, wrong, base="base", refused=(), default=None, **more):
    "What the verification finds with such a server, and what it asked."
    asked = []
    monkeypatch.setattr(verification, "vllm_installed", lambda: True)
    monkeypatch.setattr(served_check, "ask_vllm_many", server(asked, wrong, refused, default))
    try: return verification.verify(folder/"w4", folder/base, **more)["vllm"], asked
    except VerificationError as error: return str(error), asked


def test_a_right_export(folder, monkeypatch):
    found, asked = verify(folder, monkeypatch, ())
    assert found["dtype"] == "float16" and found["mean_kl"] < 1e-9 and found["kernels"] == {"SomeKernel": 1}
    assert ("w4", "float16", True) in asked and not any(name == "base" for name, *_ in asked)


def test_a_wrong_export(folder, monkeypatch):
    "The float reference is served in the same way, and is right."
    found, asked = verify(folder, monkeypatch, {("w4", "float16")})
    assert found.startswith("the export: vLLM computes another model, mean KL ")
    assert found.endswith("; the float reference, served in the same way, is right")
    assert [dtype for name, dtype, _ in asked if name == "base"] == ["float16", "bfloat16", "float32"]


def test_a_wrong_export_of_a_gguf(tmp_path, monkeypatch):
    "Its reference is served with the weights unpacked, for vLLM could not load it as it is."
    path = tmp_path/"base.gguf"
    tiny_gguf.write(path, tiny_gguf.model("llama"), "llama", keys=[("rope.dimension_count", 16, "UINT32")])
    quantize(path, tmp_path/"w4", bits=4, group_size=32)
    found, asked = verify(tmp_path, monkeypatch, {("w4", "float16")}, path.name)
    assert found.endswith("; the float reference, served in the same way, is right") and len(asked) == 6


def test_a_server_that_is_wrong_in_one_dtype(folder, monkeypatch):
    "The export is served again in a dtype in which the reference is right, and the result says why."
    wrong = {("w4", "float16"), ("base", "float16")}
    found, _ = verify(folder, monkeypatch, wrong)
    assert found["dtype"] == "bfloat16" and found["mean_kl"] <= found["bound"] and found["own_bfloat16_noise"] > 0
    assert found["served_again"].startswith("the server: the float reference, served in the same way, is not right "
                                            "either: vLLM computes another model, mean KL ")
    text, _ = verify(folder, monkeypatch, wrong, dtype="float16")   # what the user asks for is what is judged
    assert text.startswith("the server: ") and text.endswith("it is right in bfloat16, so verify in that")
    text, _ = verify(folder, monkeypatch, wrong | {("w4", "bfloat16")})
    assert text.startswith("the export: ") and "allowed in bfloat16" in text


def test_a_server_that_is_always_wrong(folder, monkeypatch):
    dtypes = ("float16", "bfloat16", "float32")
    text, _ = verify(folder, monkeypatch, {(name, dtype) for name in ("w4", "base") for dtype in dtypes})
    assert "the export is not at fault (vLLM computes " in text
    assert text.endswith("no dtype is right here, so verify elsewhere")


CANNOT = "vLLM cannot serve it (KeyError: "


def test_an_export_that_cannot_be_loaded(folder, monkeypatch):
    "The float reference loads in that dtype: vLLM's words, and the export is at fault."
    text, asked = verify(folder, monkeypatch, (), refused={("w4", "float16")})
    assert text == f"the export: {CANNOT}the export/float16); the float reference, served in the same way, is right"
    assert [dtype for name, dtype, _ in asked if name == "base"] == ["float16", "bfloat16", "float32"]
    monkeypatch.setattr(served_check, "ask_vllm_many", server([], (), {("w4", "float16")}))
    with pytest.raises(VerificationError) as caught: verification.verify(folder/"w4")   # nothing to compare it with
    assert str(caught.value) == f"the export: {CANNOT}the export/float16)"


def test_a_server_that_can_load_neither(folder, monkeypatch):
    "Another dtype is taken where there is one; where there is none, or the user named his, the server is named."
    refused = {("w4", "float16"), ("base", "float16")}
    why = ("the server: the float reference, served in the same way, is not right either: "
           f"{CANNOT}the reference/float16); the export is not at fault ({CANNOT}the export/float16)); ")
    found, _ = verify(folder, monkeypatch, (), refused=refused)
    assert found["dtype"] == "bfloat16" and found["mean_kl"] <= found["bound"]
    assert found["served_again"] == f"{why}it is right in bfloat16, so verify in that"
    found, _ = verify(folder, monkeypatch, {("base", "bfloat16")}, refused=refused)
    assert found["dtype"] == "float32"                      # in bfloat16 the reference loads, and is wrong
    text, _ = verify(folder, monkeypatch, (), refused=refused, dtype="float16")
    assert text == f"{why}it is right in bfloat16, so verify in that"
    text, _ = verify(folder, monkeypatch, (), refused=refused | {("w4", "bfloat16")})
    assert text == f"the export: {CANNOT}the export/bfloat16); the float reference, served in the same way, is right"
    everywhere = {(name, dtype) for name in ("w4", "base") for dtype in ("float16", "bfloat16", "float32")}
    text, _ = verify(folder, monkeypatch, (), refused=everywhere)
    assert text == f"{why}no dtype is right here, so verify elsewhere"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU does by default")
def test_a_default_that_cannot_be_served(folder, monkeypatch):
    "One line in the report, without the name of a folder that will have another."
    found, _ = verify(folder, monkeypatch, (), default=Answer(error=f"OSError: {folder/'w4'}/x"))
    assert found["server_default"] == "not measured: vLLM cannot serve it (OSError: the export/x)"
    product = {"model.layers.0.mlp.down_proj": W4A8_PRODUCT}
    answers = [Answer(), Answer(dtype="bfloat16", kernels=product), Answer(error="OSError: x")]
    ids, logits = [[1, 2, 3]], torch.log(torch.arange(1., 5).repeat(2, 1))
    monkeypatch.setattr(served_check, "forced_logits", lambda *_: [logits])
    said = logits.log_softmax(-1).sort(descending=True)
    answers[1] = replace(answers[1], ids=[said.indices.numpy()], logprobs=[said.values.numpy()])
    found = served_check.server_default(folder/"w4", ids, answers)["server_default"]
    assert abs(found["mean_kl"]) < 1e-6
    assert found["mean_kl_with_float_activations"] == "not measured: vLLM cannot serve it (OSError: x)"


def test_a_default_that_serves_another_model_is_warned_of(caplog):
    "Once, with the figures and what to set; nothing where the default is within the bound or was not measured."
    figures = {"mean_kl": 4e-5, "bound": 1e-4}
    for default in None, "not measured: x", {"mean_kl": 9e-5}, {"mean_kl": "not measured: x"}:
        served_check.warn_of_default(default, figures)
    assert not caplog.records
    served_check.warn_of_default({"mean_kl": .082}, figures)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "0.082 instead of the verified 4e-05" in record.getMessage()
    assert "VLLM_CPU_INT4_W4A8=0" in record.getMessage()


@pytest.mark.parametrize("amx", "01")
def test_a_child_that_begins_with_the_default_job(amx, tmp_path, monkeypatch):
    "As after a crash of the first job: what replaces vLLM's predicate is at work before that job asks it."
    seen = []
    def asks(*_): seen.append(torch.cpu._is_amx_tile_supported())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx == "0")
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(vllm_check, "default_is_w4a8", asks)
    monkeypatch.setenv("LLMQUANT_CPU_AMX", amx)
    jobs = [Job("x", [[1, 2]]), Job("x", [[1, 2]], only_w4a8=True)]
    (tmp_path/"jobs.json").write_text(json.dumps(list(map(asdict, jobs))))
    vllm_check.save_answer(Answer(error="died"), tmp_path, 0)
    vllm_check.child_main(tmp_path/"jobs.json")
    assert seen == [amx == "1"] and vllm_check.load_answer(tmp_path, 1).skipped


def test_a_child_that_dies_says_in_which_dtype(tmp_path, monkeypatch, started_children):
    "The one that the kernels asked for, for the float reference is to be served in the same."
    def dies(*_): raise SystemExit(132)
    def child(command, **_):
        with pytest.raises(SystemExit): vllm_check.child_main(command[-1])
        return subprocess.CompletedProcess(command, 132, "", "Illegal instruction")
    monkeypatch.setattr(vllm_check, "prepare_process", lambda: None)
    monkeypatch.setattr(vllm_check, "accepted_dtype", lambda *_: "bfloat16")
    monkeypatch.setattr(vllm_check, "load_engine", dies)
    monkeypatch.setattr(vllm_check, "vllm_installed", lambda: True)
    monkeypatch.setattr(vllm_check.subprocess, "run", child)
    jobs = [Job("x", [[1, 2]], "float32", flexible=True), Job("x", [[1, 2]], "float16")]
    answers = vllm_check.ask_vllm_many(jobs)
    assert [said.dtype for said in answers] == ["bfloat16", "float16"]
    assert {said.error for said in answers} == {"vLLM's process ended with status 132: Illegal instruction"}


@pytest.mark.parametrize("template, first", [("<s> $A", 1), ("<s> $A </s>", 1), ("$A </s>", None), ("$A", None)])
def test_forced_prompts_begin_as_the_models_do(template, first, tmp_path):
    "BOS in front, once, where the tokenizer puts it there and not where it doesn't; the rest is a piece of the text."
    tiny_tokenizer.save(tmp_path)
    file = str(tmp_path/"tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save(file)
    text = demo_text()[1]
    prompts = served_model.teacher_tokens(tmp_path, {"vocab_size": 512})
    assert [len(prompt) for prompt in prompts] == [49] * 4
    for prompt in prompts:
        assert (prompt[0] == 1) == (first == 1) == (tokenizer.encode("any text").ids[0] == 1)
        rest = prompt[1:] if first else prompt
        assert not {1, 2} & set(rest) and tokenizer.decode(rest) in text


def test_the_bound_in_bfloat16_is_the_references_own_noise(folder, monkeypatch):
    found, _ = verify(folder, monkeypatch, (), dtype="bfloat16")
    assert found["bound"] == pytest.approx(max(1e-4, 3 * found["own_bfloat16_noise"]), rel=1e-2)
    assert 1e-5 < found["own_bfloat16_noise"] < 2e-3


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU does by default")
def test_what_a_server_does_by_default(folder):
    "4-bit weights of a model in bfloat16: 8-bit activations with AMX, and both divergences; nothing to say without."
    found = verification.verify(folder/"w4", folder/"base")["vllm"]
    assert found["dtype"] == "float16" and found["mean_kl"] < 1e-5
    assert not any(W4A8_PRODUCT in kernel for kernel in found["kernels"])
    assert ("server_default" in found) == AMX
    if not AMX: return
    default = found["server_default"]
    assert default["dtype"] == "bfloat16" and "VLLM_CPU_INT4_W4A8" in default["activations"]
    assert default["mean_kl"] > 3 * default["mean_kl_with_float_activations"] > 0


GEMMA_3N = {**tiny.COMMON, "num_hidden_layers": 2, "head_dim": 32, "sliding_window": 64, "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 512, "laurel_rank": 16, "altup_num_inputs": 4, "pad_token_id": 0}


def gemma_3n(path, tie):
    "A text-only Gemma 3n."
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3n_text", **GEMMA_3N, tie_word_embeddings=tie)
    model = AutoModelForCausalLM.from_config(config)
    tiny.perturb_(model, 0)
    model.to(torch.float16).save_pretrained(path)
    return path


@pytest.mark.parametrize("tie, note", [(True, PER_LAYER_NOTE), (False, NO_HEAD_NOTE)])
def test_check_and_the_report_say_what_vllm_makes_of_a_text_only_gemma_3n(tie, note, tmp_path, capsys):
    options = ["--model-path", str(gemma_3n(tmp_path/"base", tie)), "--bits", "4", "--group-size", "32"]
    assert main(["check", *options]) == 0 and note in capsys.readouterr().out
    assert main([*options, "--output-path", str(tmp_path/"w4")]) == 0 and note in capsys.readouterr().out
    assert note in yaml.safe_load((tmp_path/"w4"/"quantization_report.yaml").read_text())["serving"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_what_vllm_makes_of_a_text_only_gemma_3n(tmp_path, monkeypatch):
    """The notes hold for the vLLM that is here: the export is right beside transformers without the embeddings per
    layer, and far from the model; without a tied head it is not loaded. The plugin is there, and no method is named."""
    exports = {tie: tmp_path/f"w4 {tie}" for tie in (True, False)}
    for tie, out in exports.items(): quantize(gemma_3n(tmp_path/f"base {tie}", tie), out, bits=4, group_size=32)
    prompts = torch.randint(3, 512, (4, 49), generator=torch.Generator().manual_seed(0)).tolist()   # no padding
    tied, untied = vllm_check.ask_vllm_many([Job(str(out), prompts, "float16") for out in exports.values()])
    assert not tied.error and "named 'lm_head' in Gemma3nForCausalLM" in untied.error
    def mean_kl():
        model = load(exports[True], torch.float32)
        return served_model.divergences(forced_logits(model, prompts), tied)[0].mean()
    assert mean_kl() > 1e-2
    project = Gemma3nTextModel.project_per_layer_inputs
    def without(self, embeds, per_layer=None): return project(self, embeds)
    monkeypatch.setattr(Gemma3nTextModel, "project_per_layer_inputs", without)
    assert mean_kl() < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="its classes that see can be imported")
def test_a_class_that_vllm_cannot_import(tmp_path):
    "The module that is missing is named, not only that something is."
    config = AutoConfig.for_model("qwen3_5").to_dict() | {"architectures": ["Qwen3_5ForConditionalGeneration"]}
    (tmp_path/"config.json").write_text(json.dumps(config))
    said, = vllm_check.ask_vllm_many([Job(str(tmp_path), [[1, 2]], "bfloat16")], stock=True)
    assert said.error == ("its Qwen3_5ForConditionalGeneration cannot be imported, ModuleNotFoundError: "
                          "No module named 'torchvision'")


def test_check_and_the_report_say_what_this_machine_serves_otherwise(folder, tmp_path, monkeypatch, capsys):
    "The sentences come from the predicate, which is replaced here either way."
    tokens = ["--set", "calibration.num_samples=2", "--set", "calibration.max_length=16"]
    tiny_tokenizer.save(folder/"base")
    text = tmp_path/"text.txt"
    text.write_text("one two three four five six seven. " * 40)
    rows = {"W4": ["--bits", "4", "--group-size", "32"],
            "static": ["--set", "quantization.activations.dynamic=false", "--calibration-dataset", str(text), *tokens]}
    said = {}
    for amx in "01":
        monkeypatch.setenv("LLMQUANT_CPU_AMX", amx)
        for name, options in rows.items():
            out = tmp_path/f"{name}{amx}"
            assert main(["check", "--model-path", str(folder/"base"), *options]) == 0
            checked = capsys.readouterr().out
            assert main(["--model-path", str(folder/"base"), "--output-path", str(out), *options]) == 0
            printed = capsys.readouterr().out
            notes = yaml.safe_load((out/"quantization_report.yaml").read_text()).get("serving", [])
            said[name, amx] = notes
            assert all(note in checked and note in printed for note in notes)
            assert ("note" in checked) == ("note  " in printed) == bool(notes)
    expected = [] if torch.cuda.is_available() else None
    assert said["W4", "0"] == said["static", "0"] == []
    assert said["W4", "1"] == (expected if expected is not None else [W4A8_NOTE])
    assert said["static", "1"] == (expected if expected is not None else [STATIC_NOTE])


TILES = """
import ctypes, importlib, sys
def allowed():   # bit 18 of what the system lets this process use: the tiles' data, by arch_prctl(ARCH_GET_XCOMP_PERM)
    mask = ctypes.c_uint64()
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) == 0
    return mask.value >> 18 & 1
module, name = sys.argv[1:]
function = getattr(importlib.import_module(module), name)
before = allowed()
function()
print("ANSWER", before, allowed())
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
@pytest.mark.parametrize("module, name", [("llmquant.evaluation.kernels", "prepare_process"),
                                          ("llmquant.serving.plugin", "register")])
def test_the_system_is_asked_for_tiles(module, name):
    "Nobody else does it before vLLM's 4-bit kernel uses them."
    if name == "register": pytest.importorskip("vllm")
    done = subprocess.run([sys.executable, "-c", TILES, module, name], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "ANSWER 0 1"
