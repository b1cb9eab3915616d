"""Ranks: where their collectives run, what they share, and how they end when one of them fails."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import Command
from torch import Tensor

from tempbalance.measure import ranks


def on(device: str) -> Any:
    where = torch.device(device)
    return SimpleNamespace(device=where, is_cuda=where.type == "cuda")


def test_nccl_runs_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current device: with one process a GPU it is the first one for all of them."""
    group: Any = object()
    monkeypatch.setattr(ranks.dist, "get_backend", lambda _: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    near: list[Tensor] = [on("cpu"), on("cuda:3"), on("cuda:1")]
    assert ranks.collective_device(group, near) == torch.device("cuda", 3)
    assert ranks.collective_device(group, [on("cpu")]) == torch.device("cuda", 0)
    monkeypatch.setattr(ranks.dist, "get_backend", lambda _: "gloo")
    assert ranks.collective_device(group, near) == torch.device("cpu")


# --- two processes -------------------------------------------------------------------------------

HEAD = """
import datetime, json, os, sys
import torch, torch.distributed as dist
from torch import nn
from tempbalance import Farms, analyze
from tempbalance.layers.find import Layer, find_layers
from tempbalance.measure import engine, measure
from tempbalance.measure.measurement import Measurement
from tempbalance.measure.method import Method

rank, folder, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=60),
)
torch.manual_seed(0)

def shard(modules):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for module in modules:
        fully_shard(module, mesh=mesh)

def done(result):
    with open(f"{folder}/{rank}.json.part", "w") as file:
        json.dump(result, file)
    os.rename(f"{folder}/{rank}.json.part", f"{folder}/{rank}.json")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
"""

SHARED = """
bad = nn.Linear(40, 40)
bad.weight.data[3, 3] = float("nan")
model = nn.Sequential(
    nn.Linear(90, 61), nn.Conv2d(16, 20, 3), nn.Linear(33, 47), bad,
    nn.utils.parametrizations.weight_norm(nn.Linear(30, 30)), nn.Linear(64, 3),
    nn.Linear(40, 40), nn.MultiheadAttention(16, 2),
)
nn.init.eye_(model[6].weight)
alone = [r.alpha for r in analyze(model)]
if kind == "fsdp":
    shard([child for child in model if not hasattr(child, "parametrizations")])
names = [layer.name for layer in find_layers(model).layers]
if kind == "replicated":
    model = nn.parallel.DistributedDataParallel(model)
layers = find_layers(model).layers
assert [layer.name for layer in layers] == names
records = measure(layers, group=dist.group.WORLD)
rows = [
    [r.name, r.kind, r.outcome.value, r.alpha, r.D, r.xmin, r.n_eigs, r.spectral_norm, r.numel]
    for r in records
]
whole = [r.alpha for r in analyze(model)] if kind == "fsdp" else alone
done([rows, alone, whole])
"""

FAILING = """
model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(5)))
shard(model)
layers = find_layers(model).layers
whole_read, whole_spectra = Layer.read, engine.spectra

def run(where, how, whose):
    reads = []

    def read(self):
        reads.append(self.name)
        weight = whole_read(self)
        if rank == 1 and where == "reading" and self.name == "1":
            raise torch.cuda.OutOfMemoryError("no room")
        return weight

    def spectra(tasks, *rest):
        if rank == 1 and where == "computing":
            raise torch.cuda.OutOfMemoryError("no room")
        return whole_spectra(tasks, *rest)

    Layer.read, engine.spectra = read, spectra
    group = dist.group.WORLD if whose == "shared" else None
    try:
        # A budget for one weight: computing begins before all are read.
        taken = Measurement(layers, Method(budget=1), group=group, snapshot=how == "later")
        taken.compute()
        taken.finish()
    except Exception as problem:
        return reads, f"{type(problem).__name__}: {problem}"
    return reads, None

done([run(*each.split()) for each in kind.split(", ")])
"""

CASES = ("computing now shared", "reading now shared", "reading later shared",
         "computing now alone")  # fmt: skip


def two_ranks(folder: Path, text: str, kind: str) -> list[Any]:
    """What each of two gloo processes makes of a script."""
    pytest.importorskip("torch.distributed.fsdp", reason="torch was built without distributed")
    file = folder / "worker.py"
    file.write_text(HEAD + text)
    pair = [
        Command(folder / f"{rank}.log", str(file), str(rank), str(folder), kind)
        for rank in range(2)
    ]
    output = [each.finish(timeout=200)[1] for each in pair]
    results = [folder / f"{rank}.json" for rank in range(2)]
    if "cannot import name 'fully_shard'" in "".join(output):
        pytest.skip("FSDP2 is not public before torch 2.6")
    assert all(result.exists() for result in results), output
    return [json.loads(result.read_text()) for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
def test_two_ranks_share_the_work(tmp_path: Path, kind: str) -> None:
    """The same records on each, bit for bit, and to rounding those of a single process.

    Other batches are made, and on some processors MKL rounds by the place in a batch.
    """
    found = two_ranks(tmp_path, SHARED, kind)
    assert found[0][0] == found[1][0]
    rows, alone, whole = found[0]
    expected = np.array(alone, dtype=float)  # None becomes NaN
    for alphas in ([row[3] for row in rows], whole):
        np.testing.assert_allclose(np.array(alphas, dtype=float), expected, rtol=1e-6)
    outcomes = [row[2] for row in rows]
    assert outcomes.count("non-finite") == 1
    assert outcomes.count("no spread") == 1
    assert {row[1] for row in rows} == {"Linear", "Conv2d", "MultiheadAttention",
                                        "NonDynamicallyQuantizableLinear"}  # fmt: skip


@pytest.mark.slow
def test_a_rank_that_fails_midway_reads_on(tmp_path: Path) -> None:
    """Every read of a sharded weight is a collective: the other rank would wait for ever."""
    found = two_ranks(tmp_path, FAILING, ", ".join(CASES))
    for case, (reads, error), (reads_too, error_too) in zip(CASES, *found, strict=True):
        assert reads == reads_too == ["0", "1", "2", "3", "4"]
        assert error_too == "OutOfMemoryError: no room"
        if case.endswith("shared"):
            assert error == (
                "RuntimeError: measuring the weights failed on another rank; see its error"
            )
        else:  # each for itself: nothing is exchanged
            assert error is None
