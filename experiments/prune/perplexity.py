"""Perplexity of a causal language model, and a few steps of training to lower it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Progress = Callable[[float], None]


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, progress: Progress | None = None) -> float:
    """exp of the mean negative log likelihood of the tokens after the first of each window.

    Args:
        windows: ids (w, length), one pass each.
    """
    total = 0.0
    for window in windows:
        total += float(loss(model, window.unsqueeze(0))) * (len(window) - 1)
        if progress is not None:
            progress(1 / len(windows))
    return math.exp(min(total / (windows.shape[0] * (windows.shape[1] - 1)), 700.0))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of ids (b, length), the first of each given."""
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def finetune(model: nn.Module, batches: Tensor, steps: int, lr: float) -> None:
    """So many steps of AdamW without decay, a window (1, length) each, in turn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model.train()
    for step in range(steps):
        loss(model, batches[step % len(batches)].unsqueeze(0)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
