"""Tables for a person: rich ones on a terminal, plain text wherever else the output goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tempbalance.analysis.compare import Change, Comparison
from tempbalance.analysis.report import Report
from tempbalance.analysis.text import outcomes
from tempbalance.measure.measurement import LayerRecord, Outcome

if TYPE_CHECKING:
    from rich.console import Console

_ABSENT = "-"


def print_report(report: Report, sort: str = "depth") -> None:
    """The layers of a report, with its summary, on stdout; ``sort`` by depth, name or alpha."""
    console = _terminal()
    ordered = replace(report, layers=tuple(_sorted(report, sort)))
    if console is None or not report.layers:
        sys.stdout.write(f"{ordered}\n")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    for title in ("shape", "alpha", "D", "eigs", "spectral norm", "stable rank"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("outcome")
    for layer in ordered.layers:
        good = layer.outcome is Outcome.OK
        table.add_row(
            escape(layer.name),
            layer.kind,
            _shape(layer),
            f"[bold]{_number(layer.alpha, 3)}[/]",
            _number(layer.D, 3),
            f"{layer.n_eigs:,}",
            _number(layer.spectral_norm, 4),
            _number(layer.stable_rank, 2),
            f"[dim]{layer.outcome.value}[/]" if good else f"[yellow]{layer.outcome.value}[/]",
        )
    console.print(table)
    # What stands below the plain table: the summary, the failures, what is not measured.
    console.print("\n" + str(report).partition("\n\n")[2], markup=False, highlight=False)


def print_comparison(result: Comparison, sort: str) -> None:
    """The layers of a comparison on stdout, by depth, name, alpha (after) or change."""
    rows = _sorted_changes(result.layers, sort)
    lines = [
        (
            row.name,
            " x ".join(map(str, row.shape)),
            _number(row.before, 3),
            _number(row.after, 3),
            _signed(row.difference),
            _ABSENT if row.units is None else f"{row.units:+.1f}",
            _number(row.norm_ratio, 3),
        )
        for row in rows
    ]
    titles = ("layer", "slices x rows x cols", "before", "after", "difference", "units", "norm x")
    summary = result.summary()
    for report, side in ((result.a, "before"), (result.b, "after")):
        summary += [f"{side}: {line}" for line in outcomes(report.failed)]
    summary.append("units: of the standard deviation of the difference between two random matrices")
    console = _terminal()
    if console is None:
        sys.stdout.write(_plain(titles, lines) + "\n" + "\n".join(summary) + "\n")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left", overflow="fold")
    for line, row in zip(lines, rows, strict=True):
        color = _color(row.units)
        table.add_row(
            escape(line[0]), *line[1:4], *(f"[{color}]{x}[/]" for x in line[4:6]), line[6]
        )
    console.print(table)
    console.print("\n" + "\n".join(summary), markup=False, highlight=False)


def _terminal() -> Console | None:
    """A console on stdout, if that is a terminal and rich is there."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


def _sorted(report: Report, sort: str) -> list[LayerRecord]:
    if sort == "name":
        return sorted(report.layers, key=lambda layer: layer.name)
    if sort == "alpha":  # without one last
        return sorted(report.layers, key=lambda r: (r.alpha is None, r.alpha or 0.0))
    return list(report.layers)


def _sorted_changes(rows: Sequence[Change], sort: str) -> list[Change]:
    if sort == "name":
        return sorted(rows, key=lambda row: row.name)
    if sort == "alpha":
        return sorted(rows, key=lambda row: (row.after is None, row.after or 0.0))
    if sort == "change":  # the largest first
        return sorted(rows, key=lambda row: -abs(row.difference or 0.0))
    return list(rows)


def _plain(titles: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(titles, *lines, strict=True)]
    out = []
    for line in (titles, *lines):
        cells = [f"{line[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        out.append("  ".join(cells))
    return "\n".join(out) + "\n"


def _shape(layer: LayerRecord) -> str:
    slices, rows, cols = layer.shape
    return f"{slices} x {rows} x {cols}" if slices > 1 else f"{rows} x {cols}"


def _number(value: float | None, digits: int) -> str:
    return _ABSENT if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:+.3f}"


def _color(units: float | None) -> str:
    """Heavier tails (a lower alpha) and lighter ones; what may be noise stays plain."""
    if units is None or abs(units) < 3:
        return "dim"
    return "cyan" if units < 0 else "magenta"
