"""Networks: published sizes, shapes, refusals; FNO's checkpoints."""

import sys

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from experiments.data.darcy import DarcyGenerated
from experiments.models.fno import fno
from experiments.models.resnet import cifar_resnet
from experiments.models.unet import UNet
from experiments.models.vgg import cifar_vgg
from experiments.models.wideresnet import WideResNet


def count(model: nn.Module) -> int:
    """Real numbers in the parameters; a complex one counts twice."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kind)]


# Counted by hand from the published layouts: convolutions k*k*in*out, norms 2*out, head in*out+out.
@pytest.mark.parametrize(
    ("model", "parameters", "convolutions"),
    [
        (lambda: cifar_resnet(18, 100), 11_220_132, 20),
        (lambda: cifar_resnet(34, 100), 21_328_292, 36),
        (lambda: cifar_vgg(16, 100), 14_774_436, 13),
        (lambda: cifar_vgg(19, 100), 20_086_692, 16),
        (lambda: WideResNet(28, 10, 10), 36_479_194, 28),
        (lambda: WideResNet(16, 8, 200), 11_058_840, 16),
    ],
)
def test_sizes_are_the_published_ones(model, parameters, convolutions):
    net = model()
    assert count(net) == parameters
    assert len(kinds(net, nn.Conv2d)) == convolutions
    assert len(kinds(net, nn.Linear)) == 1


def test_resnet_stem_keeps_the_resolution():
    net = cifar_resnet(18, 10, width=8).eval()
    seen = {}
    net.layer1.register_forward_hook(lambda m, i, o: seen.update(first=o.shape))
    net.layer4.register_forward_hook(lambda m, i, o: seen.update(last=o.shape))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert seen == {"first": (2, 8, 32, 32), "last": (2, 64, 4, 4)}


def test_resnet_narrow_and_grey():
    net = cifar_resnet(18, 10, in_channels=1, width=16)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert {m.out_channels for m in kinds(net, nn.Conv2d)} == {16, 32, 64, 128}
    for conv in kinds(net, nn.Conv2d):
        # He's initialisation, fan out: std = sqrt(2 / (out * kernel area)).
        expected = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.15)


def test_vgg_and_wideresnet_forward():
    x = torch.zeros(2, 3, 32, 32)
    assert cifar_vgg(16, 7).eval()(x).shape == (2, 7)
    net = WideResNet(10, 1, 7, dropout=0.5).eval()
    assert net(x).shape == (2, 7)
    assert torch.equal(net(x), net(x))


def test_wideresnet_large_images_cost_no_more():
    small, large = WideResNet(10, 1, 2).eval(), WideResNet(10, 1, 2, image_size=64).eval()
    shapes = []
    for net, size in ((small, 32), (large, 64)):
        net.stages.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
        net(torch.zeros(1, 3, size, size))
    assert shapes[0] == shapes[1] == (1, 64, 8, 8)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: cifar_resnet(50, 10), r"\[18, 34\], not 50"),
        (lambda: cifar_resnet(18, 10, width=0), "width"),
        (lambda: cifar_vgg(11, 10), r"\[16, 19\], not 11"),
        (lambda: WideResNet(17, 2, 10), "6 n . 4.*not 17"),
        (lambda: WideResNet(16, 2, 10, image_size=4), "at least 8"),
        (lambda: UNet(4, 1, 1), "dim must be 1, 2 or 3"),
        (lambda: UNet(2, 1, 1, depth=0), "at least 1"),
        (lambda: UNet(2, 1, 1)(torch.zeros(1, 2, 32, 32)), r"not \(1, 2, 32, 32\)"),
        (lambda: UNet(2, 1, 1)(torch.zeros(1, 1, 32)), "2 dimensions"),
        (lambda: UNet(2, 1, 1)(torch.zeros(1, 1, 32, 8)), "smaller depth"),
        (lambda: fno((0, 4), 1, 1), r"n_modes.*\(0, 4\)"),
    ],
)
def test_refusals_name_the_number(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("dim", "grid"), [(1, (64,)), (1, (37,)), (2, (16, 16)), (2, (13, 22)), (3, (8, 7, 12))]
)
def test_unet_keeps_any_grid(dim, grid):
    net = UNet(dim, 3, 2, width=4, depth=2)
    out = net(torch.randn(2, 3, *grid))
    assert out.shape == (2, 2, *grid)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_unet_pads_with_edge_values():
    net = UNet(1, 1, 1, width=4, depth=2).eval()
    x = torch.randn(1, 1, 13)
    padded = torch.cat([x, x[..., -1:].expand(1, 1, 3)], dim=-1)
    assert torch.equal(net(x), net(padded)[..., :13])


def test_unet_size():
    # The 2-D network of width 32 and depth 4 that PDE benchmarks use.
    assert count(UNet(2, 1, 1)) == 7_762_465


def test_fno_size_silence_and_state(capfd):
    net = fno((12, 12), 1, 1)
    assert capfd.readouterr().out == ""
    assert count(net) == 274_141
    state = net.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state["net.fno_blocks.convs.0.weight.tensor"].shape == (20, 20, 12, 7)
    holder = nn.Sequential(net, fno((4,), 1, 1, hidden_channels=4, n_layers=1))
    assert all(isinstance(value, torch.Tensor) for value in holder.state_dict().values())
    holder.load_state_dict(holder.state_dict())


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_fno_takes_any_resolution(dim):
    # A smooth periodic field: the operator's answer on a finer grid agrees at the common points.
    net = fno((4,) * dim, 1, 2, hidden_channels=6, n_layers=2, positional_embedding=None)
    outs = []
    for size in (16, 32):
        line = torch.arange(size) / size
        mesh = torch.meshgrid([line] * dim, indexing="ij")
        x = 0.1 * sum(torch.sin(2 * torch.pi * axis) for axis in mesh)[None, None]
        outs.append(net(x))
    coarse = outs[1][(..., *[slice(None, None, 2)] * dim)]
    torch.testing.assert_close(coarse, outs[0], atol=2e-3, rtol=0)


def test_fno_without_neuralop_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "neuralop", None)
    monkeypatch.setitem(sys.modules, "neuralop.models", None)
    with pytest.raises(ImportError, match="pip install 'neuraloperator"):
        fno((4,), 1, 1)


class Operator(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = fno((4, 4), 1, 1, hidden_channels=6, n_layers=2)
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-2)


def fit(folder, data_root, epochs, ckpt=None):
    torch.manual_seed(0)
    module = Operator()
    data = DarcyGenerated(str(data_root), batch_size=8, n_train=40, n_test=4, cells=32)
    saver = pl.callbacks.ModelCheckpoint(folder, save_last=True)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[saver],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt)
    return module


def test_fno_in_a_lightning_module_resumes_bit_for_bit(tmp_path):
    whole = fit(tmp_path / "whole", tmp_path, 10)
    assert sum(whole.losses[-5:]) < 0.6 * sum(whole.losses[:5])
    half = fit(tmp_path / "half", tmp_path, 5)
    last = tmp_path / "half" / "last.ckpt"
    stored = torch.load(last, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in stored["state_dict"].values())
    rest = fit(tmp_path / "rest", tmp_path, 10, ckpt=last)
    assert half.losses + rest.losses == whole.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
