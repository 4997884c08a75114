"""The package's shape: which room may import which, no circles, and one meaning for each public name."""
import ast
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmquant"
ROOMS = ("cli", "pipeline", "in_memory", "report", "harness", "evaluation", "export", "serving", "outlier_suppression",
         "sequential", "plan", "quantizers", "formats", "calibration", "checkpoint", "models", "utils",
         "core")  # from the top to the floor
WINGS = {"outlier_suppression", "quantizers", "formats", "models"}
FRONT = {"registry_init", "__main__"}  # above every room; nothing imports them
FLOOR = {"__init__"}  # the version, below every room
BY_NAME = {"BaseQuantizer.quantize", "BaseQuantizer._add_vllm_compatibility", "BaseOutlierSuppressor.apply",
           "BaseHuggingFaceAdapter.save_quantized", "Registry._fill"}


def modules(folder):
    "Module name to its parsed source; the index, which nbdev writes, is left out."
    found = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        if name != "_modidx" and (name == "__init__" or not name.endswith("__init__")):
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(name, tree, known):
    "The package's own modules that a module imports, at the top or inside a function."
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("llmquant.") for alias in node.names
                        if alias.name.startswith("llmquant."))
        if not isinstance(node, ast.ImportFrom): continue
        if node.level: base = package[:len(package) - node.level + 1] + (node.module or "").split(".")
        elif (node.module or "").split(".")[0] == "llmquant": base = node.module.split(".")[1:]
        else: continue
        base = ".".join(filter(None, base))
        for alias in node.names:
            inside = f"{base}.{alias.name}" if base else alias.name
            yield inside if inside in known else base or "__init__"


def arrows(trees):
    "Pairs (importer, imported)."
    return {(name, target) for name, tree in trees.items() for target in imported(name, tree, trees) if target != name}


def height(module):
    "Smaller is higher."
    if module in FRONT: return -1
    if module in FLOOR or module == "_render": return len(ROOMS)
    return ROOMS.index(module.split(".")[0])


def circles(pairs):
    "Modules that import each other, directly or through others."
    below = defaultdict(set)
    for one, other in pairs: below[one].add(other)

    def reach(start):
        seen, todo = set(), [start]
        while todo:
            for other in below[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen
    return sorted(name for name in list(below) if name in reach(name))


def upward(pairs): return sorted((one, other) for one, other in pairs if height(other) < height(one))


def sideways(pairs):
    "Wings that touch each other."
    room = lambda module: module.split(".")[0]
    return sorted((a, b) for a, b in pairs if {room(a), room(b)} <= WINGS and room(a) != room(b))


def public_names(tree):
    "What a module defines at its top level under a public name; methods that are patched into a class do not count."
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
            names = [] if patched else [node.name]
        elif isinstance(node, ast.Assign): names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.AnnAssign): names = [node.target.id]
        else: names = []
        yield from (name for name in names if not name.startswith("_") and name != "logger")


def homonyms(trees):
    "Public names that two modules define."
    homes = defaultdict(set)
    for module, tree in trees.items():
        for name in public_names(tree): homes[name].add(module)
    return {name: sorted(found) for name, found in homes.items() if len(found) > 1}


def strangers(trees):
    "Methods that are patched into a class of another file."
    found = []
    for module, tree in trees.items():
        own = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef): continue
            if not any("patch" in ast.unparse(d) for d in node.decorator_list): continue
            cls = ast.unparse(node.args.args[0].annotation)
            if cls not in own: found.append(f"{module}: {cls}.{node.name}")
    return found


def callers_by_name(trees):
    "The methods and functions that look a function of the package up by its name."
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "by_name":
                if any(isinstance(n, ast.Call) and ast.unparse(n.func) in ("by_name", "import_module") for n in ast.walk(node)):
                    first = node.args.args[0].annotation if node.args.args else None
                    yield f"{ast.unparse(first)}.{node.name}" if first is not None else node.name


def reached_through(trees, name, attribute):
    "Modules that reach through an object to what it owns, such as `sink.writer`."
    return sorted({module for module, tree in trees.items() for node in ast.walk(tree)
                   if isinstance(node, ast.Attribute) and node.attr == attribute
                   and ast.unparse(node.value).split(".")[-1] == name})


def users(trees, function):
    "Where a function is called, as module.function."
    return sorted({f"{module}.{outer.name}" for module, tree in trees.items() for outer in tree.body
                   if isinstance(outer, ast.FunctionDef) for node in ast.walk(outer)
                   if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == function})


@pytest.fixture(scope="module")
def trees(): return modules(PACKAGE)


def test_each_room_is_known(trees):
    rooms = {name.split(".")[0] for name in trees if "." in name}
    assert rooms == set(ROOMS)


def test_no_circles(trees): assert circles(arrows(trees)) == []
def test_imports_point_down(trees): assert upward(arrows(trees)) == []
def test_wings_do_not_touch(trees): assert sideways(arrows(trees)) == []
def test_a_public_name_has_one_meaning(trees): assert homonyms(trees) == {}
def test_the_methods_of_a_class_stand_in_its_file(trees): assert strangers(trees) == []


def test_only_the_base_classes_reach_up_by_name(trees):
    assert set(callers_by_name(trees)) - {"__getattr__"} == BY_NAME


def test_the_export_sink_owns_writer_and_journal(trees): assert reached_through(trees, "sink", "writer") == []


def test_one_loop_quantizes_weight_by_weight(trees):
    "For a checkpoint and for a model in memory; the block loop, which measures, is the other one."
    loops = ["sequential.block_loop.solve", "sequential.layer.quantize_stack", "sequential.layer_loop.run_layers"]
    assert users(trees, "quantize_layer") == loops


def test_core_stays_small():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (PACKAGE / "core").glob("*.py")) <= 2000


def test_what_these_tests_would_find(tmp_path):
    "A package of four files with one fault of each kind."
    for name, text in {
        "core/a.py": "from ..cli.b import f\nLIMIT = 1\nclass C: pass\n", "cli/b.py": "from ..core import a\nLIMIT = 2\n",
        "core/c.py": "from .d import x\n@patch\ndef m(self:C): pass\n", "core/d.py": "def x():\n    from .c import m\n",
        "formats/e.py": "import llmquant.models.g\n", "models/g.py": "self.sink.writer.journal\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = modules(tmp_path)
    assert circles(arrows(found)) == ["cli.b", "core.a", "core.c", "core.d"]
    assert upward(arrows(found)) == [("core.a", "cli.b")] and sideways(arrows(found)) == [("formats.e", "models.g")]
    assert homonyms(found) == {"LIMIT": ["cli.b", "core.a"]} and strangers(found) == ["core.c: C.m"]
    assert reached_through(found, "sink", "writer") == ["models.g"]


def test_the_sidebar_stands_once():
    "nbdev reads _quarto.yml beside the notebooks, which is a link to the one at the top."
    link = PACKAGE.parent / "nbs/_quarto.yml"
    assert link.is_symlink() and link.samefile(PACKAGE.parent / "_quarto.yml")
