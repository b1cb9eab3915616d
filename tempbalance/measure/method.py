"""Method: how layers are measured, as one object that has been checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tempbalance.spectra.by_layer import AnyWindows, checked_windows
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.windows import Farms
from tempbalance.words import check_kind

# Extra memory of a measurement, in bytes, unless a single window needs more. A window of 8192 x
# 8192, the largest of a layer of 8192 x 28672, needs 544 MiB.
DEFAULT_BUDGET = 2**30


@dataclass(frozen=True)
class Method:
    """How layers are measured.

    Args:
        windows: which submatrices, for all layers or by patterns of names and types.
        fit: the power-law fit.
        min_eigs: a layer with fewer eigenvalues gets no alpha.
        budget: extra memory in bytes. What a single window cannot do without (twice its Gram
            matrix, for the solver) is taken all the same, with a message in the log.
        keep_spectra: read the eigenvalues back too, and keep them in the records.

    Raises:
        TypeError: where ``windows`` or ``fit`` are a name or a class.
        ValueError: for ``budget`` below 1, or ``min_eigs`` below 2.
    """

    windows: AnyWindows = Farms()
    fit: Fit = Hill()
    min_eigs: int = 10
    budget: int = DEFAULT_BUDGET
    keep_spectra: bool = False

    def __post_init__(self) -> None:
        check_engine(self.windows, self.fit, self.budget)
        object.__setattr__(self, "windows", checked_windows(self.windows))  # a mapping is taken too
        if not isinstance(self.min_eigs, int) or self.min_eigs < 2:
            raise ValueError(f"min_eigs must be at least 2, got {self.min_eigs!r}")


def check_engine(windows: Any, fit: Any, budget: Any) -> None:
    """Raises TypeError where windows or fit are a name or a class; ValueError for the budget."""
    if not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget must be a number of bytes of at least 1, got {budget!r}")
    checked_windows(windows)
    check_kind("fit", fit, callable(fit), "an object such as Hill() or KSFit()")
