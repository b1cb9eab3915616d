"""Runs on disk: find the folder that a callback has written, and read what is in it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tempbalance.runs.write import COLUMNS, ESD_FILES, FILE
from tempbalance.words import some

_LISTED = 12


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (N,) of a layer, ascending, and the fit to their tail (NaN without one)."""

    eigenvalues: npt.NDArray[np.float64]
    alpha: float
    xmin: float
    D: float
    n_tail: float


@dataclass(frozen=True)
class Run:
    """The measurements of one run: L layers in depth order, T measurements in order of time.

    Attributes:
        layers: names, of length L.
        epochs, steps: when each measurement was made, (T,).
        alphas, multipliers, rates: (L, T); NaN where there is none.
        spectra: by layer, at the first and at the last measurement; empty where none was kept.
    """

    folder: Path
    layers: tuple[str, ...]
    epochs: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    alphas: npt.NDArray[np.float64]
    multipliers: npt.NDArray[np.float64]
    rates: npt.NDArray[np.float64]
    spectra: tuple[dict[str, Spectrum], dict[str, Spectrum]] = ({}, {})

    @property
    def observed_only(self) -> bool:
        """Whether no rate was changed: an observer wrote it."""
        return bool(np.isnan(self.rates).all() and (self.multipliers == 1).all())

    @property
    def prefix(self) -> str:
        """What all names begin with (``model.``); of one layer nothing."""
        parts = [name.split(".")[:-1] for name in self.layers]
        shared: list[str] = []
        for words in zip(*parts, strict=False):
            if len(set(words)) > 1 or len(self.layers) < 2:
                break
            shared.append(words[0])
        return "".join(f"{word}." for word in shared)

    @property
    def short(self) -> list[str]:
        """Names without what all begin with."""
        return [name.removeprefix(self.prefix) for name in self.layers]

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Layers whose name, whole or without the prefix, matches one of the patterns.

        Raises:
            ValueError: for a pattern that matches none.
        """
        found: set[str] = set()
        for pattern in patterns:
            hits = {
                name
                for name, short in zip(self.layers, self.short, strict=True)
                if fnmatchcase(name, pattern) or fnmatchcase(short, pattern)
            }
            if not hits:
                raise ValueError(
                    f"no layer matches {pattern!r}; the layers are {some(self.short)} "
                    "(* stands for any letters)"
                )
            found |= hits
        return [name for name in self.layers if name in found]


def find_run(path: str | PathLike[str]) -> Path:
    """The folder with ``tempbalance.csv``: this one, or the only one below.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are several, listing them.
    """
    folder = Path(path)
    if folder.name == FILE and folder.is_file():
        return folder.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: pass the folder of a run")
    if (folder / FILE).is_file():
        return folder
    found = sorted(file.parent for file in folder.rglob(FILE))
    if not found:
        raise FileNotFoundError(
            f"no {FILE} in {folder} or below. TempBalanceCallback writes it into the folder of "
            "the trainer's first logger; without a logger it writes nothing"
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {len(found)} runs; pass one of them: {some([str(f) for f in found])}"
        )
    return found[0]


def read_run(folder: str | PathLike[str]) -> Run:
    """Read ``tempbalance.csv`` and, where they are, the spectra.

    A run that was resumed from an earlier checkpoint has written some measurements twice: the later
    attempt counts.

    Raises:
        FileNotFoundError: without ``tempbalance.csv``.
        ValueError: if it has no measurement, or is not such a file.
    """
    folder = Path(folder)
    path = folder / FILE
    table: dict[tuple[int, int], dict[str, tuple[float, float, float]]] = {}
    layers: dict[str, None] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}: not a file of tempbalance")
        last = (-1, -1)
        for number, row in enumerate(reader, 2):
            try:
                when = (int(row["epoch"]), int(row["step"]))
                values = (_number(row["alpha"]), _number(row["multiplier"]), _number(row["lr"]))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a measurement ({error})") from error
            again = when == last and row["layer"] in table.get(when, {})
            if when[1] < last[1] or when < last or again:
                table = {k: v for k, v in table.items() if k[1] < when[1] and k < when}
            last = when
            layers.setdefault(row["layer"])
            table.setdefault(when, {})[row["layer"]] = values
    if not table:
        raise ValueError(f"{path} has no measurement yet")
    nothing = (np.nan, np.nan, np.nan)
    cube = np.array([[table[k].get(name, nothing) for k in table] for name in layers])
    return Run(
        folder=folder,
        layers=tuple(layers),
        epochs=np.array([epoch for epoch, _ in table]),
        steps=np.array([step for _, step in table]),
        alphas=cube[..., 0],
        multipliers=cube[..., 1],
        rates=cube[..., 2],
        spectra=(_spectra(folder / ESD_FILES[0]), _spectra(folder / ESD_FILES[1])),
    )


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def _spectra(path: Path) -> dict[str, Spectrum]:
    if not path.is_file():
        return {}
    out = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                kind, _, name = key.partition("/")
                if kind == "eigenvalues":
                    values = np.sort(arrays[key].astype(np.float64))
                    fit = [float(x) for x in arrays[f"fit/{name}"]]
                    out[name] = Spectrum(values[values > 0], *fit)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to draw the rest") from error
    return {name: s for name, s in out.items() if len(s.eigenvalues)}
