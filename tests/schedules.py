"""The contract table: every schedule, optimizer and assignment that balancing is held against."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

import tempbalance as tb


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


def train_step(model: nn.Module, optimizer: Optimizer, index: int) -> float:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    y = torch.randint(0, 10, (8,), generator=generator)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def _plateau(optimizer: Optimizer) -> lrs.LRScheduler:
    return lrs.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=1e9)


def _swa(optimizer: Optimizer) -> lrs.LRScheduler:
    return torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=5)


def _sequential(optimizer: Optimizer) -> lrs.LRScheduler:
    warm = lrs.LinearLR(optimizer, 0.1, total_iters=3)
    return lrs.SequentialLR(optimizer, [warm, lrs.CosineAnnealingLR(optimizer, 9)], [3])


def _chained(optimizer: Optimizer) -> lrs.LRScheduler:
    return lrs.ChainedScheduler(
        [lrs.ExponentialLR(optimizer, 0.9), lrs.StepLR(optimizer, 4)], optimizer=optimizer
    )


Schedule = Callable[[Optimizer], Any]
SCHEDULES: dict[str, Schedule] = {
    "none": lambda o: None,
    "step": lambda o: lrs.StepLR(o, 3, 0.5),
    "multistep": lambda o: lrs.MultiStepLR(o, [2, 5], 0.3),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 7, eta_min=0.001),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.8),
    "constant": lambda o: lrs.ConstantLR(o, 0.5, 4),
    "lambda": lambda o: lrs.LambdaLR(o, lambda e: 1 / (1 + e)),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda e: 0.9),
    "linear": lambda o: lrs.LinearLR(o, 0.1, 1.0, 6),
    "polynomial": lambda o: lrs.PolynomialLR(o, 8, 2.0),
    "onecycle": lambda o: lrs.OneCycleLR(o, 0.3, total_steps=40),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.2, step_size_up=4),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 4, 2),
    "sequential": _sequential,
    "chained": _chained,
    "swa": _swa,
    "plateau": _plateau,
}

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.85, 0.99)),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
}

ASSIGNMENTS: dict[str, tb.assign.Assignment] = {
    "linear": tb.LinearMap(0.5, 1.5),
    "sqrt": tb.SqrtShare(),
    "log2": tb.Log2Share(),
    "rank": tb.RankMap(0.5, 1.5),
    "sigmoid": tb.SigmoidMap(1.0, 10),
    "sigmoid_sides": tb.SigmoidMap((0.5, 1.0), 5),
    "clipped": tb.Clipped(tb.LinearMap(), 2.0),
    "shuffled": tb.Shuffled(tb.LinearMap(), seed=3),
    "reversed": tb.Reversed(tb.LinearMap()),
    "averaged": tb.Averaged(tb.LinearMap()),
    "frozen": tb.Frozen(tb.LinearMap()),
    "constant": tb.Constant(0.8),
    "pertype": tb.PerType({"Conv2d": 0.6, "Linear": 1.3}),
}


def advance(scheduler: Any, name: str, index: int) -> None:
    """One step of a schedule; plateau gets a loss that does not improve after the third step."""
    if scheduler is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "plateau":
            scheduler.step(1.0 / (1 + min(index, 3)))
        else:
            scheduler.step()


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in model.state_dict().values()])


class Foreign:
    """A schedule that is not torch's: it writes the groups that it was built on, an entry each."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        self.values = [group["lr"] for group in optimizer.param_groups]

    def step(self) -> None:
        self.count += 1
        for value, group in zip(self.values, self.optimizer.param_groups, strict=True):
            self.write(group, value)

    def write(self, group: dict[str, Any], value: float) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
