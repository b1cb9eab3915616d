"""Metrics against closed forms; what a task predicts, decodes, logs and optimizes."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from standins import Doubled, RandomData
from torch import Tensor, nn

from experiments.metrics import MeanRelativeL2, SampleMean, nrmse, relative_l2
from experiments.schedules import warmup_cosine
from experiments.sharding import shard
from experiments.tasks import Classification, OperatorLearning

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def fit_and_test(
    task: pl.LightningModule, data: pl.LightningDataModule, tmp_path: Any, epochs: int = 1
) -> dict[str, float]:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, datamodule=data)
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(task, datamodule=data, verbose=False)
    return seen | {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_relative_l2_of_a_scaled_field_is_the_scale() -> None:
    y = torch.randn(3, 2, 5, 5)
    factors = torch.tensor([1.5, 1.0, 0.0])
    errors = relative_l2(factors[:, None, None, None] * y, y)
    torch.testing.assert_close(errors, torch.tensor([0.5, 0.0, 1.0]))
    assert MeanRelativeL2()(factors[:, None, None, None] * y, y).item() == pytest.approx(0.5)


def test_nrmse_weighs_fields_alike_and_relative_l2_by_their_size() -> None:
    y = torch.ones(1, 2, 4, 4)
    y[:, 0] *= 100.0  # a large and a small field, wrong by 10% and by 50%
    prediction = y * torch.tensor([1.1, 1.5])[None, :, None, None]
    assert nrmse(prediction, y, fields=1).item() == pytest.approx(0.3, abs=1e-5)
    expected = math.sqrt((10.0**2 + 0.5**2) / (100.0**2 + 1))
    assert relative_l2(prediction, y).item() == pytest.approx(expected, rel=1e-5)


def test_nrmse_averages_over_time_and_channels() -> None:
    y = torch.ones(2, 3, 2, 8)  # (B, T, C, x)
    prediction = y.clone()
    prediction[:, 1, 0] = 1.6  # one of six fields wrong by 60%
    torch.testing.assert_close(nrmse(prediction, y), torch.tensor([0.1, 0.1]))


def test_zero_target_gives_a_finite_error() -> None:
    y = torch.zeros(1, 1, 4)
    assert torch.isfinite(relative_l2(y + 1, y)).all()
    assert torch.isfinite(nrmse(y + 1, y, fields=1)).all()


def test_sample_mean_does_not_depend_on_batch_sizes() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    whole, parts = SampleMean(), SampleMean()
    whole.update(values)
    parts.update(values[:3])
    parts.update(values[3:])
    assert whole.compute().item() == parts.compute().item() == 4.0


class LastStep(nn.Module):
    """Predicts the last input frame plus one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -self.channels :] + self.bias


def test_rollout_feeds_predictions_back() -> None:
    task = OperatorLearning(LastStep(2), SGD, rollout=True)
    x = torch.arange(6.0)[None, :, None].repeat(1, 1, 4)  # 3 frames of 2 channels: last is (4, 5)
    out = task.predict(x, steps=3)
    assert out.shape == (1, 3, 2, 4)
    torch.testing.assert_close(out[0, :, :, 0], torch.tensor([[5.0, 6], [6, 7], [7, 8]]))


def test_rollout_window_slides_by_whole_frames() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2]

    task = OperatorLearning(First(), SGD, rollout=True)
    x = torch.arange(6.0)[None, :, None]
    out = task.predict(x, steps=4)[0, :, :, 0]
    torch.testing.assert_close(out, torch.tensor([[0.0, 1], [2, 3], [4, 5], [0, 1]]))


class Constant(nn.Module):
    """Predicts one value, that is not trained away at a rate of zero."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.value * torch.ones_like(x[:, :1])


def test_metrics_are_in_the_units_of_the_data_and_every_test_set_is_logged(tmp_path: Any) -> None:
    data = RandomData(x=[1, 4, 4], y=[1, 4, 4], normalizer=Doubled(), tests=2)
    still = functools.partial(torch.optim.SGD, lr=0.0)
    metrics = fit_and_test(OperatorLearning(Constant(0.25), still), data, tmp_path)
    target = 2 * data.data.tensors[1] + 1
    expected = relative_l2(torch.full_like(target, 1.5), target).mean().item()
    assert metrics["test/relative_l2"] == pytest.approx(expected, rel=1e-5)
    assert metrics["test_32/relative_l2"] == pytest.approx(expected, rel=1e-5)
    assert metrics["val/relative_l2"] == pytest.approx(expected, rel=1e-5)
    encoded = relative_l2(torch.full_like(target, 0.25), data.data.tensors[1]).mean().item()
    assert metrics["train/loss"] == pytest.approx(encoded, rel=1e-5)  # the loss is not decoded
    assert "test/nrmse" in metrics
    assert "test/rollout" not in metrics


def test_rollout_error_is_that_of_the_last_step(tmp_path: Any) -> None:
    data = RandomData(x=[3, 8], y=[2, 1, 8])
    still = functools.partial(torch.optim.SGD, lr=0.0)
    task = OperatorLearning(Constant(0.5), still, rollout=True, loss=nn.MSELoss())
    metrics = fit_and_test(task, data, tmp_path)
    target = data.data.tensors[1]
    half = torch.full_like(target, 0.5)
    last = relative_l2(half[:, -1], target[:, -1]).mean().item()
    assert metrics["test/rollout"] == pytest.approx(last, rel=1e-5)
    assert metrics["test/relative_l2"] == pytest.approx(relative_l2(half, target).mean().item())
    assert metrics["train/loss"] == pytest.approx((half - target).square().mean().item(), rel=1e-5)


def test_wrong_output_shape_is_explained(tmp_path: Any) -> None:
    data = RandomData(x=[2, 4], y=[2, 4])
    with pytest.raises(ValueError, match=r"out_channels.*rollout"):
        fit_and_test(OperatorLearning(Constant(0.5), SGD), data, tmp_path)


def test_classification_learns_and_counts(tmp_path: Any) -> None:
    torch.manual_seed(0)
    data = RandomData(x=[6], classes=3, n=12, batch_size=5)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    task = Classification(net, functools.partial(torch.optim.Adam, lr=0.05), num_classes=3)
    metrics = fit_and_test(task, data, tmp_path, epochs=30)
    x, y = data.data.tensors
    with torch.no_grad():
        right = (net(x).argmax(1) == y).float().mean().item()
    assert metrics["test/accuracy"] == metrics["val/accuracy"] == pytest.approx(right)
    assert right == 1.0  # twelve points can be learnt by heart


class Rates(Callback):
    """Learning rates as the epochs see them."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_schedule_follows_its_interval(interval: str, tmp_path: Any) -> None:
    schedule = {
        "scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        "interval": interval,
    }
    task = Classification(nn.Linear(6, 3), SGD, schedule, num_classes=3)
    rates = Rates()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[rates],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, datamodule=RandomData(x=[6], classes=3))  # two batches an epoch
    expected = [0.1, 0.1, 0.05, 0.05] if interval == "epoch" else [0.1, 0.05, 0.025, 0.0125]
    assert rates.seen == pytest.approx(expected)


def test_no_schedule_is_a_constant_rate() -> None:
    task = Classification(nn.Linear(6, 3), SGD, {"scheduler": None}, num_classes=3)
    assert isinstance(task.configure_optimizers(), torch.optim.SGD)


def test_warmup_then_cosine_to_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warmup_cosine(optimizer, warmup=4, total=12)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.01)
    assert rates[4] == pytest.approx(1.0)
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="does not fit"):
        warmup_cosine(optimizer, warmup=12, total=12)


def test_sharding_of_a_partly_complex_model_is_refused_with_the_cure() -> None:
    model = nn.Linear(3, 3)
    model.spectral = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"real and complex parameters.*trainer=ddp"):
        shard(model, mesh=None)  # type: ignore[arg-type]
