"""The part of the verification that needs no vLLM: what stands beside the weights, wrong references, damaged files."""
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
import yaml
from safetensors.torch import load_file, save_file

from llmquant.cli.main import main
from llmquant.core.errors import UsageError, VerificationError
from llmquant.evaluation import verification, served_check
from llmquant.evaluation.vllm_check import Answer
from llmquant.export.loading import load
from llmquant.formats.unpackers import read_safetensors
from llmquant.pipeline.info import info
from llmquant.pipeline.run import quantize

SYMMETRIC = {"quantization": {"minmax": {"symmetric": True}}}
EXPORTS = {"compressed_tensors": dict(bits=4, group_size=32), "awq": dict(bits=4, group_size=32, format="awq"),
           "gptq": dict(bits=4, group_size=32, format="gptq", config=SYMMETRIC),
           "channel": dict(bits=8, group_size=0), "plain": dict(bits=16)}
REPORT = "quantization_report.yaml"
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A base model and its exports."
    folder = tmp_path_factory.mktemp("verification")
    base = tiny.make("llama", folder/"base")
    for name, options in EXPORTS.items(): quantize(base, folder/name, **options)
    return folder


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    monkeypatch.setattr(verification, "vllm_installed", lambda: False)


def edited(export, target, name="config.json", edit=lambda values: None, text=None):
    "A copy of an export with one of its JSON or YAML files edited."
    shutil.copytree(export, target)
    file = target/name
    values = yaml.safe_load(file.read_text()) if name.endswith("yaml") else json.loads(file.read_text())
    edit(values)
    dump = yaml.safe_dump if name.endswith("yaml") else json.dumps
    file.write_text(dump(values) if text is None else text)
    return target


def message(error, export, reference=None):
    "The one sentence that `verify` raises."
    with pytest.raises(error) as caught: verification.verify(export, reference)
    text = str(caught.value)
    assert type(caught.value) is error and "\n" not in text
    return text


def inner(config, key):
    "A key of a quantization_config, wherever the method has it."
    found = config["quantization_config"]
    return found if key in found else found["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize("name", EXPORTS)
def test_good_exports_pass(name, folder):
    found = verification.verify(folder/name, folder/"base")
    assert found["files"]["layers"] == (0 if name == "plain" else 14)
    assert found["files"]["float_tensors"] == (21 if name == "plain" else 7)


@pytest.mark.parametrize("key,value", [("rms_norm_eps", 0.5), ("num_hidden_layers", 1), ("tie_word_embeddings", True),
                                       ("vocab_size", 511), ("head_dim", None), ("eos_token_id", 7), ("extra", 1)])
@pytest.mark.parametrize("name", ["compressed_tensors", "plain"])
def test_config_of_another_model(name, key, value, folder, tmp_path):
    theirs = json.loads((folder/"base"/"config.json").read_text())
    export = edited(folder/name, tmp_path/"e", edit=lambda config: config.update({key: value}))
    was = json.dumps(theirs[key]) if key in theirs else "absent"
    expected = (f"config.json: {key} is {json.dumps(value)} in the export and {was} in the reference; give the checkpoint "
                "that the export was made from")
    assert message(VerificationError, export, folder/"base") == expected


def test_config_lacks_a_key_or_differs_below(folder, tmp_path):
    export = edited(folder/"awq", tmp_path/"a", edit=lambda config: config.pop("rope_parameters"))
    assert "rope_parameters is absent in the export" in message(VerificationError, export, folder/"base")
    export = edited(folder/"awq", tmp_path/"b", edit=lambda config: config["rope_parameters"].update(rope_theta=5.0))
    assert "rope_parameters.rope_theta is 5.0 in" in message(VerificationError, export, folder/"base")


def test_config_keys_that_may_differ(folder, tmp_path):
    "What transformers notes about itself; in an export of old, without digests of files, the dtype as well."
    notes = dict(_name_or_path="x", transformers_version="1")
    export = edited(folder/"awq", tmp_path/"a", edit=lambda config: config.update(notes))
    assert verification.verify(export, folder/"base")["files"]["layers"] == 14
    export = edited(folder/"awq", tmp_path/"b", edit=lambda config: config.update(dtype="bfloat16"))
    for reference in (None, folder/"base"): assert "config.json: changed" in message(VerificationError, export, reference)
    export = edited(export, tmp_path/"c", REPORT, lambda report: report["verification"].pop("side_files"))
    found = verification.verify(export, folder/"base")["files"]
    assert found["layers"] == 14 and "holds no digests" in found["side_files"]


@pytest.fixture(scope="module")
def with_files(folder):
    "An export with all kinds of files beside its weights."
    base = shutil.copytree(folder/"base", folder/"with_files_base")
    tiny_tokenizer.save(base)
    files = {"chat_template.jinja": "{{ messages }}", "templates/tool.jinja": "{{ tools }}", "README.md": "# A model",
             "\udce1.txt": "a name that is no UTF-8"}
    for name, text in files.items():
        (base/name).parent.mkdir(exist_ok=True)
        (base/name).write_text(text)
    quantize(base, folder/"with_files", bits=4, group_size=32)
    return folder/"with_files"


def test_the_report_has_a_digest_of_each_file(with_files):
    "Of all that readers load, but the weights; the command line shows how many."
    export = with_files
    files = {p.relative_to(export): p for p in export.rglob("*") if p.is_file() and "safetensors" not in p.name}
    known = yaml.safe_load((export/REPORT).read_bytes())["verification"]["side_files"]
    spelled = {str(name).replace("\udce1", "\\udce1"): path for name, path in files.items()}
    assert set(known) == {*spelled} - {REPORT, "README.md", "README.base.md", "report.html"} and len(known) >= 7
    for name in {*known} - {"config.json"}:
        assert known[name] == hashlib.sha256(spelled[name].read_bytes()).hexdigest()
    assert verification.verify(export)["files"]["side_files"] == len(known)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                  "vllm_config.json", "chat_template.jinja", "templates/tool.jinja", "\udce1.txt"])
def test_files_beside_the_weights_that_changed_or_went(name, with_files, tmp_path, capsys):
    "One byte more or a missing file is named, with and without a reference, and by the command line."
    export, shown = shutil.copytree(with_files, tmp_path/"e"), name.replace("\udce1", "\\udce1")
    base = with_files.parent/"with_files_base"
    with open(export/name, "ab") as file: file.write(b" ")
    for reference in (None, base):
        assert message(VerificationError, export, reference).startswith(f"{shown}: changed since the export was written")
    (export/name).unlink()
    assert message(VerificationError, export).startswith(f"{shown}: missing, and written with the export")
    assert main(["verify", str(export), "--reference", str(base)]) == 1
    assert f"{shown}: missing" in capsys.readouterr().err


def test_while_a_run_still_has_its_journal(with_files, tmp_path, monkeypatch):
    "A verification before the folder gets its name counts the same files, and no others."
    monkeypatch.setattr("llmquant.pipeline.run.require_vllm", lambda: None)
    monkeypatch.setattr(verification, "vllm_installed", lambda: True)
    monkeypatch.setattr(verification, "check_vllm", lambda export, *_: {"journal": (export/"journal").is_dir()})
    text = {"calibration.num_samples": 2, "calibration.max_length": 32}
    report = quantize(with_files.parent/"with_files_base", tmp_path/"out", method="gptq", bits=4, group_size=32,
                      verify=True, **text)
    assert report["verification"]["vllm"] == {"journal": True} and "added_later" not in report["verification"]["files"]
    assert report["verification"]["files"]["side_files"] == len(report["verification"]["side_files"]) >= 7


@pytest.mark.parametrize("change", [
    lambda c: c.update(max_position_embeddings=8), lambda c: c.pop("eos_token_id"), lambda c: c.update(more=1),
    lambda c: c["quantization_config"].update(more=1), lambda c: c["rope_parameters"].update(rope_theta=5.0)])
def test_values_of_config_json_that_changed(change, with_files, tmp_path):
    "Without a reference; another layout of the same values is the same."
    same = edited(with_files, tmp_path/"same")
    assert (same/"config.json").read_bytes() != (with_files/"config.json").read_bytes()
    assert verification.verify(same)["files"]["layers"] == 14
    assert message(VerificationError, edited(same, tmp_path/"e", edit=change)).startswith("config.json: changed since")


def test_exports_without_digests_of_files_and_files_added_later(with_files, tmp_path, capsys):
    "An older export passes and says what was not compared; what was added is named, a model card may be edited."
    old = edited(with_files, tmp_path/"old", REPORT, lambda report: report["verification"].pop("side_files"))
    (old/"tokenizer.json").write_text("{}")
    assert main(["verify", str(old), "--reference", str(with_files.parent/"with_files_base")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "side_files" in line]
    assert len(lines) == 1 and "not compared, the report of this older export holds no digests" in lines[0]
    more = shutil.copytree(with_files, tmp_path/"more")
    (more/"README.md").write_text("# Edited")
    assert "added_later" not in verification.verify(more)["files"]
    (more/"added.jinja").write_text("{{ 1 }}")
    assert verification.verify(more)["files"]["added_later"] == ["added.jinja"]


@pytest.mark.parametrize("name", ["compressed_tensors", "awq", "gptq"])
def test_quantization_config_against_tensors_and_report(name, folder, tmp_path):
    def group_size(config): inner(config, "group_size")["group_size"] = 64
    def scheme(config): config["quantization_config"]["llmquant_scheme"]["group_size"] = 64
    def method(config): config["quantization_config"]["llmquant_method"] = "other"
    def ignore(config):
        found = config["quantization_config"]
        if "dynamic" in found: found["dynamic"][f"-:^(?:{re.escape(LAYER)})$"] = {}
        else: found["ignore" if "ignore" in found else "modules_to_not_convert"].append(LAYER)
    for edit, expected in ((group_size, "config.json has group_size 64, and each of the 8 scales"),
                           (scheme, "quantization_config.llmquant_scheme is"),
                           (method, "quantization_config.llmquant_method is"),
                           (ignore, f"layer {LAYER}: is quantized, and config.json lists it as left in float")):
        export = edited(folder/name, tmp_path/edit.__name__, edit=edit)
        for reference in (None, folder/"base"): assert expected in message(VerificationError, export, reference)


def test_group_size_of_whole_rows(folder, tmp_path):
    def edit(config): inner(config, "group_size").update(group_size=32, strategy="group")
    assert "has group_size 32" in message(VerificationError, edited(folder/"channel", tmp_path/"e", edit=edit))


def test_layers_in_the_files_and_in_the_report(folder, tmp_path):
    def edit(report):
        for part in (report["layers"], report["verification"]["digests"]): del part[LAYER]
    export = edited(folder/"awq", tmp_path/"e", REPORT, edit)
    assert f"layer {LAYER}: is quantized in the files or in the report" in message(VerificationError, export)


def test_wrong_references(folder, tmp_path):
    def reference(name, edit):
        target = shutil.copytree(folder/"base", tmp_path/name)
        tensors = load_file(target/"model.safetensors")
        edit(tensors)
        save_file(tensors, target/"model.safetensors", metadata={"format": "pt"})
        return target
    weight, norm = f"{LAYER}.weight", "model.norm.weight"
    for i, name in enumerate((weight, norm)):
        gone = reference(f"gone{i}", lambda t, name=name: t.pop(name))
        assert f"tensor {name}: the reference has none" in message(VerificationError, folder/"awq", gone)
        other = reference(f"other{i}", lambda t, name=name: t.update({name: torch.zeros(3, 5)}))
        assert f"tensor {name}: is " in message(VerificationError, folder/"awq", other)
    more = reference("more", lambda t: t.update(more=torch.zeros(2)))
    assert "tensor more: is not in the export" in message(VerificationError, folder/"awq", more)
    wrong = tiny.make("qwen3", tmp_path/"qwen3")
    assert "config.json: " in message(VerificationError, folder/"awq", wrong)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "verification: 3", "verification: {digests: 3}", "\x00", "a: &a [*a]",
                                  "verification: {digests: {a: '0'}, within_one_step: true}\nlayers: {a: {shape: 3}}",
                                  "verification: {digests: {a: '0'}, within_one_step: true}\nlayers: {a: {shape: [2, 2]}}",
                                  "verification: {digests: {}}\nlayers: {}"])
def test_damaged_reports(text, folder, tmp_path):
    export = edited(folder/"awq", tmp_path/"e", REPORT, text=text)
    found = message(UsageError, export, folder/"base")
    assert found.startswith(f"{export/REPORT}: ") and "not an export of llmquant, or it is damaged" in found


def test_damaged_configs(folder, tmp_path):
    for i, edit in enumerate((lambda c: c.pop("quantization_config"),
                              lambda c: c["quantization_config"].pop("quant_method"),
                              lambda c: c["quantization_config"].pop("config_groups"),
                              lambda c: c["quantization_config"].update(config_groups={"group_0": None}),
                              lambda c: c["quantization_config"].pop("ignore"))):
        export = edited(folder/"compressed_tensors", tmp_path/str(i), edit=edit)
        found = message(UsageError, export, folder/"base")
        assert found.startswith(f"{export/'config.json'}: ") and "not an export of llmquant, or it is damaged" in found
    odd = edited(folder/"awq", tmp_path/"odd", edit=lambda c: c.update(quantization_config=[1]))
    assert "config.json: quantization_config is [1], must be a section or null" in message(UsageError, odd)
    for i, text in enumerate(("{", "[]")):
        assert "config.json: " in message(UsageError, edited(folder/"awq", tmp_path/f"t{i}", text=text), folder/"base")


def sharded(export, target, shard):
    "A copy of an export whose index says that everything lies in `shard`."
    shutil.copytree(export, target)
    file, = target.glob("*.safetensors")
    file.rename(target.parent/"away.safetensors")
    names = load_file(target.parent/"away.safetensors")
    (target/"model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    return target


@pytest.mark.parametrize("shard,expected", [
    ("../away.safetensors", "outside the checkpoint's folder; only names inside it are allowed"),
    ("/away.safetensors", "outside the checkpoint's folder"), (3, "outside the checkpoint's folder"),
    ("x" * 300 + ".safetensors", "no file can have a name of more than 255 bytes"),
    ("away.bin", "only .safetensors files are read")])
def test_an_index_that_leads_elsewhere(shard, expected, folder, tmp_path):
    "Refused by all that read an export, with the same words; the file that is named would pass."
    export = sharded(folder/"awq", tmp_path/"e", shard)
    said = message(UsageError, export, folder/"base")
    assert "model.safetensors.index.json: tensor " in said and expected in said
    for read in info, load, read_safetensors:
        with pytest.raises(UsageError) as caught: read(export)
        assert str(caught.value) == said
    shutil.copy(tmp_path/"away.safetensors", export/"in.safetensors")
    index = export/"model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(export/"in.safetensors"), "in.safetensors")}))
    assert verification.verify(export, folder/"base")["files"]["layers"] == 14


def test_headers_are_limited(folder, tmp_path):
    "A header longer than a safetensors file may have, one that names a tensor twice, tensors that share bytes."
    export = shutil.copytree(folder/"awq", tmp_path/"e")
    file, = export.glob("*.safetensors")
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8:8 + size]), whole[8 + size:]
    def write(text): file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with open(file, "wb") as sparse:
        sparse.write((200_000_000).to_bytes(8, "little"))
        sparse.truncate(300_000_000)
    assert "its length field is 200000000 bytes, 100000000 are allowed" in message(UsageError, export)
    with pytest.raises(UsageError, match="header of 200000000 bytes is longer than the 100000000"):
        read_safetensors(export)
    text = json.dumps(header).encode()
    write(text.replace(b"{", b'{"model.norm.weight": %s, ' % json.dumps(header["model.norm.weight"]).encode(), 1))
    assert "a name occurs twice" in message(UsageError, export)
    with pytest.raises(UsageError, match="holds no JSON object"): read_safetensors(export)
    write(json.dumps(header | {"more": header["model.norm.weight"]}).encode())
    assert "overlaps another" in message(UsageError, export)


@pytest.mark.parametrize("pattern", ["(a+)+$", "([a-z._]+)*!", ".*", "^model.*$", "^(?:lm_head)$|.*"])
def test_patterns_are_data(pattern, folder, tmp_path):
    "An expression that our exports do not write is refused, and never run: the first two would take years."
    def gptq(config): config["quantization_config"]["dynamic"][f"-:{pattern}"] = {}
    def ignore(config): config["quantization_config"]["ignore"].append(f"re:{pattern}")
    def targets(config):
        config["quantization_config"]["config_groups"]["group_0"]["targets"].append(f"re:{pattern}")
    packed = "compressed_tensors"
    for name, edit, expected in (("gptq", gptq, "dynamic has the key"), (packed, ignore, "must hold names"),
                                 (packed, targets, "targets must be a list of names")):
        found = message(UsageError, edited(folder/name, tmp_path/edit.__name__, edit=edit), folder/"base")
        assert expected in found and "this is not an export of llmquant, or it is damaged" in found


def test_paths_that_are_no_export(folder, tmp_path):
    assert message(UsageError, tmp_path/"nope") == f"{tmp_path/'nope'}: does not exist; give the folder of an export"
    assert "is a file" in message(UsageError, folder/"awq"/"config.json")
    assert "holds no quantization_report.yaml" in message(UsageError, folder/"base")
    assert "nope: does not exist" in message(UsageError, folder/"awq", tmp_path/"nope")


def test_messages_never_name_the_partial_folder(folder, tmp_path, monkeypatch):
    partial = shutil.copytree(folder/"awq", tmp_path/"out.partial-123")
    monkeypatch.setattr(verification, "vllm_installed", lambda: True)
    refusal = Answer(error=f"OSError: cannot read {partial}/x")
    monkeypatch.setattr(served_check, "ask_vllm_many", lambda jobs, stock: [refusal] * len(jobs))
    refused = "vLLM cannot serve it (OSError: cannot read the export/x)"
    assert message(VerificationError, partial) == f"the export: {refused}"
    found = message(VerificationError, partial, folder/"base")   # the float reference is refused in the same words
    assert found == ("the server: the float reference, served in the same way, is not right either: "
                     f"{refused}; the export is not at fault ({refused}); no dtype is right here, so verify elsewhere")
    (partial/"config.json").write_text("{")
    assert message(UsageError, partial).startswith(f"{tmp_path/'out'}/config.json: ")


def test_a_failed_proof_of_the_pipeline(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("llmquant.pipeline.run.require_vllm", lambda: None)
    with pytest.raises(VerificationError, match="^the export: its files are right, but there is no vLLM here"):
        quantize(folder/"base", tmp_path/"out", bits=4, group_size=32, verify=True)
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["out.failed"]


@pytest.mark.parametrize("error", [UsageError("no norm"), RuntimeError("a bug\nof two lines"), OSError(5, "gone"),
                                   KeyboardInterrupt(2), VerificationError("too far"), MemoryError()],
                         ids=lambda error: type(error).__name__)
def test_whatever_ends_a_verification_the_export_stays(error, folder, tmp_path, monkeypatch, capsys):
    "It is complete: it lies under OUT.failed with the reason, the old one is where it was, and the exit status is 1."
    def fails(*_, **__): raise type(error)(*error.args)
    verify = verification.verify
    monkeypatch.setattr("llmquant.pipeline.run.require_vllm", lambda: None)
    monkeypatch.setattr(verification, "verify", fails)
    out = shutil.copytree(folder/"awq", tmp_path/"out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    status = main(["--model-path", str(folder/"base"), "--output-path", str(out), "--bits", "4", "--group-size", "32",
                   "--overwrite", "--verify"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert f"the export is complete and lies in {out}.failed" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.failed"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    report = yaml.safe_load((tmp_path/"out.failed"/"quantization_report.yaml").read_text())
    assert report["verdict"].startswith("failed: ") and report["verdict"].endswith(" ".join(str(error).split()))
    assert verify(tmp_path/"out.failed", folder/"base")["files"]["layers"] == len(report["layers"])


def test_a_report_of_an_earlier_version_is_read(with_files, tmp_path):
    "Its keys were proof, promises_step and edited; a verdict is written into it under today's."
    def rename(report):
        found = report.pop("verification")
        report["proof"] = {"promises_step": found.pop("within_one_step"), **found}
    old, base = edited(with_files, tmp_path/"old", REPORT, rename), with_files.parent/"with_files_base"
    assert "promises_step" in (old/REPORT).read_text()
    assert verification.check_files(old, base) == verification.check_files(with_files, base)
    assert main(["verify", str(old), "--reference", str(base)]) == 0
    report = yaml.safe_load((old/REPORT).read_bytes())
    assert "proof" not in report and report["verification"]["within_one_step"] is True
