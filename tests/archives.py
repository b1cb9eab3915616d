"""The archives that a release consists of: built, looked into, and the wheel used alone.

    python tests/archives.py                  # torch comes from the index
    python tests/archives.py --beside-torch   # with the torch and numpy that are installed already

`make release-check` is the first of them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What the source archive brings beside the package, and nothing else.
BROUGHT = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "docs",
           "examples", "tempbalance"}  # fmt: skip
OF_THE_BUILD = {"MANIFEST.in", "PKG-INFO", "pyproject.toml", "setup.cfg", "tempbalance.egg-info"}
LARGEST = 1_000_000  # bytes of the source archive

# Run where only torch, numpy and the wheel are, or where the rest is refused.
USE = """
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
import importlib.metadata, tempbalance as tb
assert "site" in tb.__file__, tb.__file__
assert importlib.metadata.version("tempbalance") == tb.__version__
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


@dataclass(frozen=True)
class Archives:
    """A source archive and the wheel that was built from it."""

    sdist: Path
    wheel: Path

    def brought(self) -> list[str]:
        """Paths in the source archive, below its one folder."""
        with tarfile.open(self.sdist) as archive:
            files = [member.name for member in archive.getmembers() if member.isfile()]
        return [name.partition("/")[2] for name in files]

    def installed(self) -> list[str]:
        """Paths in the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.namelist()

    def metadata(self) -> str:
        """The wheel's METADATA, with the README in it."""
        with zipfile.ZipFile(self.wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith("METADATA"))
            return archive.read(name).decode()


def build(folder: Path) -> Archives:
    """Build both, from a copy of what git tracks or would: no build of before, nothing of a run."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    source = folder / "source"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    call(sys.executable, "-m", "build", "--outdir", folder / "dist", source)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return Archives(sdist, wheel)


def check_contents(archives: Archives) -> None:
    """The wheel is the package and needs torch and numpy; the source archive explains it too."""
    own = {name.partition("/")[0] for name in archives.installed()}
    assert all(name.startswith("tempbalance") for name in own), own
    assert "tempbalance/py.typed" in archives.installed()
    lines = archives.metadata().splitlines()
    needed = [x for x in lines if x.startswith("Requires-Dist") and "extra ==" not in x]
    assert sorted(x.split()[1].split(">")[0] for x in needed) == ["numpy", "torch"], needed
    tops = {name.partition("/")[0] for name in archives.brought()}
    assert tops - OF_THE_BUILD == BROUGHT, tops
    size = archives.sdist.stat().st_size
    assert size < LARGEST, f"the source archive has {size:,} bytes"


def check_metadata(archives: Archives) -> None:
    """What the index shows: it renders, and its links and pictures are absolute."""
    call(sys.executable, "-m", "twine", "check", "--strict", archives.sdist, archives.wheel)
    page = archives.metadata().partition("\n\n")[2]
    relative = re.findall(r"\]\((?!https?://|#|mailto:)([^)\s]+)", page)
    assert not relative, f"links of the README that lead nowhere on an index: {relative}"


def first_block() -> str:
    """The first Python block of the README."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, "README.md has no Python block"
    return found[1]


def environment(folder: Path, wheel: Path, beside_torch: bool) -> list[str]:
    """Install the wheel; the command that starts a Python which has it and nothing of ours else."""
    if beside_torch:
        site = folder / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        call(*pip, site, wheel)
        return ["env", "-i", f"PYTHONPATH={site}", "PATH=/usr/bin:/bin", sys.executable]
    call(sys.executable, "-m", "venv", folder / "env")
    python = folder / "env" / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", wheel)
    return [str(python)]


def call(*command: str | Path) -> None:
    """Run a command. Raises: SystemExit with what it printed where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def check_alone(archives: Archives, folder: Path, beside_torch: bool) -> None:
    """The wheel alone measures, trains, names missing extras, and runs the README's first block."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    python = environment(folder, archives.wheel, beside_torch)
    for name, code in (("use.py", USE), ("readme.py", first_block())):
        (elsewhere / name).write_text(code)
        call(*python, elsewhere / name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the archives of a release and try them.")
    parser.add_argument("--beside-torch", action="store_true", help="do not install torch anew")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the archives go")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archives = build(folder)
        check_contents(archives)
        check_metadata(archives)
        check_alone(archives, folder, chosen.beside_torch)
        chosen.out.mkdir(parents=True, exist_ok=True)
        for path in (archives.sdist, archives.wheel):
            kept = shutil.copy(path, chosen.out)
            print(f"{kept}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
