"""Layers: nn.Module in, named stacks of matrices out."""

from tempbalance.layers.find import Fused as Fused
from tempbalance.layers.find import Layer as Layer
from tempbalance.layers.find import Layers as Layers
from tempbalance.layers.find import Skipped as Skipped
from tempbalance.layers.find import find_layers as find_layers
