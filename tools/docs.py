"""Build the documentation site (_docs/) and README.md from nbs/ and _quarto.yml, without the Quarto binary.

nbdev processes the notebooks as it does for Quarto (API entries, hidden cells, links to names); smalldocs, a reader of
_quarto.yml in pure Python, turns them into the site, in which formulas become MathML.
Then every link of every page is followed, and every picture must have alternative text.
"""
import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import yaml
from execnb.nbio import mk_cell, read_nb, write_nb
from formulas import unknown_commands, write_formulas
from nbdev.config import get_config
from nbdev.doclinks import _build_modidx, nbglob
from nbdev.processors import FilterDefaults, exec_show_docs
from readme import readme

FINGERPRINT = "sources.sha256"
LONG_LINE = 110
OUTPUT = re.compile(r'(<div class="cell-output[^"]*">\s*)<pre><code>(.*?)</code></pre>', re.S)
IMG = re.compile(r"<img\b[^>]*>")
LINK = re.compile(r'(?:href|src)="([^"]+)"')
FENCE = re.compile(r"^```.*?^```$", re.S | re.M)
LINKED_NAME = re.compile(r"\[(`[^`\]]+`)\]\([^)\s]+\)")
LINK_OF_LINKS = re.compile(r"\[((?:[^\[\]]|\[`[^`\]]+`\]\([^)\s]+\))+)\](?=\()")


def needed_for_docs(cell):
    "What must run so that `show_doc` finds its objects: exported cells, `show_doc` itself, imports of the package."
    if cell.cell_type != "code" or not cell.parsed_():
        return ""
    exported = cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"}
    if exported or re.search(r"^show_doc", cell.source, re.M):
        return cell.source
    imports = [node for node in cell.parsed_() if isinstance(node, ast.ImportFrom)]
    return "\n".join(ast.unparse(node) for node in imports if (node.module or "").startswith("llmquant"))


class RunForDocs(exec_show_docs):
    "nbdev runs any cell that holds an import, with all that it does besides; this runs the package's imports alone."

    def __call__(self, cell):
        code = needed_for_docs(cell) if self.nb.has_docs_ else ""
        if code and code == cell.source:
            self.k.cell(cell)
        elif code:
            self.k.run(code)
        if self.k.exc:
            raise RuntimeError(f"the documentation needs this cell, and it fails:\n{code}") from self.k.exc


class Docs(FilterDefaults):
    "nbdev's processors, with our way of running cells."

    def base_procs(self):
        return [RunForDocs if proc is exec_show_docs else proc for proc in super().base_procs()]


FIRST_CELL = re.compile(r"(?P<title># [^\n]*)\n+(?P<description>(?:>[^\n]*\n?)*)"
                        r"(?P<settings>\s*(?:- [\w-]+: [^\n]*\n?)*)(?P<rest>.*)", re.S)


def split_first_cell(notebook):
    "nbdev makes the front matter out of the first cell and drops what else it holds: give the rest a cell of its own."
    first = notebook.cells[0]
    found = FIRST_CELL.fullmatch(first.source) if first.cell_type == "markdown" else None
    if not found:
        return
    description = " ".join(line.lstrip("> ") for line in found["description"].splitlines())
    if found["rest"].strip():
        notebook.cells.insert(1, mk_cell(found["rest"].strip(), "markdown"))
    first.source = f"{found['title']}\n\n> {description}\n\n{found['settings'].strip()}".strip()
    for number, cell in enumerate(notebook.cells):
        cell.idx_ = number


def unlinked_code(text):
    "Markdown without links in its code blocks: nbdev links names in a signature's comments, where they stay text."
    return FENCE.sub(lambda block: LINKED_NAME.sub(r"\1", block[0]), text)


def unnested_links(text):
    "Markdown without links inside the text of a link: nbdev links every name in backticks, there as well."
    return LINK_OF_LINKS.sub(lambda link: LINKED_NAME.sub(r"\1", link[0]), text)


def unlink(notebook):
    "Apply `unnested_links` to prose and `unlinked_code` to what cells show as Markdown."
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = unnested_links(cell.source)
        for output in cell.get("outputs", []):
            shown = output.get("data", {})
            if "text/markdown" in shown:
                shown["text/markdown"] = unlinked_code("".join(shown["text/markdown"]))


def process(source, target):
    "Process one notebook as nbdev does before it calls Quarto."
    notebook = read_nb(source)
    split_first_cell(notebook)
    Docs()(notebook)
    unlink(notebook)
    front = notebook.cells[0]
    if front.cell_type == "raw":
        front.source = re.sub(r"^output-file:.*\n", "", front.source, flags=re.M)
    write_nb(notebook, target)


def process_all(nbs, target):
    "Process all notebooks, each in a process of its own, for they fill the same registries; yield what failed."
    import torch  # noqa: F401  once, before the forks, not once in each

    os.environ.update(IN_TEST="1", TQDM_DISABLE="1", MPLBACKEND="agg")
    for source in sorted(nbglob(nbs, file_glob="", as_path=True)):
        place = target / source.relative_to(nbs)
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".ipynb":
            shutil.copy(source, place)
            continue
        child = os.fork()
        if child == 0:
            process(source, place)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            yield f"{source.relative_to(nbs)}: could not be processed, see above"


def listed(contents):
    "The pages that a sidebar names."
    for item in contents:
        if isinstance(item, str):
            yield item
        elif "href" in item:
            yield item["href"]
        else:
            yield from listed(item.get("contents", []))


def unlisted(cfg, quarto):
    "Notebooks that no sidebar names: nobody would find them."
    sidebars = quarto["website"]["sidebar"]
    sidebars = sidebars if isinstance(sidebars, list) else [sidebars]
    known = {page for sidebar in sidebars for page in listed(sidebar["contents"])}
    pages = [p.relative_to(cfg.nbs_path).as_posix() for p in nbglob(cfg.nbs_path, as_path=True)]
    return [f"{page}: in no sidebar of _quarto.yml" for page in sorted(pages) if page not in known]


def make_relative(out, site):
    "Turn nbdev's absolute links into relative ones at every depth."
    for page in out.rglob("*.html"):
        up = "../" * (len(page.relative_to(out).parts) - 1)
        text = page.read_text(encoding="utf-8").replace(f'href="{site}', f'href="{up or "./"}')
        page.write_text(text, encoding="utf-8")


def wrap_long_lines(out):
    "Mark outputs with a line longer than any screen, messages as a rule: styles.css wraps those, and not tables."
    def marked(found):
        lines = unescape(found[2]).splitlines()
        long = max(map(len, lines), default=0) > LONG_LINE
        return found[0].replace("<pre>", '<pre class="long-lines">', 1) if long else found[0]

    for page in out.rglob("*.html"):
        page.write_text(OUTPUT.sub(marked, page.read_text(encoding="utf-8")), encoding="utf-8")


def broken_links(out):
    "Links of the site that lead nowhere: a missing file, or a missing place in a page."
    ids = {page: set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8"))) for page in out.rglob("*.html")}
    for page in sorted(ids):
        for link in sorted(set(LINK.findall(page.read_text(encoding="utf-8")))):
            link = unquote(unescape(link))
            if re.match(r"[a-z]+:|//", link):
                continue
            name, _, place = link.partition("#")
            target = (page.parent / name.partition("?")[0]).resolve() if name else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (place and target in ids and place not in ids[target]):
                yield f"{page.relative_to(out)}: the link {link} leads nowhere"


def pictures_without_text(out):
    "Pictures that a reader who does not see them learns nothing about."
    for page in sorted(out.rglob("*.html")):
        for number, picture in enumerate(IMG.findall(page.read_text(encoding="utf-8")), 1):
            if not re.search(r'\balt="\s*[^"\s]', picture):
                yield (f"{page.relative_to(out)}: picture {number} has no alternative text; give its cell "
                       "#| fig-alt, and quote options that hold a colon")


def problems_of(out):
    "What is wrong with the pages as they are written."
    return [*broken_links(out), *pictures_without_text(out), *unknown_commands(out)]


def fingerprint(root):
    "A digest of all that the site is made of, stored with it, so that a test knows whether it has to build one."
    files = [*(root / "nbs").rglob("*"), *(root / "llmquant").rglob("*.py"),
             root / "_quarto.yml", root / "settings.ini",
             *(root / "tools" / f"{name}.py" for name in ("docs", "formulas", "readme"))]
    made_of = [path for path in files if path.is_file() and ".ipynb_checkpoints" not in path.parts]
    digest = hashlib.sha256()
    for path in sorted(made_of):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def main():
    "Build the site and README.md."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="fail on any warning, unlisted page or broken link")
    given = parser.parse_args()
    cfg = get_config()
    root, processed, out = Path(cfg.config_path), Path(cfg.config_path) / "_proc", Path(cfg.doc_path)
    site = f"{cfg.doc_host}{cfg.doc_baseurl}/"
    for folder in (processed, out):
        shutil.rmtree(folder, ignore_errors=True)
    _build_modidx()
    made_of = fingerprint(root)
    failed = list(process_all(cfg.nbs_path, processed))
    if failed:
        sys.exit("\n".join(failed))
    quarto = root / "_quarto.yml"
    shutil.copy(quarto, processed / "_quarto.yml")
    text = readme(read_nb(processed / cfg.readme_nb), site, root / "images")
    (root / "README.md").write_text(text, encoding="utf-8")
    render = [Path(sys.executable).with_name("smalldocs"), "render", "--quiet", *["--strict"] * given.strict, processed]
    done = subprocess.run(render)
    if done.returncode:
        sys.exit(done.returncode)
    make_relative(processed / out.name, site)
    wrap_long_lines(processed / out.name)
    write_formulas(processed / out.name)
    shutil.move(processed / out.name, out)
    (out / FINGERPRINT).write_text(made_of)
    problems = [*unlisted(cfg, yaml.safe_load(quarto.read_text(encoding="utf-8"))), *problems_of(out.resolve())]
    print("\n".join([*problems, f"{out.name}: {len(list(out.rglob('*.html')))} pages, {len(problems)} problems"]))
    sys.exit(1 if given.strict and problems else 0)


if __name__ == "__main__":
    main()
