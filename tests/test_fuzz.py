"A share of `make fuzz`, always the same inputs; and the sentences of the kinds that once ended in a traceback."
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import fuzz  # noqa: E402

SHARE = {"config": 12, "recipe": 20, "command_line": 12, "header": 8, "tensor": 6, "tokenizer": 4, "text": 4,
         "export": 10, "gguf": 6}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    small = {"models": ("llama", "olmo2"), "exports": ("mixed", "gptq", "activations")}
    with fuzz.prepared(tmp_path_factory.mktemp("fuzz"), **small) as bases: yield bases


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_inputs(kind, bases):
    "Each ends well: done, failed in verification, or refused in one line."
    for number in range(SHARE[kind]):
        what, found = fuzz.try_one(bases, kind, number, seed=2026)
        for command, _, fault in found: assert not fault, f"{kind}:{number} ({what}): {command}: {fault}"


def test_the_tool_sees_faults(bases, monkeypatch):
    "An exception, a slow end, another status, no line and two lines are each told from a good end."
    def ends(act):
        monkeypatch.setattr("llmquant.cli.main", act)
        return fuzz.fault_of(["info"], bases.folder, seconds=0.2)[0]
    def raises(words): raise KeyError("x")
    def slow(words):
        while True: pass
    def talks(words):
        print("llmquant: error: one line is enough", "llmquant: error: two are too many", sep="\n", file=sys.stderr)
        return 2
    assert ends(raises) == "KeyError in ?" and ends(slow) == "TooLong in ?"
    assert ends(lambda words: 130) == "status 130"
    assert ends(lambda words: 2) == "status 2 with 0 lines" and ends(talks) == "status 2 with 2 lines"
    assert ends(lambda words: 0) == ""
