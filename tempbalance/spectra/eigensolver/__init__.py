"""Eigensolver: our own Triton kernels for many symmetric matrices on a GPU, on request.

``solver`` is the one door, and ``spectra/gram.py`` the one place that knows it: without this folder
``torch.linalg.eigvalsh`` does all. ``launch`` and ``kernels`` need Triton and are imported by the
door alone. A newcomer adds a kernel here, and its launch to ``launch``.
"""
