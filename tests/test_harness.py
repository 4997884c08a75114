"The lm-eval stage on tiny models: hf in this process, vLLM in its own."
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch

from llmquant.cli.main import main
from llmquant.core.errors import LLMQuantError, UsageError
from llmquant.evaluation.vllm_check import vllm_installed
from llmquant.harness.evaluate import evaluate, read_results
from llmquant.pipeline.run import quantize

pytest.importorskip("lm_eval")
vllm = pytest.mark.skipif(not vllm_installed(), reason="needs vLLM")
SUMS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_target: label
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
WORDS = """task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: start
doc_to_target: "{{' ' + last}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""


PAGES = """task: pages
dataset_path: json
dataset_kwargs: {data_files: {test: pages.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
"""
ECHO = """task: echo
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
doc_to_text: start
doc_to_target: last
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def lines(rows): return "".join(json.dumps(row) + "\n" for row in rows)


def write_tasks(folder):
    "Two tasks of choices, one of continuations, one of pages, one of generation."
    for name, step in ("sums", 1), ("more_sums", 2):
        rows = [{"question": f"{a} + {step} =", "choices": [str(a), str(a + step)], "label": a % 2} for a in range(12)]
        (folder/f"{name}.yaml").write_text(SUMS.format(name=name))
        (folder/f"{name}.jsonl").write_text(lines(rows))
    (folder/"words.yaml").write_text(WORDS)
    rows = [{"start": f"number {a} comes before", "last": str(a + 1)} for a in range(12)]
    (folder/"words.jsonl").write_text(lines(rows))
    (folder/"pages.yaml").write_text(PAGES)
    rows = [{"text": f"Page {a} has a few words more than fit into a window."} for a in range(3)]
    (folder/"pages.jsonl").write_text(lines(rows))
    (folder/"echo.yaml").write_text(ECHO)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A tiny base with a tokenizer, its 4-bit export, and a folder of tasks."
    folder = tmp_path_factory.mktemp("harness")
    base = tiny.make("llama", folder/"base", torch.bfloat16)
    tiny_tokenizer.save(base)
    quantize(base, folder/"export", method="minmax", bits=4, group_size=32, quiet=True)
    (folder/"tasks").mkdir()
    return base, folder/"export", write_tasks(folder/"tasks")


@pytest.fixture
def export(models, tmp_path): return shutil.copytree(models[1], tmp_path/"export")


def ask(export, models, tasks="sums", **options):
    "An evaluation by hf."
    return evaluate(export, models[0], tasks, models[2], **{"backend": "hf", **options})


def samples(folder): return {path.name: path.stat().st_mtime_ns for path in (folder/"evaluation"/"samples").iterdir()}


def loglikelihood(path, context, continuation):
    "By a plain loop over transformers, independent of lm-eval."
    from transformers import AutoTokenizer

    from llmquant import load
    tokenizer, model = AutoTokenizer.from_pretrained(path), load(path, dtype=torch.float32)
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + continuation)["input_ids"]
    with torch.no_grad(): table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(table[at - 1, ids[at]].item() for at in range(start, len(ids)))


def test_scores_are_those_of_a_plain_loop(models, export):
    results = ask(export, models, "sums,words")
    for role, path in ("base", models[0]), ("export", export):
        file, = (export/"evaluation"/"samples").glob(f"{role}-sums-*.jsonl")
        items = [json.loads(line) for line in file.read_text().splitlines()]
        assert [item["doc_id"] for item in items] == list(range(12))
        own = [[loglikelihood(path, *pair) for pair in item["arguments"]] for item in items]
        assert [[r[0] for r in item["responses"]] for item in items] == [pytest.approx(pair, abs=1e-3) for pair in own]
        right = [pair[item["target"]] == max(pair) for pair, item in zip(own, items, strict=True)]
        assert results["tasks"]["sums"]["metrics"]["acc"][role] == pytest.approx(sum(right) / 12)
    assert results["tasks"]["sums"]["chance"] == 0.5 and results["tasks"]["sums"]["n"] == 12
    words = results["tasks"]["words"]["metrics"]["perplexity"]
    assert words["difference_of"] == "mean log-likelihood" and words["higher_is_better"] is False
    assert results["models"]["export"]["bits"] == 4 and results["settings"]["dtype"] == "float32"
    assert read_results(export) == results


def test_a_second_call_reuses_and_another_fingerprint_does_not_mix(models, export):
    first = ask(export, models)
    before = samples(export)
    assert ask(export, models) == first and samples(export) == before
    more = ask(export, models, "sums,words")  # a task more leaves the answers to the others valid
    assert more["fingerprint"] != first["fingerprint"] and before.items() < samples(export).items()
    fewer = ask(export, models, limit=6)
    assert fewer["tasks"]["sums"]["n"] == 6 and before.items() < samples(export).items()
    assert ask(export, models, limit=6, reuse=False)["tasks"] != {} and before.items() < samples(export).items()


def test_an_export_that_changed_is_asked_again(models, export):
    from safetensors.torch import load_file, save_file
    first = ask(export, models)
    file, = export.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors: # every scale doubled, which no report tells
        if name.endswith("weight_scale"): tensors[name] = tensors[name] * 2
    save_file(tensors, file)
    second = ask(export, models)
    assert second["models"]["export"]["digest"] != first["models"]["export"]["digest"]
    assert second["models"]["base"] == first["models"]["base"]
    answers = [{json.loads(line)["doc_id"]: json.loads(line)["responses"] for line in path.read_text().splitlines()}
               for path in (export/"evaluation"/"samples").glob("export-sums-*.jsonl")]
    assert len(answers) == 2 and answers[0] != answers[1]


def test_task_files_that_change_are_asked_again(models, export, tmp_path):
    folder = shutil.copytree(models[2], tmp_path/"tasks")
    one = evaluate(export, models[0], "sums", folder, backend="hf")
    rows = [json.loads(line) for line in (folder/"sums.jsonl").read_text().splitlines()]
    (folder/"sums.jsonl").write_text(lines(row | {"label": 1 - row["label"]} for row in rows))
    two = evaluate(export, models[0], "sums", folder, backend="hf")
    accuracy = [found["tasks"]["sums"]["metrics"]["acc"]["base"] for found in (one, two)]
    assert one["fingerprint"] != two["fingerprint"] and accuracy[0] == pytest.approx(1 - accuracy[1])


def test_a_gate_decides_the_exit_status(models, export, capsys):
    command = ["evaluate", str(export), "--base", str(models[0]), "--tasks", "sums", "--task-folder", str(models[2]),
               "--backend", "hf"]
    assert main([*command, "--gate", "acc>=-1"]) == 0
    shown = capsys.readouterr()
    assert "sums  acc" in shown.out and "acc>=-1 passed on sums" in shown.out
    assert main([*command, "--gate", "acc>=-0.001"]) == 1
    shown = capsys.readouterr()
    assert "sums  acc" in shown.out and "12 items are too few to tell" in shown.err
    assert [verdict["passed"] for verdict in read_results(export)["gates"]] == [False]
    assert main([*command, "--quiet"]) == 0 and capsys.readouterr().out == ""


def test_what_an_evaluation_adds_is_no_part_of_the_export(models, export):
    from llmquant.evaluation.verification import check_files
    before = check_files(export, models[0])
    ask(export, models)
    assert check_files(export, models[0]) == before and "added_later" not in before
    quantize(models[0], export, method="minmax", bits=8, group_size=32, overwrite=True, quiet=True)
    assert read_results(export) is None


def test_the_bases_folder_is_never_written_to(models, export):
    before = sorted(models[0].rglob("*"))
    with pytest.raises(UsageError, match="lies in the base model's folder"):
        ask(export, models, output=models[0]/"results")
    ask(export, models)
    assert sorted(models[0].rglob("*")) == before


def test_the_base_comes_from_the_report_where_it_still_is(models, export):
    assert evaluate(export, None, "sums", models[2], backend="hf", limit=4)["models"]["base"]["path"] == str(models[0])
    report = export/"quantization_report.yaml"
    report.write_text(report.read_text().replace(str(models[0]), "/gone/base"))
    with pytest.raises(UsageError, match="was made from /gone/base, which is no folder here; give the base model"):
        evaluate(export, None, "sums", models[2], backend="hf")


def test_two_at_once_do_not_write_to_one_place(models, export):
    from llmquant.harness.evaluate import sole_writer
    with sole_writer(export/"evaluation"):
        with pytest.raises(UsageError, match="another evaluation writes there now"): ask(export, models)


def test_an_answer_that_is_no_number_is_an_error(models, export):
    from safetensors.torch import load_file, save_file
    file, = export.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, file)
    with pytest.raises(LLMQuantError, match="24 of 24 log-likelihoods of the export are no finite numbers"):
        ask(export, models)
    assert read_results(export) is None


def test_perplexity_and_kl_divergence_on_a_text(models, export, tmp_path, capsys):
    (tmp_path/"text.txt").write_text("A tiny model reads a text that it has never seen, again and again. " * 20)
    command = ["evaluate", str(export), "--base", str(models[0]), "--tasks", "sums", "--task-folder", str(models[2]),
               "--backend", "hf", "--text", str(tmp_path/"text.txt"), "--context", "64", "--stride", "32",
               "--windows", "6"]
    assert main([*command, "--gate", "perplexity_ratio<=100", "--gate", "kl<=0.0001"]) == 1
    shown, results = capsys.readouterr(), read_results(export)
    text = results["text"]
    assert (text["name"], text["context"], text["stride"], text["windows"]) == ("text.txt", 64, 32, 6)
    assert text["kl"]["mean"] > 0 and [verdict["passed"] for verdict in results["gates"]] == [True, False]
    assert "text.txt, " in shown.out and "gate kl<=0.0001 failed" in shown.err
    before = samples(export)
    assert main(command) == 0 and samples(export) == before and read_results(export)["text"] == text


def test_pages_and_generations(models, export):
    "A log-likelihood of whole pages, by a plain loop over one window; and texts that are generated."
    results = ask(export, models, "pages,echo")
    from transformers import AutoTokenizer

    from llmquant import load
    tokenizer, model = AutoTokenizer.from_pretrained(models[0]), load(models[0], dtype=torch.float32)
    pages = [json.loads(line)["text"] for line in (models[2]/"pages.jsonl").read_text().splitlines()]
    total = 0.0
    for page in pages:
        ids = [tokenizer.bos_token_id, *tokenizer(page)["input_ids"]]
        with torch.no_grad(): table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total += sum(table[at - 1, ids[at]].item() for at in range(1, len(ids)))
    found = results["tasks"]["pages"]["metrics"]
    size = sum(len(page.encode()) for page in pages)
    assert found["bits_per_byte"]["base"] == pytest.approx(-total / size / math.log(2), abs=1e-3)
    assert found["bits_per_byte"]["difference_of"] == "mean log-likelihood" and "flips" not in results["tasks"]["pages"]
    assert results["tasks"]["echo"]["metrics"]["exact_match"]["base"] == 0
    file, = (export/"evaluation"/"samples").glob("export-echo-*.jsonl")
    answers = [json.loads(line)["responses"] for line in file.read_text().splitlines()]
    assert len(answers) == 12 and all(isinstance(text, str) for texts in answers for text in texts)


def test_the_offline_tasks_are_the_default(models, export):
    results = evaluate(export, models[0], backend="hf", limit=2)
    assert set(results["tasks"]) == {"llmquant_agreement", "llmquant_knowledge"}
    assert results["requests"]["notes"][0].startswith("requests start without BOS <s> (id 1)")


def test_bos_and_template_are_applied_once_and_named(models, tmp_path):
    "A tokenizer that adds BOS, and a template that writes it."
    from tokenizers import processors
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    adding = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = adding
    tokenizer.chat_template = "<s>{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    base, export = (shutil.copytree(path, tmp_path/path.name) for path in models[:2])
    for folder in base, export: tokenizer.save_pretrained(folder)
    found = {template: evaluate(export, base, "sums", models[2], backend="hf", apply_chat_template=template)
             for template in (False, True)}
    for template, results in found.items():
        first, notes = results["requests"]["hf"]["first_tokens"], results["requests"]["notes"]
        assert first[:3] == (["<s>", "[", "0"] if template else ["<s>", "0", "\u0120"])
        assert notes[0] == "requests start with BOS <s> (id 1) once, which the tokenizer adds by itself"
        assert any("chat template, which was not applied" in note for note in notes) is not template


def test_prompts_that_are_cut_are_named(models, export):
    results = ask(export, models, "words", max_length=16)
    assert any("words: 12 requests are longer than the engine takes and were cut" in note
               for note in results["requests"]["notes"])


def test_a_tokenizer_that_is_not_the_bases_is_named(models, export):
    file = export/"tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["0"], vocabulary["9"] = vocabulary["9"], vocabulary["0"]
    file.write_text(json.dumps(values))
    notes = ask(export, models)["requests"]["notes"]
    assert "the export's tokenizer is not the base's: the token ids of sums differ" in notes


def test_answers_of_the_base_serve_several_exports(models, export, tmp_path):
    ask(export, models, samples=tmp_path/"samples")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path/"samples").glob("base-*")}
    other = tmp_path/"w8"
    quantize(models[0], other, method="minmax", bits=8, group_size=32, quiet=True)
    ask(other, models, samples=tmp_path/"samples")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path/"samples").glob("base-*")} == before
    assert len(list((tmp_path/"samples").glob("export-*.jsonl"))) == 2


def test_compare_shows_exports_side_by_side(models, export, tmp_path, capsys):
    other = tmp_path/"w8"
    quantize(models[0], other, method="minmax", bits=8, group_size=32, quiet=True)
    ask(export, models)
    assert main(["compare", str(export), str(other)]) == 2
    assert "has no evaluation/results.json; run llmquant evaluate" in capsys.readouterr().err
    ask(other, models, limit=6)
    assert main(["compare", str(export), str(other)]) == 2 and "were not measured alike" in capsys.readouterr().err
    ask(other, models)
    assert main(["compare", str(export), str(other), "--plot", str(tmp_path/"plot.svg")]) == 0
    shown = capsys.readouterr().out
    assert "sums acc" in shown and "w8" in shown and (tmp_path/"plot.svg").read_text().startswith("<?xml")
    assert main(["compare", str(export), str(other), "--files"]) == 0
    assert "layers: " in capsys.readouterr().out
    assert main(["compare", str(export), str(export), "--files"]) == 0 and "no difference" in capsys.readouterr().out


BAD = {
    "--tasks summs": "task 'summs' is unknown; did you mean 'sums'?",
    "--tasks ,": "--tasks is empty",
    "--tasks sums --limit 1.0": "lm-eval reads 1.0 as one document",
    "--tasks sums --limit 0": "must be a whole number of documents",
    "--tasks sums --num-fewshot many": "--num-fewshot many: must be a whole number",
    "--tasks sums --backend vlm": "--backend 'vlm' is unknown",
    "--tasks sums --dtype int8": "--dtype 'int8' is unknown",
    "--tasks sums --gate acc": "gate 'acc' does not parse",
    "--tasks sums --gate acc_nrm>=-0.1": "metric acc_nrm",
    "--tasks sums --gate kl<=0.1": "give one with --text FILE",
    "--tasks words --gate perplexity>=-0.1": "better when lower",
    "--tasks sums --max-length 100000": "to the model's 512 positions",
    "--tasks sums --base /no/such/model": "--base /no/such/model: is no folder",
    "--tasks sums --task-folder /no/such/folder": "is no folder",
    "--tasks sums --output EXPORT/config.json": "is a file",
    "--tasks sums --text no.txt": "no.txt",
    "--tasks sums --text demo --stride 0": "--stride 0: must be a whole number",
    "--tasks sums --lmit 3": "did you mean '--limit'?",
}


@pytest.mark.parametrize("given", BAD)
def test_bad_input_is_one_line(given, models, export, capsys):
    words = given.replace("EXPORT", str(export)).split()
    own = {"--base": str(models[0]), "--task-folder": str(models[2]), "--backend": "hf"}
    words += [word for flag, value in own.items() if flag not in words for word in (flag, value)]
    assert main(["evaluate", str(export), *words]) == 2
    said = capsys.readouterr()
    assert BAD[given] in said.err and said.err.count("\n") == 1 and said.out == ""
    assert not (export/"evaluation").exists()


def test_bad_task_files_are_one_line(models, export, tmp_path):
    folder = shutil.copytree(models[2], tmp_path/"tasks")
    rows = (folder/"sums.jsonl").read_text()

    def said(match):
        with pytest.raises(UsageError, match=match): evaluate(export, models[0], "sums", folder, backend="hf")

    (folder/"sums.jsonl").write_text(rows.replace('"question"', '"query"'))
    said("line 1: has no column 'question', which task sums reads; there are query, choices, label")
    (folder/"sums.jsonl").write_text(rows + "{\n")
    said("line 13: is no JSON")
    (folder/"sums.jsonl").unlink()
    said("its data file sums.jsonl is neither beside")
    (folder/"sums.yaml").write_text("task: [\n")
    said("sums.yaml, line 2: is no YAML")


def test_a_task_that_cannot_be_scored_is_one_line(models, export, tmp_path):
    "Choices that are missing show before a model is loaded, a metric that fails while the task runs."
    folder = shutil.copytree(models[2], tmp_path/"tasks")
    rows = [json.loads(line) for line in (folder/"sums.jsonl").read_text().splitlines()]
    (folder/"sums.jsonl").write_text(lines([*rows[:5], rows[5] | {"choices": []}, *rows[6:]]))
    with pytest.raises(UsageError, match="task sums: document 5 has no choices; mend its file"):
        evaluate(export, models[0], "sums", folder, backend="hf")
    own = (folder/"more_sums.yaml").read_text() + "process_results: !function own.fails\n"
    (folder/"more_sums.yaml").write_text(own)
    (folder/"own.py").write_text("def fails(doc, results): return {'acc': results[7]}\n")
    with pytest.raises(UsageError, match="task more_sums: lm-eval cannot score it .IndexError: list index"):
        evaluate(export, models[0], "more_sums", folder, backend="hf")
    assert read_results(export) is None


def test_a_base_of_another_architecture(models, export, tmp_path):
    other = tiny.make("llama", tmp_path/"other", torch.bfloat16, layers=1)
    tiny_tokenizer.save(other)
    with pytest.raises(UsageError, match="another model than the export was made from: its num_hidden_layers is 1"):
        evaluate(export, other, "sums", models[2], backend="hf")


def test_without_lm_eval_or_vllm_the_message_says_how_to_install(models, export, monkeypatch):
    from llmquant.evaluation import vllm_check
    from llmquant.harness import tasks
    monkeypatch.setattr(vllm_check, "vllm_installed", lambda: False)
    with pytest.raises(UsageError, match=r"vLLM is not installed here; pip install 'llmquant\[vllm\]'"):
        ask(export, models, backend="vllm")
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"lm-eval is not installed here; pip install 'llmquant\[eval\]'"):
        ask(export, models)


def test_the_command_answers_without_lm_eval_or_torch():
    probe = ("import sys; from llmquant.cli.main import main; main(['evaluate', 'x', '--gaet', 'a']);"
             "print({'torch', 'lm_eval', 'datasets', 'vllm'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "set()\n"


@vllm
def test_a_child_that_dies_is_one_error(models, export, monkeypatch):
    from llmquant.harness import backends
    started = subprocess.Popen
    dying = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(backends.subprocess, "Popen", lambda command, **options: started(dying, **options))
    with pytest.raises(LLMQuantError, match="vLLM's process for the base ended with status -9: it wrote nothing"):
        ask(export, models, backend="vllm", check_agreement=0)
    assert read_results(export) is None and not list((export/"evaluation").rglob("*.json*"))


@vllm
def test_vllm_answers_as_the_dequantized_model_does(models, export, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1") # with which vLLM's own bar divides by zero
    results = ask(export, models, "sums,words,pages", backend="vllm", dtype="float16", check_agreement=8, max_length=20)
    assert results["settings"]["dtype"] == "float16" and results["settings"]["versions"]["vllm"]
    for role in "base", "export":
        found = results["agreement"][role]
        assert found["items"] == 19 and found["equal_answers"] == 1 and found["largest_difference"] < 0.1
    assert results["requests"]["hf"] == results["requests"]["vllm"]
    assert results["requests"]["vllm"]["first_tokens"][0] == "0"


@vllm
def test_a_kill_leaves_whole_tasks_and_the_next_run_resumes(models, export):
    "The parent dies while the child answers: the child ends too, and what is finished is not asked again."
    command = [sys.executable, "-m", "llmquant", "evaluate", str(export), "--base", str(models[0]), "--task-folder",
               str(models[2]), "--tasks", "sums,more_sums,words", "--check-agreement", "0"]
    folder = export/"evaluation"/"samples"
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not list(folder.glob("base-sums-*.jsonl")):
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    child, = (int(number) for number in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while Path(f"/proc/{child}").exists() and "\nState:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    left = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    assert read_results(export) is None and not any(name.startswith("export-") for name in left)
    assert subprocess.run(command, capture_output=True).returncode == 0
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    assert left.items() < now.items() and len(now) == 6 and not list(folder.glob(".*.part"))
    assert set(read_results(export)["tasks"]) == {"sums", "more_sums", "words"}
