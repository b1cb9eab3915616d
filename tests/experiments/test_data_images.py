"""Image data: splits, trees and their cache, augmentation, order and resume."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from experiments.data import image_tree
from experiments.data.augment import crop_flip, hashed_integers
from experiments.data.digits import Digits
from experiments.data.images import CIFAR, STATISTICS, ImageFolderData
from experiments.data.loaders import TensorRows, make_loader
from experiments.data.splits import take_share, train_val_split

DATA = os.environ.get("TEMPBALANCE_DATA")


# Splits and shares


def test_split_covers_all_and_is_balanced():
    labels = torch.arange(200) % 10
    train, val = train_val_split(200, 0.25, seed=3, labels=labels)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(200))
    assert labels[val].bincount().tolist() == [5] * 10
    again = train_val_split(200, 0.25, seed=3, labels=labels)
    assert torch.equal(again[1], val)
    assert not torch.equal(train_val_split(200, 0.25, seed=4, labels=labels)[1], val)


def test_split_of_nothing_is_no_validation():
    train, val = train_val_split(7, 0.0, seed=0)
    assert train.tolist() == list(range(7))
    assert len(val) == 0


def test_shares_are_nested_and_balanced():
    labels = torch.arange(1000) % 7
    rows = torch.arange(1000) + 5000
    small = take_share(rows, 0.025, 1, labels)
    large = take_share(rows, 0.05, 1, labels)
    assert (len(small), len(large)) == (25, 50)
    assert set(small.tolist()) < set(large.tolist()) < set(rows.tolist())
    counts = labels[small - 5000].bincount(minlength=7)
    assert counts.max() - counts.min() <= 1
    assert not torch.equal(take_share(rows, 0.025, 2, labels), small)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: take_share(torch.arange(20), 0.01, 0), "share=0.01 of 20 .*smallest.* 0.05"),
        (lambda: take_share(torch.arange(20), 0.0, 0), "share must be over 0.*not 0.0"),
        (lambda: take_share(torch.arange(20), 1.5, 0), "not 1.5"),
        (lambda: train_val_split(4, 0.1, 0), "val_fraction=0.1 of 4"),
        (lambda: train_val_split(4, 1.0, 0), "under 1"),
        (lambda: train_val_split(4, 0.95, 0), "none to train on"),
        (lambda: make_loader(TensorRows(torch.zeros(3)), 0), "batch_size.*not 0"),
        (lambda: CIFAR("cifar11", "."), "not 'cifar11'"),
        (lambda: ImageFolderData(".", mean=[0.5]), "both mean and std"),
    ],
)
def test_refusals_name_the_numbers(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# Augmentation


def test_crop_flip_against_a_loop():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 9, 7), dtype=torch.uint8)
    index = torch.randint(0, 10**6, (40,))
    out = crop_flip(images, index, seed=5, epoch=2, pad=2)
    draws = [hashed_integers(index, 5, 2, stream) for stream in range(3)]
    for k in range(40):
        top, left = (int(d[k]) * 5 // 2**32 for d in draws[:2])
        canvas = torch.zeros(3, 13, 11, dtype=torch.uint8)
        canvas[:, 2:11, 2:9] = images[k]
        wanted = canvas[:, top : top + 9, left : left + 7]
        if int(draws[2][k]) % 2:
            wanted = wanted.flip(-1)
        assert torch.equal(out[k], wanted)


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    images = torch.arange(64 * 64).reshape(64, 1, 8, 8)
    index = torch.arange(64)
    whole = crop_flip(images, index, 1, 7)
    order = torch.randperm(64)
    assert torch.equal(crop_flip(images[order], index[order], 1, 7), whole[order])
    assert torch.equal(crop_flip(images[:3], index[:3], 1, 7), whole[:3])
    for other in (crop_flip(images, index, 2, 7), crop_flip(images, index, 1, 8)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9


def test_draws_are_uniform_and_independent():
    index = torch.arange(90_000)
    draws = [hashed_integers(index, s, e, k) for s, e, k in ((0, 0, 0), (0, 0, 1), (0, 1, 0))]
    for draw in draws:
        counts = (draw * 9 >> 32).bincount(minlength=9).double()
        # Chi-squared with 8 degrees of freedom: 26.1 is exceeded once in a thousand.
        assert ((counts - 10_000) ** 2 / 10_000).sum() < 26.1
        low = (draw & 1).double().mean()
        assert abs(low - 0.5) < 0.006
    table = torch.corrcoef(torch.stack(draws).double())
    assert (table - torch.eye(3)).abs().max() < 0.014
    lagged = torch.corrcoef(torch.stack([draws[0][1:], draws[0][:-1]]).double())
    assert abs(lagged[0, 1]) < 0.014


# Digits


def test_digits_parts_and_normalisation():
    data = Digits(seed=2)
    data.setup()
    sizes = [data.size_of(part) for part in ("train", "val", "test")]
    assert sum(sizes) == 1797
    assert sizes[2] == round(1797 * 0.25)
    batches = [data.prepare(b) for b in data.train_dataloader()]
    x = torch.cat([b[0] for b in batches])
    assert x.shape == (sizes[0], 1, 8, 8)
    assert x.dtype == torch.float32
    assert abs(x.mean()) < 1e-5
    assert x.std().item() == pytest.approx(1, abs=1e-4)
    other = Digits(seed=3)
    other.setup()
    tests = [torch.cat([b[0] for b in d.test_dataloader()[0]]) for d in (data, other)]
    assert torch.equal(*tests)
    assert Digits(val_fraction=0.0).test_names == ("test",)


def test_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        data = Digits(seed=seed, val_fraction=0.0)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([index for _, _, index in loader])

    torch.manual_seed(0)
    first = order(1, 4)
    torch.manual_seed(1)
    assert torch.equal(order(1, 4), first)
    assert not torch.equal(order(1, 5), first)
    assert not torch.equal(order(2, 4), first)
    assert sorted(first.tolist()) == list(range(len(first)))


class Recorder(pl.LightningModule):
    """Keeps what it is given, epoch by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.validated: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append((self.current_epoch, x.clone(), y.clone()))
        return nn.functional.cross_entropy(self.net(x.flatten(1)), y)

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[0].clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder, epochs, ckpt=None, **options):
    torch.manual_seed(0)
    module = Recorder()
    data = Digits(seed=9, share=0.2, augment=True, **options)
    saver = pl.callbacks.ModelCheckpoint(folder, save_last=True)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[saver],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt)
    return module


def test_resume_sees_the_same_augmented_batches(tmp_path):
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "part", 2)
    rest = run(tmp_path / "rest", 4, tmp_path / "part" / "last.ckpt")
    expected = [item for item in whole.seen if item[0] >= 2]
    assert [item[0] for item in rest.seen] == [item[0] for item in expected]
    for (_, x, y), (_, wanted_x, wanted_y) in zip(rest.seen, expected, strict=True):
        assert torch.equal(x, wanted_x)
        assert torch.equal(y, wanted_y)
    assert torch.equal(whole.net.weight, rest.net.weight)
    # Augmented anew each epoch, and never in validation.
    first, second = (
        torch.cat([x for epoch, x, _ in whole.seen if epoch == e]).flatten(1) for e in (0, 1)
    )
    assert not torch.allclose(first.sum(0), second.sum(0), atol=1e-2)
    per_epoch = len(whole.validated) // 4
    assert torch.equal(whole.validated[-1], whole.validated[-1 - per_epoch])


def test_loader_before_setup_is_refused():
    with pytest.raises(RuntimeError, match=r"Digits: call setup\(\)"):
        Digits().train_dataloader()


def test_no_validation_part(tmp_path):
    module = run(tmp_path, 1, val_fraction=0.0)
    assert module.validated == []


# Trees


def write_tree(root, size=(8, 8), classes=("ant", "bee"), parts=("train", "test"), each=3):
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for k in range(each):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{k}.png")


def tree(root, **options):
    data = ImageFolderData(str(root), val_fraction=0.0, **options)
    data.prepare_data()
    data.setup()
    return data


def test_tree_is_decoded_exactly(tmp_path):
    write_tree(tmp_path)
    data = tree(tmp_path, augment=False, mean=[0.0] * 3, std=[1.0] * 3)
    assert (data.num_classes, data.image_size, data.in_channels) == (2, 8, 3)
    images, labels = data.prepare(next(iter(data.test_dataloader()[0])))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    wanted = np.asarray(Image.open(tmp_path / "test" / "bee" / "1.png")).transpose(2, 0, 1)
    torch.testing.assert_close(images[4], torch.from_numpy(wanted / 255).float())


def test_tree_statistics(tmp_path):
    write_tree(tmp_path, each=5)
    data = tree(tmp_path)
    files = sorted((tmp_path / "train").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(f)) for f in files]) / 255
    assert data.mean == pytest.approx(pixels.mean((0, 1, 2)).tolist())
    assert data.std == pytest.approx(pixels.std((0, 1, 2)).tolist())


def test_tree_is_cached_until_it_changes(tmp_path, monkeypatch):
    write_tree(tmp_path)
    decoded = []
    real = image_tree._decode
    monkeypatch.setattr(
        image_tree, "_decode", lambda path, size: decoded.append(path) or real(path, size)
    )
    cache = tmp_path / "cache"
    first = tree(tmp_path, cache_dir=str(cache)).load()[0].images
    assert len(decoded) == 14  # twelve images, and the first of each part for its size
    decoded.clear()
    again = tree(tmp_path, cache_dir=str(cache)).load()[0].images
    assert decoded == []
    assert torch.equal(first, again)
    changed = tmp_path / "train" / "ant" / "0.png"
    Image.new("RGB", (8, 8), "red").save(changed)
    os.utime(changed, ns=(1, 1))
    third = tree(tmp_path, cache_dir=str(cache)).load()[0].images
    assert {p.parent.parent.name for p in decoded} == {"train"}
    assert third[0, 0].min() == 255
    decoded.clear()
    os.utime(tmp_path / "test" / "bee" / "0.png", ns=(1, 1))  # same length, another time
    tree(tmp_path, cache_dir=str(cache))
    assert {p.parent.parent.name for p in decoded} == {"test"}
    decoded.clear()
    tree(tmp_path, cache_dir=str(cache), image_size=4)
    assert len(decoded) == 14
    for file in cache.iterdir():
        file.write_bytes(b"half")
    assert torch.equal(tree(tmp_path, cache_dir=str(cache)).load()[0].images, third)


def test_truncated_image_is_named(tmp_path):
    write_tree(tmp_path)
    broken = tmp_path / "train" / "bee" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"bee/2\.png cannot be decoded.*truncated"):
        tree(tmp_path)


def test_sizes_differ(tmp_path):
    write_tree(tmp_path)
    Image.new("RGB", (5, 6)).save(tmp_path / "train" / "bee" / "x.png")
    with pytest.raises(ValueError, match=r"x\.png is 5x6 pixels, the first image 8x8"):
        tree(tmp_path)
    assert tree(tmp_path, image_size=6).load()[0].images.shape == (7, 3, 6, 6)


def test_wrong_trees_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder.*train.*data.root"):
        tree(tmp_path / "nowhere")
    write_tree(tmp_path, parts=("train",))
    with pytest.raises(FileNotFoundError, match="neither a folder test nor a folder val"):
        tree(tmp_path)
    write_tree(tmp_path, parts=("test",), classes=("ant", "cow"))
    with pytest.raises(ValueError, match="training part has not: cow"):
        tree(tmp_path)
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "test" / "ant").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no images"):
        tree(tmp_path)


def test_tinyimagenet_layout(tmp_path):
    for number, name in enumerate(("n01", "n02")):
        folder = tmp_path / "train" / name / "images"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(folder / f"{name}_0.JPEG")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t1\t1\n")
    (tmp_path / "val" / "images").mkdir(parents=True)
    lines = []
    for k, name in enumerate(("n02", "n01", "n02")):
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / "images" / f"val_{k}.JPEG")
        lines.append(f"val_{k}.JPEG\t{name}\t0\t0\t7\t7")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "test" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "images" / "test_0.JPEG")
    train, test = tree(tmp_path).load()
    assert train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [1, 0, 1]


# CIFAR


def test_cifar_missing_says_what_to_fetch(tmp_path):
    data = CIFAR("cifar100", str(tmp_path), download=False)
    with pytest.raises(
        RuntimeError, match=r"cifar-100-python\.tar\.gz \(md5 eb9058c3a382ffc7"
    ) as e:
        data.prepare_data()
    assert str(tmp_path / "cifar-100-python") in str(e.value)


def test_cifar_through_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *a, **k: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("test", 10)):
        entry = {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "fine_labels": (np.arange(n) % 10).tolist(),
        }
        (folder / part).write_bytes(pickle.dumps(entry))
        if part == "test":
            pixels = entry["data"]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(k) for k in range(100)]}))
    data = CIFAR("cifar100", str(tmp_path), val_fraction=0.25, batch_size=10)
    data.prepare_data()
    data.setup()
    assert [data.size_of(p) for p in ("train", "val", "test")] == [30, 10, 10]
    x, y = data.prepare(next(iter(data.test_dataloader()[0])))
    assert y.tolist() == list(range(10))
    # A row of the file holds the red, green and blue plane one after the other.
    back = data.normalizer.decode(x) * 255
    torch.testing.assert_close(
        back.reshape(10, 3072), torch.from_numpy(pixels).float(), atol=1e-3, rtol=0
    )


@pytest.mark.skipif(DATA is None, reason="TEMPBALANCE_DATA names no folder with cifar100/")
def test_real_cifar100_through_a_tree(tmp_path):
    mosaic = Path(DATA) / "cifar100" / "test.webp"
    if not mosaic.exists():
        pytest.skip(f"no {mosaic}")
    # Row r, column c of the mosaic is image r of class c.
    pixels = np.asarray(Image.open(mosaic).convert("RGB"))
    tiles = pixels.reshape(100, 32, 100, 32, 3).swapaxes(1, 2)
    for part, rows in (("train", range(5, 100, 5)), ("test", range(5))):
        for label in range(100):
            folder = tmp_path / part / f"{label:03d}"
            folder.mkdir(parents=True)
            for row in rows:
                Image.fromarray(tiles[row, label]).save(folder / f"{row:02d}.png", compress_level=0)
    data = tree(tmp_path)
    train, test = data.load()
    assert train.images.shape == (1900, 3, 32, 32)
    assert np.array_equal(test.images[7].numpy().transpose(1, 2, 0), tiles[2, 1])
    mean, std = STATISTICS["cifar100"]
    assert data.mean == pytest.approx(mean, abs=0.01)
    assert data.std == pytest.approx(std, abs=0.01)
