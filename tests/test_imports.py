"""Imports point one way, and importing the package loads nothing that is optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tempbalance"

# What each module of the core may import from the package, at import time or later.
ALLOWED: dict[str, set[str]] = {
    "readers": set(),
    "farms": set(),
    "powerlaw": set(),
    "kinds": set(),
    "assign": {"kinds"},
    "layers": {"readers"},
    "tridiagonal": set(),
    "cuda_graphs": set(),
    "eigensolver": {"tridiagonal", "cuda_graphs", "eigensolver_triton"},
    "eigensolver_kernels": set(),
    "eigensolver_triton": {"tridiagonal", "eigensolver_kernels"},
    "spectrum": {"cpu_pool", "gram", "jobs"},
    "cpu_pool": {"gram", "jobs"},
    "jobs": {"farms", "eigensolver"},
    "gram": {"jobs", "eigensolver"},
    "statistics": {"spectrum", "powerlaw"},
    "records": {"layers", "statistics"},
    "sharing": {"layers", "farms", "ranks"},
    "measure": {
        "layers",
        "farms",
        "spectrum",
        "powerlaw",
        "statistics",
        "records",
        "sharing",
        "cuda_graphs",
    },
    "report": {"measure", "layers", "farms", "powerlaw", "plots", "checks"},
    "groups": {"layers", "readers", "rates"},
    "claims": {"rates"},
    "ranks": {"layers"},
    "sketch": {"layers", "spectrum"},
    "background": set(),
    "overhead": {"ranks"},
    "units": {"assign", "layers"},
    "checks": {"layers", "units", "kinds"},
    "attempt": {"measure", "layers", "farms", "powerlaw"},
    "savings": {"sharing", "layers", "farms", "ranks", "sketch"},
    "pending": {"attempt", "background", "sketch"},
    "ramp": set(),
    "messages": {"attempt", "checks", "layers"},
    "marks": {"attempt", "checks", "layers"},
    "balance": {
        *("measure", "assign", "layers", "farms", "powerlaw", "ranks", "overhead", "units"),
        *("checks", "attempt", "background", "pending", "savings", "marks"),
        *("messages", "ramp"),
    },
}
# Lower ones never import higher ones; what stands on one line may import each other.
RANKS = [
    {"kinds"},
    {"readers", "farms", "powerlaw", "assign", "schedules", "rates", "background", "ramp"},
    {"tridiagonal", "cuda_graphs", "eigensolver_kernels"},
    {"eigensolver_triton"},
    {"eigensolver"},
    {"jobs"},
    {"gram"},
    {"cpu_pool"},
    {"layers", "spectrum"},
    {"statistics", "sharing", "groups", "claims", "ranks", "sketch", "units"},
    {"records"},
    {"measure"},
    {"attempt", "savings", "overhead", "pending", "marks", "checks", "messages"},
    {"report", "plots", "tables", "balance", "checkpoints", "history"},
    {"hooks", "scheduler", "cli_options", "run_files", "run_plots"},
    {"integrations", "cli"},
]
OPTIONAL = [
    *("lightning", "pytorch_lightning", "hydra", "omegaconf", "pandas", "matplotlib", "peft"),
    *("transformers", "scipy", "rich", "torchvision", "safetensors", "wandb", "neuralop"),
    *("sklearn", "triton", "tempbalance.cli", "tempbalance.integrations"),
    "tempbalance.eigensolver_triton",
    "tempbalance.eigensolver_kernels",
]


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it; ``tempbalance.x`` as ``.x``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: imports are absolute"
            names = [node.module or ""]
            if node.module == "tempbalance":  # from tempbalance import x: a module or a name
                names = [f"tempbalance.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            found.add("." + rest.partition(".")[0] if top == "tempbalance" else top)
    return found


def modules() -> dict[str, Path]:
    return {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def within(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    return {name[1:] for name in imports(path) if name.startswith(".")} & {
        *modules(),
        "integrations",
    }


@pytest.mark.parametrize("name", ALLOWED)
def test_direction(name: str) -> None:
    assert within(PACKAGE / f"{name}.py") <= ALLOWED[name]


@pytest.mark.parametrize("path", [*modules().values(), *(PACKAGE / "integrations").glob("*.py")],
                         ids=lambda path: path.stem)  # fmt: skip
def test_nothing_imports_what_stands_on_it(path: Path) -> None:
    own = "integrations" if path.parent.name == "integrations" else path.stem
    rank = next((i for i, names in enumerate(RANKS) if own in names), len(RANKS))
    above = {name for names in RANKS[rank + 1 :] for name in names}
    assert not within(path) & above


@pytest.mark.parametrize("name", ["readers", "layers", "farms", "spectrum", "powerlaw", "assign",
                                  "measure", "groups", "ranks", "sketch", "background", "overhead",
                                  "units", "checks", "attempt", "savings", "pending", "marks",
                                  "messages", "ramp", "balance", "scheduler"])  # fmt: skip
def test_the_core_needs_torch_and_numpy_alone(name: str) -> None:
    outside = {n for n in imports(PACKAGE / f"{name}.py") if not n.startswith(".")}
    assert outside <= {"torch", "numpy", *sys.stdlib_module_names}


def test_importing_loads_nothing_optional() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import tempbalance; "
        "print(*(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = result.stdout.split()
    assert "tempbalance.report" in loaded
    assert not [m for m in loaded for o in OPTIONAL if m == o or m.startswith(o + ".")]
    assert not result.stderr


def test_analyze_works_where_only_torch_and_numpy_are() -> None:
    blocked = [name for name in OPTIONAL if not name.startswith("tempbalance")]
    code = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None
import torch, tempbalance
report = tempbalance.analyze(torch.nn.Linear(30, 30))
assert str(report) and report.to_dict()
try:
    report.to_pandas()
except ImportError as error:
    assert "tempbalance[pandas]" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_is_there() -> None:
    import tempbalance

    assert sorted(tempbalance.__all__) == list(tempbalance.__all__)
    assert all(hasattr(tempbalance, name) for name in tempbalance.__all__)
    public = {"analyze", "Report", "Farms", "WholeMatrix", "Hill", "KSFit", "PeakFit"}
    assert public <= set(tempbalance.__all__)
