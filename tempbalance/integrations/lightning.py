"""Lightning: ``Trainer(callbacks=[TempBalanceCallback()])``, and nothing else changes."""

from __future__ import annotations

import inspect
import logging
import time
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch.optim import Optimizer

from tempbalance import history
from tempbalance.balance import Balancer
from tempbalance.measure import measure
from tempbalance.scheduler import TempBalanceLR

try:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
    from lightning.pytorch.utilities.types import LRSchedulerConfig
except ImportError:
    try:
        import pytorch_lightning as pl  # type: ignore[no-redef]
        from pytorch_lightning.callbacks import (  # type: ignore[assignment]
            BackboneFinetuning,
            BaseFinetuning,
        )
        from pytorch_lightning.utilities.types import (  # type: ignore[assignment]
            LRSchedulerConfig,
        )
    except ImportError as error:
        raise ImportError(
            "tempbalance.integrations.lightning needs Lightning: "
            "pip install 'tempbalance[lightning]'"
        ) from error

logger = logging.getLogger("tempbalance")

Log = Literal["auto", "layers", "summary", "none"]
# Up to so many layers each has its own curves in the logger.
_CURVES = 64
_REFUSED = {
    "FSDPStrategy": "it flattens the weights, so that no layer has a matrix of its own",
    "DeepSpeedStrategy": "it builds its own optimizer from flattened weights",
}
_OPTIONS = [p for p in inspect.signature(Balancer).parameters if p not in ("model", "parameters")]


class TempBalanceCallback(pl.Callback):
    """Layer-wise learning rates from the spectra, for a LightningModule as it is.

    The optimizers' groups are split, a group a layer, when ``fit`` starts; the schedules that the
    module configures go on as they are, times each layer's multiplier. The first measurement is
    just before the first batch, the next ones at the start of every ``every_n_epochs``-th epoch,
    whatever the schedule's own interval.

    Args:
        every_n_epochs: epochs between measurements.
        every_n_steps: optimizer steps between measurements, instead of epochs.
        observe: measure and log, but leave optimizers and schedules alone.
        log: what the trainer's loggers get at each measurement: ``"layers"`` alpha, multiplier
            and rate of every layer, ``"summary"`` their least, median and largest, ``"auto"`` the
            first up to 64 layers and the second above, ``"none"`` nothing. With a logger,
            ``tempbalance.csv`` in its folder has every layer in any case.
        esd: keep the eigenvalues of the first and the last measurement, for ``tempbalance plot``.
        warn: name, at the end, layers that theory calls over-trained (alpha under 2 and under
            what a random matrix reads) and those that never left the random spectrum.
        options: as for :class:`~tempbalance.scheduler.TempBalanceLR` (``windows``, ``fit``,
            ``assign``, ``start``, ``stop``, ...); ``start``, ``stop`` and ``ramp`` are in epochs,
            or in optimizer steps with ``every_n_steps``.

    Raises:
        ValueError, TypeError: for options out of range or unknown.

    A run resumes from its checkpoint bit for bit, and a checkpoint of a run without the callback
    can be continued with it. To continue a balanced run without balancing, keep the callback, with
    ``assign=Constant(1.0)``: the checkpoint's optimizer has a group a layer.
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        observe: bool = False,
        log: Log = "auto",
        esd: bool = True,
        warn: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if log not in ("auto", "layers", "summary", "none"):
            raise ValueError(f"log must be 'auto', 'layers', 'summary' or 'none', got {log!r}")
        unknown = [name for name in options if name not in _OPTIONS or name == "every"]
        if unknown:
            raise TypeError(
                f"TempBalanceCallback has no option {unknown[0]!r}; there are every_n_epochs, "
                f"every_n_steps, observe, log, esd, warn, "
                + ", ".join(o for o in _OPTIONS if o != "every")
            )
        self.by_step = every_n_steps is not None
        self.every = every_n_steps or every_n_epochs
        # Lightning overwrites an attribute named ``log``.
        self.observe, self.curves, self.esd, self.warn = observe, log, esd, warn
        self.options = options
        self.schedulers: list[TempBalanceLR] = []
        self.observers: list[Balancer] = []
        self._clock = -1  # the epoch, or the number of optimizer steps, of the last tick
        self._saved: dict[str, Any] | None = None
        self._began = 0.0
        self._folder: Path | None = None

    @property
    def balancers(self) -> list[Balancer]:
        """One for each optimizer that holds layers (one for the model with ``observe``)."""
        return self.observers or [s.balancer for s in self.schedulers]

    # --- Lightning's hooks ---------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Split the groups and wrap the schedules, before any optimizer state is restored."""
        self._refuse(trainer)
        self._began = time.perf_counter()
        self._clock = -1
        self.schedulers, self.observers = [], []
        group = dist.group.WORLD if trainer.world_size > 1 and dist.is_initialized() else None
        options = {"process_group": group, "every": self.every, **self.options}
        if self.observe:
            self.observers = [Balancer(pl_module, **options)]
            return
        errors = []
        for index, optimizer in enumerate(trainer.optimizers):
            try:
                self._install(trainer, pl_module, index, optimizer, options)
            except ValueError as error:
                if len(trainer.optimizers) == 1:
                    raise
                errors.append(f"optimizer {index}: {error}")
                logger.info("optimizer %d is left alone: %s", index, error)
        if not self.schedulers:
            raise ValueError("no optimizer has a layer to balance. " + "; ".join(errors))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first measurement: only now are the weights right under every strategy."""
        self._folder = self._log_folder(trainer)
        if self._saved is not None:
            self._clock = int(self._saved["clock"])
            for observer, state in zip(self.observers, self._saved["observers"], strict=False):
                observer.load_state_dict(state)
            self._saved = None
        fresh = not any(b.measurements or b.tick for b in self.balancers)
        if fresh:
            for scheduler in self.schedulers:
                scheduler.begin()
            for observer in self.observers:
                observer.begin()
            self._clock = self._now(trainer)
            self._measured(trainer)
        if fresh or not self.by_step:
            self._save_esd(trainer, last=False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_schedulers(trainer)
        if not self.by_step:
            self._catch_up(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.by_step:
            self._catch_up(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # a callback may have exchanged a schedule since the epoch began
            self._check_schedulers(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save_esd(trainer, last=True)
        if self.warn:
            self._warn()

    def state_dict(self) -> dict[str, Any]:
        return {"clock": self._clock, "observers": [o.state_dict() for o in self.observers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Under FSDP2 this comes after on_fit_start, otherwise before it.
        self._saved = dict(state_dict)

    # --- installing ----------------------------------------------------------------------------

    def _refuse(self, trainer: pl.Trainer) -> None:
        name = type(trainer.strategy).__name__
        if name in _REFUSED:
            raise ValueError(
                f"TempBalanceCallback does not work with {name}: {_REFUSED[name]}. Use DDP, or "
                "ModelParallelStrategy with fully_shard (FSDP2)"
            )
        if self.observe:
            return
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        if any(isinstance(c, BackboneFinetuning) for c in callbacks):
            raise ValueError(
                "BackboneFinetuning writes the rate of the last param group itself, which would "
                "then be one layer of the backbone; unfreeze with a BaseFinetuning of your own "
                "(unfreeze_and_add_param_group), or use TempBalanceCallback(observe=True)"
            )
        late = [c for c in callbacks[callbacks.index(self) :] if isinstance(c, BaseFinetuning)]
        if late:
            raise ValueError(
                f"put {type(late[0]).__name__} before TempBalanceCallback in the list of "
                "callbacks: it rebuilds the param groups when a run is resumed"
            )

    def _install(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        index: int,
        optimizer: Optimizer,
        options: dict[str, Any],
    ) -> None:
        configs = [
            c for c in trainer.lr_scheduler_configs if _optimizer_of(c.scheduler) is optimizer
        ]
        if len(configs) > 1:
            raise ValueError(
                f"optimizer {index} has {len(configs)} schedules; combine them into one with "
                "torch.optim.lr_scheduler.ChainedScheduler or SequentialLR"
            )
        base = configs[0].scheduler if configs else None
        if isinstance(base, TempBalanceLR):
            raise ValueError(
                "configure_optimizers returns a TempBalanceLR already: use that, or the callback, "
                "not both"
            )
        scheduler = TempBalanceLR(optimizer, pl_module, base, clock="manual", **options)
        self.schedulers.append(scheduler)
        if configs:
            configs[0].scheduler = scheduler
        elif pl_module.automatic_optimization:
            # So that its state is in the checkpoint, and learning-rate monitors find it.
            made = LRSchedulerConfig(scheduler=scheduler, interval="epoch", frequency=1)
            trainer.strategy.lr_scheduler_configs.append(made)

    def _check_schedulers(self, trainer: pl.Trainer) -> None:
        """Stop where another callback (StochasticWeightAveraging) has put in its own schedule."""
        held = [c.scheduler for c in trainer.lr_scheduler_configs]
        for scheduler in list(self.schedulers):
            rivals = [
                s for s in held if s is not scheduler and _optimizer_of(s) is scheduler.optimizer
            ]
            if rivals and scheduler not in held:
                scheduler.detach()
                self.schedulers.remove(scheduler)
                logger.warning(
                    "%s has taken over the learning rate: balancing stops and every layer has "
                    "its base rate",
                    type(rivals[0]).__name__,
                )

    # --- the clock -----------------------------------------------------------------------------

    def _now(self, trainer: pl.Trainer) -> int:
        return trainer.global_step if self.by_step else trainer.current_epoch

    def _catch_up(self, trainer: pl.Trainer) -> None:
        now = self._now(trainer)
        for _ in range(self._clock, now):
            before = [b.measurements for b in self.balancers]
            for scheduler in self.schedulers:
                scheduler.tick()
            for observer in self.observers:
                observer.step()
            self._clock += 1
            if before != [b.measurements for b in self.balancers]:
                self._measured(trainer)

    # --- logs ----------------------------------------------------------------------------------

    def _log_folder(self, trainer: pl.Trainer) -> Path | None:
        folder = trainer.log_dir if trainer.loggers else None  # a broadcast: on every rank
        return Path(folder) if folder and trainer.is_global_zero else None

    def _figures(self) -> tuple[dict[str, float | None], dict[str, float], dict[str, float]]:
        """Alphas, multipliers and rates of all balanced layers."""
        alphas: dict[str, float | None] = {}
        multipliers: dict[str, float] = {}
        rates: dict[str, float] = {}
        for balancer in self.balancers:
            alphas |= balancer.alphas
            multipliers |= {} if self.observe else balancer.multipliers
        for scheduler in self.schedulers:
            for name, host in scheduler.layer_groups.items():
                rates[name] = scheduler.layer_rates[host]
        return alphas, multipliers, rates

    def _measured(self, trainer: pl.Trainer) -> None:
        if not trainer.loggers or not trainer.is_global_zero:
            return
        alphas, multipliers, rates = self._figures()
        if self._folder is not None:
            epoch, step = trainer.current_epoch, trainer.global_step
            history.append(self._folder, epoch, step, alphas, multipliers, rates)
        if self.curves == "none":
            return
        layers = self.curves == "layers" or (self.curves == "auto" and len(alphas) <= _CURVES)
        figures = history.summary(alphas, multipliers)
        if layers:
            figures |= history.by_layer(alphas, multipliers, rates)
        elapsed = time.perf_counter() - self._began
        figures["time_share"] = sum(b.seconds for b in self.balancers) / max(elapsed, 1e-9)
        named = {f"tempbalance/{name}": value for name, value in figures.items()}
        named["epoch"] = float(trainer.current_epoch)
        for each in trainer.loggers:
            each.log_metrics(named, step=trainer.global_step)

    def _save_esd(self, trainer: pl.Trainer, last: bool) -> None:
        """Eigenvalues of every layer, written by rank 0; sharded weights need every rank."""
        if not (self.esd and trainer.loggers):
            return
        sharded = any(
            hasattr(p, "full_tensor") for b in self.balancers for x in b.layers for p in x.tensors()
        )
        if self._folder is None and not sharded:
            return
        records = []
        for balancer in self.balancers:
            records += measure(
                balancer.layers,
                windows=balancer.windows,
                fit=balancer.fit,
                min_eigs=balancer.min_eigs,
                budget=balancer.budget,
                keep_spectra=True,
            )
        if self._folder is not None:
            history.save_esd(self._folder, records, last)

    def _warn(self) -> None:
        for balancer in self.balancers:
            over, under = balancer.theory_marks()
            if over:
                logger.warning(
                    "alpha is under 2 and under that of a random matrix, the mark of over-training "
                    "(anti-grokking), in: %s. Stop earlier, or regularize them more",
                    ", ".join(over),
                )
            if under:
                logger.warning(
                    "alpha is still that of a random matrix, the mark of under-training, in: %s. "
                    "Train longer, or check that gradients reach them",
                    ", ".join(under),
                )


def _optimizer_of(scheduler: Any) -> Any:
    return getattr(scheduler, "optimizer", None)
