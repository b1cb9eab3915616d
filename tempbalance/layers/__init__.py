"""Layers: nn.Module in, named stacks of matrices out, and which parameters share their rates.

walk.py sees through wrappers, find.py lists the layers, hosts.py binds biases and norms to them.
Which matrices a type of module holds is told in :mod:`tempbalance.readers`: a newcomer adds
a layer type there, and a new wrapper of whole models in walk.py. Imported by all that looks at
a model, and imports the readers alone.
"""

from tempbalance.layers.find import Fused as Fused
from tempbalance.layers.find import find_layers as find_layers
from tempbalance.layers.hosts import find_hosts as find_hosts
from tempbalance.layers.hosts import without_norms as without_norms
from tempbalance.layers.layer import Host as Host
from tempbalance.layers.layer import Layer as Layer
from tempbalance.layers.layer import Layers as Layers
from tempbalance.layers.layer import Skipped as Skipped
