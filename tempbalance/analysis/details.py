"""Details: a network's layers in the columns, and by the names, that WeightWatcher prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tempbalance.analysis.metrics import Row, summary
from tempbalance.analysis.text import left_out
from tempbalance.layers import Skipped

if TYPE_CHECKING:
    import pandas as pd

# Of the columns, those that a terminal shows.
_SHOWN = ("layer_id", "name", "M", "N", "alpha", "D", "alpha_weighted", "log_alpha_norm",
          "stable_rank", "num_spikes", "mp_softrank", "rand_num_spikes", "warning")  # fmt: skip


@dataclass(frozen=True, repr=False)
class Details:
    """What ``WeightWatcher.analyze()`` gives as a data frame, and its ``get_summary()``.

    ``rows`` are in definition order, a dictionary a layer; ``skipped`` are the parameters without.
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def summary(self) -> dict[str, float]:
        """The means over layers, by the tool's names."""
        return summary(self.rows)

    def to_pandas(self) -> pd.DataFrame:
        """The rows as the tool's data frame.

        Raises:
            ImportError: without pandas.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "Details.to_pandas needs pandas: pip install 'tempbalance[pandas]'"
            ) from error
        return pd.DataFrame(list(self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: no NaN, ``None`` where there is no number."""
        return {
            "details": [{k: _plain(v) for k, v in row.items()} for row in self.rows],
            "summary": {k: _plain(v) for k, v in self.summary.items()},
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return f"Details({len(self.rows)} layers)"

    def __str__(self) -> str:
        if not self.rows:
            return "No layers: the model has no weight matrix to measure."
        titles = [x for x in _SHOWN if any(x in row for row in self.rows)]
        table = [titles, *([_cell(row.get(x)) for x in titles] for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
        lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in table]
        means = ", ".join(f"{name} {value:.4g}" for name, value in self.summary.items())
        return "\n".join([*lines, "", means, *left_out(self.skipped), *self.notes])


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
