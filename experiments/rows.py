"""Rows of results in a CSV file: one dataclass a file, a row a run, added as soon as it is done."""

from __future__ import annotations

import csv
import typing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")


def read(path: Path, kind: type[R]) -> list[R]:
    """The rows of a file, by the types of the dataclass; none where there is no file.

    Raises: ValueError for a row that is cut off, naming it.
    """
    if not path.is_file():
        return []
    kinds = typing.get_type_hints(kind)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for number, line in enumerate(lines, start=2):
        if None in line or None in line.values():
            raise ValueError(f"{path}, row {number}: cut off, or two in one; delete it")
    return [
        kind(**{name: _parsed(text, kinds[name]) for name, text in line.items()}) for line in lines
    ]


def _parsed(text: str, kind: Any) -> Any:
    allowed = typing.get_args(kind) or (kind,)
    if type(None) in allowed and not text:
        return None
    wanted = next(one for one in allowed if one is not type(None))
    return text == "True" if wanted is bool else wanted(text)


def append(path: Path, row: Any) -> None:
    """Add a row to a file, in one write; the header too, where the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    if not new and not path.read_bytes().endswith(b"\n"):
        raise ValueError(f"{path}: its last row is cut off; delete it")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({k: "" if v is None else v for k, v in asdict(row).items()})
