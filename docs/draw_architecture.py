"""Draw docs/images/architecture.svg from the imports: python docs/draw_architecture.py

Rooms stand on the floor above the highest room that they import. ``--check`` draws nothing and
fails where the picture on file is not that of the imports.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tempbalance"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
# The network at rest, drawn beside the stair of a network in training.
WING = ("plots", "analysis", "pruning", "runs", "cli")
WIDTH, HEIGHT, STEP_X, STEP_Y, MARGIN = 132, 48, 168, 92, 28


def arrows() -> dict[str, set[str]]:
    """The rooms of the package, and which other rooms each imports, now or later."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        found.setdefault(room, set()).update(_imported(path) - {room})
    return {room: rooms & found.keys() for room, rooms in found.items()}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tempbalance"):
            inner = (node.module or "").removeprefix("tempbalance").strip(".")
            names.update([inner] if inner else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            names.update(a.name.removeprefix("tempbalance.") for a in node.names)
    return {name.partition(".")[0] for name in names}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of every room: 0 for those that import no other.

    Raises:
        ValueError: for a circle.
    """
    found: dict[str, int] = {}

    def floor(room: str, above: tuple[str, ...]) -> int:
        if room in above:
            raise ValueError(f"rooms import each other: {' -> '.join((*above, room))}")
        if room not in found:
            found[room] = 1 + max((floor(r, (*above, room)) for r in graph[room]), default=-1)
        return found[room]

    for room in graph:
        floor(room, ())
    return found


def places(graph: dict[str, set[str]]) -> dict[str, tuple[int, int]]:
    """Column and floor of every room: the stair left, the wing right."""
    level = floors(graph)
    rows: dict[tuple[bool, int], list[str]] = {}
    for room in sorted(graph):
        rows.setdefault((room in WING, level[room]), []).append(room)
    widest = max(len(row) for (wing, _), row in rows.items() if not wing)
    out = {}
    for (wing, floor), row in rows.items():
        first = widest if wing else widest - len(row)  # the stair is flush on its right
        out.update({room: (first + i, floor) for i, room in enumerate(row)})
    return out


def shown(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Arrows that no longer way says already."""

    def reach(room: str) -> set[str]:
        return set().union(*({r} | reach(r) for r in graph[room])) if graph[room] else set()

    return [
        (room, below)
        for room, rooms in sorted(graph.items())
        for below in sorted(rooms)
        if not any(below in reach(other) for other in rooms - {below})
    ]


def draw() -> str:
    """The picture, as SVG."""
    graph = arrows()
    where = places(graph)
    columns = 1 + max(x for x, _ in where.values())
    top = max(y for _, y in where.values())
    width, height = columns * STEP_X + MARGIN, (top + 1) * STEP_Y + 2 * MARGIN

    def corner(room: str) -> tuple[int, int]:
        x, y = where[room]
        return MARGIN + x * STEP_X, MARGIN + (top - y) * STEP_Y

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#8a8a8a"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for room, below in shown(graph):
        (x1, y1), (x2, y2) = corner(below), corner(room)
        lines.append(
            f'<line x1="{x1 + WIDTH // 2}" y1="{y1}" x2="{x2 + WIDTH // 2}" y2="{y2 + HEIGHT}" '
            'stroke="#8a8a8a" stroke-width="1.3" marker-end="url(#head)"/>'
        )
    for room in sorted(where):
        x, y = corner(room)
        fill = "#fdebd9" if room in WING else "#dcebf7"
        lines.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" '
            'stroke="#4a4a4a"/>'
        )
        lines.append(
            f'<text x="{x + WIDTH // 2}" y="{y + HEIGHT // 2 + 5}" text-anchor="middle">'
            f"{room}</text>"
        )
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="draw nothing; fail if it differs")
    picture = draw()
    if parser.parse_args().check:
        return int(not PICTURE.exists() or PICTURE.read_text() != picture)
    PICTURE.write_text(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
