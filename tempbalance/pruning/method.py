"""Method: what a pruner must say."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from tempbalance.pruning.masks import Pattern


class Statistic(Protocol):
    """What is kept of a layer's inputs while batches pass."""

    def add(self, inputs: Tensor) -> None:
        """Take in the inputs of one call, (samples, ..., in) or (rows, in)."""
        ...


@runtime_checkable
class Method(Protocol):
    """A pruner: immutable, and the same weights for the same inputs."""

    @property
    def pattern(self) -> Pattern | None:
        """(N, M): N of every M neighbouring inputs of an output are kept; None: any."""
        ...

    def statistic(self, weight: Tensor) -> Statistic | None:
        """An empty statistic for a weight (out, in); None where no data are needed."""
        ...

    def __call__(self, weight: Tensor, ratio: float, statistic: Statistic | None) -> Tensor:
        """The weight (out, in) in its dtype with ``ratio`` of its entries zero; a new tensor."""
        ...


def samples_and_rows(inputs: Tensor) -> tuple[int, Tensor]:
    """The number of samples, and the inputs as rows (rows, in) in float32.

    A matrix counts as one sample, as in the published pruners.
    """
    samples = len(inputs) if inputs.ndim > 2 else 1
    return samples, inputs.detach().reshape(-1, inputs.shape[-1]).float()
