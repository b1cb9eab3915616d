"""Small random data in the place of real sets, and helpers that several test files share."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments import sweep

FILLERS = ["film", "plot", "actor", "scene", "the", "a", "of", "and", "with", "very"]


class Identity:
    """A normalizer that changes nothing."""

    def decode(self, y: Tensor) -> Tensor:
        return y


class Doubled:
    """A normalizer of which the decoded field is 2 y + 1."""

    def decode(self, y: Tensor) -> Tensor:
        return 2 * y + 1


class RandomData(pl.LightningDataModule):
    """`n` seeded samples of the given shapes; labels of `classes` where there are any."""

    def __init__(
        self,
        x: Sequence[int],
        y: Sequence[int] = (),
        classes: int = 0,
        n: int = 8,
        batch_size: int = 4,
        tests: int = 1,
        normalizer: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(n, *x, generator=draw)
        if classes:
            target = torch.randint(classes, (n,), generator=draw)
        else:
            target = torch.randn(n, *y, generator=draw)
        self.data = TensorDataset(images, target)
        self.batch_size = batch_size
        self.normalizer = normalizer
        self.test_names = tuple(f"test_{16 * 2**i}" for i in range(tests))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, self.batch_size)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(self.data, self.batch_size) for _ in self.test_names]


def substitute(cfg: DictConfig) -> DictConfig:
    """Put random data of the right shapes in the place of the data module of a configuration."""
    problem = cfg.problem
    if "vocab_size" in problem:  # a small model on a little text
        small = {"context": 16, "batch_size": 2, "steps": 1, "val_tokens": 32, "bpe": None}
        text = {"path": str(Path(__file__).parent), "pattern": "test_*.py"}
        cfg.data = {**cfg.data, **small, **text, "val_fraction": 0.02, "test_fraction": 0.02}
        cfg.model = {**cfg.model, "hidden": 32, "ffn": 48, "layers": 2, "heads": 2}
        cfg.tuned.min_eigs = 5
        return cfg
    if "modulus" in cfg.data:  # made, not loaded
        return cfg
    share = {"share": cfg.data.share, "val_fraction": cfg.data.val_fraction}
    if "num_classes" in problem:
        x = [problem.in_channels, problem.image_size, problem.image_size]
        shapes: dict[str, Any] = {"x": x, "classes": problem.num_classes}
    else:
        grid = [32] * problem.dim
        y = [problem.out_channels, *grid]
        if cfg.task.rollout:
            y = [2, *y]
        shapes = {"x": [problem.in_channels, *grid], "y": y}
    cfg.data = {"_target_": "standins.RandomData", "n": 2, "batch_size": 2, **shapes, **share}
    return cfg


def sentences(folder: Path, count: int) -> Path:
    """TSV files of sentences whose class a word tells: train, dev and test of `count` each."""
    folder.mkdir(parents=True)
    for name, seed in (("train", 1), ("dev", 2), ("test", 3)):
        draw = random.Random(seed)
        lines = []
        for i in range(count):
            words = [draw.choice(FILLERS) for _ in range(draw.randint(4, 9))]
            words.insert(draw.randrange(4), "good" if i % 2 else "bad")
            lines.append(f"{' '.join(words)}\t{i % 2}\n")
        (folder / f"{name}.tsv").write_text("".join(lines))
    return folder


def save_encoder(folder: Path) -> Path:
    """A small BERT of random weights with a tokenizer of whole words, as transformers saves it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *FILLERS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=len(words), num_attention_heads=2, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


def composed(tmp_path: Path, *overrides: str) -> DictConfig:
    """A configuration that writes under `tmp_path`, quietly, on the CPU."""
    quiet = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu")
    return sweep.compose([f"outputs={tmp_path}", *quiet, *overrides])


def close(a: float, b: float, tolerance: float = 1e-6) -> bool:
    """Equal to a relative tolerance."""
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
