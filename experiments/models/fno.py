"""Fourier neural operator: neuraloperator's network, made safe to save and resume."""

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


def _drop_metadata(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """State-dict hook of the holder: remove the constructor arguments that neuralop writes."""
    state_dict.pop("_metadata", None)


class SafeFNO(nn.Module):
    """neuraloperator's FNO in a module whose state dict holds tensors only.

    neuralop's `state_dict()` adds a key `_metadata` without a prefix, with a function object in
    it: a checkpoint cannot then be loaded with `weights_only=True`, and without it strict loading
    refuses the key (neuraloperator issue 700). The hook sits on this module, around neuralop's,
    because neuralop adds the key after its own hooks have run. Module-level hook: it pickles.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_state_dict_post_hook(_drop_metadata)

    def forward(self, x: Any, **kwargs: Any) -> Any:
        """Field (B, in_channels, *grid) -> (B, out_channels, *grid)."""
        return self.net(x, **kwargs)


def fno(
    n_modes: Sequence[int],
    in_channels: int,
    out_channels: int,
    hidden_channels: int = 20,
    n_layers: int = 4,
    **kwargs: Any,
) -> nn.Module:
    """FNO in len(n_modes) dimensions: (B, in_channels, *grid) -> (B, out_channels, *grid).

    Defaults (width 20, 4 layers) are those of PDEBench and Model Balancing, with 12 modes there.
    A grid of positions is appended inside. `kwargs` go to `neuralop.models.FNO`. Spectral weights
    are `net.fno_blocks.convs.{i}.weight.tensor`, complex64 (in, out, *modes): optimizers with
    `fused=True` refuse them.

    Raises: ImportError without neuraloperator, ValueError for modes under 1.
    Source: Li et al. 2021 (arXiv 2010.08895).
    """
    modes = tuple(int(n) for n in n_modes)
    if not modes or min(modes) < 1:
        raise ValueError(f"fno: n_modes needs one positive number a dimension, not {modes}")
    try:
        with warnings.catch_warnings():
            # neuralop changes the global warning filters when it is imported: undone here.
            from neuralop.models import FNO
    except ImportError as error:
        raise ImportError(
            "fno needs neuraloperator: pip install 'neuraloperator>=2.0,<3' "
            "(or pip install 'tempbalance[experiments]')"
        ) from error
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        net = FNO(
            n_modes=modes,
            in_channels=in_channels,
            out_channels=out_channels,
            hidden_channels=hidden_channels,
            n_layers=n_layers,
            **kwargs,
        )
    for line in printed.getvalue().splitlines():
        logger.debug("neuralop: %s", line)
    return SafeFNO(net)
