"""Draws the rooms of the package, from its imports, into CONTRIBUTING.md, and says what is wrong with them.

python scripts/draw_house.py
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "misdirection"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- the house: written by scripts/draw_house.py -->", "<!-- end of the house -->"

FLOORS = (
    ("cli",),
    ("hub", "playground"),
    ("report",),
    ("bundles",),
    ("auditing", "repairing", "screening"),
    ("experiment",),
    ("interpretation",),
    ("cost",),
    ("runs",),
    ("organisms",),
    ("defending",),
    ("evals",),
    ("directions",),
    ("judging",),
    ("sampling",),
    ("likelihood",),
    ("interventions",),
    ("lora",),
    ("models",),
    ("data",),
    ("ground",),
    ("statistics",),
)
"""Rooms from top to bottom; rooms of one floor may use each other one way round."""

GROUND = "ground"
"""The modules that stand in no folder."""

HEIGHT = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@dataclass(frozen=True)
class Import:
    """One module of the package that another imports, at whatever depth, for types too."""

    where: str
    """File and line."""
    room: str
    target: str


def imports(source: Path = SOURCE) -> list[Import]:
    """Every import between two rooms."""
    return [
        Import(f"{file.relative_to(source.parents[1])}:{line}", room, target)
        for file in sorted(source.rglob("*.py"))
        # The package itself only says where its names are.
        if file != source / "__init__.py"
        for room in [room_of(file.relative_to(source).parts)]
        for line, target in _targets(file, source)
        if target != room
    ]


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module, from the parts of its path below the package."""
    return parts[0] if len(parts) > 1 else GROUND


def _targets(file: Path, source: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"{file}:{node.lineno}: a relative import; write the module's whole name")
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        ours = (name.split(".") for name in names if name.startswith("misdirection."))
        rooms = {first if (source / first).is_dir() else GROUND for _, first, *_ in ours}
        yield from ((node.lineno, room) for room in sorted(rooms))


def faults(found: list[Import]) -> list[str]:
    """Arrows up, rooms without a floor, and circles."""
    unknown = sorted({room for each in found for room in (each.room, each.target)} - HEIGHT.keys())
    if unknown:
        return [f"{room}: has no floor; name it in FLOORS of {Path(__file__).name}" for room in unknown]
    up = [
        f"{each.where}: {each.room} imports {each.target}, which is above it"
        for each in found
        if HEIGHT[each.target] > HEIGHT[each.room]
    ]
    return up + [f"a circle: {' and '.join(pair)} import each other" for pair in _circles(found)]


def _circles(found: list[Import]) -> list[tuple[str, str]]:
    """Pairs of rooms of one floor that import each other: without an arrow up there can be no other circle."""
    arrows = {(each.room, each.target) for each in found}
    return [(a, b) for a, b in sorted(arrows) if a < b and (b, a) in arrows and HEIGHT[a] == HEIGHT[b]]


def draw(found: list[Import]) -> str:
    """The rooms as a Mermaid graph; an arrow that goes by way of others is left out."""
    below: dict[str, set[str]] = defaultdict(set)
    for each in found:
        below[each.room].add(each.target)
    lines = [f"    {room} --> {target}" for room in HEIGHT for target in sorted(_direct(room, below))]
    return "\n".join(["```mermaid", "graph TD", *lines, "```"])


def _direct(room: str, below: Mapping[str, set[str]]) -> set[str]:
    """The rooms that are not reached through another one."""
    return {target for target in below.get(room, ()) if not _reached(below[room] - {target}, target, below)}


def _reached(starts: set[str], target: str, below: Mapping[str, set[str]]) -> bool:
    waiting, visited = list(starts), set[str]()
    while waiting:
        room = waiting.pop()
        if room == target:
            return True
        if room not in visited:
            visited.add(room)
            waiting += below.get(room, ())
    return False


def page(text: str, picture: str) -> str:
    """The text of CONTRIBUTING.md with this picture."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{picture}\n{END}{after}"


def main() -> None:
    """Draw; exit status 1 and a line for each fault where there is one."""
    found = imports()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), draw(found)), encoding="utf-8")
    if wrong := faults(found):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
