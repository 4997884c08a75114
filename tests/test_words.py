"""The field's words: what titles, docstrings, comments and messages may not say, and what a reader must find."""
import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb")
               if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts))

PRIVATE = {  # the field's word: how we once called it
    "entry point": r"\b(front )?doors?\b",
    "verification": r"(?<!`)\b(un)?pro(of|ofs|ve|ves|ved|ven)\b",
    "block loop": r"\b(the|block|layer) walk\b|\bwalks\b|\bclimbs?\b",
    "check, verify": r"\bto its promise\b|\bheld against\b|\b(held|hold) (it )?to\b",
    "transform": r"\bpresent(s|ed) (a|another|the) (checkpoint|model)\b",
    "quantization scheme, quantized activations": r"\bon (a|its|their|the|such a) grids?\b|\bactivation grids?\b|\bgrids? for activations\b",
    "outlier channel": r"\b(stand|stands|stood) out\b|\bloud\b",
    "float or quantized activations": r"\b(float|quantized|second) streams?\b",
    "memory limit": r"\bceilings?\b",
    "resume": r"\b(go|goes|going|went) on (with|from|after|at|there)\b|\bkilled run goes on\b|\brun that goes on\b",
    "column order": r"\bturn comes\b|\bin turn\b",
    "report, log, store": r"\b(say|says|said) so\b|\bspeaks? (for|of)\b|\b(is|are) told\b",
    "round_to_nearest": r"\bround(s|ed|ing)?[_ ]to[_ ](a|the)?[_ ]?grid\b",
    "within one step": r"\bpromise[sd]?[_ ](a[_ ])?step\b",
    "cause": r"\bto blame\b|\bblames?\b",
}
FOUND = ("activation quantization", "weight-only", "round-to-nearest (RTN)", "act-order", "group size", "zero point",
         "calibration data", "resume", "outlier channel", "sequential pipeline", "perplexity", "KL divergence")


def cells(path):
    "(kind, text) of each cell."
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text("utf-8"))["cells"]]


def headings(text):
    "Titles, headings and the line below a title."
    return [line for line in text.splitlines() if line.startswith(("#", "> "))]


def spoken(code):
    "Strings and comments of Python code; keys and names, which hold one word, are none."
    found = [node.value for node in ast.walk(ast.parse(code))
             if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip()]
    return found + [token.string for token in tokenize.generate_tokens(io.StringIO(code).readline)
                    if token.type == tokenize.COMMENT and not token.string.startswith("#|")]


def sentences(path):
    "What a page says in headings, and what its exported code says."
    for kind, text in cells(path):
        if kind == "markdown": yield from headings(text)
        elif re.match(r"#\s*\| export", text): yield from spoken(text)


def private(text):
    "The field's words for the private ones that a text uses, each with what was found."
    return {word: found[0] for word, pattern in PRIVATE.items() if (found := re.search(pattern, text, re.I))}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT / "nbs").with_suffix("").as_posix())
def test_titles_docstrings_and_messages_use_the_fields_words(path):
    assert {text: found for text in sentences(path) if (found := private(text))} == {}


@pytest.mark.parametrize("word", FOUND)
def test_a_reader_finds_the_fields_words(word):
    "In the prose of a page, the glossary aside, which lists them all."
    assert [path.stem for path in PAGES if path.stem != "glossary"
            for kind, text in cells(path) if kind == "markdown" and word.lower() in " ".join(text.lower().split())]


def test_what_these_tests_would_find():
    code = 'def f():\n    "Prove it; the run goes on from there."\n    raise E(f"{x} has no grid for activations") # loud\n'
    assert [list(private(text)) for text in spoken(code)] == [
        ["verification", "resume"], ["quantization scheme, quantized activations"], ["outlier channel"]]
    assert headings("# The proof\n\n> Walks\n\nprose") == ["# The proof", "> Walks"]
    assert private("report['proof'] improves the resumed one") == {"verification": "proof"}
    assert list(private("promises_step of round_to_grid")) == ["round_to_nearest", "within one step"]
