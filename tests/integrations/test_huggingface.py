"""The Hugging Face callback: a small random GPT-2, decay groups, LoRA, resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from schedules import weights

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from tempbalance.integrations import huggingface
from tempbalance.integrations.huggingface import TempBalanceTrainerCallback

pytestmark = pytest.mark.filterwarnings("ignore")


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 64, (16,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    return GPT2LMHeadModel(config)


def trainer(folder: Path, net: Any, steps: int, *callbacks: Any, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=2,
        save_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    return Trainer(
        net, arguments, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=list(callbacks)
    )


def test_balances_without_touching_groups_or_schedule(tmp_path: Path) -> None:
    callback, net, twin = TempBalanceTrainerCallback(every=3), model(), model()
    t = trainer(tmp_path / "a", net, 8, callback)
    t.train()
    assert len(t.optimizer.param_groups) == 2  # decay and no decay
    assert callback.hooks is not None
    multipliers = callback.multipliers
    assert len(multipliers) == 8  # four Conv1D a block
    assert max(multipliers.values()) == 1.5
    assert callback.hooks.balancer.measurements == 3
    plain = trainer(tmp_path / "b", twin, 8)
    plain.train()
    assert not torch.equal(weights(net), weights(twin))
    logged = [entry for entry in t.state.log_history if "tempbalance/alpha/median" in entry]
    assert [entry["step"] for entry in logged] == [1, 3, 6]
    same = [a["learning_rate"] for a in t.state.log_history if "loss" in a]
    assert same == [a["learning_rate"] for a in plain.state.log_history if "loss" in a]


@pytest.mark.parametrize("options", [{}, {"delay": 2}])
def test_resume_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    """With a delay, from a checkpoint in the middle of a measurement."""
    whole, net = TempBalanceTrainerCallback(every=3, ramp=2, **options), model()
    trainer(tmp_path / "a", net, 8, whole).train()
    again, net2 = TempBalanceTrainerCallback(every=3, ramp=2, **options), model()
    with torch.no_grad():
        for p in net2.parameters():
            p.mul_(2.0)
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    trainer(tmp_path / "c", net2, 8, again).train(resume_from_checkpoint=checkpoint)
    assert again.hooks is not None and whole.hooks is not None
    assert again.hooks.balancer.state_dict() == whole.hooks.balancer.state_dict()
    assert torch.equal(weights(net2), weights(net))


@pytest.mark.parametrize(
    "when",
    [
        {"save_strategy": "epoch"},
        {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
    ],
)
def test_checkpoints_that_are_not_written_by_steps(tmp_path: Path, when: dict[str, Any]) -> None:
    whole, net = TempBalanceTrainerCallback(every=3), model()
    epoch = -(-len(Tokens()) // 4)
    trainer(tmp_path / "a", net, 2 * epoch, whole, **when).train()
    checkpoint = tmp_path / "a" / f"checkpoint-{epoch}"
    again, net2 = TempBalanceTrainerCallback(every=3), model()
    t = trainer(tmp_path / "b", net2, 2 * epoch, again, **when)
    t.train(resume_from_checkpoint=str(checkpoint))
    assert again.hooks is not None and whole.hooks is not None
    assert again.hooks.balancer.state_dict() == whole.hooks.balancer.state_dict()
    assert torch.equal(weights(net2), weights(net))


def test_all_ranks_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that callbacks are given has lost the wrapper that would tell."""
    ranks: Any = SimpleNamespace(world_size=2)
    assert huggingface._ranks(ranks) is None  # no process group
    monkeypatch.setattr(huggingface.dist, "is_initialized", lambda: True)
    assert huggingface._ranks(ranks) is huggingface.dist.group.WORLD
    assert huggingface._ranks(SimpleNamespace(world_size=1)) is None  # type: ignore[arg-type]


def test_checkpoint_without_the_callback_is_continued(tmp_path: Path) -> None:
    trainer(tmp_path / "a", model(), 4).train()
    callback = TempBalanceTrainerCallback(every=2)
    t = trainer(tmp_path / "a", model(), 6, callback)
    t.train(resume_from_checkpoint=True)
    assert callback.hooks is not None
    assert callback.hooks.balancer.tick == 2


def test_lora_layers_take_the_rate_of_the_weight_in_use(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    net = peft.get_peft_model(
        model(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    callback = TempBalanceTrainerCallback(every=2, fused={"*.c_attn": 3}, log="layers")
    t = trainer(tmp_path, net, 3, callback)
    t.train()
    assert callback.hooks is not None
    names = set(callback.multipliers)
    assert len(names) == 6 and all(name.rpartition(".")[2] in "qkv" for name in names)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="log must be"):
        TempBalanceTrainerCallback(log="all")


def test_resume_with_decay_is_exact(tmp_path: Path) -> None:
    def callback() -> TempBalanceTrainerCallback:
        return TempBalanceTrainerCallback(every=3, decay={"every": 2})

    whole, net = callback(), model()
    trainer(tmp_path / "a", net, 8, whole).train()
    again, net2 = callback(), model()
    with torch.no_grad():
        for p in net2.parameters():
            p.mul_(2.0)
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    trainer(tmp_path / "c", net2, 8, again).train(resume_from_checkpoint=checkpoint)
    assert whole.hooks is not None and again.hooks is not None
    assert whole.hooks.decay is not None and again.hooks.decay is not None
    assert again.hooks.decay.multipliers == whole.hooks.decay.multipliers
    assert len(set(whole.hooks.decay.multipliers.values())) > 2
    assert torch.equal(weights(net2), weights(net))
