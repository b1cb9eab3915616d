"""Spectra: stacks of matrices in, eigenvalues and power laws out; numbers alone, no modules.

``grid`` and ``windows`` say which submatrices, ``scale``, ``batches``, ``gram``, ``cpu``, ``gpu``
and ``spectrum`` find their eigenvalues within a budget, ``powerlaw`` and ``table`` fit them.
Imports nothing of the package; ``measure`` and the packages above it import from here.

A newcomer adds a window strategy in ``windows`` (an object with ``pool`` and ``grid``, see
``grid.Windows``) or a fit in ``powerlaw`` (a callable on a batch of spectra).
"""
