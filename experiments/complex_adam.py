"""Adam that divides a complex gradient by its absolute value, as codes of Fourier operators do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class ComplexAdam(Optimizer):
    """Adam whose second moment is that of |g|^2, so that a complex weight has one step size.

    torch's Adam takes the real and the imaginary part as two numbers, each with its own step: where
    both are of one size, its steps are sqrt(2) times these. On real weights the two are the same.

    Args:
        params: parameters or groups.
        lr, betas, eps: as for torch's Adam.
        weight_decay: an L2 term in the gradient.

    Raises: ValueError for a negative rate, eps or decay, or betas outside of [0, 1).
    Source: Kingma and Ba 2015; the optimizer that PDEBench's and Model Balancing's FNO train with.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"ComplexAdam: {name} must not be negative, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"ComplexAdam: betas must lie in [0, 1), got {betas!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the value of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p.real)
        state["step"] += 1
        count, (beta1, beta2) = float(state["step"]), group["betas"]
        if group["weight_decay"]:
            gradient = gradient.add(p, alpha=group["weight_decay"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = (gradient * gradient.conj()).real
        state["exp_avg_sq"].mul_(beta2).add_(square, alpha=1 - beta2)
        size = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        p.sub_(state["exp_avg"] / size * (group["lr"] / (1 - beta1**count)))
