"""Perplexity and KL divergence of folders: by a plain loop over prefixes, and as vLLM serves them."""
import json
import math
import shutil

import pytest
import tiny_tokenizer
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmquant.core.errors import UsageError
from llmquant.evaluation.vllm_check import vllm_installed
from llmquant.export.loading import load
from llmquant.harness.text_metrics import text_metrics
from llmquant.pipeline.run import run
from llmquant.utils.config import resolve

TEXT = "A tiny model reads a text that it has never seen, and is asked what comes next. " * 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A base, its export at 4 bits, and a text."
    place = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    LlamaForCausalLM(config).half().save_pretrained(place / "base")
    tiny_tokenizer.save(place / "base")
    run(resolve({"model_path": f"{place}/base", "output_path": f"{place}/w4", "method": "minmax", "bits": 4,
                 "group_size": 32, "verify": False, "quiet": True}))
    (place / "text.txt").write_text(TEXT)
    return place


def measure(place, **given):
    "The metrics of the small text, 6 windows of 24 tokens."
    same = {"text": place / "text.txt", "context": 24, "stride": 8, "windows": 6}
    return text_metrics(place / "base", place / "w4", **{**same, **given})


@torch.no_grad()
def by_prefixes(place):
    "Losses of both models and KL, each scored token by itself."
    from transformers import AutoTokenizer
    ids = AutoTokenizer.from_pretrained(place / "base")(TEXT, add_special_tokens=False)["input_ids"]
    models = [load(place / name, torch.float32) for name in ("base", "w4")]
    rows = []
    for window in range(6):
        for at in range(16 + 8 * window, 24 + 8 * window):
            prefix = torch.tensor([ids[8 * window:at]])
            p, q = (model(prefix).logits[0, -1].double().log_softmax(-1) for model in models)
            rows.append((-p[ids[at]].item(), -q[ids[at]].item(), (p.exp() * (p - q)).sum().item()))
    return [sum(column) / len(rows) for column in zip(*rows)], max(row[2] for row in rows)


def test_figures_are_those_of_a_loop_over_prefixes(folders):
    found, ((base, export, kl), largest) = measure(folders, backend="hf"), by_prefixes(folders)
    assert found["perplexity"]["base"] == pytest.approx(math.exp(base), rel=1e-5)
    assert found["perplexity"]["export"] == pytest.approx(math.exp(export), rel=1e-5)
    assert found["kl"]["mean"] == pytest.approx(kl, rel=1e-3) and found["kl"]["max"] == pytest.approx(largest, rel=1e-3)
    assert (found["tokens"], found["windows"], found["prefix"]) == (48, 6, [])
    assert json.loads(json.dumps(found)) == found


def test_the_same_model_loses_nothing(folders):
    shutil.copytree(folders / "base", folders / "again")
    numbers = {"context": 24, "stride": 8, "windows": 3}
    found = text_metrics(folders / "base", folders / "again", folders / "text.txt", "hf", **numbers)
    assert found["perplexity"]["ratio"] == 1 and found["perplexity"]["interval"] == [1, 1]
    assert found["kl"]["max"] < 1e-12 and found["kl"]["top1_agreement"] == 1


@pytest.mark.skipif(not vllm_installed(), reason="needs vLLM")
def test_vllm_serves_what_the_files_mean(folders):
    served, own = measure(folders, backend="vllm", dtype="float16"), measure(folders, backend="hf", dtype="float16")
    assert served["digest"] == own["digest"] and served["dtype"] == "float16"
    assert served["kl"]["base_as_served"] < 1e-4 < served["kl"]["mean"]
    assert served["perplexity"]["ratio"] == pytest.approx(own["perplexity"]["ratio"], rel=0.01)
    assert served["kl"]["mean"] == pytest.approx(own["kl"]["mean"], rel=0.1)


@pytest.mark.parametrize(("given", "said"), [
    ({"windows": 5000}, "use a longer text"), ({"windows": 1}, "at least 2 are compared"),
    ({"stride": 24}, "stride 24: must be from 1 to 23"), ({"text": "nowhere.txt"}, "there is no such file"),
    ({"backend": "cuda"}, "must be vllm or hf"), ({"dtype": "int4"}, "must be auto"),
])
def test_bad_input_is_refused_before_a_model_is_loaded(folders, given, said, monkeypatch):
    monkeypatch.setattr("llmquant.harness.text_metrics.load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=said): measure(folders, **{"backend": "hf", **given})


def test_an_export_with_another_tokenizer_is_refused(folders):
    shutil.copytree(folders / "w4", folders / "other", dirs_exist_ok=True)
    file = folders / "other/tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="gives other ids than the base's, from token 10"):
        text_metrics(folders / "base", folders / "other", folders / "text.txt", "hf", context=24, stride=8, windows=2)
