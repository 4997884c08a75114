"How the API entries of the documentation look; named by `renderer` in settings.ini."
import inspect
from types import SimpleNamespace

from fastcore.docments import docments
from nbdev.showdoc import BasicMarkdownRenderer


class Table(BasicMarkdownRenderer):
    "The signature as nbdev shows it, then a table of the parameters: name, type, default, meaning"

    def _repr_markdown_(self):
        text = super()._repr_markdown_()
        if inspect.isclass(self.sym):
            text = text.replace("```python\ndef ", "```python\nclass ")
            text = text.replace("(\n    *args, **kwargs\n):", "():")  # a constructor that is object's own
        rows = [row(name, p) for name, p in docments(self.sym, full=True, returns=True).items()
                if name != "self" and p.anno is not inspect._empty]
        rows += [row(name, SimpleNamespace(anno=field.annotation, default=field.default, docment=field.description))
                 for name, field in getattr(self.sym, "model_fields", {}).items()]
        return text + "\n\n" + "\n".join(["| | Type | Default | |", "|---|---|---|---|", *rows]) if rows else text


def row(name, parameter):
    "One line of the table."
    kind = getattr(parameter.anno, "__name__", None) or str(parameter.anno)
    default = "" if parameter.default is inspect._empty else f"`{parameter.default!r}`"
    cells = [f"`{name}`", kind, default, parameter.docment or ""]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
