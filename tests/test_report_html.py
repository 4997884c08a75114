"The two pages of an export: report.html and the model card. What they show stands in the files beside them."

import dataclasses
import html
import importlib.util
import json
import logging
import re
import shutil
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from outliers import inject_outliers
from tiny_tokenizer import save as save_tokenizer
from transformers import AutoModelForCausalLM

from llmquant.checkpoint.side_files import BASE_CARD, CARD, PAGE
from llmquant.cli.main import main
from llmquant.core.errors import LLMQuantError, UsageError
from llmquant.core.model_registry import ModelRegistry
from llmquant.core.quantizer_registry import QuantizerRegistry
from llmquant.evaluation import verification
from llmquant.export.export import PICTURE, REPORT
from llmquant.pipeline.info import info
from llmquant.pipeline.run import quantize
from llmquant.report.card import is_unedited, write_card
from llmquant.report.facts import RESULTS_FILE, read_facts
from llmquant.report.html import write_report
from llmquant.report.pages import refresh_pages
from llmquant.report.serving_commands import SERVED, kinds_in, request_command, serve_commands

CARD_OF_BASE = "---\nlicense: llama3.1\nlanguage:\n- en\n- zh\nbase_model: org/older\n---\n# The base\n\nMade of \u6587\u672c.\n"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    "Elements, the rows of each table, and the alternative texts of a page; tags that do not match are an error."

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.tables, self.titles, self.headings = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "title":
            self.titles.append("")
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "title":
            self.titles[-1] += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if "h2" in self.open:
            self.headings[-1] += data

    def table(self, first):
        "The rows below the head of the table whose head starts so."
        return next(table[1:] for table in self.tables if table[0][0] == first)


def results(hostile=""):
    "What an evaluation leaves, by the names that its page documents."

    def task(base, export, low, high, chance):
        acc = {
            "base": base,
            "base_stderr": 0.031,
            "export": export,
            "export_stderr": 0.032,
            "difference": export - base,
            "interval": [low, high],
            "mcnemar_p": 0.27,
            "higher_is_better": True,
        }
        flips = {"metric": "acc", "right_to_wrong": 11, "wrong_to_right": 7, "share": 0.09}
        return {"version": 1, "n": 200, "chance": chance, "metrics": {"acc": acc}, "flips": flips}

    tasks = {
        f"piqa{hostile}": task(0.665, 0.645, -0.06, 0.02, 0.5),
        "arc_easy": task(0.5625, 0.4875, -0.12, -0.03, 0.25),
    }
    text = {
        "name": "reference",
        "tokens": 4096,
        "perplexity": {"base": 20.315, "export": 23.75, "ratio": 1.169, "interval": [1.15, 1.19]},
        "kl": {"mean": 0.0431, "p99": 0.52, "max": 3.07, "top1_agreement": 0.884},
    }
    gates = [
        {
            "gate": "acc>=-0.02",
            "task": "arc_easy",
            "metric": "acc",
            "passed": False,
            "sentence": "acc>=-0.02: lost too much",
        }
    ]
    return {
        "llmquant": "0",
        "fingerprint": "ab",
        "settings": {"backend": "vllm", "limit": 200},
        "tasks": tasks,
        "text": text,
        "gates": gates,
        "requests": {"notes": [f"no BOS{hostile}"]},
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A tiny Llama with a model card and a license."
    path = tiny.make("llama", tmp_path_factory.mktemp("report") / "base", layers=3)
    save_tokenizer(path)
    (path / CARD).write_text(CARD_OF_BASE)
    (path / "LICENSE").write_text("Use it well.\n")
    return path


@pytest.fixture(scope="module")
def made(base):
    "An export with its pages."
    quantize(base, base.parent / "out", bits=4, group_size=32)
    return base.parent / "out"


@pytest.fixture
def export(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


@pytest.fixture
def measured(export):
    "An export with results."
    (export / RESULTS_FILE).parent.mkdir()
    (export / RESULTS_FILE).write_text(json.dumps(results()))
    refresh_pages(export)
    return export


def page_of(folder):
    return Page((folder / PAGE).read_text(encoding="utf-8"))


def report_of(folder):
    return yaml.safe_load((folder / REPORT).read_text())


def foreign(page):
    "What a page would fetch or run."
    loads = [
        (tag, name, value)
        for tag, attrs in page.elements
        for name, value in attrs.items()
        if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster", "background")
    ]
    beside = re.compile(r"[\w/.-]+")
    found = [
        item
        for item in loads
        if not (item[2].startswith(("data:image/png;base64,", "#")) or (item[0] == "a" and beside.fullmatch(item[2])))
    ]
    return found + [
        (tag, attrs)
        for tag, attrs in page.elements
        if tag in ("script", "iframe", "object", "embed", "link", "form") or any(n.startswith("on") for n in attrs)
    ]


def test_the_page_is_self_contained(measured):
    text = (measured / PAGE).read_text()
    assert foreign(page_of(measured)) == []
    assert (
        not re.search(r"url\((?!#)|@import|javascript:", text)
        and "prefers-color-scheme:dark" in text
        and "@media print" in text
    )
    assert foreign(Page('<a href="http://x">y</a><img src="a.png" onerror="z"/>')) and foreign(
        Page("<script></script>")
    )


def test_every_figure_has_its_alternative_text_and_its_source(measured):
    page = page_of(measured)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    drawn = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert len(drawn) == 8 and all(attrs["role"] == "img" and attrs["aria-labelledby"] in ids for attrs in drawn)
    assert len(page.titles) == 1 + len(drawn) and all(
        title.strip() for title in page.titles
    )  # the page's own is the first
    assert all(attrs.get("alt") for tag, attrs in page.elements if tag == "img")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", (measured / PAGE).read_text())
    named = [re.findall(r"<code>(.*?)</code>", caption) for caption in captions]
    assert len(named) == len(drawn) and all((measured / file).is_file() for file, *_ in named)


def test_the_recipe_has_the_origin_of_each_value(made):
    page, recipe = page_of(made), report_of(made)["recipe"]
    rows = {
        key: (value, origin) for table in page.tables if table[0][:1] == ["key"] for key, value, origin in table[1:]
    }
    assert rows.keys() == recipe.keys() and rows["report"] == ("true", "default") and rows["bits"] == ("4", "call")
    for key, (value, origin) in rows.items():
        assert (
            origin == recipe[key]["from"]
            and yaml.safe_load(value) == yaml.safe_load(str(recipe[key]["value"]))
            or value == "null"
        )


def test_the_figures_of_the_report_are_those_of_the_file(made):
    page, report = page_of(made), report_of(made)
    layers = report["layers"]
    long = max((table for table in page.tables if table[0][0] == "layer"), key=len)[1:]
    assert {name: float(error) for name, _, _, error in long} == {
        n: round(x["relative_error"], 4) for n, x in layers.items()
    }
    by_kind = {}
    for name, layer in layers.items():
        by_kind.setdefault(name.split(".", 3)[3], []).append(layer["relative_error"])
    drawn = next(title for title in page.titles if title.startswith("Relative error"))
    told = {
        kind: [float(x) for x in rest]
        for kind, *rest in re.findall(r"([\w.]+) ([\d.]+) \(([\d.]+) to ([\d.]+)\)", drawn)
    }
    assert told.keys() == by_kind.keys()
    for kind, errors in by_kind.items():
        assert told[kind] == pytest.approx([statistics.median(errors), min(errors), max(errors)], rel=6e-3)
    (title,) = (title for title in page.titles if title.startswith("The checkpoint has"))
    units = {"B": 1, "kB": 10**3, "MB": 10**6}
    shown = [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) ([kM]?B)", title)]
    assert shown == pytest.approx(
        [report["sizes"][key] for key in ("checkpoint", "export", "quantized_layers")], rel=6e-3
    )


def test_the_worst_layer_is_drawn_from_the_files(made):
    "Codes that another library reads from the file: how many of the sixteen are in use, and the steps."
    from safetensors.torch import load_file

    tensors = load_file(next(made.glob("*.safetensors")))
    layers = report_of(made)["layers"]
    worst = max(layers, key=lambda name: layers[name]["relative_error"])
    words, scales = tensors[f"{worst}.weight_packed"], tensors[f"{worst}.weight_scale"].float()
    codes = {int(word) >> shift & 15 for word in words.flatten().tolist() for shift in range(0, 32, 4)}
    (title,) = (title for title in page_of(made).titles if title.startswith("Weights of"))
    low, high, middle = map(
        float, re.search(r"steps from ([\de.-]+) to ([\de.-]+), median ([\de.-]+)\.", title).groups()
    )
    assert f"{worst}: {len(codes)} of 16 codes in use; {scales.numel()} steps" in title
    assert [low, high] == pytest.approx([float(scales.min()), float(scales.max())], rel=6e-3)
    assert middle == pytest.approx(statistics.median(scales.flatten().tolist()), rel=6e-3)


def test_the_scores_are_those_of_the_results(measured):
    page, found = page_of(measured), results()
    for row in page.table("task"):
        task, metric, items, base, export, difference, interval, p, flips = row
        acc = found["tasks"][task]["metrics"][metric]
        assert [float(x) for x in (base, export, difference)] == pytest.approx(
            [acc["base"], acc["export"], acc["difference"]], abs=6e-5
        )
        assert [float(x) for x in interval.split(" to ")] == acc["interval"] and float(p) == acc["mcnemar_p"]
        assert (items, flips) == ("200", "11 / 7")
    assert len(page.table("task")) == 2
    text = " ".join(page.titles)
    for part in "piqa 0.665 and 0.645", "arc_easy -0.075 (-0.120 to -0.030)", "base 20.32, export 23.75", "mean 0.0431":
        assert part in text, part
    assert "acc&gt;=-0.02: lost too much" in (measured / PAGE).read_text()
    card = (measured / CARD).read_text()
    assert r"| piqa | acc | 200 | 0.665 | 0.645 | -0.020 (-0.060 to +0.020) |" in card and "0.0431 nats" in card


def test_nothing_from_a_checkpoint_is_markup(export):
    "Names of layers, tasks, reasons and paths with tags, formulas and line breaks in them."
    bad = "<img src=x onerror=alert(1)></title></svg><script>$_{^\n---\u4e2d`|"
    report = report_of(export)
    name = f"model.layers.0.{bad}"
    report["layers"][name] = {"scheme": "W4 g32 asym", "shape": [32, 32], "relative_error": 0.001}
    report["verification"]["digests"][name] = "00"
    report["left_in_float"][bad] = [bad]
    report["model"] |= {"path": f"/x/{bad}", "model_type": bad}
    report["recipe"][bad] = {"value": bad, "from": bad}
    report |= {
        "fused_by": bad,
        "verdict": bad,
        "serving": [bad],
        "left_out": {bad: bad},
        "calibration": {"dataset": bad},
    }
    (export / REPORT).write_text(yaml.safe_dump(report))
    (export / RESULTS_FILE).parent.mkdir()
    (export / RESULTS_FILE).write_text(json.dumps(results(bad)))
    (export / CARD).unlink()
    refresh_pages(export)
    page = page_of(export)
    assert foreign(page) == [] and not any(tag == "img" for tag, _ in page.elements)
    assert any(bad in cell for table in page.tables for row in table for cell in row)
    card = (export / CARD).read_text()
    assert "<img" not in card.replace(r"\<img", "") and "<script" not in card.replace(r"\<script", "")
    assert ModelCard(card).data.to_dict()["license"] == "llama3.1"


def test_the_card_as_the_hub_reads_it(made, base):
    card = ModelCard((made / CARD).read_text())
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["library_name"]) == ("llama3.1", ["en", "zh"], "transformers")
    assert {"quantized", "llmquant", "compressed-tensors", "minmax", "4-bit"} <= set(data["tags"])
    assert "base_model" not in data  # a folder has no name on the hub, and the base's base is another one's
    assert str(base.parent) not in card.content and f"]({BASE_CARD})" in card.text and "](LICENSE)" in card.text
    commit = "0123456789" * 4
    facts = read_facts(made)
    there = facts.report | {"model": {"path": "org/name@main", "commit": commit, "model_type": "llama"}}
    from llmquant.report.card import card_text

    data = ModelCard(card_text(dataclasses.replace(facts, report=there))).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/name", "quantized")


def test_the_card_of_the_base_is_kept(made, base, tmp_path):
    "Byte for byte, beside ours; without pages, where it was. A base that is an export of ours loses neither card."
    assert (made / BASE_CARD).read_bytes() == (base / CARD).read_bytes()
    quantize(base, tmp_path / "plain", bits=4, group_size=32, report=False)
    assert (tmp_path / "plain" / CARD).read_bytes() == (base / CARD).read_bytes()
    assert not (tmp_path / "plain" / PAGE).exists() and not (tmp_path / "plain" / BASE_CARD).exists()
    quantize(base, tmp_path / "sixteen", bits=16)
    (tmp_path / "sixteen" / RESULTS_FILE).parent.mkdir()
    (tmp_path / "sixteen" / RESULTS_FILE).write_text(json.dumps(results()))
    report = quantize(tmp_path / "sixteen", tmp_path / "again", bits=4, group_size=32)
    again = tmp_path / "again"
    assert (again / BASE_CARD).read_bytes() == (base / CARD).read_bytes()
    assert (again / "README.base-2.md").read_bytes() == (tmp_path / "sixteen" / CARD).read_bytes()
    assert (again / "report.base.html").read_bytes() == (tmp_path / "sixteen" / PAGE).read_bytes()
    assert report["left_out"]["results.json"] == "measures another checkpoint" and not (again / RESULTS_FILE).exists()
    assert ModelCard((again / CARD).read_text()).data.to_dict()["license"] == "llama3.1"


def test_the_rest_of_an_export_does_not_depend_on_its_pages(made, base, tmp_path):
    quantize(base, tmp_path / "plain", bits=4, group_size=32, report=False)
    files = lambda folder: {
        p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (CARD, PAGE, BASE_CARD, REPORT)
    }
    assert files(made) == files(tmp_path / "plain")
    kept = lambda folder: {
        k: v for k, v in report_of(folder).items() if k not in ("seconds", "peak_memory_mib", "recipe", "memory")
    }
    assert kept(made) == kept(tmp_path / "plain")
    said = [report_of(folder)["recipe"] for folder in (made, tmp_path / "plain")]
    assert {key for key in said[0] if said[0][key] != said[1][key]} == {"report", "output_path"}
    (tmp_path / "more").mkdir()
    quantize(base, tmp_path / "more" / "out", bits=4, group_size=32)
    assert (tmp_path / "more" / "out" / CARD).read_bytes() == (made / CARD).read_bytes()  # it holds no seconds


def test_the_command_line_can_leave_it_out(base, tmp_path):
    arguments = ["--model-path", str(base), "--bits", "4", "--group-size", "32", "--quiet", "--output-path"]
    assert main([*arguments, str(tmp_path / "out"), "--no-report"]) == 0 and not (tmp_path / "out" / PAGE).exists()
    (tmp_path / "r.yaml").write_text("output: {report: false}\n")
    assert main([*arguments, str(tmp_path / "other"), "--config", str(tmp_path / "r.yaml")]) == 0
    assert (
        not (tmp_path / "other" / PAGE).exists() and report_of(tmp_path / "other")["recipe"]["report"]["value"] is False
    )
    refresh_pages(tmp_path / "other")
    assert not (tmp_path / "other" / PAGE).exists()


def test_a_model_in_memory_has_both_pages(base, tmp_path):
    model = QuantizerRegistry.get("minmax")().quantize(
        AutoModelForCausalLM.from_pretrained(base), bits=4, group_size=32
    )
    save = ModelRegistry.for_config(model.config.to_dict()).save_quantized
    save(model, tmp_path / "lent", source=base)
    save(model, tmp_path / "alone")
    save(model, tmp_path / "plain", source=base, report=False)
    assert (
        (tmp_path / "lent" / BASE_CARD).read_bytes()
        == (tmp_path / "plain" / CARD).read_bytes()
        == (base / CARD).read_bytes()
    )
    for name in "lent", "alone":
        assert foreign(page_of(tmp_path / name)) == [] and is_unedited((tmp_path / name / CARD).read_text())
    assert (
        not (tmp_path / "plain" / PAGE).exists()
        and "license" not in ModelCard((tmp_path / "alone" / CARD).read_text()).data.to_dict()
    )


def test_a_verification_rewrites_the_pages(export, base, monkeypatch, caplog):
    "An edited card stays as it is, and the report's own files are not called added."
    monkeypatch.setattr(verification, "vllm_installed", lambda: False)
    assert "Not verified." in (export / PAGE).read_text()
    assert main(["verify", str(export), "--reference", str(base), "--quiet"]) == 0
    assert "verified: files; vLLM is not installed" in (export / PAGE).read_text()
    assert "verified: files; vLLM is not installed" in (export / CARD).read_text()
    assert "added_later" not in report_of(export)["verification"]["files"]
    (export / CARD).write_text((export / CARD).read_text().replace("## Limits", "## What I found"))
    edited = (export / CARD).read_bytes()
    (export / "tokenizer_config.json").write_text("{}")
    caplog.set_level(logging.INFO, "llmquant")
    assert main(["verify", str(export), "--reference", str(base)]) == 1
    assert (export / CARD).read_bytes() == edited and "stays as it is; delete it" in caplog.text
    assert 'class="bad">failed: tokenizer_config.json: changed' in (export / PAGE).read_text()
    (export / CARD).unlink()
    assert write_card(export) and is_unedited((export / CARD).read_text())


def test_a_damaged_export_shows_no_old_verdict(export, base, monkeypatch, capsys):
    "The page of an export that verified once, and cannot be read now, is removed; what is wrong is printed."
    monkeypatch.setattr(verification, "vllm_installed", lambda: False)
    assert main(["verify", str(export), "--reference", str(base), "--quiet"]) == 0
    config = json.loads((export / "config.json").read_text())
    del config["quantization_config"]["config_groups"]
    (export / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(export), "--reference", str(base)]) > 0
    assert "config_groups" in capsys.readouterr().err.splitlines()[-1]
    assert not (export / PAGE).exists() and not (export / CARD).exists() and (export / BASE_CARD).exists()


def test_an_export_with_all_of_it_is_still_an_export(measured, base, monkeypatch):
    monkeypatch.setattr(verification, "vllm_installed", lambda: False)
    assert "added_later" not in verification.verify(measured, base)["files"]
    assert info(measured)["quantization"]["llmquant_method"] == "minmax"
    quantize(base, measured, bits=4, group_size=32, overwrite=True)
    assert not (measured / RESULTS_FILE).exists() and "Not measured yet" in (measured / PAGE).read_text()


def test_suppression_has_its_picture(base, tmp_path):
    model = inject_outliers(tiny.build("llama"), [5, 33], 24.0)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    text = {"num_samples": 4, "max_length": 48, "batch_size": 2}
    section = {"outlier_suppression": "smooth_quant", "activations": 8}
    quantize(tmp_path / "base", tmp_path / "out", "minmax", config={"quantization": section, "calibration": text})
    page, facts = page_of(tmp_path / "out"), read_facts(tmp_path / "out")
    (picture,) = (attrs for tag, attrs in page.elements if tag == "img")
    (stage,) = facts.report["outlier_suppression"]["sizes"]
    sizes = stage["largest_over_median"][stage["worst"]["block"]][stage["worst"]["layer"]]
    assert f"{sizes['before']:.3g} times the median before and {sizes['after']:.3g} times after" in picture["alt"]
    assert (tmp_path / "out" / PICTURE).is_file() and "Outlier channels" in page.headings
    assert kinds_in(facts) == {("int-quantized", 8, True, "dynamic", False): len(facts.report["layers"])}


SYMMETRIC = {"quantization": {"minmax": {"symmetric": True}}}


@pytest.mark.parametrize(
    "options",
    [
        dict(bits=16),
        dict(bits=8, group_size=-1),
        dict(bits=2, group_size=32, container="dense", config=SYMMETRIC),
        dict(bits=4, group_size=32, format="awq"),
        dict(method="hqq", bits=4, group_size=32),
        dict(bits=8, config={"quantization": {"activations": {"bits": 8, "type": "float"}}}),
    ],
    ids=["16 bits", "channel", "dense", "awq", "hqq", "fp8"],
)
def test_every_layout_has_its_page(base, tmp_path, options):
    quantize(base, tmp_path / "out", **options)
    page, facts = page_of(tmp_path / "out"), read_facts(tmp_path / "out")
    assert foreign(page) == [] and ("Layer by layer" in page.headings) == bool(facts.report["layers"])
    assert sum(kinds_in(facts).values()) == len(facts.report["layers"])
    assert is_unedited((tmp_path / "out" / CARD).read_text())


def test_what_cannot_be_described(export, tmp_path):
    (export / RESULTS_FILE).parent.mkdir()
    (export / RESULTS_FILE).write_text("{")
    before = (export / PAGE).read_bytes()
    with pytest.raises(UsageError, match="results.json: is damaged; delete it and run llmquant evaluate again"):
        write_report(export)
    with pytest.raises(UsageError, match="holds no quantization_report.yaml"):
        write_report(tmp_path)
    assert (export / PAGE).read_bytes() == before and not [*export.glob(".*")]


def test_a_page_that_fails_leaves_the_export(base, tmp_path, monkeypatch):
    "A full disk while the page is written: the export is complete, and lies under OUT.failed."
    import llmquant.report.html as page

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "put_report", full)
    with pytest.raises(LLMQuantError, match="the export is complete and lies in .*out.failed"):
        quantize(base, tmp_path / "out", group_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    assert report_of(tmp_path / "out.failed")["verdict"].startswith("failed: ")


def test_the_pages_cost_little(made):
    start = time.process_time()
    refresh_pages(made)
    assert time.process_time() - start < 3


BROWSER = shutil.which("chromium")


@pytest.mark.skipif(not BROWSER, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(measured, tmp_path, width):
    "No sideways scrolling at the width of a telephone, letters that can be read, and every figure has a size."
    looked = """<script>onload = () => {
        const page = document.querySelector('iframe').contentDocument, all = what => [...page.querySelectorAll(what)];
        const size = e => parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b);
        const least = values => Math.min(...values);
        document.title = JSON.stringify([page.documentElement.scrollWidth, least(all('svg text').map(size)),
                                         least(all('svg, img').map(e => e.getBoundingClientRect().width))]);
    }</script>"""
    page, inside = tmp_path / "page.html", html.escape((measured / PAGE).read_text())
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe width="{width}" height="900" srcdoc="{inside}"></iframe>{looked}'
    )
    done = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    wide, letters, figures = json.loads(re.search(r"<title>(\[.*?\])</title>", done.stdout)[1])
    assert wide <= width and letters >= 8.5 and figures > 300


TABLE = """
import json, sys
import torch
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.scalar_type import ScalarType

def served(bits, symmetric, group):
    kind = ScalarType.uint(bits, 2**(bits - 1) if symmetric else None)
    config = MPLinearLayerConfig((256, 256), (256, 256), kind, torch.bfloat16, group, not symmetric)
    try: return bool(choose_mp_linear_kernel(config))
    except ValueError: return False

print(json.dumps([served(*kind) for kind in json.loads(sys.argv[1])]))
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
for words in json.loads(sys.argv[2]):
    parsed = parser.parse_args(words)
    print(json.dumps([parsed.model_tag, parsed.quantization]))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_table_and_the_commands_are_vllms(made):
    "The column of the CPU is what the installed vLLM chooses, and its own parser reads the commands."
    import shlex

    import torch

    from llmquant.evaluation.vllm_check import child_environment

    if torch.cuda.is_available():
        pytest.skip("the table's CPU column is for a machine without a GPU")
    rows = [row for row in SERVED if not row.experts and not row.activations]
    kinds = [(row.bits, row.symmetric, 64) for row in rows]
    commands = [shlex.split(command.line)[1:] for command in serve_commands(read_facts(made))]
    done = subprocess.run(
        [sys.executable, "-c", TABLE, json.dumps(kinds), json.dumps(commands)],
        capture_output=True,
        text=True,
        env=child_environment(True),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert dict(zip(kinds, lines[0])) == {kind: bool(row.cpu) for kind, row in zip(kinds, rows)}
    assert lines[1:] == [["./out", None], ["./out", "minmax"]]
    body = json.loads(shlex.split(request_command(read_facts(made)).line.replace("\\\n", ""))[-1])
    assert body["model"] == "./out"
