"""Which of Lightning's two packages a callback is of: ``lightning`` and ``pytorch-lightning``."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def callback_class() -> Any:
    """Lightning's callback, under the name that is loaded already (both, if both are) or installed.

    Each of the two packages knows its own callbacks alone.
    """
    names = ("pytorch_lightning", "lightning.pytorch")
    modules = (sys.modules.get(name) for name in names)  # None where an import is prevented
    loaded = tuple(module.Callback for module in modules if module is not None)
    if loaded:
        return loaded[0] if len(loaded) == 1 else type("Callback", loaded, {})
    for name in names:
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise ImportError(
        "tempbalance.integrations.lightning needs Lightning: pip install 'tempbalance[lightning]'"
    )
