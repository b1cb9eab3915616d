"""Ranking: models of one series in order, by what their spectra say without any data.

Source: Martin, Peng and Mahoney (2021), Nature Communications 12, 4122. What is published is one
metric a series; here the norms, parameter count and depth always stand beside it, since a plain
norm orders many series as well as alpha does.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tempbalance.analysis.analyze import Network, analyze
from tempbalance.analysis.report import Report
from tempbalance.measure.measurement import DEFAULT_BUDGET, LayerRecord
from tempbalance.spectra.by_layer import WindowsLike
from tempbalance.spectra.powerlaw import Fit, KSFit
from tempbalance.spectra.windows import WholeMatrix
from tempbalance.words import some

logger = logging.getLogger("tempbalance")

# What theory or common sense expects of a metric when models get better.
EXPECTED: dict[str, int] = {
    "weighted_alpha": -1,  # mean of alpha * log10 of the largest eigenvalue
    "log_alpha_norm": -1,  # mean of log10 of the sum of lambda ** alpha
    "log_norm": -1,  # mean of log10 of the squared Frobenius norm
    "log_spectral_norm": -1,  # mean of log10 of the largest eigenvalue
    "stable_rank": -1,
    "mean_alpha": -1,
    "parameters": 1,
    "depth": 1,  # layers with a weight matrix
}
# Below this share of kinds of layers in common, models are no series.
_SERIES = 0.5
_RESAMPLES = 2000
_FEWEST = 4  # models for an interval


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau-b of a metric with the scores."""

    metric: str
    tau: float | None  # None where a metric is the same for all models
    p: float | None  # two-sided; exact unless there are ties
    interval: tuple[float, float] | None  # 95%, percentiles of a bootstrap over the models
    expected: int  # the sign that it should have


@dataclass(frozen=True)
class Ranking:
    """Metrics of several models on the layers that they share; ``print(ranking)`` shows both."""

    metrics: dict[str, dict[str, float | None]]  # by model, then by metric; in the order given
    scores: dict[str, float] | None
    correlations: tuple[Correlation, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "models": {
                name: {**row, "score": None if self.scores is None else self.scores[name]}
                for name, row in self.metrics.items()
            },
            "correlations": [asdict(each) for each in self.correlations],
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return f"Ranking({', '.join(self.metrics)})"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def rank(
    models: Mapping[str, Network] | Sequence[str | os.PathLike[str]],
    scores: Mapping[str, float] | None = None,
    *,
    higher_is_better: bool = True,
    windows: WindowsLike = WholeMatrix(),
    fit: Fit = KSFit(),
    min_eigs: int = 10,
    budget: int = DEFAULT_BUDGET,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Ranking:
    """Metrics of several models beside each other and, with scores, how well each orders them.

    Args:
        models: what :func:`~tempbalance.analyze` takes, by name; or paths, which name themselves.
        scores: a number a model, by the same names: accuracy on held-out data, say.
        higher_is_better: whether a larger score is a better model.
        windows: as for ``analyze``; the default here is the published method.
        fit: likewise.
        min_eigs: likewise.
        budget: likewise, in bytes.
        seed: of the bootstrap.
        progress: called with the share of the work that was just done.

    Raises:
        ImportError: with scores and without scipy.
        TypeError: for a sequence of anything but paths.
        ValueError: for fewer than two models, a model without a score or a score without a model,
            or models that have no layer in common.
    """
    named: Mapping[str, Network] = (
        models if isinstance(models, Mapping) else dict(zip(_named(models), models, strict=True))
    )
    if len(named) < 2:
        raise ValueError(f"rank needs at least two models, got {len(named)}")
    known = None if scores is None else _checked(scores, named)
    step = None if progress is None else _part(progress, len(named))
    options: dict[str, Any] = {"windows": windows, "fit": fit, "min_eigs": min_eigs}
    reports = {
        name: analyze(model, budget=budget, progress=step, **options)
        for name, model in named.items()
    }
    return rank_reports(reports, known, higher_is_better=higher_is_better, seed=seed)


def rank_reports(
    reports: Mapping[str, Report],
    scores: Mapping[str, float] | None = None,
    *,
    higher_is_better: bool = True,
    seed: int = 0,
) -> Ranking:
    """As :func:`rank`, of models that are measured already."""
    chosen, notes = _same_layers(reports)
    metrics = {name: _metrics(reports[name], chosen[name]) for name in reports}
    for note in notes:
        logger.warning("rank: %s", note)
    if scores is None:
        return Ranking(metrics, None, (), notes)
    sign = 1 if higher_is_better else -1
    values = np.array([scores[name] for name in reports], dtype=np.float64)
    correlations = []
    for metric, expected in EXPECTED.items():
        row = [metrics[name][metric] for name in reports]
        correlations.append(_correlation(metric, row, values, sign * expected, seed))
    return Ranking(metrics, dict(scores), tuple(correlations), notes)


# --- layers ---------------------------------------------------------------------------------------


def _same_layers(
    reports: Mapping[str, Report],
) -> tuple[dict[str, list[LayerRecord]], tuple[str, ...]]:
    """The layers of each model that count: those with an alpha wherever they occur.

    In models of one architecture, a layer counts by its name. In a series of several depths, by
    its place in a block: its name without numbers must occur in every model.
    """
    names = {model: {layer.name for layer in report} for model, report in reports.items()}
    one = all(each == next(iter(names.values())) for each in names.values())
    key: Callable[[str], str] = (lambda name: name) if one else _place
    every = [{key(x.name) for x in report} for report in reports.values()]
    shared, union = set.intersection(*every), set.union(*every)
    if not shared:
        raise ValueError(
            "these models have no layer in common (by name): they are not of one series, and "
            "their metrics do not compare"
        )
    notes = []
    if len(shared) < _SERIES * len(union):
        notes.append(
            f"these models do not look like one series: of {len(union)} kinds of layers "
            f"{len(shared)} are in all of them; across architectures nothing is claimed of these "
            "metrics"
        )
    elif shared != union:
        lost = sorted(union - shared)
        notes.append(f"left out, since not every model has them: {some(lost, 3)}")
    unmeasured = (
        {key(x.name) for report in reports.values() for x in report.failed} if one else set()
    )
    if unmeasured & shared:
        notes.append(f"left out, without an alpha in some model: {some(sorted(unmeasured), 3)}")
    chosen = {
        model: [x for x in report.measured if key(x.name) in shared - unmeasured]
        for model, report in reports.items()
    }
    if not all(chosen.values()):
        raise ValueError(f"no layer has an alpha in {some([m for m in chosen if not chosen[m]])}")
    return chosen, tuple(notes)


def _place(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _metrics(report: Report, layers: Sequence[LayerRecord]) -> dict[str, float | None]:
    return {
        "weighted_alpha": _mean([x.alpha_hat for x in layers]),
        "log_alpha_norm": _mean([_log_alpha_norm(x) for x in layers]),
        "log_norm": _mean([x.log_norm for x in layers]),
        "log_spectral_norm": _mean(
            [2 * float(np.log10(x.spectral_norm)) if x.spectral_norm else None for x in layers]
        ),
        "stable_rank": _mean([x.stable_rank for x in layers]),
        "mean_alpha": _mean([x.alpha for x in layers]),
        "parameters": report.numel,
        "depth": len(report.layers),
    }


def _log_alpha_norm(layer: LayerRecord) -> float | None:
    """log10 of the sum of lambda ** alpha, of the eigenvalues that were fitted."""
    if layer.alpha is None or layer.eigenvalues is None:
        return None
    powers = layer.alpha * np.log10(layer.eigenvalues)
    top = powers.max()
    return float(top + np.log10((10 ** (powers - top)).sum()))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# --- order ----------------------------------------------------------------------------------------


def _correlation(
    metric: str,
    values: Sequence[float | None],
    scores: npt.NDArray[np.float64],
    expected: int,
    seed: int,
) -> Correlation:
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise ImportError("scores need scipy: pip install 'tempbalance[cli]'") from error
    x = np.array([np.nan if value is None else value for value in values])
    if np.isnan(x).any() or len(set(x)) == 1 or len(set(scores)) == 1:
        return Correlation(metric, None, None, None, expected)
    ties = len(set(x)) < len(x) or len(set(scores)) < len(scores)
    result = kendalltau(x, scores, method="auto" if ties else "exact")
    return Correlation(
        metric, float(result.statistic), float(result.pvalue), _interval(x, scores, seed), expected
    )


def _interval(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], seed: int
) -> tuple[float, float] | None:
    """95% of tau-b over resamples of the models; those of a single value have none."""
    if len(x) < _FEWEST:
        return None
    a, b = (np.sign(v[:, None] - v[None, :]) for v in (x, y))
    draws = np.random.default_rng(seed).integers(len(x), size=(_RESAMPLES, len(x)))
    taus = []
    for draw in draws:
        p, q = a[np.ix_(draw, draw)], b[np.ix_(draw, draw)]
        norm = np.sqrt((p * p).sum() * (q * q).sum())
        if norm:
            taus.append((p * q).sum() / norm)
    low, high = np.percentile(taus, [2.5, 97.5])
    return float(low), float(high)


def _checked(scores: Mapping[str, float], models: Mapping[str, Any]) -> dict[str, float]:
    without = [name for name in models if name not in scores]
    unknown = [name for name in scores if name not in models]
    if without or unknown:
        what = f"no score for {some(without)}" if without else f"no model for {some(unknown)}"
        raise ValueError(f"scores: {what}; models are {some(list(models))}")
    return {name: float(scores[name]) for name in models}


def _named(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """File names where they differ, else the paths."""
    if isinstance(paths, str):
        raise ValueError(f"rank needs at least two models, got the one path {paths!r}")
    if wrong := [path for path in paths if not isinstance(path, str | os.PathLike)]:
        raise TypeError(
            f"rank names models by their paths, got a {type(wrong[0]).__name__}: give models by "
            "name, rank({'small': model, ...})"
        )
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _part(progress: Callable[[float], None], count: int) -> Callable[[float], None]:
    return lambda share: progress(share / count)


# --- words ----------------------------------------------------------------------------------------


def _lines(ranking: Ranking) -> list[str]:
    scores = ranking.scores
    by: Callable[[str], float] = lambda name: (  # noqa: E731
        -scores[name] if scores is not None else ranking.metrics[name]["weighted_alpha"] or 0.0
    )
    titles = ["model", *(("score",) if scores else ()), *EXPECTED]
    rows = [titles]
    for name in sorted(ranking.metrics, key=by):
        cells = [name, *((f"{scores[name]:g}",) if scores else ())]
        rows.append([*cells, *(_cell(ranking.metrics[name][metric]) for metric in EXPECTED)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = [
        "  ".join(
            f"{c:<{w}}" if not i else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    if ranking.correlations:
        lines += ["", "Kendall's tau with the scores (two-sided p; 95% by bootstrap over models)"]
        lines += [_told(each) for each in ranking.correlations]
        count = len(ranking.metrics)
        if count < _FEWEST:
            lines.append(f"{count} models are an example, not evidence, and too few for intervals")
    return [*lines, *(("", *ranking.notes) if ranking.notes else ())]


def _told(each: Correlation) -> str:
    start = f"  {each.metric:<17}  "
    if each.tau is None or each.p is None:
        return start + "the same in all models, or unknown"
    between = ""
    if each.interval is not None:
        between = f"  [{each.interval[0]:+.2f}, {each.interval[1]:+.2f}]"
    wrong = "" if each.tau * each.expected > 0 else "  (not the order that is claimed)"
    return f"{start}{each.tau:+.2f}  p {each.p:.3g}{between}{wrong}"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
