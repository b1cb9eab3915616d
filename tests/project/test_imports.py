"""Imports point one way, and importing the package loads nothing that is optional."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tempbalance"

# What the files of each room may import from the package, at import time or later: one way.
ALLOWED: dict[str, set[str]] = {
    "readers": set(),
    "words": set(),
    "spectra": set(),
    "layers": {"readers", "words"},
    "assign": {"words"},
    "measure": {"layers", "spectra", "words"},
    "balance": {"measure", "assign", "layers", "spectra", "words"},
    "optim": {"balance", "measure", "assign", "layers", "readers", "spectra", "words"},
    "plots": {"measure", "words"},
    "analysis": {"plots", "measure", "layers", "readers", "spectra", "words"},
    "pruning": {"analysis", "measure", "layers", "readers", "spectra", "words"},
    "runs": {"plots", "measure", "words"},
    "cli": {
        "runs",
        "pruning",
        "analysis",
        "plots",
        "measure",
        "layers",
        "readers",
        "spectra",
        "words",
    },
    "integrations": {"optim", "balance", "runs", "analysis", "measure", "assign", "words"},
    "__main__": {"cli"},
}
# What needs torch and numpy alone.
CORE = ["readers", "words", "spectra", "layers", "assign", "measure", "balance", "optim"]
LONGEST = 400  # lines of a file
OPTIONAL = [
    *("lightning", "pytorch_lightning", "hydra", "omegaconf", "pandas", "matplotlib", "peft"),
    *("transformers", "scipy", "rich", "torchvision", "safetensors", "wandb", "neuralop"),
    *("sklearn", "triton", "tempbalance.cli", "tempbalance.integrations"),
    "tempbalance.spectra.eigensolver.launch",
    "tempbalance.spectra.eigensolver.kernels",
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


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_direction(path: Path) -> None:
    own = room(path)
    rooms = {name[1:] for name in imports(path) if name.startswith(".")} & ALLOWED.keys()
    assert rooms - {own} <= ALLOWED[own]


def test_no_circle_of_files() -> None:
    for top in ("tempbalance", "experiments", "benchmarks"):
        graph = {}
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            graph[name] = path
        arrows = {name: targets(path, graph) - {name} for name, path in graph.items()}
        graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, naming the circle


def targets(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports, each by its own name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inner]
        else:
            continue
        found.update(name for name in names if name in known)
    return found


def test_few_files_lie_flat_and_none_is_long() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    tops = ("tempbalance", "experiments", "benchmarks")
    files = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in CORE],
                         ids=lambda p: str(p.relative_to(PACKAGE)))  # fmt: skip
def test_the_core_needs_torch_and_numpy_alone(path: Path) -> None:
    outside = {n for n in imports(path) if not n.startswith(".")}
    if "eigensolver" in path.parts:  # the one door to Triton
        outside -= {"triton"}
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
    assert "tempbalance.analysis.report" in loaded
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


def test_the_picture_of_the_rooms_is_that_of_the_imports() -> None:
    script = ROOT / "docs" / "draw_architecture.py"
    drawn = subprocess.run([sys.executable, str(script), "--check"], timeout=60)
    assert drawn.returncode == 0, "draw it again: python docs/draw_architecture.py"
