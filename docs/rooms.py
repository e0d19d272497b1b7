"""Read the imports of the package, hold them against the order in docs/architecture.md, and draw them.

    python docs/rooms.py                # what is against the order; nothing, if all is well
    python docs/rooms.py --draw         # docs/images/rooms.png

A room is a folder of the package, or a file beside the folders.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "linearize"
APART = ("families", "planning")  # folders whose own folders are rooms, too


def room_of(module: str) -> str:
    """The room of a module, by its dotted name.

    Example:
        >>> room_of("linearize.families.blocks.fit"), room_of("linearize.graph.walk"), room_of("linearize.collapse")
        ('families/blocks', 'graph', 'collapse')
    """
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    if parts[0] in APART and len(parts) > 2:
        return "/".join(parts[:2])
    if parts[0] == "families" and parts[-1] == "registry":
        return "families/registry"
    return parts[0]


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name; a folder by its `__init__`."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Names of the package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name in known)


def imports() -> dict[tuple[str, str], list[str]]:
    """For each pair of rooms, the imports of the first from the second, as "file -> module"."""
    known, found = modules(), dict[tuple[str, str], list[str]]()
    for name, path in known.items():
        for other in imported(path, known):
            pair = (room_of(name), room_of(other))
            if pair[0] != pair[1]:
                found.setdefault(pair, []).append(f"{path.relative_to(ROOT)} -> {other}")
    return found


def circles() -> list[list[str]]:
    """Groups of modules that import one another in a circle."""
    known = modules()
    graph = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:  # Tarjan's strongly connected components
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            if len(stack) - place > 1:
                found.append(stack[place:])
            del stack[place:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


def order() -> list[str]:
    """The rooms in the order of docs/architecture.md, from the ground up."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("## The rooms, from the ground up", 1)[1].split("\n## ", 1)[0]
    return [name for line in table.splitlines() if line.startswith("| `") for name in _names(line)]


def _names(line: str) -> list[str]:
    return [name.removesuffix("/") for name in re.findall(r"`([^`]+)`", line.split("|")[1])]


def against() -> list[str]:
    """Imports that go up, rooms that the page does not list, and rooms that are listed and do not exist."""
    places = {room: place for place, room in enumerate(order())}
    rooms = {room_of(name) for name in modules()}
    found = [f"{room} is not in docs/architecture.md" for room in sorted(rooms - places.keys())]
    found += [f"docs/architecture.md lists {room}, which is not there" for room in sorted(places.keys() - rooms)]
    for (lower, upper), lines in imports().items():
        if places.get(lower, 0) < places.get(upper, 0):
            found += [f"{lower} stands below {upper}: {line}" for line in lines]
    return found


def draw(path: Path) -> None:
    """Rooms as boxes on their floors, imports as lines that go down."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    pairs = set(imports())
    below = {room: {b for a, b in pairs if a == room} for room in order()}
    floors: dict[str, int] = {}
    for room in order():
        floors[room] = 1 + max((floors[other] for other in below[room]), default=-1)
    rows = [[room for room in order() if floors[room] == floor] for floor in range(1 + max(floors.values()))]
    figure = Figure(figsize=(13, 0.72 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    spots = {}
    for floor, row in enumerate(rows):
        for place, room in enumerate(row):
            spots[room] = ((place + 0.5) / len(row), floor)
    for upper, lower in sorted(pairs):
        (x, y), (u, v) = spots[upper], spots[lower]
        axes.plot([x, u], [y, v], color="#2166ac", alpha=0.13, linewidth=1, zorder=1)
    for room, (x, y) in spots.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "#2166ac"}
        axes.text(x, y, room, ha="center", va="center", fontsize=9, color="#333333", bbox=box, zorder=2)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axis("off")
    axes.set_title("Rooms of the package: each imports only from floors below its own", fontsize=10, loc="left")
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)  # few colours: a much smaller file


def main() -> None:
    """Say what is against the order, or draw."""
    if "--draw" in sys.argv:
        draw(ROOT / "docs" / "images" / "rooms.png")
        return
    wrong = [*against(), *(f"a circle: {', '.join(circle)}" for circle in circles())]
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
