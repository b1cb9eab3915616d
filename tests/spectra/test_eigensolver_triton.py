"""The Triton kernels, where there is no GPU: interpreted on the CPU, and compiled for two chips."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matrices
import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parents[1]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or bool(os.environ.get("TRITON_INTERPRET")),
    reason="needs Triton, not interpreting",
)


@pytest.mark.ci
@needs_triton
def test_interpreted() -> None:
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": path}  # fmt: skip
    script = [sys.executable, "-W", "error::RuntimeWarning", str(HERE / "interpreted_kernels.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("Triton's interpreter before 3.7 needs numpy before 2.4")
    if "arange's arguments must be of type tl.constexpr" in done.stderr:
        pytest.skip("Triton 3.0's interpreter knows no constants of the compiler")
    assert not done.returncode, done.stderr[-2000:]


def compiled(kernel: str, n: int, dtype: torch.dtype, chip: int) -> Any:
    """A kernel compiled for a chip that need not be there, as it would be for n x n."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tempbalance.spectra.eigensolver import kernels, launch

    function = getattr(kernels, kernel)
    limit = launch.NEGLIGIBLE[dtype]
    size = launch.tiles(n, dtype)
    constants: dict[str, Any]
    if kernel == "sturm_kernel":
        constants = {"STEPS": launch.STEPS[dtype], "LANES": launch.LANES,
                     "UNROLL": launch.UNROLL, "PIVOT": limit**2}  # fmt: skip
        options = {"num_warps": launch.LANES // 32, "num_stages": 1}
    else:
        constants = {"PANEL": launch.PANEL, "BLOCK": size.block, "ROWS": size.rows,
                     "COLS": size.cols, "CHUNK": size.chunk, "NEGLIGIBLE": limit}  # fmt: skip
        options = launch.options(size)
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


QUICK = [("reduction_kernel", 512, torch.float32, 90), ("sturm_kernel", 512, torch.float32, 80)]
REST = [
    (kernel, n, dtype, chip)
    for chip in (80, 90)
    for dtype in (torch.float32, torch.float64)
    for kernel, n in [*(("reduction_kernel", n) for n in (64, 128, 512, 1024)),
                      ("sturm_kernel", 512)]
    if (kernel, n, dtype, chip) not in QUICK
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


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [33, 64, 200, 512])
def test_on_a_gpu(dtype: torch.dtype, n: int) -> None:
    from tempbalance.spectra.eigensolver import launch

    batch = matrices.every_family(n, dtype).cuda()
    batch[-1, 0, 1] = float("nan")
    launch.solve(batch)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = launch.solve(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found[-1].isnan().all()
    truth = matrices.exact(batch[:-1])
    error = np.abs(found[:-1].double().cpu().numpy() - truth)
    assert (error <= matrices.tolerance(batch, truth) + np.finfo(np.float32).tiny).all()
