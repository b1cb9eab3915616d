r"""Sketch: 4,096 numbers of a weight that tell how far it has moved, without a copy of it.

A weight X (R x C, its dimensions split into two as evenly as they allow) has the sketch
S(X) = L^T X Q / 64, with matrices L (R x 64) and Q (C x 64) of fixed random signs. S is linear and
keeps lengths: E |S(X)|^2 = |X|^2 for every X, and the variance of |S(X)|^2 / |X|^2 is at most
(1 + 2/64)^2 - 1: a standard deviation of 0.25, or 13% of the length, reached by changes of rank
one. A change of rank r has about 1 / sqrt(r) of it, down to 1% of the length at full rank. Unlike
a sample of the entries, no change is overlooked for being in few of them.

The relative change, up to scale, of W against W0 is |W - s W0| / |W| at the s that makes it least
(the sine of the angle between them), read off the two sketches. Scale is left out because alpha
does not depend on it: weight decay alone is no change.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tempbalance.layers.find import Layer
from tempbalance.spectra.gram import full_precision

SIZE = 64
# Entries of a weight that are converted to float32 at a time.
_CHUNK = 2**24
_SEEDS = (20260101, 20260202)
_GAMMA = 0x9E3779B97F4A7C15


def sketches(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """The sketch (64, 64) of each layer's weight by name, float32, on the weight's device.

    (On the CPU for devices without float64.)

    Reads every weight: sharded ones are gathered, one after another, on every rank.
    """
    signs = _Signs()
    out: dict[str, Tensor] = {}
    for layer in layers:
        weight = layer.read()
        with torch.no_grad(), full_precision(weight.device.type):
            sketch = _sketch(weight, signs)
        out[layer.name] = sketch if weight.device.type in ("cpu", "cuda") else sketch.cpu()
    return out


def changes(now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """Relative change, up to scale, of each weight by its sketches: (L,) float64, no sync.

    NaN or infinite where a weight is not finite, or was all zero. All on one device.
    """
    a = torch.stack(list(now)).flatten(1).double()
    b = torch.stack(list(before)).flatten(1).double()
    scale = (a * b).sum(-1) / b.square().sum(-1)
    return (a - scale.unsqueeze(-1) * b).norm(dim=-1) / a.norm(dim=-1)


def encode(sketch: Tensor) -> str:
    """As text, exactly: fits a checkpoint of plain values, and JSON."""
    return base64.b64encode(sketch.cpu().numpy().astype("<f4").tobytes()).decode()


def decode(text: str) -> Tensor:
    values = np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
    return torch.from_numpy(values).reshape(SIZE, SIZE)


def _sketch(weight: Tensor, signs: _Signs) -> Tensor:
    x = _matrix(torch.view_as_real(weight) if weight.is_complex() else weight)
    rows, columns = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    left = signs.take(0, rows, x.device, dtype)
    right = signs.take(1, columns, x.device, dtype)
    step = max(1, _CHUNK // columns)
    total = torch.zeros(SIZE, SIZE, dtype=dtype, device=x.device)
    for start in range(0, rows, step):
        part = x[start : start + step].to(dtype)
        total += left[start : start + step].T @ (part @ right)
    return (total / SIZE).float()


def _matrix(weight: Tensor) -> Tensor:
    """A view, where there is one, with the dimensions in memory order and split in two evenly."""
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    dense = weight.permute(order)
    half = math.sqrt(dense.numel())
    sizes = [math.prod(dense.shape[:i]) for i in range(1, dense.ndim)]
    rows = min(sizes, key=lambda size: abs(math.log(size / half)))
    return dense.reshape(rows, -1)


class _Signs:
    """The two tables of signs, as long as was needed so far, made where they are used."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def take(self, side: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (side, device, dtype)
        table = self._tables.get(key)
        if table is None or len(table) < length:
            bits = _splitmix64(_SEEDS[side], length, device)
            places = torch.arange(SIZE, device=device)
            table = (((bits.unsqueeze(-1) >> places) & 1) * 2 - 1).to(dtype)
            self._tables[key] = table
        return table[:length]


def _splitmix64(seed: int, length: int, device: torch.device) -> Tensor:
    """The first numbers of a random stream, (length,) of 64 bits: the same on every device.

    Source: Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators.
    """
    z = torch.arange(1, length + 1, device=device, dtype=torch.int64) * _signed(_GAMMA) + seed
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, places: int) -> Tensor:
    """To the right, filled with zeros (and not with the sign)."""
    return (z >> places) & (2 ** (64 - places) - 1)


def _signed(number: int) -> int:
    """The same 64 bits, read with a sign."""
    return number - 2**64 if number >= 2**63 else number
