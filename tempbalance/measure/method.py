"""Method: how layers are measured, as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tempbalance.spectra.by_layer import AnyWindows, checked_windows
from tempbalance.spectra.powerlaw import Fit
from tempbalance.words import check_kind


@dataclass(frozen=True)
class Method:
    """How layers are measured; see :func:`tempbalance.measure.measurement.measure`."""

    windows: AnyWindows
    fit: Fit
    min_eigs: int
    budget: int
    keep_spectra: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__dict__)


def check_engine(windows: Any, fit: Any, budget: Any) -> None:
    """Raises TypeError where windows or fit are a name or a class; ValueError for the budget."""
    if not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget must be a number of bytes of at least 1, got {budget!r}")
    checked_windows(windows)
    check_kind("fit", fit, callable(fit), "an object such as Hill() or KSFit()")
