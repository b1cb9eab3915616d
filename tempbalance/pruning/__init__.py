"""Pruning: how much to remove from which layer, and removing it.

``sparsities`` and its controls turn a report or a model into a ratio by layer, ``allocate`` is the
arithmetic below them, and ``prune`` zeroes weights by ``Magnitude``, ``Wanda`` or ``SparseGPT``.
May import analysis, measure, layers and spectra. A new pruner is a file with a frozen dataclass of
the form of ``Method``; a new allocation is a function beside ``sparsities``.
"""

from tempbalance.pruning.allocate import allocate as allocate
from tempbalance.pruning.magnitude import Magnitude as Magnitude
from tempbalance.pruning.prune import Pruned as Pruned
from tempbalance.pruning.prune import PrunedLayer as PrunedLayer
from tempbalance.pruning.prune import prune as prune
from tempbalance.pruning.sparsegpt import SparseGPT as SparseGPT
from tempbalance.pruning.sparsities import by_depth as by_depth
from tempbalance.pruning.sparsities import by_depth_and_alpha as by_depth_and_alpha
from tempbalance.pruning.sparsities import linear_layers as linear_layers
from tempbalance.pruning.sparsities import reversed as reversed
from tempbalance.pruning.sparsities import shuffled as shuffled
from tempbalance.pruning.sparsities import sparsities as sparsities
from tempbalance.pruning.sparsities import uniform as uniform
from tempbalance.pruning.wanda import Wanda as Wanda
