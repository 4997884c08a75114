"""Formulas of the site as MathML, which a browser shows without a script and without a network.

smalldocs leaves TeX in the pages and asks for KaTeX from a server; latex2mathml takes its place when the site is built.
"""
import json
import re
from html import unescape
from importlib.resources import files
from xml.etree import ElementTree

from fontTools.ttLib import TTFont
from latex2mathml.converter import convert

TEX = re.compile(r'<span class="math (?P<kind>inline|display)">\\[(\[](?P<tex>.*?)\\[)\]]</span>', re.S)
MATH = re.compile(r"<math\b.*?</math>", re.S)
KATEX = re.compile(r'<(?:link|script)\b[^>]*/npm/katex@[^>]*>(?:</script>)?\n?')
COMMAND = re.compile(r"\\[A-Za-z]+")
# browsers leave a digit as it is where mathvariant asks for another alphabet: the letter itself has to stand there
BLACKBOARD_ONE = re.compile(r'<mn mathvariant="double-struck">1</mn>')


def mathml(
    tex,  # a formula
    display=False,  # on a line of its own
):
    "The formula as MathML; a command that the converter does not know stays in it (see `unknown_commands`)."
    return BLACKBOARD_ONE.sub("<mn>\U0001d7d9</mn>", convert(tex, display="block" if display else "inline"))


def words_of(made):
    "What MathML shows, without its marks."
    return "".join(ElementTree.fromstring(made).itertext())


def write_formulas(
    out,  # the folder of the site
):
    "Replace all TeX in the pages and in the index of the search, and KaTeX by a font with formulas' letters."
    search = json.loads((out / "search.json").read_text(encoding="utf-8"))
    for page in out.rglob("*.html"):
        text, words = page.read_text(encoding="utf-8"), {}

        def written(found, words=words):
            tex = unescape(found["tex"])
            made = mathml(tex, found["kind"] == "display")
            if COMMAND.search(tex):
                words[tex] = words_of(made)
            return f'<span class="math {found["kind"]}">{made}</span>'

        page.write_text(KATEX.sub("", TEX.sub(written, text)), encoding="utf-8")
        name = page.relative_to(out).as_posix()
        for entry in search:
            if entry["href"].partition("#")[0] == name:
                for tex in sorted(words, key=len, reverse=True):
                    entry["text"] = entry["text"].replace(tex, words[tex])
    (out / "search.json").write_text(json.dumps(search, ensure_ascii=False), encoding="utf-8")
    write_font(out / "site_libs")


def unknown_commands(
    out,  # the folder of the site
):
    "Formulas that a reader would see as TeX."
    for page in sorted(out.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        for made in [*MATH.findall(text), *TEX.findall(text)]:
            if unknown := COMMAND.findall("".join(made)):
                names = ", ".join(unknown)
                yield f"{page.relative_to(out)}: latex2mathml does not know {names}: write the formula without"


def write_font(
    folder,  # where styles.css looks for it
):
    "STIX Two Math, under the Open Font License: parentheses that grow, for readers whose system has no such font."
    font = TTFont(files("ziamath") / "fonts/STIXTwoMath-Regular.ttf")
    font.flavor = "woff"
    font.save(folder / "STIXTwoMath.woff")
