"What a message must tell whole: paths, sums, model types."
import re

import pytest
import tiny
import yaml
from transformers import AutoConfig

from llmquant.cli.summary import list_text
from llmquant.core.errors import UsageError, VerificationError
from llmquant.core.model_registry import ModelRegistry
from llmquant.in_memory.save import export_model
from llmquant.outlier_suppression.rotation import RotationSuppressor
from llmquant.pipeline.run import check
from llmquant.plan.memory import MemoryNeed, fit
from llmquant.utils.config import resolve
from llmquant.sequential.equivalence import check_supported

MIB = 1 << 20


@pytest.mark.parametrize("need", [
    MemoryNeed(300 * MIB, 400 * MIB, 120 * MIB, 60 * MIB, 200 * MIB, 80 * MIB, 500 * MIB),
    MemoryNeed(300 * MIB + 7, 40 * MIB + 1, 12 * MIB, 60 * MIB + 3, 20 * MIB, 8 * MIB, 500 * MIB, searching=5 * MIB + 9),
    MemoryNeed(300 * MIB, 4 * MIB, 1 * MIB, 6 * MIB, 2 * MIB, 800 * MIB, 5 * MIB)], ids=["solving", "searching", "reading"])
def test_refused_memory_adds_up(need):
    "The parts are those of the worst moment: their sum, as shown, is the figure, and no less than the peak."
    with pytest.raises(UsageError, match="max_memory 64 MiB is too little") as refused: fit(need, 64 * MIB)
    total, listed = re.search(r"takes (\d+) MiB with its hidden states in files \((.*?)\)", str(refused.value)).groups()
    parts = [int(size) for size in re.findall(r"(\d+) MiB", listed)]
    assert sum(parts) == int(total) and len(parts) == listed.count(" + ") + 1
    hidden = need.hidden
    assert need.peak - hidden <= int(total) * MIB < need.peak - hidden + len(parts) * MIB


def test_failed_export_is_named_by_its_whole_path(tmp_path):
    "OUT.failed with the folder that it lies in, and not its last name alone."
    from llmquant.quantizers.minmax_quantizer import MinMaxQuantizer
    model = MinMaxQuantizer().quantize(tiny.build("llama", layers=1), bits=4, group_size=32)
    def wrong(folder): raise VerificationError("the export: mean KL 0.3")
    with pytest.raises(VerificationError) as failed:
        export_model(model, ModelRegistry.for_config(model.config.to_dict()), tmp_path/"deep"/"gg", verify=wrong)
    named = tmp_path/"deep"/"gg.failed"
    assert str(named) in str(failed.value) and (named/"config.json").is_file(), str(failed.value)
    assert yaml.safe_load((named/"quantization_report.yaml").read_text())["verdict"].startswith("failed: the export: mean")


def test_rotation_names_model_types():
    "What is refused is not in the list that the refusal gives, and what is in it is not refused."
    listed = [name.strip("()") for name in RotationSuppressor().get_supported_models()]
    for kind in listed: check_supported(RotationSuppressor(), ModelRegistry.for_config({"model_type": kind}), {"model_type": kind})
    assert {"gemma3_text", "olmo3", "qwen3_moe", "mistral"} <= set(listed) and "gpt2" not in listed
    with pytest.raises(UsageError, match="does not support model type 'gpt2'.*gemma3_text, ") as refused:
        check_supported(RotationSuppressor(), ModelRegistry.for_config({"model_type": "gpt2"}), {"model_type": "gpt2"})
    assert set(re.search("made for (.*), so", str(refused.value))[1].split(", ")) == set(listed)


def test_gemma3_text_is_rotated(tmp_path):
    "Its values are; its stream is not, for the norms behind the sub-layers."
    from transformers import AutoModelForCausalLM
    config = AutoConfig.for_model("gemma3_text", **{**tiny.COMMON, "num_hidden_layers": 1, "head_dim": 32})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path/"model")
    given = {"model_path": str(tmp_path/"model"), "group_size": 32, "outlier_suppression": ["rotation"]}
    assert len(check(resolve(given)).quantized) == 7
    with pytest.raises(UsageError, match="residual: true, and it cannot be done: norms behind attention"):
        check(resolve(given, config={"quantization": {"rotation": {"residual": True}}}))


def test_list_shows_what_each_family_can():
    "Smoothing pairs and rotation, family by family, as the adapters say."
    lines = dict(line.strip().split(": ", 1) for line in list_text().split("\nadapters\n")[1].split("\n\n")[0].splitlines())
    assert set(lines) == set(ModelRegistry.list_adapters())
    for name, line in lines.items():
        adapter = ModelRegistry.get(name)()
        assert ("smoothing pairs" in line) == bool(adapter.smoothing_types()), line
        for part in set(adapter.rotation_types().values()): assert f"rotation of {part}" in line, line
    assert "gemma3_text" in lines["default"]


@pytest.mark.parametrize("verb", ["check", "info"])
def test_a_folder_without_a_model_is_called_so(tmp_path, capsys, verb):
    "By whatever looks at it: what it holds, and what to give."
    from llmquant.cli import main as cli
    (tmp_path / "notes.txt").write_text("nothing")
    assert cli.main([verb, *(["--model-path"] if verb == "check" else []), str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == (f"llmquant: error: {tmp_path}: is no checkpoint, it holds no safetensors and no GGUF (it holds notes.txt); "
                    "give the folder with config.json and the weights\n")
