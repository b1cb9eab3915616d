"""Trainings of the released codes, replayed: rates, weights and alphas of every epoch to 1e-9.

The twin (released.py) shares the network and the batches with ours, and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import released
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

import tempbalance as tb
from experiments.complex_adam import ComplexAdam
from experiments.models.resnet import cifar_resnet
from experiments.models.vgg import cifar_vgg

EPOCHS = 5
Losses = Callable[[nn.Module, int], Iterator[Tensor]]


def images(model: nn.Module, epoch: int, side: int = 16) -> Iterator[Tensor]:
    """Two batches of noise with labels."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(2):
        x = torch.randn(12, 3, side, side, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 10, (12,), generator=generator)
        yield nn.functional.cross_entropy(model(x), y)


def ours(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    losses: Losses,
    **options: Any,
) -> released.Run:
    """The same training with the package, an epoch a tick."""
    scheduler = tb.TempBalanceLR(optimizer, model, schedule, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    run = released.Run()
    for epoch in range(EPOCHS):
        run.rates.append({names[id(p)]: group["lr"] for group in optimizer.param_groups
                          for p in group["params"]})  # fmt: skip
        run.alphas.append({n: a for n, a in scheduler.balancer.alphas.items() if a is not None})
        for loss in losses(model, epoch):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        scheduler.step()
    return run


def same(got: released.Run, wanted: released.Run, first: nn.Module) -> None:
    for epoch in range(EPOCHS):
        assert got.alphas[epoch].keys() == wanted.alphas[epoch].keys()
        assert got.alphas[epoch] == pytest.approx(wanted.alphas[epoch], rel=1e-9)
        assert got.rates[epoch] == pytest.approx(wanted.rates[epoch], rel=1e-9)
        for name, weight in wanted.weights[epoch].items():
            moved = (weight - first.get_parameter(name)).norm()
            assert (got.weights[epoch][name] - weight).norm() <= 1e-9 * moved, (epoch, name)
    different = {rate for rates in wanted.rates for rate in rates.values()}
    assert len(different) > 3 * EPOCHS  # rates by layer, and new ones each epoch


def residual() -> nn.Module:
    """Shortcuts with a norm, a stem of 27 and a head of 10 eigenvalues, shortcuts of 8 to 32."""
    torch.manual_seed(0)
    return cifar_resnet(18, 10, width=8, torch_init=True).double()


SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
# Released, a shortcut's norm finds no host by its name.
NORMS = {"*.downsample.1": 1.0}


def replay_images(
    model: nn.Module, layers: list[str], alpha: Callable[[nn.Module], float],
    spread: tuple[float, float], **options: Any,
) -> None:  # fmt: skip
    twin = copy.deepcopy(model)
    wanted = released.train(
        twin,
        EPOCHS,
        layers=layers,
        alpha=alpha,
        assign=released.linear(*spread),
        rate=released.cosine(SGD["lr"], EPOCHS),
        update=released.sgd(SGD["momentum"], SGD["weight_decay"]),
        losses=images,
    )
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), **SGD)
    schedule = CosineAnnealingLR(optimizer, EPOCHS)
    assign = tb.LinearMap(*spread)
    same(ours(trained, optimizer, schedule, images, assign=assign, **options), wanted, model)


def test_tempbalance_without_first_and_last_by_position() -> None:
    """First and last go first, and then those of under 50 eigenvalues: stem and head go once."""
    model = residual()
    names = released.of_size(model, released.measurable(model)[1:-1], 50)
    assert {"conv1", "fc", "layer4.0.downsample.0"}.isdisjoint(names)
    assert len(names) == 16
    replay_images(
        model, names, released.plain, (0.5, 1.5),
        windows=tb.WholeMatrix(), min_eigs=50, fixed=NORMS,
        skip_first=True, skip_last=True, ends="measurable",
    )  # fmt: skip


def test_farms_without_the_linear_layer() -> None:
    model = residual()
    names = released.of_size(model, released.measurable(model), 5)[1:-1]
    replay_images(
        model, names, released.farms_block, (0.1, 1.9),
        windows=tb.Farms.released_conv(1.0), min_eigs=5, fixed=NORMS,
        skip_first=True, skip_last=True,
    )  # fmt: skip


def test_farms_with_the_linear_layer() -> None:
    """Whose alpha comes from other windows, and one fit of them all."""
    model = residual()
    names = released.of_size(model, released.measurable(model), 5)
    assert names[-1] == "fc"
    windows = {"Linear": tb.Farms.released_linear(100, 1.0, per_dim=9),
               "*": tb.Farms.released_conv(1.0)}  # fmt: skip
    replay_images(
        model, names, released.farms, (0.1, 1.9), windows=windows, min_eigs=5, fixed=NORMS
    )


def test_farms_on_vgg_whose_norms_have_no_name() -> None:
    """Released, a norm follows where its name says ``bn``; here its place in the list does."""
    torch.manual_seed(0)
    model = cifar_vgg(16, 10, torch_init=True)
    narrow = nn.Sequential(model.features[:7], nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    narrow.append(nn.Linear(64, 10).double())
    names = released.measurable(narrow)
    norms = [n for n, m in narrow.named_modules() if isinstance(m, nn.BatchNorm2d)]
    replay_images(
        narrow, names, released.farms_block, (0.2, 1.8),
        windows=tb.Farms.released_conv(1.0), min_eigs=5, fixed=dict.fromkeys(norms, 1.0),
    )  # fmt: skip


class SpectralConv2d(nn.Module):
    """Two corners of the spectrum, each with complex weights (in, out, modes, modes)."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        shape = (width, width, modes, modes)
        scale = 1 / width**2
        self.weights1 = nn.Parameter(scale * torch.rand(shape, dtype=torch.cdouble))
        self.weights2 = nn.Parameter(scale * torch.rand(shape, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        m = self.modes
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros_like(spectrum)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], self.weights1)
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -m:, :m], self.weights2)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class FNO2d(nn.Module):
    """An operator in the form of PDEBench: lift, two blocks, project; channels last outside."""

    def __init__(self, width: int = 16, modes: int = 4) -> None:
        super().__init__()
        self.fc0 = nn.Linear(3, width)  # three eigenvalues: no vote
        self.conv0, self.conv1 = SpectralConv2d(width, modes), SpectralConv2d(width, modes)
        self.w0, self.w1 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.fc1, self.fc2 = nn.Linear(width, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc0(x).permute(0, 3, 1, 2)
        x = nn.functional.gelu(self.conv0(x) + self.w0(x))
        x = (self.conv1(x) + self.w1(x)).permute(0, 2, 3, 1)
        return self.fc2(nn.functional.gelu(self.fc1(x)))


def fields(model: nn.Module, epoch: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(3):
        x = torch.randn(4, 12, 12, 3, generator=generator, dtype=torch.float64)
        yield (model(x)[..., 0] - x.cumsum(1)[..., 0]).square().mean()


def test_tb_sigmoid_on_a_fourier_operator() -> None:
    """Spectral weights take no part; Adam divides their gradients by their absolute value."""
    torch.manual_seed(0)
    model = FNO2d().double()
    names = released.of_size(model, released.measurable(model), 13)
    assert names == ["w0", "w1", "fc1"]
    wanted = released.train(
        twin := copy.deepcopy(model),
        EPOCHS,
        layers=names,
        alpha=released.plain,
        assign=released.sigmoid(0.5),
        rate=released.steps(2.5e-3, 2, 0.5),
        update=released.adam(1e-4),
        losses=fields,
    )
    assert all(torch.equal(p, wanted.weights[-1][n]) for n, p in twin.named_parameters())
    trained = copy.deepcopy(model)
    optimizer = ComplexAdam(trained.parameters(), lr=2.5e-3, weight_decay=1e-4)
    got = ours(
        trained, optimizer, StepLR(optimizer, 2, 0.5), fields, windows=tb.WholeMatrix(),
        assign=tb.SigmoidMap(0.5), min_eigs=13, exclude=["SpectralConv2d"],
    )  # fmt: skip
    same(got, wanted, model)
