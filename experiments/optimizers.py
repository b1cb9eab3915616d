"""Parameter groups by role, and Muon with AdamW as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer


def groups_by_role(model: nn.Module, decay_vectors: bool = True) -> list[dict[str, Any]]:
    """Parameter groups of a network of linear layers, `role` in each; empty ones are left out.

    `matrix`: weights of linear layers; `table`: embeddings, and the output layer of a language
    model, tied to them or not; `vector`: norms and biases, with `weight_decay` 0 unless
    `decay_vectors`. Frozen parameters are in none.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables.add(id(head.weight))
    found: dict[str, list[nn.Parameter]] = {"matrix": [], "table": [], "vector": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            role = "vector" if parameter.ndim < 2 else "matrix"
            found["table" if id(parameter) in tables else role].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members, "role": role} for role, members in found.items() if members
    ]
    for group in groups:
        if group["role"] == "vector" and not decay_vectors:
            group["weight_decay"] = 0.0
    return groups


class MuonAdamW(Optimizer):
    """torch's Muon for the matrices and torch's AdamW for all else, as one optimizer.

    One object, since Lightning steps one optimizer by itself, a schedule hangs on one, and whoever
    splits or scales groups (a balancing scheduler does both) finds them all in `param_groups`.
    At each step the groups go to torch's optimizers as they are then.

    Args:
        params: groups with a `role`; those of role `matrix`, which hold two-dimensional weights
            alone, are Muon's.
        lr: of both: Muon's update is scaled to the root mean square of AdamW's
            (`adjust_lr_fn="match_rms_adamw"`).
        weight_decay: of both, decoupled, times the rate.
        betas: AdamW's.
        momentum: Muon's.

    Raises: ImportError where torch has no Muon (it came with 2.9); ValueError for groups without a
    role, or of one kind alone.
    Source: Jordan et al. 2024; the scale, Liu et al. 2025 (arXiv 2502.16982).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
    ) -> None:
        groups = [dict(group) if isinstance(group, dict) else {} for group in params]
        if any("role" not in group for group in groups):
            raise ValueError(
                "MuonAdamW takes groups with a role: experiments.optimizers.groups_by_role"
            )
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        matrices, others = self._of(True), self._of(False)
        if not matrices or not others:
            raise ValueError("MuonAdamW needs matrices and other parameters: use one of the two")
        try:
            from torch.optim import Muon
        except ImportError as error:
            raise ImportError(
                f"torch {torch.__version__} has no Muon: install torch 2.9 or later, or use "
                "optimizer=adamw"
            ) from error
        # They fill in their own defaults, in the very groups of this optimizer.
        self._muon: Optimizer = Muon(
            matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw: Optimizer = AdamW(others, lr, betas, weight_decay=weight_decay)

    def _of(self, matrices: bool) -> list[dict[str, Any]]:
        return [g for g in self.param_groups if (g["role"] == "matrix") == matrices]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both, on the groups and the state as they are now."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, matrices in ((self._muon, True), (self._adamw, False)):
            optimizer.param_groups = self._of(matrices)
            optimizer.state = self.state
            optimizer.step()
        return loss
