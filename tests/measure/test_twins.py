"""Twins: random matrices of the layers' shapes."""

from __future__ import annotations

import torch
from torch import nn

from tempbalance.layers.find import find_layers
from tempbalance.measure.twins import random_twin


def test_random_twin_is_the_same_whatever_the_default_device() -> None:
    for dtype in (torch.float32, torch.complex64):
        module = nn.Linear(24, 20, dtype=dtype)
        (layer,) = find_layers(module).layers
        wanted = random_twin(layer).read()
        with torch.device("meta"):  # no value can be read of what is made there
            got = random_twin(layer).read()
        assert got.device.type == "cpu" and torch.equal(got, wanted)
        assert got.shape == layer.shape and got.dtype == dtype
