"The documentation site in headless Chromium: each page at a telephone's width, its formulas and pictures, the search."
import http.server
import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from llmquant.pipeline.run import quantize

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from docs import FINGERPRINT, fingerprint, problems_of  # noqa: E402

SITE = ROOT / "_docs"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}

# What a page shows, asked in the page: elements that stand out at the right and in no box that scrolls, TeX outside of
# code, formulas and pictures that take no place, pictures without words.
AUDIT = r"""() => {
  const name = e => [e.tagName.toLowerCase(), e.id, e.className, e.textContent.trim().slice(0, 60)].join(" ");
  const out = e => e.getBoundingClientRect().right > innerWidth + 1;
  const scrolls = e => e && e !== document.body &&
    ((/auto|scroll/.test(getComputedStyle(e).overflowX) && !out(e)) || scrolls(e.parentElement));
  const empty = e => { const r = e.getBoundingClientRect(); return !r.width || !r.height; };
  const shown = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !empty(e));
  const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), tex = [];
  const command = /\\[a-zA-Z]{2,}(?![a-zA-Z0-9])|\\[([]|\$\$|\$[^$]+\$/;
  while (texts.nextNode()) {
    const text = texts.currentNode;
    if (!text.parentElement.closest("code, pre, script, style") && command.test(text.data)) tex.push(text.data);
  }
  const formulas = [...document.querySelectorAll("math")];
  const pictures = [...document.querySelectorAll("img, svg[role=img]")];
  const blank = e => empty(e) || (e.tagName == "IMG" && !e.naturalWidth);
  const words = e => (e.getAttribute("alt") || e.getAttribute("aria-label") || "").trim();
  return {
    wide: shown.filter(e => out(e) && !scrolls(e.parentElement)).map(name),
    scroll: document.documentElement.scrollWidth - innerWidth,
    tex, formulas: formulas.length, pictures: pictures.length,
    unseen: [...formulas.filter(empty), ...pictures.filter(blank)].map(name),
    silent: pictures.filter(e => !words(e)).map(e => e.outerHTML.slice(-80)),
  };
}"""


CUT = """[...document.querySelectorAll(".math.display")].filter(e => e.scrollWidth > e.clientWidth)
  .map(e => e.textContent)"""


@pytest.fixture(scope="module")
def site():
    "The folder of the site; built here, which takes a minute, unless `make docs` has built it from the same sources."
    stored = SITE / FINGERPRINT
    if not stored.exists() or stored.read_text() != fingerprint(ROOT):
        done = subprocess.run([sys.executable, "tools/docs.py", "--strict"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return SITE


@pytest.fixture(scope="module")
def address(site):
    "Where the site is served: the search asks for its index, which a browser refuses to read from a file."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    "Debian's Chromium, or another one that is installed."
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    reason = "no Chromium on this machine to open the site in: apt-get install chromium"
    if not program and os.environ.get("CI") == "true": pytest.fail(reason)
    if not program: pytest.skip(reason)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program)
        yield started
        started.close()


@pytest.fixture(scope="module")
def tab(browser, address):
    "A tab that keeps what went wrong in it: script errors, files that did not come, requests to other machines."
    tab = browser.new_page(viewport=PHONE)
    tab.wrong = []
    tab.on("pageerror", lambda error: tab.wrong.append(f"script error: {error}"))
    tab.on("console", lambda message: message.type == "error" and tab.wrong.append(f"console: {message.text}"))
    tab.on("requestfailed", lambda request: request.failure == "net::ERR_ABORTED" or  # the next page was opened
           tab.wrong.append(f"{request.failure}: {request.url[:100]}"))
    tab.on("response", lambda answer: answer.status >= 400 and tab.wrong.append(f"{answer.status}: {answer.url}"))
    tab.on("request", lambda request: request.url.startswith((address, "data:")) or
           tab.wrong.append(f"asks another machine: {request.url}"))
    return tab


@pytest.fixture(scope="module")
def pages(site, tab, address):
    "What every page shows at a telephone's width, and what went wrong in it."
    found = {}
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        tab.wrong.clear()
        tab.goto(f"{address}/{name}")
        found[name] = tab.evaluate(AUDIT) | {"wrong": list(tab.wrong), "cut": []}
        if found[name]["formulas"]:
            tab.set_viewport_size(DESK)
            found[name]["cut"] = tab.evaluate(CUT)
            tab.set_viewport_size(PHONE)
    return found


def faults(pages, kind): return {name: page[kind] for name, page in pages.items() if page[kind]}


def test_every_notebook_is_a_page_that_opens(pages):
    "No script error, no missing file, nothing asked of another machine."
    notebooks = [path.relative_to(ROOT / "nbs") for path in (ROOT / "nbs").rglob("*.ipynb")]
    assert set(pages) == {path.with_suffix(".html").as_posix() for path in notebooks
                          if not any(part.startswith((".", "_")) for part in path.parts)}
    assert not faults(pages, "wrong")


def test_no_page_is_wider_than_a_telephone(pages):
    "Tables, code and formulas scroll in boxes of their own, or wrap."
    assert not faults(pages, "wide") and not faults(pages, "scroll")


def test_formulas_are_formulas(pages):
    "MathML that takes place on the page and, on a desk, is seen whole; no TeX is left in the text."
    assert not faults(pages, "tex") and not faults(pages, "unseen") and not faults(pages, "cut")
    assert pages["quantizers/gptq_quantizer.html"]["formulas"] > 10


def test_every_picture_has_words(pages):
    assert sum(page["pictures"] for page in pages.values()) > 30
    assert not faults(pages, "silent")


def test_links_lead_somewhere(site):
    "Within a page, too; those to other sites are not followed."
    assert problems_of(site.resolve()) == []


@pytest.mark.parametrize("page", ["index", "results", "glossary", "extending.zh", "quantizers/gptq_quantizer"])
def test_no_page_is_wider_than_a_desk(tab, address, page):
    tab.set_viewport_size(DESK)
    tab.goto(f"{address}/{page}.html")
    shown = tab.evaluate(AUDIT)
    assert not shown["wide"] and shown["scroll"] <= 0


def plain(text): return re.sub(r"[-\s]+", " ", text).lower()


@pytest.mark.parametrize("words", [
    "activation quantization", "weight-only", "round-to-nearest", "RTN", "act-order", "resume", "outlier channel",
    "SmoothQuant", "GPTQ", "calibration data", "group size", "zero point", "sequential pipeline", "perplexity",
    "KL divergence", "lm-eval",
])
def test_search_finds_the_words_of_the_field(tab, address, words):
    "Typed as a reader types them; one of the first five answers shows them, and leads to a page that holds them."
    tab.set_viewport_size(DESK)
    tab.goto(f"{address}/index.html")
    tab.locator(".smalldocs-search input").first.fill(words)
    answers = tab.locator(".search-result")
    answers.first.wait_for()
    shown = [plain(text) for text in answers.all_inner_texts()[:5]]
    place = next((place for place, text in enumerate(shown) if plain(words) in text), None)
    assert place is not None, shown
    answers.nth(place).click()
    assert plain(words) in plain(tab.locator("main").inner_text())


def test_an_api_page_shows_each_parameter(tab, address):
    "Name, type, default and what it is for, of the function that the command line calls."
    tab.goto(f"{address}/pipeline/run.html")
    rows = tab.locator("section#quantize table tr, #quantize ~ table tr, #quantize ~ * table tr")
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    shown = {row[0].strip("* "): row for row in cells if row}
    taken = inspect.signature(quantize).parameters.values()
    for name in [parameter.name for parameter in taken if parameter.kind != parameter.VAR_KEYWORD]:
        assert len(shown[name]) > 2 and shown[name][-1].strip(), name


@pytest.mark.parametrize("page", ["extending", "guide/new_quantizer", "guide/new_model", "guide/new_suppressor",
                                  "guide/questions"])
def test_the_chinese_page_is_chinese(tab, address, page):
    "It says its language to a reader's voice and hyphenation, and its text is Chinese."
    tab.goto(f"{address}/{page}.zh.html")
    text = tab.locator("main").inner_text()
    assert tab.evaluate("document.querySelector('main').closest('[lang]').lang").startswith("zh")
    assert len(re.findall(r"[\u4e00-\u9fff]", text)) > 600 and "\ufffd" not in text
