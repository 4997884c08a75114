"""Every public function, class and parameter of the package says what it is: that is what the API's tables show."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmquant"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("_"))


def one_line(function):
    "Whether all of a signature is on the line of its `def`."
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg, function.returns]
    here = all(part.end_lineno == function.lineno for part in every if part)
    return here and function.body[0].lineno == function.lineno + 1


def undescribed(source):
    "Names without a docstring, and parameters and fields without a comment on their lines, of what is public."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    tree, found = ast.parse(source), []
    # a comment behind a signature that is one line is read as that of what comes back
    comments -= {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and one_line(node)
    }

    def bare(node):
        return comments.isdisjoint(range(node.lineno, node.end_lineno + 1))

    def helped(field):
        return isinstance(field.value, ast.Call) and any(
            isinstance(a, ast.Constant) and isinstance(a.value, str) and a.value
            for a in [*field.value.args[1:2], *(k.value for k in field.value.keywords if k.arg == "description")])

    def look(body, above=""):
        for node in body:
            name = f"{above}{getattr(node, 'name', '')}"
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.extend([name] if not ast.get_docstring(node) else [])
                found.extend(f"{name}.{f.target.id}" for f in node.body if isinstance(f, ast.AnnAssign) and bare(f) and not helped(f))
                look(node.body, f"{name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own = node.name == "__init__"  # its class has the docstring
                if node.name.startswith("_") and not own:
                    continue
                found.extend([name] if not ast.get_docstring(node) and not own else [])
                given = node.args
                every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
                every = [a for a in every if a and a.arg not in ("self", "cls")]
                found.extend(f"{name}({a.arg})" for a in every if bare(a))

    if not ast.get_docstring(tree):
        found.append("the module")
    look(tree.body)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_names_and_parameters_are_described(path):
    missing = undescribed(path.read_text(encoding="utf-8"))
    assert not missing, f"give a docstring, or a comment behind the parameter, to {', '.join(missing)}"


def test_what_is_undescribed_is_found():
    source = '''
def whole(
    a, # one
    *rest, b:int=1, # more
): "Done."
def lacking(a, b): "One line."
def silent(): return 1
def returning(a) -> int: # what comes back
    "One."
def _private(a): return a
class Box:
    "Holds."
    size:int # of it
    place:tuple = (1,
                   2) # behind the last line
    bare:str
    def __init__(self, given): self.given = given
    def method(self,
        left, # side
        right,
    ): "Of a class."
class _Own:
    def method(self, a): return a
class Mute: pass
'''
    assert undescribed(source) == ["the module", "lacking(a)", "lacking(b)", "silent", "returning(a)", "Box.bare",
                                   "Box.__init__(given)", "Box.method(right)", "Mute"]  # fmt: skip
    assert undescribed('"Nothing."') == []
    assert len(MODULES) > 90
