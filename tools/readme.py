"README.md out of the processed index notebook: Markdown that GitHub shows, with plots as files and links to the site."
import base64
import re
from pathlib import Path

ALERTS = {"note": "NOTE", "tip": "TIP", "important": "IMPORTANT", "warning": "WARNING", "caution": "CAUTION"}
CALLOUT = re.compile(r"^:::+ *\{\.callout-(\w+)([^}]*)\}\n(.*?)^:::+ *$", re.S | re.M)
PAGE_LINK = re.compile(r"\]\((?!https?:)([^)\s#]+)\.(?:ipynb|html)(#[^)\s]*)?\)")
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)


def callout(found):
    "A Quarto callout as a GitHub alert."
    title = re.search(r'title="([^"]*)"', found[2])
    lines = ([f"**{title[1]}**", ""] if title else []) + found[3].strip().splitlines()
    return "\n".join([f"> [!{ALERTS[found[1]]}]", *[f"> {line}".rstrip() for line in lines]])


def prose(source, site):
    "A Markdown cell: callouts as alerts, links between notebooks as links to the site."
    source = CALLOUT.sub(callout, source)
    return PAGE_LINK.sub(lambda m: f"]({site}{m[1]}.html{m[2] or ''})", source)


def figure(data, alt, folder, number):
    "Write a plot beside README.md and link to it."
    folder.mkdir(exist_ok=True)
    file = folder / f"readme-{number}.png"
    file.write_bytes(base64.b64decode("".join(data)))
    return f"![{alt}]({folder.name}/{file.name})"


def outputs(cell, alt, folder, taken):
    "What a cell printed, showed and plotted."
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            taken.append(1)
            yield figure(data["image/png"], alt, folder, len(taken))
        elif "text/markdown" in data:
            yield "".join(data["text/markdown"])
        else:
            text = "".join(data.get("text/plain", output.get("text", ""))).rstrip()
            if text:
                yield f"```text\n{text}\n```"


def blocks(cells, site, folder):
    "The blocks of README.md, in order."
    taken = []
    for cell in cells:
        if cell.cell_type == "markdown":
            yield prose(cell.source, site)
        elif cell.cell_type == "code":
            directives = "\n".join(DIRECTIVE.findall(cell.source))
            alt = re.search(r"fig-alt: *(.*)", directives)
            code = DIRECTIVE.sub("", cell.source).strip()
            if code and not re.search(r"echo: *false", directives):
                yield f"```python\n{code}\n```"
            yield from outputs(cell, alt[1].strip().strip('"') if alt else "plot", folder, taken)


def readme(
    notebook,  # processed by nbdev, its first cell the front matter
    site: str,  # address of the site, ending in a slash
    folder: Path,  # where plots go
) -> str:  # the text of README.md
    "The index notebook as GitHub's Markdown."
    front = dict(re.findall(r"^(title|description): *(.*)$", notebook.cells[0].source, re.M))
    front = {key: value.strip().strip("'\"") for key, value in front.items()}
    note = "<!-- Written by `make docs` from nbs/index.ipynb; edit that. -->"
    body = "\n\n".join(block.strip() for block in blocks(notebook.cells[1:], site, folder) if block.strip())
    return f"# {front['title']}\n\n> {front['description']}\n\n{note}\n\n" + re.sub(r"\n{3,}", "\n\n", body) + "\n"
