"""The released training loops, written anew: slow, in float64, with nothing of the package.

One loop for all: measure, give every layer its rate, train an epoch, step the schedule. What
differs between the codes is passed in. Alphas come from singular values of matrices in a Python
loop; optimizers are a dozen lines of arithmetic on one tensor each.

Sources: TempBalance (arXiv 2312.00359), FARMS (arXiv 2506.06280), Model Balancing (arXiv
2410.12178), as docs/method.md describes their codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Rates = dict[str, float]
Update = Callable[[Tensor, Tensor, dict[str, Tensor], float], None]


@dataclass
class Run:
    """What a training did, an entry an epoch: rates as the epoch began, weights as it ended."""

    rates: list[Rates] = field(default_factory=list)
    alphas: list[Rates] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)


def train(
    model: nn.Module,
    epochs: int,
    *,
    layers: Sequence[str],
    alpha: Callable[[nn.Module], float],
    assign: Callable[[list[float]], list[float]],
    rate: Callable[[int], float],
    update: Update,
    losses: Callable[[nn.Module, int], Iterable[Tensor]],
) -> Run:
    """Train; ``layers`` are the modules that are tuned, ``losses`` those of an epoch's batches.

    A layer's bias and the norm called ``bn`` where it is called ``conv`` have its rate; everything
    else has that of the schedule.
    """
    run = Run()
    state: dict[str, dict[str, Tensor]] = {name: {} for name, _ in model.named_parameters()}
    for epoch in range(epochs):
        alphas = {name: alpha(model.get_submodule(name)) for name in layers}
        multipliers = dict(zip(layers, assign(list(alphas.values())), strict=True))
        rates = {}
        for name in state:
            module = name.rpartition(".")[0]
            host = module if module in multipliers else module.replace("bn", "conv")
            rates[name] = rate(epoch) * multipliers.get(host, 1.0)
        for loss in losses(model, epoch):
            parameters = dict(model.named_parameters())
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                    update(parameter, gradient, state[name], rates[name])
        run.rates.append(rates)
        run.alphas.append(alphas)
        run.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return run


# --- which layers --------------------------------------------------------------------------------


def matrices(module: nn.Module) -> list[Tensor]:
    """A linear weight, or a matrix for each position of a convolution's kernel."""
    weight = module.weight.detach()
    assert isinstance(weight, Tensor)
    if weight.ndim == 2:
        return [weight]
    return [weight[:, :, i, j] for i in range(weight.shape[2]) for j in range(weight.shape[3])]


def measurable(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def of_size(model: nn.Module, names: Iterable[str], least: int) -> list[str]:
    """Those of so many eigenvalues and more."""

    def eigenvalues(name: str) -> int:
        return sum(min(m.shape) for m in matrices(model.get_submodule(name)))

    return [name for name in names if eigenvalues(name) >= least]


# --- alphas --------------------------------------------------------------------------------------


def hill(pieces: Iterable[Tensor]) -> float:
    """Hill's estimator on the upper half of the squared singular values of all pieces."""
    values = sorted(v**2 for piece in pieces for v in torch.linalg.svdvals(piece).tolist())
    tail = values[len(values) // 2 :]
    return 1 + len(tail) / math.fsum(math.log(value / tail[0]) for value in tail)


def plain(module: nn.Module) -> float:
    """TempBalance: all matrices of a layer in one fit."""
    return hill(matrices(module))


def farms_block(module: nn.Module) -> float:
    """FARMS' path of convolutions, Q = 1: a fit for each block of C rows, and their mean."""
    turned = [m.T if m.shape[1] > m.shape[0] else m for m in matrices(module)]
    side = turned[0].shape[1]
    blocks = turned[0].shape[0] // side
    fits = [hill([m[i * side : (i + 1) * side] for m in turned]) for i in range(blocks)]
    return math.fsum(fits) / len(fits)


def farms(module: nn.Module) -> float:
    """FARMS, the linear layer kept: it has 9 square windows of up to 100 along each side, one fit.

    The windows start every (side - window) // 8 entries.
    """
    if isinstance(module, nn.Conv2d):
        return farms_block(module)
    (weight,) = matrices(module)
    size = min(100, *weight.shape)

    def starts(side: int) -> list[int]:
        step = max(1, (side - size) // 8)
        return [i * step for i in range(9) if i * step + size <= side]

    rows, cols = map(starts, weight.shape)
    return hill([weight[r : r + size, c : c + size] for r in rows for c in cols])


# --- multipliers ---------------------------------------------------------------------------------


def linear(low: float, high: float) -> Callable[[list[float]], list[float]]:
    def assign(alphas: list[float]) -> list[float]:
        least, most = min(alphas), max(alphas)
        return [low + (high - low) * (a - least) / (most - least) for a in alphas]

    return assign


def sigmoid(s: float, tau: float = 10.0) -> Callable[[list[float]], list[float]]:
    def assign(alphas: list[float]) -> list[float]:
        mean = math.fsum(alphas) / len(alphas)
        return [10 ** (s * (1 / (1 + math.exp(-tau * (a - mean))) - 0.5)) for a in alphas]

    return assign


# --- schedules and optimizers --------------------------------------------------------------------


def cosine(base: float, epochs: int) -> Callable[[int], float]:
    return lambda epoch: base * (1 + math.cos(math.pi * epoch / epochs)) / 2


def steps(base: float, every: int, factor: float) -> Callable[[int], float]:
    return lambda epoch: base * factor ** (epoch // every)


def sgd(momentum: float, decay: float) -> Update:
    def update(p: Tensor, gradient: Tensor, state: dict[str, Tensor], rate: float) -> None:
        change = gradient + decay * p
        before = state.get("velocity")
        state["velocity"] = change if before is None else momentum * before + change
        p.sub_(rate * state["velocity"])

    return update


def adam(decay: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Update:
    """Adam with L2; a complex gradient is normalized by its absolute value."""

    def update(p: Tensor, gradient: Tensor, state: dict[str, Tensor], rate: float) -> None:
        change = gradient + decay * p
        if not state:
            state.update(first=torch.zeros_like(p), second=p.abs() * 0, count=torch.zeros(()))
        state["count"] += 1
        state["first"] = beta1 * state["first"] + (1 - beta1) * change
        state["second"] = beta2 * state["second"] + (1 - beta2) * change.abs() ** 2
        count = float(state["count"])
        size = (state["second"] / (1 - beta2**count)).sqrt() + eps
        p.sub_(rate * state["first"] / (1 - beta1**count) / size)

    return update
