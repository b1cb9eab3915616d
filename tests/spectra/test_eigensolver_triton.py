"""The Triton kernels, where there is no GPU: interpreted on the CPU, and compiled for two chips."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matrices
import pytest
import torch

from tempbalance.spectra.eigensolver import solver as eigensolver
from tempbalance.spectra.eigensolver import tridiagonal

HERE = Path(__file__).resolve().parents[1]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or bool(os.environ.get("TRITON_INTERPRET")),
    reason="needs Triton, not interpreting",
)


@needs_triton
@pytest.mark.parametrize("part", ["reduction", "bisection"])
def test_interpreted(part: str) -> None:
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": path}  # fmt: skip
    script = [sys.executable, "-W", "error::RuntimeWarning", str(HERE / "interpreted_kernels.py")]
    done = subprocess.run([*script, part], env=environment, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("Triton's interpreter before 3.7 needs numpy before 2.4")
    assert not done.returncode, done.stderr[-2000:]


def compiled(kernel: str, n: int, dtype: torch.dtype, chip: int) -> Any:
    """A kernel compiled for a chip that need not be there, as it would be for n x n."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tempbalance.spectra.eigensolver import kernels as eigensolver_kernels
    from tempbalance.spectra.eigensolver import launch as kernels

    function = getattr(eigensolver_kernels, kernel)
    limit = tridiagonal.NEGLIGIBLE[dtype]
    size = kernels.tiles(n, dtype)
    constants: dict[str, Any]
    if kernel == "sturm_kernel":
        steps = tridiagonal.iterations(dtype)
        constants = {"STEPS": steps, "LANES": kernels.LANES, "UNROLL": kernels.UNROLL,
                     "PIVOT": limit**2}  # fmt: skip
        options = {"num_warps": kernels.LANES // 32, "num_stages": 1}
    else:
        constants = {"PANEL": kernels.PANEL, "BLOCK": size.block, "ROWS": size.rows,
                     "COLS": size.cols, "CHUNK": size.chunk, "NEGLIGIBLE": limit}  # fmt: skip
        options = kernels.options(size)
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    pointer = "*fp32" if dtype == torch.float32 else "*fp64"
    kinds = dict.fromkeys(("n", "j", "half"), "i32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, pointer)
                 for name in names}  # fmt: skip
    aligned = [name for name, kind in signature.items() if kind == pointer or name == "n"]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def local_memory(cubin: bytes, folder: Path) -> int | None:
    """Bytes that each thread spills, by the tool that comes with Triton; None without it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return None
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True)
    found = [int(part[6:]) for part in usage.stdout.split() if part.startswith("STACK:")]
    return max(found) if found else None


REDUCTION = ("whole_kernel", "column_kernel", "panel_kernel")
QUICK = [("whole_kernel", 512, torch.float32, 90), ("sturm_kernel", 512, torch.float32, 80)]
REST = [
    (kernel, n, dtype, chip)
    for chip in (80, 90)
    for dtype in (torch.float32, torch.float64)
    for kernel, n in [*((k, n) for k in REDUCTION for n in (64, 128, 512, 1024)),
                      ("whole_kernel", 20), ("sturm_kernel", 512)]
    if not (n < 384 and kernel != "whole_kernel") and (kernel, n, dtype, chip) not in QUICK
]  # fmt: skip


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "n", "dtype", "chip"),
    [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in REST)],
)
def test_compiles_without_spilling(
    kernel: str, n: int, dtype: torch.dtype, chip: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    try:
        binary = compiled(kernel, n, dtype, chip)
    except (ImportError, TypeError) as error:
        pytest.skip(f"this Triton compiles offline in another way: {error}")
    assert "tt.dot" not in binary.asm["ttir"]  # which may round to TF32
    assert binary.metadata.shared <= 48 * 1024
    # None with Triton 3.9, and with older ones a few registers on sm_80.
    assert (local_memory(binary.asm["cubin"], tmp_path) or 0) <= 64
    from tempbalance.spectra.eigensolver import launch as kernels

    assert kernels.rows(n) == n + eigensolver._KERNEL_ROWS


# --- it can never break a run --------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, solve: Any) -> None:
    """A device with kernels of one's own."""
    module = SimpleNamespace(rows=tridiagonal.work_rows, parts=lambda *_: 1,
                             tiles=lambda *_: "tiles", solve_alone=solve)  # fmt: skip
    monkeypatch.setattr(eigensolver, "usable", lambda _: True)
    monkeypatch.setattr(eigensolver, "_module", lambda: module)
    monkeypatch.setattr(eigensolver, "_verdicts", {})


def test_kernels_that_work_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def solve(work: torch.Tensor) -> torch.Tensor:
        calls.append(len(work))
        return eigensolver._by_torch(work)

    pretend(monkeypatch, solve)
    batch = matrices.every_family(7, torch.float32)
    expected = eigensolver.eigvalsh(batch, form="torch")
    for _ in range(2):
        assert torch.equal(eigensolver.eigvalsh(batch), expected)
    assert calls == [2, len(batch), len(batch)]  # checked once
    calls.clear()
    eigensolver.eigvalsh(batch.to(torch.complex64))
    assert not calls
    assert not caplog.records


def broken(work: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such instruction")


@pytest.mark.parametrize(
    ("solve", "reason"),
    [
        (broken, "no such instruction"),
        (lambda work: eigensolver._by_torch(work) * 1.001, "off by"),
        (lambda work: eigensolver._by_torch(work) * float("nan"), "off by nan"),
    ],
)
def test_kernels_that_fail_are_left_alone_and_named_once(
    solve: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, solve)
    batch = matrices.every_family(7, torch.float32)
    expected = eigensolver.eigvalsh(batch, form="torch")
    for _ in range(3):
        assert torch.equal(eigensolver.eigvalsh(batch), expected)
    assert len(caplog.records) == 1
    assert reason in caplog.text
    with pytest.raises(RuntimeError, match="see the log"):
        eigensolver.eigvalsh(batch, form="triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(eigensolver, "usable", lambda _: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "tempbalance.spectra.eigensolver.launch", raising=False)
    eigensolver._module.cache_clear()
    batch = matrices.every_family(7, torch.float32)
    monkeypatch.setattr(eigensolver.plans, "get", lambda *_: None)
    try:
        for _ in range(2):
            assert torch.equal(
                eigensolver.eigvalsh(batch), eigensolver.eigvalsh(batch, form="torch")
            )
    finally:
        eigensolver._module.cache_clear()
    assert len(caplog.records) == 1
    assert "without Triton" in caplog.text


def test_the_known_matrices() -> None:
    for n in (1, 2, 5, 40):
        dense, values = eigensolver.known(n)
        torch.testing.assert_close(torch.linalg.eigvalsh(dense), values, atol=1e-14, rtol=0)
        assert n < 3 or bool((dense.triu(2)[0] != 0).sum() > n)  # not tridiagonal already
