"""What is learned: classification, and operators between fields (one step or a rollout)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from experiments.metrics import MeanRelativeL2, SampleMean, nrmse, relative_l2
from experiments.sharding import shard

OptimizerFactory = Callable[..., torch.optim.Optimizer]
Schedule = Mapping[str, Any]


class Task(pl.LightningModule):
    """A model with its optimizer and schedule; the subclasses say what a step is.

    `schedule` is Lightning's scheduler dictionary whose `scheduler` is a factory that takes the
    optimizer, or None for a constant rate. With `whole_run: true` the factory is also given
    `total`, the optimizer steps of the run.
    """

    def __init__(
        self, model: nn.Module, optimizer: OptimizerFactory, schedule: Schedule | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._optimizer = optimizer
        self._schedule = dict(schedule or {})

    def forward(self, x: Tensor) -> Tensor:
        """Apply the model."""
        return self.model(x)

    def configure_model(self) -> None:
        """Shard the model where the strategy has a device mesh (FSDP2)."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the schedule on it, from their factories."""
        optimizer = self._optimizer(self.parameter_groups())
        factory = self._schedule.get("scheduler")
        if factory is None:
            return optimizer
        options = {k: v for k, v in self._schedule.items() if k not in ("scheduler", "whole_run")}
        total = {}
        if self._schedule.get("whole_run"):
            total = {"total": int(self.trainer.estimated_stepping_batches)}
        scheduler = factory(optimizer, **total)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"interval": "epoch", **options, "scheduler": scheduler},
        }

    def parameter_groups(self) -> Any:
        """What the optimizer is built from: all parameters in one group."""
        return self.parameters()

    def _show(self, name: str, value: Tensor | Metric, size: int, bar: bool = False) -> None:
        # The history callback sends one row an epoch to the loggers: no second copy from here.
        self.log(
            name,
            value,
            on_step=False,
            on_epoch=True,
            prog_bar=bar,
            logger=False,
            batch_size=size,
            sync_dist=not isinstance(value, Metric) and not name.startswith("train"),
            add_dataloader_idx=False,
        )


class Classification(Task):
    """Loss and accuracy of `num_classes` classes.

    `loss`: of logits (B, num_classes) and labels (B,), default cross entropy, with
    `label_smoothing` in training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(model, optimizer, schedule)
        self.label_smoothing = label_smoothing
        self.loss = loss
        self.accuracy = nn.ModuleDict(
            {
                stage: MulticlassAccuracy(num_classes, average="micro")
                for stage in ("train_", "val_", "test_")
            }
        )

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        logits = self(x)
        smoothing = self.label_smoothing if stage == "train" else 0.0
        loss = (
            F.cross_entropy(logits, y, label_smoothing=smoothing)
            if self.loss is None
            else self.loss(logits, y)
        )
        accuracy = cast("MulticlassAccuracy", self.accuracy[f"{stage}_"])
        accuracy.update(logits, y)
        self._show(f"{stage}/loss", loss, len(y), bar=stage == "train")
        self._show(f"{stage}/accuracy", accuracy, len(y), bar=stage != "train")
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch (x (B, C, H, W), y (B,))."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on the validation data."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on the test data."""
        self._step(batch, "test")


class OperatorLearning(Task):
    """Maps between fields: one step (B, C', *grid), or a rollout of T steps (B, T, C, *grid).

    The batch is normalized and the loss is taken there; every metric is in the units of the data,
    through the data module's `normalizer.decode`. `nrmse` and `relative_l2` are over the whole
    rollout, `rollout` is the relative L2 error of its last step. Several test loaders are logged
    under the data module's `test_names`, the first as `test/`: it is the headline.

    `loss`: of prediction and target, default the mean relative L2 error of the samples.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        rollout: bool = False,
    ) -> None:
        super().__init__(model, optimizer, schedule)
        self.loss = loss or MeanRelativeL2()
        self.rollout = rollout
        self.errors = nn.ModuleDict()

    def setup(self, stage: str) -> None:
        """Make the accumulators, one set for validation and one for each test loader."""
        for name in ("val", *self._test_stages()):
            for kind in ("nrmse", "relative_l2", *(("rollout",) if self.rollout else ())):
                key = _key(name, kind)
                if key not in self.errors:
                    self.errors[key] = SampleMean()

    def predict(self, x: Tensor, steps: int) -> Tensor:
        """Feed predictions back: (B, T_in * C, *grid) -> (B, steps, C, *grid)."""
        predictions = []
        for _ in range(steps):
            step = self(x)
            predictions.append(step)
            x = torch.cat([x[:, step.shape[1] :], step], dim=1)
        return torch.stack(predictions, dim=1)

    def _predict(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        prediction = self.predict(x, y.shape[1]) if self.rollout else self(x)
        if prediction.shape != y.shape:
            raise ValueError(
                f"the model's output is {tuple(prediction.shape)}, the target {tuple(y.shape)}: "
                "check problem.out_channels, and task.rollout for autoregressive data"
            )
        return prediction

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch of normalized fields, through all steps of a rollout."""
        loss = self.loss(self._predict(batch), batch[1])
        self._show("train/loss", loss, len(batch[1]), bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Errors on the validation data."""
        self._evaluate(batch, "val")

    def test_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Errors on a test set."""
        self._evaluate(batch, self._test_stages()[dataloader_idx])

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        encoded = self._predict(batch)
        decode = self._decode()
        prediction, target = decode(encoded), decode(batch[1])
        size = len(target)
        self._show(f"{stage}/loss", self.loss(encoded, batch[1]), size)
        values = {
            "nrmse": nrmse(prediction, target, fields=2 if self.rollout else 1),
            "relative_l2": relative_l2(prediction, target),
        }
        if self.rollout:
            values["rollout"] = relative_l2(prediction[:, -1], target[:, -1])
        for kind, value in values.items():
            error = cast("SampleMean", self.errors[_key(stage, kind)])
            error.update(value)
            self._show(f"{stage}/{kind}", error, size, bar=kind == "relative_l2")

    def _decode(self) -> Callable[[Tensor], Tensor]:
        normalizer = getattr(self._datamodule(), "normalizer", None)
        return (lambda y: y) if normalizer is None else normalizer.decode

    def _test_stages(self) -> list[str]:
        names = list(getattr(self._datamodule(), "test_names", None) or [""])
        return ["test", *(n if n.startswith("test") else f"test_{n}" for n in names[1:])]

    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)


def _key(stage: str, kind: str) -> str:
    # Module names hold no dots and must not shadow `train`.
    return f"{stage}_{kind}".replace(".", "_")
