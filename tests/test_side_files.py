"What lies beside the weights: which files come along, which stay behind, and that the report names those."
import json

import pytest
import tiny

from llmquant.core.errors import LLMQuantError, VerificationError
from llmquant.core.model_registry import ModelRegistry
from llmquant.core.quantizer_registry import QuantizerRegistry
from llmquant.evaluation.verification_config import check_config
from llmquant.pipeline.run import quantize

STALE = {"quantize_config.json": '{"bits": 8, "group_size": 128}', "quant_config.json": '{"w_bit": 8}',
         "hf_quant_config.json": '{"quantization": {"quant_algo": "FP8"}}', "recipe.yaml": "quant_stage: {}\n"}
OWN = {"generation_config.json": '{"eos_token_id":  2}', "chat_template.jinja": "{{ messages }}"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A tiny Llama with another tool's files, code, and the keys that name the code."
    folder = tiny.make("llama", tmp_path_factory.mktemp("side")/"model", layers=1)
    for name, text in {**STALE, **OWN, "modeling_own.py": "raise SystemExit('run')\n"}.items():
        (folder/name).write_text(text)
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_own.Own"}}))
    (folder/"tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling_own.T", null]}, "pad": 0}')
    return folder


def files_of(folder):
    return {path.name for path in folder.iterdir()}


def test_left_out_and_named(checkpoint, tmp_path, caplog):
    "Nothing that another reader would believe, or run, is in the export; everything else is byte for byte the same."
    caplog.set_level("INFO", "llmquant")
    report = quantize(checkpoint, tmp_path/"out", group_size=32)
    out = tmp_path/"out"
    assert not files_of(out) & {*STALE, "modeling_own.py"}
    for name, text in OWN.items(): assert (out/name).read_text() == text
    assert "auto_map" not in json.loads((out/"config.json").read_text())
    assert json.loads((out/"tokenizer_config.json").read_text()) == {"pad": 0}
    assert set(report["left_out"]) == {*STALE, "modeling_own.py", "auto_map in config.json",
                                       "auto_map in tokenizer_config.json"}
    said = [record.getMessage() for record in caplog.records if "left out of the export" in record.getMessage()]
    assert any("quantize_config.json" in line and "another quantization" in line for line in said), said
    assert any("modeling_own.py" in line and "trust_remote_code" in line for line in said), said


def test_trusted_code_comes_along(checkpoint, tmp_path):
    "With trust_remote_code the code and what names it are copied; another quantization's files still are not."
    report = quantize(checkpoint, tmp_path/"out", group_size=32, trust_remote_code=True)
    out = tmp_path/"out"
    for name in ("modeling_own.py", "tokenizer_config.json"):
        assert (out/name).read_bytes() == (checkpoint/name).read_bytes()
    assert json.loads((out/"config.json").read_text())["auto_map"] == {"AutoModel": "modeling_own.Own"}
    assert set(report["left_out"]) == set(STALE)


def test_verification_allows_what_was_left_out():
    "An export without auto_map is the reference's; one with another auto_map is not."
    theirs = {"model_type": "llama", "auto_map": {"AutoModel": "modeling_own.Own"}}
    check_config({"model_type": "llama"}, theirs, {})
    with pytest.raises(VerificationError, match="auto_map.AutoModel is"):
        check_config({"model_type": "llama", "auto_map": {"AutoModel": "other.Other"}}, theirs, {})


@pytest.mark.parametrize("trusted", [True, False])
def test_trusted_code_comes_along_from_memory(checkpoint, tmp_path, trusted):
    "What the document of the call says of trust is what the export does, as for a folder."
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    config = {"quantization": {"minmax": {}}, "model": {"trust_remote_code": trusted}}
    QuantizerRegistry.get("minmax")().quantize(model, bits=4, group_size=32, config=config)
    adapter, out = ModelRegistry.for_config(model.config.to_dict()), tmp_path/"out"
    report = adapter.save_quantized(model, out, checkpoint)
    assert (out/"modeling_own.py").exists() == trusted == ("auto_map" in json.loads((out/"config.json").read_text()))
    assert ("auto_map" in json.loads((out/"tokenizer_config.json").read_text())) == trusted
    assert ("modeling_own.py" not in report["left_out"]) == trusted
    assert json.loads((out/"vllm_config.json").read_text())["model"]["trust_remote_code"] == trusted
    assert adapter.trust_remote_code is False  # nobody else's


def test_a_tokenizer_that_is_code_is_trusted_in_memory_too(checkpoint, monkeypatch):
    "Calibration of a model in memory reads its tokenizer under the trust that the document gives."
    from transformers import AutoModelForCausalLM
    asked = []
    def load(*_, trust_remote_code, **__):
        asked.append(trust_remote_code)
        raise LLMQuantError("seen")
    monkeypatch.setattr("llmquant.calibration.data.load_calibration", load)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    for trusted in (True, False):
        config = {"quantization": {}, "model": {"trust_remote_code": trusted}}
        with pytest.raises(LLMQuantError, match="seen"):
            QuantizerRegistry.get("gptq")().quantize(model, bits=4, group_size=32, config=config)
    assert asked == [True, False]
