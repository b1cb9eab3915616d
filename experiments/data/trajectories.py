"""Autoregressive windows: the first frames of a trajectory to the frames after them."""

import torch

from experiments.data.field_module import FieldParts
from experiments.data.loaders import TensorRows
from experiments.data.normalizer import Normalizer


def check_window(initial_step: int, t_train: int, frames: int, where: str) -> None:
    """Refuse a window that does not fit. Raises: ValueError naming the numbers."""
    if not 1 <= initial_step < t_train:
        raise ValueError(
            f"initial_step={initial_step} frames in and t_train={t_train} frames in all: "
            "need 1 <= initial_step < t_train"
        )
    if t_train > frames:
        raise ValueError(
            f"t_train={t_train} frames, but {where} has {frames}: lower t_train or "
            "reduced_resolution_t"
        )


def to_window(frames: torch.Tensor, initial_step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, C, *grid) -> x (B, initial_step * C, *grid), y (B, T - initial_step, C, *grid)."""
    x, y = frames[:, :initial_step], frames[:, initial_step:]
    return x.flatten(1, 2), y


def rollout_parts(
    frames: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    test: torch.Tensor,
    initial_step: int,
) -> FieldParts:
    """Parts of trajectories in memory, (N, T, C, *grid); one normaliser a channel, of rows[0]."""
    train, val = rows
    normalizer = Normalizer.fit(frames[train].flatten(0, 1))

    def windows(chosen: torch.Tensor) -> TensorRows:
        x, y = to_window(normalizer.encode(chosen), initial_step)
        return TensorRows(x, y)

    return FieldParts(
        train=windows(frames[train]),
        val=windows(frames[val]) if len(val) else None,
        test={"test": windows(test)},
        inputs=normalizer,
        outputs=normalizer,
    )
