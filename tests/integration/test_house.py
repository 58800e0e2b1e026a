"""The shape of the house: which folder may import which, and how large a file, a function and the loss may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "mipic_st"

GROUND = {"validation", "numerics", "processes", "codes", "files", "data", "demo", "docstrings", "plotting"}
# Who may import whom; a folder always may import its own files, and everything the public table.
MAY_IMPORT = {
    "validation": set(),
    "numerics": {"validation"},
    "processes": set(),
    "codes": {"validation"},
    "files": {"validation"},
    "data": {"validation", "files"},
    "demo": {"validation"},
    "docstrings": {"validation"},
    "plotting": {"validation", "files"},
    "encoder": GROUND,
    "losses": {*GROUND, "encoder"},
    "transforms": {*GROUND, "encoder"},
    "evaluation": {*GROUND, "encoder"},
    "advice": {*GROUND, "encoder", "transforms", "evaluation"},
    "stored": {*GROUND, "transforms"},
    "deploy": {*GROUND, "encoder", "losses", "transforms", "evaluation"},
    "cli": {*GROUND, "encoder", "losses", "transforms", "evaluation", "advice", "stored", "deploy"},
    "__main__": {"cli"},
}
# Kinds of modules that sentence-transformers models are built of: only encoder/ asks for them.
MODULES = "sentence_transformers.sentence_transformer.modules"

LONGEST_FILE, LONGEST_FUNCTION, LONGEST_LOSS, MOST_LINES = 400, 80, 350, 15_900
# What is larger, each with the reason. Best empty.
LARGE_FILES: dict[str, str] = {}
LARGE_FUNCTIONS: dict[str, str] = {}
KNOWS_MODULES: dict[str, str] = {}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    """The folder of a file, or its own name at the top level."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source, package):
    """Full names of all modules that a source text imports, at any depth, relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            name = base + (node.module or "")
            yield name.rstrip(".")
            yield from (f"{name.rstrip('.')}.{alias.name}" for alias in node.names)


def forbidden(source, room, package="mipic_st"):
    """Rooms that a source text of a room imports and may not."""
    rooms = {name.split(".")[1] for name in imported(source, package) if name.startswith("mipic_st.")}
    return sorted((rooms & MAY_IMPORT.keys()) - MAY_IMPORT[room] - {room})


def package_of(path):
    """Dotted name of the folder that a file is in."""
    return ".".join(["mipic_st", *path.relative_to(PACKAGE).parts[:-1]])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_arrows(path):
    """Lower rooms know nothing of higher ones, and losses, transforms and evaluation nothing of each other."""
    room = room_of(path)
    if room == "__init__":
        return
    assert forbidden(path.read_text(encoding="utf-8"), room, package_of(path)) == []


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("losses", "from mipic_st.transforms.rotation import Rotation", ["transforms"]),
        ("encoder", "def f():\n    import mipic_st.evaluation.store", ["evaluation"]),
        ("transforms", "from ..losses import sia", ["losses"]),
        ("evaluation", "from mipic_st import deploy", ["deploy"]),
        ("deploy", "from mipic_st.evaluation.store import EmbeddingStore", []),
    ],
)
def test_the_check_of_arrows_can_fail(room, source, found):
    """A forbidden import is seen in every spelling."""
    assert forbidden(source, room, f"mipic_st.{room}") == found


def test_every_room_is_in_the_table():
    """A new folder or file at the top level says who it may import."""
    assert {room_of(path) for path in FILES} - {"__init__"} == set(MAY_IMPORT)


def test_only_the_encoder_knows_kinds_of_modules():
    """What kind of sentence-transformers module something is, is asked in one folder."""
    asking = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if room_of(path) != "encoder"
        and any(name.startswith(MODULES) for name in imported(path.read_text(encoding="utf-8"), package_of(path)))
    }
    assert asking == set(KNOWS_MODULES)


# --- sizes ------------------------------------------------------------------------------------------------------------


def code_lines(node, source):
    """Lines of code in a function's body: without its docstring, blank lines and comments."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = source.splitlines()[body[0].lineno - 1 : node.end_lineno] if body else []
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def sizes():
    """Lines of each file, code lines of each function."""
    files, functions = {}, {}
    for path in FILES:
        name, source = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        files[name] = len(source.splitlines())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions[f"{name}:{node.name}"] = max(
                    code_lines(node, source), functions.get(f"{name}:{node.name}", 0)
                )
    return files, functions


def test_sizes():
    """No long file, no long function, a loss that one reads in one go, and a bound on the whole."""
    files, functions = sizes()
    assert {name for name, lines in files.items() if lines > LONGEST_FILE} == set(LARGE_FILES)
    assert {name for name, lines in functions.items() if lines > LONGEST_FUNCTION} == set(LARGE_FUNCTIONS)
    assert sum(files.values()) <= MOST_LINES
    loss = next(
        node
        for node in ast.parse((PACKAGE / "losses" / "mipic.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "MIPICLoss"
    )
    assert loss.end_lineno - loss.lineno + 1 <= LONGEST_LOSS


def test_the_count_of_code_lines_counts():
    """Docstring, comments and blank lines are no code; a call over four lines is four."""
    source = 'def f():\n    """Doc."""\n    # why\n\n    return g(\n        1,\n        2,\n    )\n'
    assert code_lines(ast.parse(source).body[0], source) == 4
