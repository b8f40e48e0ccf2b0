"""The rooms keep their order: imports lead down, in no circle, and what must be light imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

from helpers.scripts import ROOT

# From the top down: a module may import from its own room and from those below it, never from one above.
LAYERS = [
    {"train_cls", "train_clm", "train_sft", "evaluate", "inference", "common.report", "common.prepare",
     "common.export"},
    {"common.train", "common.use"},
    {"common.measure"},
    {"common.model"},
    {"common.text"},
    {"common.data"},
    {"common.disk", "common.hub", "common.log", "common.memory", "common.options"},
    {"common.errors"},
]
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
DOOR = "common"  # common/__init__.py hands out open_run on demand


def room_of(module: str) -> str:
    """The room, or the module beside the rooms, that a dotted name belongs to."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "common" else parts[0]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the product."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(path: Path, known: set[str]) -> set[str]:
    """The product's own modules that a file imports anywhere, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in known else node.module)
    return found & known


def upward(name: str, others: set[str]) -> list[str]:
    """The imports of module `name` that lead up, or to a neighbor on the same floor that is another room."""
    here = room_of(name)
    rooms = {other: room_of(other) for other in others if other != DOOR}
    return [
        f"{name} -> {other}"
        for other, room in rooms.items()
        if room != here and FLOOR[room] < FLOOR[here] or room != here and {room, here} == LAYERS[1]
    ]


def test_imports_lead_down():
    """Every room imports from rooms below it alone; train and use do not know each other."""
    known = modules()
    found = [step for name, path in known.items() if name != DOOR for step in upward(name, imported(path, set(known)))]
    assert not found


def test_an_import_that_leads_up_is_found(tmp_path):
    """The check itself: data must not import model, nor train use."""
    known = set(modules())
    (tmp_path / "one.py").write_text("def late():\n    from common.model import base_model\n")
    assert upward("common.data.files", imported(tmp_path / "one.py", known)) == [
        "common.data.files -> common.model.base_model"
    ]
    (tmp_path / "two.py").write_text("from common.use.runs import open_run\n")
    assert upward("common.train.loop", imported(tmp_path / "two.py", known)) == ["common.train.loop -> common.use.runs"]


def test_no_circles():
    """No two modules import each other, over however many others."""
    known = modules()
    graph = {name: imported(path, set(known)) - {name} for name, path in known.items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"circles among {sorted(graph)}"


def test_scripts_and_data_import_no_torch():
    """Options and input errors come at once: whatever is checked before a model loads imports neither library."""
    light = ["train_cls", "train_clm", "train_sft", "evaluate", "inference", "common.prepare", "common.use.terminal"]
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, {', '.join(light)}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_loss_and_evaluation_import_nothing():
    """What a user changes first reads without imports in the middle."""
    for script in ("train_cls", "train_clm", "train_sft"):
        tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name in ("loss_of", "evaluate"):
            assert not [node for node in ast.walk(functions[name]) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_functions_fit_a_screen():
    """No function is longer than 80 lines, but for the three train(), whose order is their point."""
    long = [
        f"{name}.{node.name}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name != "train" and node.end_lineno - node.lineno >= 80
    ]
    assert not long


def test_rooms_say_what_they_are():
    """Every room's __init__.py is a docstring: what comes in, what goes out."""
    for room in ("data", "text", "model", "measure", "train", "use"):
        tree = ast.parse((ROOT / "common" / room / "__init__.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 1 and "What goes out" in ast.get_docstring(tree)
