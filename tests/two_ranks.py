"""Run by test_distributed.py in each of two processes: python two_ranks.py CASE RANK PORT FOLDER.

The result is written to a file and the process ends at once: torch may abort at interpreter exit
after gloo collectives (pytorch#190489), when all work is done.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from schedules import net, rates, train_step
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import tempbalance as tb
from tempbalance.measure import engine, measure
from tempbalance.measure.measurement import Measurement


def _counted() -> list[int]:
    """How many layers this rank really computes, in each measurement."""
    counts: list[int] = []
    whole = engine.spectra

    def counting(tasks: Any, *rest: Any) -> Any:
        counts.append(len(tasks))
        return whole(tasks, *rest)

    engine.spectra = counting
    return counts


def _fail_from_now_on(here: bool, in_background: bool = False) -> None:
    """Let this rank run out of memory, in the main thread too or beside the training alone."""
    whole = engine.spectra

    def failing(*arguments: Any) -> Any:
        main = threading.current_thread() is threading.main_thread()
        if here and not (main and in_background):
            raise torch.OutOfMemoryError("no room")
        return whole(*arguments)

    engine.spectra = failing


def ddp(rank: int) -> dict[str, Any]:
    counts = _counted()
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = tb.TempBalanceLR(optimizer, model, CosineAnnealingLR(optimizer, 10))
    for i in range(3):
        train_step(model, optimizer, 2 * i + rank)
        scheduler.step()
    return {
        "multipliers": scheduler.multipliers,
        "alphas": scheduler.alphas,
        "rates": rates(optimizer),
        "counts": counts,
    }


def decay(rank: int) -> dict[str, Any]:
    """Rates and decays of one optimizer: each layer is computed by one rank, once."""
    counts = _counted()
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = tb.TempBalanceLR(optimizer, model)
    decay = tb.AlphaDecay(optimizer, model, every=1)
    for i in range(3):
        train_step(model, optimizer, 2 * i + rank)
        scheduler.step()
        decay.step()
    return {
        "rates": rates(optimizer),
        "decays": list(decay.layer_decays.values()),
        "same": scheduler.alphas == decay.alphas,
        "counts": counts,
    }


def fsdp2(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = net()
    model[1] = nn.Identity()  # buffers of a batch norm are not what is tested
    model[4] = nn.Identity()
    whole = tb.analyze(model)
    for layer in (model[3], model[8], model[10]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    counts = _counted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = tb.TempBalanceLR(optimizer, model, CosineAnnealingLR(optimizer, 10))
    first = scheduler.alphas
    for i in range(3):
        train_step(model, optimizer, i)
        scheduler.step()
    report = tb.analyze(model)
    return {
        "multipliers": scheduler.multipliers,
        "alphas": scheduler.alphas,
        "first": first,
        "whole": {layer.name: layer.alpha for layer in whole},
        "after": {layer.name: layer.alpha for layer in report},
        "rates": rates(optimizer),
        "counts": counts,
    }


def spectra_fsdp2(rank: int) -> dict[str, Any]:
    """Read together, computed by each rank alone; the second one fails at the second time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    model[1], model[4] = nn.Identity(), nn.Identity()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    balancer = tb.Balancer(model)
    records = balancer.spectra().records
    kept = {r.name: len(r.eigenvalues) for r in records if r.eigenvalues is not None}
    _fail_from_now_on(rank == 1)
    try:
        balancer.spectra()
    except Exception as error:
        return {"kept": kept, "error": f"{type(error).__name__}: {error}"}
    return {"kept": kept, "error": None}


def background(rank: int) -> dict[str, Any]:
    """Measured beside the training; one rank alone saves in the middle, and all resume from it."""
    from tempbalance.layers.find import find_layers

    model = nn.parallel.DistributedDataParallel(net())
    layers = find_layers(model).layers
    options: dict[str, Any] = {"every": 3, "delay": 2}
    balancers = [tb.Balancer(model, **options)]
    balancers[0].begin()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected, seen, again = [], [], []
    for tick in range(1, 12):
        train_step(model, optimizer, 2 * tick + rank)
        expected.append({r.name: r.alpha for r in measure(layers, group=dist.group.WORLD)})
        for balancer in balancers:
            balancer.step()
        seen.append(balancers[0].alphas)
        again.append(balancers[-1].alphas)
        if tick == 4:
            states = [balancers[0].state_dict() if rank == 0 else None]
            dist.barrier()  # the other rank has no part in it
            dist.broadcast_object_list(states)
            balancers.append(tb.Balancer(model, **options))
            balancers[1].load_state_dict(states[0])
            again = list(seen)
        if tick == 10:
            balancers[0].update()  # lets go of the one under way
    return {
        "pending": states[0]["pending"]["due"],
        "expected": expected,
        "seen": seen,
        "again": again,
        "multipliers": balancers[1].multipliers,
        "measurements": [b.measurements for b in balancers],
    }


def background_fsdp2(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = net()
    model[1], model[4] = nn.Identity(), nn.Identity()
    for layer in (model[3], model[8], model[10]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = tb.TempBalanceLR(optimizer, model, every=2, delay=1)
    whole, alphas = [], []
    for i in range(12):
        train_step(model, optimizer, i)
        scheduler.step()
        alphas.append(scheduler.alphas)
        whole.append({layer.name: layer.alpha for layer in tb.analyze(model)})
    scheduler.detach()
    return {"alphas": alphas, "whole": whole}


def background_failure(rank: int) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(net())
    balancer = tb.Balancer(model, every=2, delay=1)
    balancer.begin()
    balancer.step()
    _fail_from_now_on(rank == 1, in_background=True)
    balancer.step()
    try:
        balancer.step()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "pending": balancer.pending}
    return {"error": None}


def failure(rank: int) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(net())
    _fail_from_now_on(rank == 1)
    try:
        tb.Balancer(model).begin()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def fsdp2_unsharded(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from tempbalance.layers.find import find_layers

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    layers = find_layers(model).layers
    whole = {r.name: r.alpha for r in measure(layers, group=dist.group.WORLD)}
    with torch.no_grad():
        model(torch.zeros(1, 64))
    taken = Measurement(layers, group=dist.group.WORLD, snapshot=True)
    model.reshard()
    taken.compute()
    return {"whole": whole, "taken": {r.name: r.alpha for r in taken.finish()}}


def lightning(rank: int) -> dict[str, Any]:
    from lightning_modules import Plain, loader, pl

    from tempbalance.integrations.lightning import TempBalanceCallback

    callback, model = TempBalanceCallback(), Plain(lambda o: CosineAnnealingLR(o, 4))
    folder = sys.argv[4]
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=pl.loggers.CSVLogger(folder),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader(8))
    return {
        "multipliers": callback.schedulers[0].multipliers,
        "rates": rates(trainer.optimizers[0]),
        "weights": [p.double().sum().item() for p in model.parameters()],
    }


def lightning_fsdp2(rank: int) -> dict[str, Any]:
    from lightning_modules import Plain, loader, pl

    from tempbalance.integrations.lightning import TempBalanceCallback

    class Sharded(Plain):
        def configure_model(self) -> None:
            from torch.distributed.fsdp import fully_shard

            if not any(hasattr(p, "full_tensor") for p in self.parameters()):
                mesh = self.device_mesh["data_parallel"]
                self.net[1], self.net[4] = nn.Identity(), nn.Identity()
                for layer in (self.net[3], self.net[8], self.net[10]):
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.net, mesh=mesh)

    def run(epochs: int, keep: bool, ckpt: str | None = None) -> Any:
        callback = TempBalanceCallback()
        model = Sharded(lambda o: CosineAnnealingLR(o, 4), adam=True)
        callbacks = [callback]
        if keep:
            folder = Path(sys.argv[4]) / "c"
            callbacks.append(pl.callbacks.ModelCheckpoint(folder, filename="last"))
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=2,
            strategy=pl.strategies.ModelParallelStrategy(
                data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
            ),
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=keep,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, loader(8), ckpt_path=ckpt)
        return callback, trainer

    whole, whole_trainer = run(3, keep=False)
    run(1, keep=True)
    resumed, resumed_trainer = run(3, keep=False, ckpt=str(Path(sys.argv[4]) / "c" / "last.ckpt"))
    return {
        "multipliers": whole.schedulers[0].multipliers,
        "resumed": resumed.schedulers[0].multipliers,
        "rates": rates(whole_trainer.optimizers[0]),
        "resumed_rates": rates(resumed_trainer.optimizers[0]),
    }


CASES = {
    "ddp": ddp,
    "decay": decay,
    "fsdp2": fsdp2,
    "spectra_fsdp2": spectra_fsdp2,
    "background": background,
    "background_fsdp2": background_fsdp2,
    "background_failure": background_failure,
    "failure": failure,
    "fsdp2_unsharded": fsdp2_unsharded,
    "lightning": lightning,
    "lightning_fsdp2": lightning_fsdp2,
}


def main() -> None:
    case, rank, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        NODE_RANK="0",
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        TORCHELASTIC_RUN_ID="test",
    )
    torch.set_num_threads(1)
    if not case.startswith("lightning"):
        dist.init_process_group("gloo")
    result = CASES[case](rank)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
