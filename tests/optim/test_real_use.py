"""Training loops as people write them, each run and resumed from the middle, bit for bit."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from schedules import rates, weights
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tempbalance as tb


class Block(nn.Module):
    """torchvision's basic block, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


def resnet() -> nn.Sequential:
    blocks = (Block(12, 12), Block(12, 16, 2), Block(16, 16))
    stem = (nn.Conv2d(3, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def images(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 10, (8,), generator=generator)


class Run:
    """A training: ``things`` are saved and loaded in order, ``train(i)`` is one step of it."""

    things: list[Any]
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]

    def train(self, index: int) -> None:
        raise NotImplementedError

    def go(self, start: int, stop: int) -> list[list[float]]:
        seen = []
        for i in range(start, stop):
            self.train(i)
            seen.append([r for o in self.optimizers for r in rates(o)])
        return seen


class ImageNet(Run):
    """As torchvision's references do: warm-up and cosine a step, GradScaler, EMA, clipping."""

    def __init__(self) -> None:
        self.model = resnet()
        norms = [p for p in self.model.parameters() if p.ndim <= 1]
        others = [p for p in self.model.parameters() if p.ndim > 1]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 1e-4}]
        optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9, nesterov=True)
        warmup = lrs.LinearLR(optimizer, start_factor=0.1, total_iters=4)
        cosine = lrs.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-3)
        base = lrs.SequentialLR(optimizer, [warmup, cosine], milestones=[4])
        self.scheduler = tb.TempBalanceLR(optimizer, self.model, base, every=3, start=4, ramp=2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.optimizers = [optimizer]
        self.things = [self.model, optimizer, self.scheduler, self.scaler, self.ema]

    def train(self, index: int) -> None:
        x, y = images(index)
        optimizer = self.optimizers[0]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(self.model(x), y, label_smoothing=0.1)
        if index == 6:
            loss = loss * float("inf")  # the scaler skips this step
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR passes an epoch to its schedules
            self.scaler.step(optimizer)
            self.scaler.update()
            self.scheduler.step()
        self.ema.update_parameters(self.model)


class FineTuning(Run):
    """As in scripts for transformers: decay and no decay, LambdaLR a step, accumulation."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.model = nn.Sequential(nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2))
        named = list(self.model.named_parameters())
        decay = [p for n, p in named if not n.endswith("bias") and "norm" not in n]
        no_decay = [p for n, p in named if n.endswith("bias") or "norm" in n]
        groups = [
            {"params": decay, "weight_decay": 0.1},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=5e-3)
        base = lrs.LambdaLR(optimizer, lambda i: min(1.0, i / 3) * max(0.0, (15 - i) / 12))
        self.scheduler = tb.TempBalanceLR(optimizer, self.model, base, every=2)
        self.optimizers = [optimizer]
        self.things = [self.model, optimizer, self.scheduler]

    def train(self, index: int) -> None:
        for part in range(2):
            tokens = torch.randint(
                0, 20, (4, 6), generator=torch.Generator().manual_seed(2 * index + part)
            )
            (self.model(tokens).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers[0].step()
        self.scheduler.step()
        self.optimizers[0].zero_grad()


class Gan(Run):
    """Two networks, two optimizers, two schedulers; one model holds both."""

    def __init__(self) -> None:
        generator = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 20))
        critic = nn.Sequential(
            nn.Linear(20, 16), nn.LeakyReLU(), nn.Linear(16, 12), nn.Linear(12, 1)
        )
        self.model = nn.ModuleDict({"g": generator, "d": critic})
        g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
        d = torch.optim.RMSprop(critic.parameters(), lr=2e-3)
        self.optimizers = [g, d]
        # The same model is given to both: each takes the layers that its optimizer holds.
        self.g = tb.TempBalanceLR(g, self.model, lrs.ExponentialLR(g, 0.9), every=2)
        self.d = tb.TempBalanceLR(d, critic, lrs.OneCycleLR(d, 4e-3, total_steps=30))
        self.things = [self.model, g, d, self.g, self.d]

    def train(self, index: int) -> None:
        random = torch.Generator().manual_seed(index)
        noise, real = torch.randn(2, 8, 20, generator=random)
        generator, critic = self.model["g"], self.model["d"]
        self.optimizers[1].zero_grad()
        fake = generator(noise[:, :12])
        loss = critic(fake.detach()).relu().mean() + (1 - critic(real)).relu().mean()
        loss.backward()
        self.optimizers[1].step()
        self.optimizers[0].zero_grad()
        (-critic(fake).mean()).backward()
        self.optimizers[0].step()
        self.g.step()
        self.d.step()


class Lora(Run):
    """peft: only A and B are trained, at the rate of the weight they change."""

    def __init__(self) -> None:
        peft = pytest.importorskip("peft")
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.Linear(16, 12))
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "3"])
        self.model = peft.get_peft_model(model, config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        base = lrs.CosineAnnealingWarmRestarts(optimizer, 3)
        self.scheduler = tb.TempBalanceLR(optimizer, self.model, base)
        self.optimizers = [optimizer]
        self.things = [self.model, optimizer, self.scheduler]

    def train(self, index: int) -> None:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(index))
        self.optimizers[0].zero_grad()
        (self.model(x) - 1).square().mean().backward()
        self.optimizers[0].step()
        self.scheduler.step()


@pytest.mark.parametrize("kind", [ImageNet, FineTuning, Gan, Lora])
def test_run_and_resumed(kind: type[Run]) -> None:
    def build(seed: int) -> Run:
        torch.manual_seed(seed)
        return kind()

    run = build(0)
    run.go(0, 7)
    buffer = io.BytesIO()
    torch.save([thing.state_dict() for thing in run.things], buffer)
    wanted = run.go(7, 12)
    assert torch.isfinite(weights(run.model)).all()
    assert all(len({round(r, 12) for r in step}) > 1 for step in wanted)

    # With LoRA the frozen weights are not re-drawn: peft saves and loads all of them here.
    again = build(1)
    buffer.seek(0)
    for thing, state in zip(again.things, torch.load(buffer, weights_only=True), strict=True):
        thing.load_state_dict(state)
    assert again.go(7, 12) == wanted
    assert torch.equal(weights(again.model), weights(run.model))
    for a, b in zip(run.things, again.things, strict=True):
        if isinstance(a, tb.TempBalanceLR):
            assert a.alphas == b.alphas and a.multipliers == b.multipliers


def test_rates_in_the_imagenet_loop() -> None:
    """By hand: warm-up alone, then cosine times multipliers that are reached in two steps."""
    torch.manual_seed(0)
    run = ImageNet()
    seen = run.go(0, 8)
    assert len(set(seen[0])) == 1 and seen[2] == pytest.approx([0.2 * (0.1 + 0.9 * 3 / 4)] * 18)
    assert len(set(seen[3])) == 1  # measured at step 4; the ramp starts from 1
    factors = run.scheduler.grouping.factors(run.scheduler.multipliers)
    assert len(set(seen[4])) > 1 and max(factors) > 1 > min(factors)
    names = run.scheduler.grouping.names
    assert "3.conv1" in names and any(n.startswith("3.conv1|") for n in names)


def test_lora_moves_only_its_factors() -> None:
    run = Lora()
    groups = run.optimizers[0].param_groups
    assert [len(g["params"]) for g in groups] == [2, 2, 2]
    assert all(p.requires_grad for g in groups for p in g["params"])
    assert len(run.scheduler.multipliers) == 3


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_compiled_model_and_optimizer_step(tensor_rate: bool) -> None:
    """Frames are counted: a rate that changes every step must not be compiled in."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 10))
    compiled = torch.compile(model)
    rate: Any = torch.tensor(1e-2) if tensor_rate else 1e-2
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, foreach=False)
    base = lrs.ExponentialLR(optimizer, 0.9)
    scheduler = tb.TempBalanceLR(optimizer, compiled, base)
    step = torch.compile(optimizer.step)
    frames, compiled_rates = [], []
    for i in range(8):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        step()
        scheduler.step()
        frames.append(torch._dynamo.utils.counters["frames"]["ok"])
        compiled_rates.append(rates(optimizer))
    assert len({tuple(r) for r in compiled_rates}) == 8
    # Once the first change of the rates has been seen, nothing is compiled again.
    assert frames[-1] == frames[2] and frames[-1] - frames[0] <= 2, frames
    assert len(scheduler.multipliers) == 3


@pytest.mark.slow
def test_step_hooks_on_a_compiled_step_measure_outside_of_it() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 10))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    hooks = tb.StepHooks(optimizer, model, every=2)
    other = tb.StepHooks(plain, twin, every=2)
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(5):
        for net, do in ((model, step), (twin, plain.step)):
            net.zero_grad()
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(i))
            net(x).square().mean().backward()
            do()
    assert hooks.balancer.measurements == other.balancer.measurements == 3
    assert hooks.alphas == other.alphas
    assert torch.allclose(weights(model), weights(twin))
