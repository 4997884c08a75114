"A run under a change of basis goes on only in the same basis."
import pytest
import tiny
import tiny_tokenizer
import torch
from safetensors.torch import load_file, save_file

from llmquant import load, quantize
from llmquant.core.errors import UsageError
from llmquant.sequential.decoder_loop import BlockLoop

CONFIG = {"quantization": {"outlier_suppression": "rotation", "rotation": {"block_size": 32}},
          "calibration": {"num_samples": 2, "max_length": 32}}
LAST = "model.layers.2.input_layernorm.weight"


def run(base, out): return quantize(base, out, "gptq", bits=8, group_size=32, config=CONFIG)


@pytest.fixture
def base(tmp_path):
    "A tiny Llama of three blocks with uneven norms."
    model, draw = tiny.build("llama", torch.float32, num_hidden_layers=3), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("layernorm.weight"): weight.copy_(torch.rand(128, generator=draw) + 0.2)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("changed", [False, True])
def test_a_norm_of_a_later_block_decides_about_the_basis(base, tmp_path, monkeypatch, changed):
    "The order of channels depends on all norms; another one is refused, the same one is gone on with."
    plain = BlockLoop.step

    def dying(self, index, *args):
        if index == 2: raise KeyboardInterrupt
        return plain(self, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BlockLoop, "step", dying)
        with pytest.raises(KeyboardInterrupt): run(base, tmp_path / "out")
    if changed:
        file = base / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {LAST: tensors[LAST].flip(0) * torch.linspace(1, 20, 128)}, file, {"format": "pt"})
        with pytest.raises(UsageError, match=r"2 finished blocks and other settings \(transformed.rotation.channels: "):
            run(base, tmp_path / "out")
        return
    assert run(base, tmp_path / "out")["resumed"]["at_block"] == 2
    run(base, tmp_path / "whole")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = [load(tmp_path / name, torch.float32)(ids).logits for name in ("out", "whole")]
    assert torch.equal(*logits)
