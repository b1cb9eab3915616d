"""Report: what ``analyze`` found in a model, to print, to look up, to export and to draw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempbalance.analysis.page import fragment, page
from tempbalance.analysis.text import guessed, left_out, number, outcomes, table
from tempbalance.layers import Skipped
from tempbalance.measure.measurement import LayerRecord
from tempbalance.measure.method import Method
from tempbalance.measure.null import null_alphas
from tempbalance.words import some

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Report:
    """The layers of a model, measured; ``print(report)`` shows them as a table.

    ``layers`` are in definition order, unmeasurable ones included, with their outcome;
    ``skipped`` are the parameters that hold no matrix, with the reason.
    """

    layers: tuple[LayerRecord, ...]
    skipped: tuple[Skipped, ...]
    numel: int  # real numbers in the model, shared ones once
    notes: tuple[str, ...] = ()  # what was guessed of a network that is known by its file alone
    method: Method | None = None  # how the layers were measured
    complex_layers: frozenset[str] = frozenset()  # names of those with complex weights

    def __getitem__(self, name: str) -> LayerRecord:
        """The record of a layer by name.

        Raises:
            KeyError: naming the layers there are, or why the parameter is not among them.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        for skipped in self.skipped:
            if skipped.name in (name, f"{name}.weight"):
                raise KeyError(f"{skipped.name!r} is not measured: {skipped.reason}")
        raise KeyError(f"no layer {name!r}; there are {[layer.name for layer in self.layers]}")

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def measured(self) -> tuple[LayerRecord, ...]:
        """The layers that have an alpha."""
        return tuple(layer for layer in self.layers if layer.outcome.measured)

    @property
    def failed(self) -> tuple[LayerRecord, ...]:
        """The layers that hold a matrix but have no alpha."""
        return tuple(layer for layer in self.layers if not layer.outcome.measured)

    @property
    def coverage(self) -> float:
        """Share (0 to 1) of the model's parameters whose layer has an alpha."""
        return sum(layer.numel for layer in self.measured) / self.numel if self.numel else 0.0

    @property
    def weighted_alpha(self) -> float | None:
        """Mean of alpha * log10(lambda_max) over layers: the universal capacity metric.

        Source: Martin, Peng and Mahoney (2021), Nature Communications 12, 4122.
        """
        return _mean([layer.alpha_hat for layer in self.measured])

    @property
    def mean_alpha(self) -> float | None:
        """Mean alpha over layers."""
        return _mean([layer.alpha for layer in self.measured])

    @property
    def mean_log_norm(self) -> float | None:
        """Mean over layers of log10 of the squared Frobenius norm."""
        return _mean([layer.log_norm for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: no NaN, ``None`` where there is no number."""
        layers = []
        for layer in self.layers:
            row = asdict(layer)
            row.pop("eigenvalues")
            layers.append({**row, "outcome": layer.outcome.value, "shape": list(layer.shape)})
        return {
            "layers": layers,
            "skipped": [{**asdict(s), "shape": list(s.shape)} for s in self.skipped],
            "coverage": self.coverage,
            "numel": self.numel,
            "weighted_alpha": self.weighted_alpha,
            "mean_alpha": self.mean_alpha,
            "mean_log_norm": self.mean_log_norm,
            "notes": list(self.notes),
        }

    def to_pandas(self) -> pd.DataFrame:
        """A row a layer, indexed by name; missing numbers are ``<NA>``.

        Raises:
            ImportError: without pandas.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "Report.to_pandas needs pandas: pip install 'tempbalance[pandas]'"
            ) from error
        rows = self.to_dict()["layers"]
        columns = list(LayerRecord.__dataclass_fields__)
        columns.remove("eigenvalues")
        frame = pd.DataFrame(rows, columns=columns).set_index("name")
        return frame.convert_dtypes()

    def level(self) -> dict[str, float]:
        """By layer, mean alpha of random matrices of its shape, measured the same way."""
        if self.method is None:
            return {}
        null = null_alphas(self.measured, self.method, fewest=2, complex_=self.complex_layers)
        return {name: each.mean for name, each in null.items()}

    def plot(self, path: str | PathLike[str] | None = None, *, layer: str | None = None) -> Figure:
        """Draw the ESD of one layer, or alpha by depth and the ESDs of the chief layers.

        Beside alpha by depth stands that of random matrices of the layers' shapes, which are
        measured for it.

        Args:
            path: where to write the figure, PNG, PDF or SVG by its suffix. Default: nowhere.
            layer: the layer whose ESD is drawn alone.

        Raises:
            ImportError: without matplotlib.
            KeyError: for a layer that is not in the report.
            ValueError: if there is nothing to draw.
        """
        from tempbalance.plots.report import plot_report

        if layer is not None:
            return plot_report(self.layers, self.numel, path, layer=self[layer])
        return plot_report(self.layers, self.numel, path, level=self.level())

    def to_html(self, path: str | PathLike[str] | None = None, title: str = "Report") -> str:
        """The report as one page that needs no network: picture, sortable table, what was left out.

        Without matplotlib there is no picture.

        Args:
            path: where to write it. Default: nowhere.
            title: its heading.
        """
        level = self.level()
        picture = self._picture(level)
        text = page(title, self.summary(), self.remarks(), self.layers, picture, level)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _picture(self, level: Mapping[str, float]) -> str:
        if not self.measured:
            return ""
        try:
            from tempbalance.plots.report import plot_report
            from tempbalance.plots.style import svg

            return svg(plot_report(self.layers, self.numel, level=level))
        except ImportError:
            return ""

    def summary(self) -> list[str]:
        """A line on what was measured, and one with the means over layers."""
        lines = [
            f"{len(self.measured)} of {len(self.layers)} layers measured, "
            f"{self.coverage:.1%} of {self.numel:,} parameters"
        ]
        if self.mean_alpha is not None:
            means = (self.mean_alpha, self.weighted_alpha, self.mean_log_norm)
            names = ("mean alpha", "weighted alpha", "mean log norm")
            lines.append(", ".join(f"{n} {number(m)}" for n, m in zip(names, means, strict=True)))
        trapped = [layer for layer in self.layers if layer.traps]
        if trapped:
            lines.append(f"{len(trapped)} with traps: {some([layer.name for layer in trapped])}")
        return lines

    def remarks(self) -> list[str]:
        """What was guessed, what is not measured and why, each thing once."""
        return [
            *outcomes(self.layers),
            *guessed(self.layers),
            *left_out(self.skipped),
            *self.notes,
        ]

    def __repr__(self) -> str:
        mean = "" if self.mean_alpha is None else f", mean alpha {self.mean_alpha:.3f}"
        return f"Report({self.summary()[0]}{mean})"

    def _repr_html_(self) -> str:
        return fragment(self.summary(), self.remarks(), self.layers)

    def __str__(self) -> str:
        lines = [*table(self.layers), "", *self.summary()]
        return "\n".join([*lines, *(f"  {line}" for line in self.remarks())])


def _mean(values: list[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None
