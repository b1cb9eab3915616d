"""Lightning: ``Trainer(callbacks=[TempBalanceCallback()])``, and nothing else changes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Unpack

import torch.distributed as dist
from torch.optim import Optimizer

from tempbalance.balance.options import OBJECTS, Given, GivenAssign, check_names, with_options
from tempbalance.balance.tracker import Tracker
from tempbalance.integrations.lightning_base import callback_class
from tempbalance.integrations.lightning_checks import (
    check_configs,
    config_class,
    configs_of,
    optimizer_of,
    refuse,
)
from tempbalance.integrations.lightning_logs import LOGS, Log, RunLog
from tempbalance.integrations.traps import TrapLog
from tempbalance.optim.checks import check_decay
from tempbalance.optim.decay import AlphaDecay
from tempbalance.optim.hooks import StepHooks
from tempbalance.optim.scheduler import TempBalanceLR

logger = logging.getLogger("tempbalance")


if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback
else:
    Callback = callback_class()


@with_options(without=("every",), files=True)
class TempBalanceCallback(Callback):
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
            ``tempbalance.csv`` in its folder has every layer in any case; a ``WandbLogger`` also
            gets a table and a picture of all measurements when ``fit`` ends.
        esd: keep the eigenvalues of the first measurement and of the end, for ``tempbalance plot``.
        warn: name, at the end, layers that theory calls over-trained (alpha under 2 and under
            what a random matrix reads) and those that never left the random spectrum; only layers
            that were measured twice or more.
        traps: look for correlation traps (atypical entries) at each measurement too, which costs
            several measurements; logged by layer as ``traps`` and ``trap_units``. A warning names
            each layer, once, whose traps persist and grow over three looks.
        keep_decay: see :class:`~tempbalance.TempBalanceLR`.
        decay: balance weight decay too: the options of a :class:`~tempbalance.AlphaDecay` (``{}``
            for its defaults, with the callback's own interval). For decay alone,
            ``assign=Constant(1.0)``.
        hooks: put multipliers on only while the optimizer steps, through a
            :class:`~tempbalance.StepHooks`: schedules that are not torch's (timm's), groups,
            learning-rate monitors and the checkpoint's optimizer stay as they are without the
            callback. Then everything is counted in optimizer steps: give ``every_n_steps``.
        options: see :class:`~tempbalance.balance.options.Options`; ``start``, ``stop``, ``hold``,
            ``ramp`` and ``delay`` are in epochs, or in optimizer steps with ``every_n_steps``.

    Raises:
        ValueError, TypeError: for options out of range or unknown.

    A run resumes from its checkpoint bit for bit, within an epoch too if the loader keeps its place
    (torchdata's StatefulDataLoader; with torch's own Lightning begins the epoch's data anew, with
    the callback or without). A checkpoint of a run without the callback can be continued with it.
    To continue a balanced run without balancing, keep the callback, with ``assign=Constant(1.0)``:
    the checkpoint's optimizer has a group a layer, and without the callback torch refuses it
    ("different number of parameter groups"). ``Trainer.validate``, ``test`` and ``predict`` and
    ``load_from_checkpoint`` need no callback.
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
        traps: bool = False,
        keep_decay: bool = False,
        decay: Given | None = None,
        hooks: bool = False,
        **options: Unpack[GivenAssign],
    ) -> None:
        super().__init__()
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if log not in LOGS:
            raise ValueError(f"log must be 'auto', 'layers', 'summary' or 'none', got {log!r}")
        check_names(type(self), options)
        for name in OBJECTS:  # from a file
            if options.get(name, ...) is None:
                del options[name]  # type: ignore[misc]
        check_names(AlphaDecay, decay or {})
        if keep_decay and decay is not None:
            raise ValueError("keep_decay and decay both write the weight decay: use one of them")
        if every_n_steps is not None and every_n_epochs != 1:
            raise ValueError("give every_n_epochs or every_n_steps, not both")
        if hooks and (every_n_steps is None or observe):
            raise ValueError(
                "hooks=True counts optimizer steps, and is not for observe: give every_n_steps"
            )
        self.hooks = hooks
        self.by_step = every_n_steps is not None
        self.every = every_n_steps or every_n_epochs
        # Lightning overwrites an attribute named ``log``.
        self.observe, self.run_log = observe, RunLog(log, esd, warn)
        self.traps = TrapLog(traps)
        self.options, self.keep_decay, self.decay = options, keep_decay, decay
        self.decays: list[AlphaDecay] = []
        self.step_hooks: list[StepHooks] = []
        self.schedulers: list[TempBalanceLR] = []
        self.observers: list[Tracker] = []
        self._logged: list[int] = []  # the measurements that the loggers have
        self._own: list[TempBalanceLR] = []  # those that are in none of the trainer's lists
        self._clock = -1  # the epoch, or the number of optimizer steps, of the last tick
        self._saved: dict[str, Any] | None = None
        self._fitting = True
        self._retired: list[Tracker] = []  # of schedules that another callback has replaced

    @property
    def balancers(self) -> list[Tracker]:
        """One for each optimizer that holds layers (one for the model with ``observe``)."""
        own: list[Tracker] = [s.balancer for s in self.schedulers]
        return self.observers or [*own, *(h.balancer for h in self.step_hooks)]

    # --- Lightning's hooks ---------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Split the groups and wrap the schedules, before any optimizer state is restored."""
        refuse(trainer, self, self.observe)
        self.run_log.start()
        self.traps.start()
        self._clock = -1
        self.schedulers, self.observers, self._own, self._retired = [], [], [], []
        self.decays = []
        self._unhook()
        group = dist.group.WORLD if trainer.world_size > 1 and dist.is_initialized() else None
        options: Given = {"process_group": group, "every": self.every, **self.options}
        if self.observe:
            self.observers = [Tracker(pl_module, **options)]
            return
        errors = []
        for index, optimizer in enumerate(trainer.optimizers):
            if not self.hooks:
                check_configs(trainer, index, optimizer)
            try:
                self._install(trainer, pl_module, optimizer, options)
            except ValueError as error:
                if len(trainer.optimizers) == 1:
                    raise
                errors.append(f"optimizer {index}: {error}")
                logger.info("optimizer %d is left alone: %s", index, error)
        if not self.schedulers and not self.step_hooks:
            raise ValueError("no optimizer has a layer to balance. " + "; ".join(errors))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first measurement: only now are the weights right under every strategy."""
        self.run_log.open(trainer)
        if self._saved is not None:
            self._restore(trainer, self._saved)
            self._saved = None
        fresh = [b for b in self.balancers if not (b.measurements or b.tick)]
        now = self._now(trainer)
        if len(fresh) == len(self.balancers):
            self._clock = now
        for each in (*self.schedulers, *self.decays):
            each.begin(now)
        for hooks in self.step_hooks:
            hooks.begin(now)
        for observer in self.observers:
            if observer in fresh:
                observer.begin(now)
        self._logged = self._counts()
        if any(b.measurements for b in fresh):  # not before ``start``
            self._measured(trainer)
        self.run_log.save_esd(trainer, self.balancers, last=False, keep=trainer.global_step > 0)

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
        # A run may resume behind the hooks above: from a checkpoint of an epoch's last batch.
        self._catch_up(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.run_log.finish(trainer, [*self.balancers, *self._retired])
        for hooks in self.step_hooks:
            hooks.detach()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt):  # Lightning then skips on_fit_end
            self.run_log.interrupted(trainer, [*self.balancers, *self._retired])

    # --- state ---------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Lightning shows this where a checkpoint is continued without the callback."""
        return f"{type(self).__qualname__} (to go on without balancing: assign=Constant(1.0))"

    def state_dict(self) -> dict[str, Any]:
        return {
            "clock": self._clock,
            "by_step": self.by_step,
            "observe": self.observe,
            "observers": [o.state_dict() for o in self.observers],
            # Without a schedule and with manual optimization Lightning keeps none of these.
            "own": [s.state_dict() for s in self._own],
            "decays": [d.state_dict() for d in self.decays],
            "hooks": [h.state_dict() for h in self.step_hooks],
            "traps": self.traps.state_dict(),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # A checkpoint that is validated or tested says nothing about the next fit.
        self._fitting = trainer.state.fn == "fit"
        saved = checkpoint["callbacks"].get(self.state_key)
        if trainer.training and self.observe and saved is not None and not saved["observe"]:
            raise ValueError(
                "the checkpoint is of a balanced run, whose optimizer has a param group a layer: "
                "observe=True cannot continue it. To go on without balancing use "
                "TempBalanceCallback(assign=tempbalance.Constant(1.0))"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Under FSDP2 this comes after on_fit_start, otherwise before it.
        if self._fitting:
            self._saved = dict(state_dict)

    def _restore(self, trainer: pl.Trainer, saved: dict[str, Any]) -> None:
        same = saved["by_step"] == self.by_step
        self._clock = int(saved["clock"]) if same else self._now(trainer)
        for observer, state in zip(self.observers, saved["observers"], strict=False):
            observer.load_state_dict(state)
        for scheduler, state in zip(self._own, saved.get("own", ()), strict=False):
            scheduler.load_state_dict(state)
        for decay, state in zip(self.decays, saved.get("decays", ()), strict=False):
            decay.load_state_dict(state)
        for hooks, state in zip(self.step_hooks, saved.get("hooks", ()), strict=False):
            hooks.load_state_dict(state)
        self.traps.load_state_dict(saved.get("traps", {}))

    def __getstate__(self) -> dict[str, Any]:
        """Options and clock: optimizers and schedules belong to the fit, and do not pickle."""
        lists = ("schedulers", "step_hooks", "observers", "decays", "_own", "_retired")
        return {**self.__dict__, **{name: [] for name in lists}}

    # --- installing ----------------------------------------------------------------------------

    def _install(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
        options: Given,
    ) -> None:
        decay: Any = None
        if self.decay is not None:
            decay = {"every": self.every, "process_group": options["process_group"], **self.decay}
        if self.hooks:
            more: Any = {"keep_decay": self.keep_decay, "decay": decay, "begin": False}
            self.step_hooks.append(StepHooks(optimizer, pl_module, **more, **options))
            return
        if decay is not None:
            check_decay(optimizer)  # before anything is touched
        configs = configs_of(trainer, optimizer)
        base = configs[0].scheduler if configs else None
        scheduler = TempBalanceLR(
            optimizer, pl_module, base, clock="manual", keep_decay=self.keep_decay, **options
        )
        self.schedulers.append(scheduler)
        if decay is not None:
            self.decays.append(AlphaDecay(optimizer, pl_module, clock="manual", **decay))
        if configs:
            configs[0].scheduler = scheduler
        elif pl_module.automatic_optimization:
            # So that its state is in the checkpoint, and learning-rate monitors find it.
            config = config_class(trainer)(scheduler=scheduler, interval="epoch", frequency=1)
            trainer.strategy.lr_scheduler_configs.append(config)
        else:
            self._own.append(scheduler)

    def _unhook(self) -> None:
        """Let go of the optimizers of an earlier fit."""
        for hooks in self.step_hooks:
            hooks.detach()
        self.step_hooks = []

    def _check_schedulers(self, trainer: pl.Trainer) -> None:
        """Stop where another callback (StochasticWeightAveraging) has put in its own schedule."""
        held = [c.scheduler for c in trainer.lr_scheduler_configs]
        for scheduler in list(self.schedulers):
            rivals = [
                s for s in held if s is not scheduler and optimizer_of(s) is scheduler.optimizer
            ]
            if rivals and scheduler not in held:
                scheduler.detach()
                self.schedulers.remove(scheduler)
                self._retired.append(scheduler.balancer)
                logger.warning(
                    "TempBalance: %s has taken over the learning rate. Balancing stops, and every "
                    "layer has its base rate from here on.",
                    type(rivals[0]).__name__,
                )

    # --- the clock -----------------------------------------------------------------------------

    def _now(self, trainer: pl.Trainer) -> int:
        return trainer.global_step if self.by_step else trainer.current_epoch

    def _catch_up(self, trainer: pl.Trainer) -> None:
        now = self._now(trainer)
        for _ in range(self._clock, now):
            for each in (*self.schedulers, *self.decays):
                each.tick()
            for observer in self.observers:
                observer.step()
            self._clock += 1
            if self._logged != (counts := self._counts()):
                self._logged = counts
                self._measured(trainer)

    def _counts(self) -> list[int]:
        """The measurements so far of everything that measures."""
        of_hooks = [b for hooks in self.step_hooks for b in hooks.balancers[1:]]
        watched = [*self.balancers, *(decay.balancer for decay in self.decays), *of_hooks]
        return [balancer.measurements for balancer in watched]

    def _measured(self, trainer: pl.Trainer) -> None:
        multipliers: dict[str, float] = {}
        rates: dict[str, float] = {}
        for hooks in self.step_hooks:
            multipliers |= hooks.multipliers
        for scheduler in self.schedulers:
            multipliers |= scheduler.multipliers
            in_use = scheduler.layer_rates
            rates |= {name: in_use[host] for name, host in scheduler.layer_groups.items()}
        decays: dict[str, float] = {}
        for decay in self.decays:
            in_use = decay.layer_decays
            decays |= {name: in_use[host] for name, host in decay.layer_groups.items()}
        self.traps.look(self.balancers, quiet=not trainer.is_global_zero)
        self.run_log.measured(trainer, self.balancers, multipliers, rates, decays, self.traps)
