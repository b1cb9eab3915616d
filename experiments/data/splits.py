"""Seeded splits: validation from training, and a share of what is left."""

import numpy as np
import torch


def _ordered(n: int, seed: int, stream: int, labels: torch.Tensor | None) -> np.ndarray:
    """Seeded order of 0..n-1; with labels every prefix is balanced over the classes."""
    order = np.random.default_rng([seed, stream]).permutation(n)
    if labels is None:
        return order
    of_class = labels.numpy()[order]
    # Position of each item among those of its class, in the shuffled order: a stable sort by it
    # deals one item of every class in turn.
    by_class = np.argsort(of_class, kind="stable")
    counts = np.unique(of_class, return_counts=True)[1]
    turn = np.empty(n, dtype=np.int64)
    turn[by_class] = np.concatenate([np.arange(count) for count in counts])
    return order[np.argsort(turn, kind="stable")]


def train_val_split(
    n: int, val_fraction: float, seed: int, labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (train, val) of a seeded split of n samples, both ascending int64.

    `val_fraction` in [0, 1): 0 gives no validation part. With `labels` (n,) the parts are
    balanced over the classes.

    Raises: ValueError where a part that was asked for would be empty.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction must be at least 0 and under 1, not {val_fraction}")
    n_val = round(n * val_fraction)
    if val_fraction > 0 and n_val == 0:
        raise ValueError(
            f"val_fraction={val_fraction} of {n} training samples is no sample at all: "
            f"use at least {1 / max(n, 1):.3g}, or 0 for no validation"
        )
    if n_val >= n:
        raise ValueError(f"val_fraction={val_fraction} of {n} samples leaves none to train on")
    order = _ordered(n, seed, 0, labels)
    val, train = np.sort(order[:n_val]), np.sort(order[n_val:])
    return torch.from_numpy(train), torch.from_numpy(val)


def take_share(
    indices: torch.Tensor, share: float, seed: int, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Seeded subset of `indices` (n,), round(share * n) of them, ascending.

    `share` in (0, 1]. Subsets of one seed are nested: that of 0.025 lies in that of 0.05. With
    `labels` (of the indices, in their order) the subset is balanced over the classes.

    Raises: ValueError where the share is out of range or would be empty, naming the numbers.
    """
    n = len(indices)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be over 0 and at most 1, not {share}")
    kept = round(share * n)
    if kept == 0:
        raise ValueError(
            f"share={share} of {n} training samples is no sample at all: "
            f"the smallest share of this set is {1 / max(n, 1):.3g}"
        )
    if kept == n:
        return indices
    return indices[torch.from_numpy(np.sort(_ordered(n, seed, 1, labels)[:kept]))]
