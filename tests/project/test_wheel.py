"""The built wheel, installed alone beside torch and numpy, imports and measures."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import builtins, torch
REFUSED = {
    "lightning", "pytorch_lightning", "hydra", "pandas", "matplotlib", "rich", "transformers",
    "safetensors", "wandb", "scipy",
}
whole = builtins.__import__
def refusing(name, *rest):
    if name.partition(".")[0] in REFUSED:
        raise ModuleNotFoundError(f"{name} is not installed here")
    return whole(name, *rest)
builtins.__import__ = refusing
import tempbalance as tb
assert "site" in tb.__file__, tb.__file__
model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Flatten(), torch.nn.Linear(64, 32))
report = tb.analyze(model)
assert report.coverage > 0.9, report
assert 1 < report["2"].alpha < 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = tb.TempBalanceLR(optimizer, model, torch.optim.lr_scheduler.StepLR(optimizer, 3))
optimizer.step(); scheduler.step()
for call, extra in ((report.to_pandas, "pandas"), (lambda: report.plot("x.png"), "plot")):
    try:
        call()
    except ImportError as error:
        assert f"tempbalance[{extra}]" in str(error), error
    else:
        raise AssertionError(extra)
try:
    import tempbalance.integrations.lightning
except ImportError as error:
    assert "tempbalance[lightning]" in str(error), error
print("measured", len(report))
"""


@pytest.mark.slow
def test_wheel_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(
        ROOT / "tempbalance",
        source / "tempbalance",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = tmp_path.glob("tempbalance-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "tempbalance/py.typed" in names
    assert not any(n.startswith(("experiments", "tests", "conf")) for n in names)
    needed = [
        line
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert sorted(line.split()[1].split(">")[0] for line in needed) == ["numpy", "torch"]
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(site), str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "measured 2" in done.stdout
