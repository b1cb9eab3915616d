"""What releases of torch cannot do, which tests then leave out."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
# Optimizers take (name, parameter) pairs.
NAMES = TORCH >= (2, 6)
needs_names = pytest.mark.skipif(not NAMES, reason="torch before 2.6 has no named parameters")
# Before, the sum of a tensor rate's changes goes to all schedules of a SequentialLR.
TENSOR_RATE_IN_SEQUENCE = TORCH >= (2, 8)
# Before, its state holds a function, which weights_only refuses.
SWA_STATE_IS_PLAIN = TORCH >= (2, 8)
