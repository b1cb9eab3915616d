"""What releases of torch and Lightning cannot do, which tests then leave out."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest


def release(*packages: str) -> tuple[int, ...]:
    """Major and minor version of the first of these that is installed; empty where none is."""
    for package in packages:
        try:
            return tuple(int(part) for part in version(package).split("+")[0].split(".")[:2])
        except PackageNotFoundError:
            continue
    return ()


TORCH = release("torch")
LIGHTNING = release("lightning", "pytorch-lightning")
# Optimizers take (name, parameter) pairs.
NAMES = TORCH >= (2, 6)
needs_names = pytest.mark.skipif(not NAMES, reason="torch before 2.6 has no named parameters")
# Before, the sum of a tensor rate's changes goes to all schedules of a SequentialLR.
TENSOR_RATE_IN_SEQUENCE = TORCH >= (2, 8)
# Before, its state holds a function, which weights_only refuses.
SWA_STATE_IS_PLAIN = TORCH >= (2, 8)
needs_fully_shard = pytest.mark.skipif(
    TORCH < (2, 6), reason="torch before 2.6 has no torch.distributed.fsdp.fully_shard"
)
# Before, a plain run too repeats the batch after which its checkpoint was written.
needs_step_checkpoints = pytest.mark.skipif(
    LIGHTNING < (2, 5), reason="Lightning before 2.5 does not resume exactly within an epoch"
)
