"""The rooms of the package: which may use which, and rules that hold in all of them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import draw_house

SOURCE = draw_house.SOURCE
MODULES = sorted(SOURCE.rglob("*.py"))
ROOMS = [folder for floor in draw_house.FLOORS for folder in floor if folder != draw_house.GROUND]
BANNED = {"bench", "carriers", "spoken", "dealt", "study"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(SOURCE)}:{line}"


def test_every_arrow_points_down():
    assert draw_house.faults(draw_house.imports()) == []


def test_the_picture_is_todays():
    text = draw_house.PAGE.read_text()
    assert draw_house.page(text, draw_house.draw(draw_house.imports())) == text, "run scripts/draw_house.py"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_owns_and_holds_nothing_else(room):
    tree = parsed(SOURCE / room / "__init__.py")
    assert len((ast.get_docstring(tree) or "").split()) > 8
    # `cli` has the entry point, `data` the names that everybody reads texts by.
    assert room in ("cli", "data") or len(tree.body) == 1


def test_a_fault_is_seen(tmp_path):
    files = {
        "models/load.py": "def load():\n    from misdirection.report.page import write\n",
        "report/page.py": "import misdirection.models.load\n",
        "auditing/a.py": "from misdirection.repairing import b\n",
        "repairing/b.py": "from misdirection.auditing import a\n",
    }
    for name, text in files.items():
        (tmp_path / "src" / "misdirection" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / "misdirection" / name).write_text(text)
    up, circle = draw_house.faults(draw_house.imports(tmp_path / "src" / "misdirection"))
    assert up.endswith("models/load.py:2: models imports report, which is above it")
    assert circle == "a circle: auditing and repairing import each other"


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every identifier that a module gives to something."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name


def test_no_signed_number_can_read_minus_zero():
    found = [
        where(path, number)
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r":\+\.\d[f%]", line)
    ]
    assert found == []


def test_no_name_is_a_private_word():
    found = [
        f"{where(path, line)}: {name}"
        for path in MODULES
        for line, name in names(parsed(path))
        if BANNED & set(re.findall(r"[a-z]+", re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()))
    ]
    assert found == []
    assert [str(path) for path in MODULES if path.stem in BANNED] == []


@pytest.mark.parametrize(
    ("text", "allowed", "instead"),
    [
        ("rmtree", {"files.py"}, "a function of files.py, which proves that the folder is ours"),
        ("raise MisdirectionError(", set(), "the class that says who must act"),
        ("splitlines()[0]", set(), "errors.first_line"),
        ("pickle.load", set(), "safetensors, Parquet or JSON"),
    ],
)
def test_what_has_one_owner_is_written_once(text, allowed, instead):
    found = [
        where(path, number)
        for path in MODULES
        if str(path.relative_to(SOURCE)) not in allowed
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if text in line
    ]
    assert found == [], f"use {instead}"
