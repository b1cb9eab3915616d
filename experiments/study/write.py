"""docs/results.md and its pictures, from the files of the study."""

from __future__ import annotations

from pathlib import Path

from experiments.study import numbers, pictures, table
from experiments.study.cells import CELLS
from experiments.study.files import RESULTS


def write_study(folder: Path = RESULTS) -> list[Path]:
    """Write results.md beside the folder of the study's results, and its pictures; their paths."""
    images = folder.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    paths = [folder.parent / "results.md"]
    found = [cell for cell in (numbers.read(c, folder) for c in CELLS.values()) if cell]
    if found:
        paths += [images / "study.png", images / "study_rates.png"]
        pictures.overview(found, paths[1])
        pictures.by_rate(found[0], paths[2])
    paths[0].write_text(table.markdown(folder))  # names the pictures that are there
    return paths
