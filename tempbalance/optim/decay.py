"""AlphaDecay: the optimizer's weight decay, times a multiplier for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tempbalance.assign import Assignment, LinearMap
from tempbalance.balance.options import Given, GivenRest, check_names, with_options
from tempbalance.layers import Host, without_norms
from tempbalance.optim.balanced import Balanced, Clock
from tempbalance.optim.checks import check_decay
from tempbalance.optim.claims import check_one_decay
from tempbalance.optim.follow import built_on
from tempbalance.optim.wrapped import innermost

# The published assignment of AdamW, and its interval.
ASSIGN = LinearMap(2 / 3, 5.0)
EVERY = 500


@with_options()
class AlphaDecay(Balanced):
    """Weight decay per layer: that of the optimizer's groups, times a multiplier from the spectra.

    A light tail (a large alpha) gets more decay. Construct it after optimizer and schedule, and
    call :meth:`step` after every step of the optimizer (as with a schedule stepped every batch).
    It splits the optimizer's param groups, a group a layer, in place, and from then on keeps, in
    every group, base decay x multiplier; rates are left alone::

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        cosine = CosineAnnealingLR(optimizer, T_max=10_000)
        decay = AlphaDecay(optimizer, model)
        for batch in batches:
            ...
            optimizer.step()
            cosine.step()
            decay.step()

    Together with a :class:`~tempbalance.TempBalanceLR` on one optimizer, weights that both would
    measure at the same step (without ``delay``, with the same windows, fit and layers) are
    measured once.

    Norms and embeddings keep the decay of their group, as published (``fixed`` gives them another).
    Groups without decay (norms and biases, as practitioners leave them) stay without. What a step
    takes off a weight is rate x decay with AdamW; with Adam and SGD decay is added to the gradient.

    Args:
        optimizer: any optimizer whose groups have a ``weight_decay``.
        model: the model whose parameters it holds, wrapped in whatever way.
        assign: alphas to multipliers of the decay. The default is the published one of AdamW,
            whose mean is above 1; ``normalize=True`` keeps the mean decay over parameters.
        every: calls of :meth:`step` between measurements.
        clock: as for :class:`~tempbalance.TempBalanceLR`.
        options: see :class:`~tempbalance.balance.options.Options`.

    Raises:
        ValueError: if the optimizer is not this model's, has no weight decay anywhere, or one that
            ``keep_decay`` of another object writes, no layer can be measured, or an option is out
            of range.
        TypeError: if an argument is not what it should be.

    To resume, load the states of model, optimizer and this object, the model first.

    Source: AlphaDecay (He et al., 2025, arXiv 2506.14562), equation 4 and Algorithm 1.
    """

    field = "weight_decay"

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        assign: Assignment = ASSIGN,
        every: int = EVERY,
        clock: Clock = "step",
        **options: Unpack[GivenRest],
    ) -> None:
        check_names(type(self), options)
        optimizer = innermost(optimizer)
        check_decay(optimizer)
        check_one_decay(optimizer, keeps=False)
        torchs = [s for s in built_on(optimizer) if isinstance(s, LRScheduler)]
        schedules = [s for s in torchs if not isinstance(s, Balanced)]
        given: Given = {**options, "assign": assign, "every": every}
        self._model = model
        super().__init__(optimizer, model, schedules, clock, (), given)
        if clock == "step":
            self.begin()
        self._log_coverage()

    def _hosts(self) -> Sequence[Host]:
        return without_norms(self.balancer.hosts, self._model)

    @property
    def layer_decays(self) -> dict[str, float]:
        """The weight decay in use of every param group, by the group's name."""
        return self._values()

    def step(self) -> None:
        """One tick: measure if it is time to, and write the new decays."""
        self._take_in_new_groups()
        self._put_back()
        try:
            if self.clock == "step" and self._hooks:
                self.balancer.step()
        finally:
            self._scale()
