"""Says in one line what to install where a package of the experiments is missing."""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = (
    "pytorch_lightning",
    "hydra",
    "torchmetrics",
    "torchvision",
    "rich",
    "matplotlib",
    "scipy",
)


def require(*packages: str) -> None:
    """Stop with the pip command if one of the packages cannot be found.

    Raises: SystemExit, naming what is missing.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"missing: {', '.join(missing)}. The experiments need more than the library: "
            "pip install 'tempbalance[experiments]'"
        )


require(*PACKAGES)
