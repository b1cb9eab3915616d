"""The callbacks watch traps: logged at each look, named once where they persist and grow."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tempbalance.analysis.traps import find_traps
from tempbalance.integrations.traps import TrapLog
from tempbalance.layers import find_layers


class Grown:
    """Put an ever larger entry into a weight, as an optimizer that runs away would."""

    def __init__(self, name: str) -> None:
        self.name, self.size = name, 1.0

    def grow(self, model: nn.Module) -> None:
        self.size += 1.0
        with torch.no_grad():
            model.get_parameter(self.name)[1, 2] = self.size


def said(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if "correlation traps" in r.getMessage()]


# --- Lightning -----------------------------


def lightning(tmp_path: Path, epochs: int, callback: Any, grown: Grown | None = None) -> Any:
    """A trainer of five steps' digits whose first layer grows an entry at each epoch's end."""
    from lightning_modules import pl

    class Grows(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if grown is not None:
                grown.grow(pl_module)

    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(tmp_path),
        callbacks=[Grows(), callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def module() -> Any:
    from lightning_modules import pl

    torch.manual_seed(0)

    class Regression(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.second(self.first(batch).tanh()).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    return Regression()


def batches() -> Any:
    return torch.utils.data.DataLoader(torch.ones(4, 40), batch_size=2)  # type: ignore[arg-type]


def logged(trainer: Any) -> list[dict[str, str]]:
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("tempbalance/alpha/first")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("observe", [True, False])
def test_lightning_logs_each_look_and_names_a_layer_once(
    observe: bool, tmp_path: Path, caplog: Any
) -> None:
    from tempbalance.integrations.lightning import TempBalanceCallback

    callback = TempBalanceCallback(observe=observe, traps=True, warn=False)
    model = module()
    t = lightning(tmp_path, 6, callback, Grown("first.weight"))
    t.fit(model, batches())
    rows = logged(t)
    assert [row["tempbalance/traps/first"] for row in rows] == ["0.0", *["1.0"] * 5]
    assert {row["tempbalance/traps/second"] for row in rows} == {"0.0"}
    units = [float(row["tempbalance/trap_units/first"]) for row in rows]
    assert units == sorted(units) and units[0] < 2 < units[1]
    assert float(rows[-1]["tempbalance/trap_units/max"]) == units[-1]
    (message,) = said(caplog)  # not at each of the three looks at which it rises
    assert "3 looks and grow in first." in message
    assert "Stop" not in message


@pytest.mark.filterwarnings("ignore")
def test_lightning_does_not_look_unless_asked(tmp_path: Path, caplog: Any) -> None:
    from tempbalance.integrations.lightning import TempBalanceCallback

    t = lightning(tmp_path, 5, TempBalanceCallback(observe=True), Grown("first.weight"))
    t.fit(module(), batches())
    assert not [key for key in logged(t)[0] if "trap" in key]
    assert not said(caplog)


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_where_a_checkpoint_left_off(tmp_path: Path, caplog: Any) -> None:
    """Two looks before the checkpoint and one after make three; none is named again."""
    from tempbalance.integrations.lightning import TempBalanceCallback

    def fit(epochs: int, grown: Grown, start: Path | None, end: Path) -> int:
        caplog.clear()
        t = lightning(tmp_path, epochs, TempBalanceCallback(observe=True, traps=True), grown)
        t.fit(module(), batches(), ckpt_path=start)
        t.save_checkpoint(end)
        torch.load(end, weights_only=True)
        return len(said(caplog))

    grown = Grown("first.weight")
    first, second, third = (tmp_path / f"{i}.ckpt" for i in range(3))
    assert fit(3, grown, None, first) == 0  # looks at 1, 2 and 3, a trap at the last two
    assert fit(4, grown, first, second) == 1
    assert fit(6, grown, second, third) == 0
    again = Grown("first.weight")
    again.size = grown.size
    assert fit(2, again, None, tmp_path / "other.ckpt") == 0  # a new run knows of nothing


def test_lightning_sums_up_over_layers(tmp_path: Path) -> None:
    from tempbalance.integrations.lightning import TempBalanceCallback

    callback = TempBalanceCallback(observe=True, traps=True, log="summary")
    t = lightning(tmp_path, 2, callback, Grown("first.weight"))
    t.fit(module(), batches())
    with (Path(t.log_dir) / "metrics.csv").open() as file:
        keys = {key for row in csv.DictReader(file) for key in row if "trap" in key}
    assert keys == {"tempbalance/traps/max", "tempbalance/trap_units/max"}


# --- what is said -----------------------------


def test_alpha_below_that_of_a_random_twin_is_said_where_it_is_so(caplog: Any) -> None:
    from tempbalance import KSFit, WholeMatrix
    from tempbalance.balance.tracker import Tracker

    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(100, 100, bias=False) for name in ("heavy", "plain")})
    with torch.no_grad():  # singular values of a power law: alpha near 2, far under a random one
        u, _, v = torch.linalg.svd(torch.randn(100, 100))
        net["heavy"].weight.copy_(u * torch.arange(1, 101.0) ** -0.5 @ v)
    tracker, log = Tracker(net, windows=WholeMatrix(), fit=KSFit()), TrapLog(on=True)
    for size in (1.0, 2.0, 3.0):
        for layer in net.values():
            spread = float(layer.weight.detach().std())  # type: ignore[arg-type, operator]
            with torch.no_grad():
                layer.weight[3, 4] = (size + 15) * spread  # type: ignore[index, operator]
        tracker.update()
        log.look([tracker], quiet=False)
    (message,) = said(caplog)
    assert "grow in heavy, plain." in message
    assert message.endswith("Alpha is below that of a random matrix of the shape in heavy")


def test_a_rank_that_is_quiet_looks_too(caplog: Any) -> None:
    from tempbalance.balance.tracker import Tracker

    net = nn.ModuleDict({"fc": nn.Linear(60, 60)})
    tracker, log, grown = Tracker(net), TrapLog(on=True), Grown("fc.weight")
    for _ in range(3):
        grown.grow(net)
        tracker.update()
        log.look([tracker], quiet=True)
    assert not said(caplog)
    found = find_traps(find_layers(net).layers)["fc"]
    assert log.figures(by_layer=True)["trap_units/fc"] == pytest.approx(found.trap_units)


# --- Hugging Face -----------------------------


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_logs_names_and_resumes(tmp_path: Path, caplog: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from test_huggingface import model, trainer

    from tempbalance.integrations.huggingface import TempBalanceTrainerCallback

    grown = Grown("transformer.h.0.mlp.c_fc.weight")

    class Grows(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 2 == 0:
                grown.grow(kwargs["model"])

    def run(steps: int, **more: Any) -> Any:
        caplog.clear()
        callback = TempBalanceTrainerCallback(every=2, traps=True, log="layers")
        t = trainer(tmp_path, model(), steps, callback, Grows())
        t.train(**more)
        return t

    run(4)  # looks at steps 1, 2 and 4: the entry came after the second
    assert not said(caplog)
    t = run(8, resume_from_checkpoint=True)
    (message,) = said(caplog)
    assert "grow in transformer.h.0.mlp.c_fc." in message
    key = "tempbalance/trap_units/transformer.h.0.mlp.c_fc"
    looks = [entry for entry in t.state.log_history if key in entry]
    units = [entry[key] for entry in looks]
    assert [entry["step"] for entry in looks] == [1, 2, 4, 6, 8]
    assert max(units[:2]) < 3 < units[2]
    assert units[2:] == sorted(units[2:])  # from then on the entry grows
    assert looks[-1]["tempbalance/trap_units/max"] == units[-1]
