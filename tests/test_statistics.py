"""What each Linear is given, block by block, is what the whole model gives it: model types against the committed table."""
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import measure_statistics as tool
import tiny_tokenizer

from llmquant.core.errors import UsageError
from llmquant.core.model_registry import ModelRegistry
from llmquant.plan.plan import make_plan
from llmquant.quantizers.gptq_quantizer import GPTQQuantizer
from llmquant.sequential.block_flow import BlockFlow
from llmquant.sequential.block_source import BlockInputs, for_checkpoint
from llmquant.sequential.decoder_loop import Storage, run_blocks, start_blocks

TABLE = json.loads((ROOT / "results" / "statistics.json").read_text(encoding="utf-8"))
BOUND = 1e-5 # relative; the block loop computes in float32
# One of each kind of decoder, and of the families that are asked for most.
TYPES = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "gemma", "gemma2", "gemma3",
         "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm_moe_dsa", "phi", "phi3",
         "olmo", "olmo2", "olmo3", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "mixtral", "minimax_m2",
         "granite", "granitemoehybrid", "bamba", "falcon_mamba", "nemotron_h", "lfm2", "kimi_linear", "zaya", "opt",
         "gpt_neox", "bloom", "falcon", "cohere2", "whisper")
REFUSED = tuple(sorted(kind for kind, row in TABLE["rows"].items() if "refused" in row))


MEASURED, INSTALLED = TABLE["machine"]["transformers"], version("transformers")
unmeasured = lambda known: {*known} - {*TABLE["rows"], *TABLE["left_out"]} # types of transformers without a row
unknown = lambda known: {*TABLE["rows"], *TABLE["left_out"]} - {*known}    # rows of types that transformers lacks


def explained(difference, what, installed=INSTALLED):
    "Whether types differ only because another version of transformers is installed; then they are named in a warning."
    if difference and installed != MEASURED:
        warnings.warn(f"transformers {installed} {what} {', '.join(sorted(difference))}; results/statistics.json was "
                      f"measured with {MEASURED}", stacklevel=2)
        return True
    return not difference


def here(kinds):
    "Parameters of a test for each type; those that another version of transformers lacks are skipped by name."
    lacks = {kind: pytest.mark.skip(reason=f"transformers {INSTALLED} has no {kind}; measured with {MEASURED}")
             for kind in unknown(KNOWN) if INSTALLED != MEASURED}
    return [pytest.param(kind, marks=lacks.get(kind, ())) for kind in kinds]


def test_the_table_is_whole():
    "Every causal model type of transformers is in it, or is left out for a reason; at least 40 are right."
    assert explained(unmeasured(KNOWN), "has besides"), unmeasured(KNOWN)
    assert explained(unknown(KNOWN), "lacks"), unknown(KNOWN)
    assert TABLE["left_out"] == tool.LEFT_OUT
    right = [row for row in TABLE["rows"].values() if "refused" not in row]
    assert len(right) >= 100 and len(TYPES) >= 40
    assert all(row[name] <= BOUND for row in right for name in tool.STATISTICS)


def test_only_another_version_explains_other_types():
    "With the measured version a new type fails; with another it is named, and so is one that is gone."
    newer, older = {*KNOWN, "llama_next"}, {*KNOWN} - {"llama"}
    if INSTALLED == MEASURED: assert (unmeasured(newer), unknown(older)) == ({"llama_next"}, {"llama"})
    assert not explained(unmeasured(newer), "has besides", MEASURED)
    assert not explained(unknown(older), "lacks", MEASURED)
    with pytest.warns(UserWarning, match=f"6.0.0 has besides .*llama_next.*{MEASURED}"):
        assert explained(unmeasured(newer), "has besides", "6.0.0")
    with pytest.warns(UserWarning, match="4.60.0 lacks .*llama"): assert explained(unknown(older), "lacks", "4.60.0")


@pytest.mark.parametrize("kind", here(TYPES))
def test_statistics_are_those_of_the_whole_model(kind):
    row, known = tool.measure(kind), TABLE["rows"][kind]
    assert {key: row[key] for key in ("linears", "blocks", "uncalled")} == {
        key: known[key] for key in ("linears", "blocks", "uncalled")}
    assert all(row[name] <= BOUND for name in tool.STATISTICS), row


@pytest.mark.parametrize("kind", here(REFUSED))
def test_what_cannot_be_made_right_is_refused_in_one_line(kind):
    row, known = tool.measure(kind), TABLE["rows"][kind]
    assert "\n" not in row["refused"]
    if "calibrated one by one" in known["refused"]: assert row == known


@pytest.mark.parametrize("kind", here(("gemma4_text",)))
def test_a_wrong_argument_shows(kind, monkeypatch):
    "The comparison can fail: the first window's arguments for all, and keys that later blocks read are lost."
    monkeypatch.setattr(BlockInputs, "_take_apart", lambda self, place, tensor: self.common[place])
    assert tool.measure(kind)["hessian"] > 1e-2
    monkeypatch.undo()
    monkeypatch.setattr(BlockFlow, "needed", lambda self, index: set())
    with pytest.raises(KeyError): tool.measure(kind)


@pytest.mark.parametrize("kind", here(("zamba", "zamba2")))
def test_both_entry_points_refuse(kind, tmp_path, capsys):
    "`check` on a folder, and `quantize` on a model in memory, which stays as it is."
    from llmquant.cli.main import main
    model = tool.build(kind, vocab_size=300).bfloat16()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save(tmp_path / "model")
    capsys.readouterr()
    assert main(["check", "--model-path", str(tmp_path / "model"), "--method", "gptq", "--bits", "8", "--group-size", "-1",
                 "--set", "calibration.max_length=32"]) == 2
    said = capsys.readouterr().err
    assert "share the weight of shared_transf" in said and "use minmax or hqq" in said and "Traceback" not in said
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UsageError, match="share the weight of shared_transf"):
        GPTQQuantizer().quantize(model, bits=8, group_size=-1, calibration_data=torch.arange(3, 35)[None])
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


class Journal:
    "A list that may die behind a block."
    def __init__(self, done, die_behind): self.done, self.die_behind = list(done), die_behind

    def finish_block(self, index, record):
        self.done.append((index, record))
        if index == self.die_behind: raise KeyboardInterrupt


@pytest.mark.parametrize("kind", here(("gemma4_text", "glm_moe_dsa")))
def test_killed_behind_any_block_and_resumed(kind, tmp_path):
    "What travels beside the hidden states comes back from the files: the same bits as an undisturbed run."
    model = tool.build(kind).bfloat16()
    config = model.config.to_dict()
    adapter = ModelRegistry.for_config(config)
    tensors = adapter.checkpoint_tensors(model)
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    tokens = torch.randint(3, 88, (3, 16), generator=torch.Generator().manual_seed(0))
    def run(folder, done=(), die_behind=None, writer=None, device="cpu"):
        quantizer = tool.Keeping()
        quantizer.configure({})
        with tool.patch("llmquant.plan.plan.leave_unfit", lambda layers, *_: layers):
            plan = make_plan(adapter, config, shapes, torch.bfloat16, quantizer, 4, -1)
        source = tool.SimpleNamespace(config=config, tensor=lambda name: tensors[name].detach().clone())
        blocks, journal = for_checkpoint(source, adapter), Journal(done, die_behind)
        loop = start_blocks(plan, quantizer, blocks, tokens, 2, Storage(torch.bfloat16, device, folder), journal.done)
        writer = tool.Kept() if writer is None else writer
        tool.note_statistics(loop, writer)
        try: run_blocks(loop, writer, journal=journal)
        except KeyboardInterrupt: pass
        return writer, journal.done
    whole = run(tmp_path)[0].stats
    assert not [*tmp_path.iterdir()]
    for behind in range(len(adapter.get_layers(model)) - 1):
        writer, done = run(tmp_path, die_behind=behind)
        writer, _ = run(tmp_path, done, writer=writer, device=None)
        assert all(torch.equal(writer.stats[name].hessian, whole[name].hessian) for name in whole)
        assert not [*tmp_path.iterdir()]


def test_what_the_page_refuses_is_what_was_measured():
    "Every architecture that the page of `block_flow` names as refused was, and for the reason of its row."
    root = Path(__file__).parents[1]
    rows = json.loads((root / "results/statistics.json").read_text())["rows"]
    page = json.loads((root / "nbs/sequential/block_flow.ipynb").read_text())
    table = next("".join(c["source"]) for c in page["cells"] if "| refused |" in "".join(c["source"]))
    refused = [line for line in table.splitlines() if line.endswith("| refused |")]
    reasons = {"share": "share the weight", "class": "can be kept", "exchanged": "exchanges modules"}
    named = {"zamba": "share", "zamba2": "share", "xlm": "class", "big_bird": "exchanged"}
    for kind, word in named.items():
        assert reasons[word] in rows[kind]["refused"], kind
        line = next(line for line in refused if word in line)
        assert kind.replace("_", "").replace("zamba2", "zamba 2") in line.lower(), line
    one_by_one = {kind for kind, row in rows.items() if "cannot be calibrated one by one" in row.get("refused", "")}
    assert one_by_one - {"xmod"} == set(named)  # xmod needs a language, which no decoder is watched for
    assert "RWKV" not in table and "HRM" not in table
