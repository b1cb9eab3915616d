"""Readers: which matrices a module holds, chosen by module type and open to registration.

To measure a layer type that is not known here, register a reader for it, anywhere:

    from tempbalance.readers import Matrix, register

    @register(MyBilinear)
    def read(module):
        yield Matrix("kernel", slices=lambda w: w.permute(2, 0, 1))  # -> (slices, rows, cols)

A reader says where a weight is and how it becomes a stack of matrices, without touching its values.

Readers of torch's own modules live in torch_modules.py, those of other libraries in libraries.py,
those of mixtures of experts in experts.py; guess.py reads what has none. A newcomer adds a layer
type to one of the first two. Imports nothing of the package; layers/ and optim/ import it.
"""

from tempbalance.readers import libraries as libraries
from tempbalance.readers import torch_modules as torch_modules
from tempbalance.readers.matrix import Matrix as Matrix
from tempbalance.readers.matrix import is_materialized as is_materialized
from tempbalance.readers.matrix import real_shape as real_shape
from tempbalance.readers.matrix import spectral_slices as spectral_slices
from tempbalance.readers.matrix import split as split
from tempbalance.readers.names import Role as Role
from tempbalance.readers.names import is_norm as is_norm
from tempbalance.readers.names import role as role
from tempbalance.readers.registry import _READERS as _READERS  # what tests put back
from tempbalance.readers.registry import Reader as Reader
from tempbalance.readers.registry import matrices as matrices
from tempbalance.readers.registry import register as register
