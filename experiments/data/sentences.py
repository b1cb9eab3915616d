"""Labelled sentences of TSV files, encoded once by the tokenizer of a pretrained encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.data.loaders import InOrder, make_loader, world_of
from experiments.data.splits import take_share, train_val_split
from experiments.models.encoder import encoder_folder


@dataclass(frozen=True)
class Labelled:
    """Sentences, and their classes (n,) int64."""

    sentences: list[str]
    labels: Tensor


def read_tsv(path: Path) -> Labelled:
    """A sentence, a tab and a class of 0, 1, ... a line; a first line of names is passed over.

    Raises: FileNotFoundError; ValueError, naming the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; data.root is the folder of the TSV files")
    sentences, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        sentence, tab, label = line.rpartition("\t")
        if tab and label.strip().isdecimal():
            sentences.append(sentence)
            labels.append(int(label))
        elif number > 1:
            raise ValueError(f"{path}:{number}: not a sentence, a tab and a class of 0, 1, ...")
    if not labels:
        raise ValueError(f"{path} has no line of a sentence, a tab and a class")
    return Labelled(sentences, torch.tensor(labels))


class SentenceRows(Dataset[Any]):
    """Encoded sentences; a batch is padded to its own longest."""

    def __init__(self, ids: Sequence[Sequence[int]], labels: Tensor, padding: int) -> None:
        self.ids, self.labels, self.padding = [list(row) for row in ids], labels, padding

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, indices: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """x: `input_ids` and `attention_mask` (B, T) int64; y (B,)."""
        rows = [self.ids[i] for i in indices]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.padding] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}, self.labels[torch.as_tensor(indices)]


class SentenceData(InOrder, pl.LightningDataModule):
    """Sentences and their classes in `train.tsv`, `dev.tsv` and `test.tsv` under `root`.

    Args:
        encoder: whose tokenizer encodes them: a folder, or a package that has one.
        share: of the training sentences: a subset of the seed's own, balanced over the classes,
            the smaller within the larger (the published ladders take the first n rows instead,
            the same for every seed).
        val_fraction: held back from the training sentences where there is no `dev.tsv`.
        max_length: tokens of a sentence; what is longer is cut.

    Attributes after `setup`: num_classes.
    """

    test_names = ("test",)

    def __init__(
        self,
        root: str,
        encoder: str,
        batch_size: int = 32,
        share: float = 1.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        max_length: int = 128,
    ) -> None:
        super().__init__()
        self.root, self.encoder = Path(root), encoder
        self.batch_size, self.num_workers = batch_size, num_workers
        self.share, self.val_fraction, self.seed = share, val_fraction, seed
        self.max_length = max_length
        self._parts: dict[str, SentenceRows] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, split and encode, once."""
        if self._parts:
            return
        train, test = (read_tsv(self.root / f"{name}.tsv") for name in ("train", "test"))
        rows, val = torch.arange(len(train.labels)), None
        if (self.root / "dev.tsv").is_file():
            val = read_tsv(self.root / "dev.tsv")
        elif self.val_fraction:
            rows, held = train_val_split(len(rows), self.val_fraction, self.seed, train.labels)
            val = _take(train, held)
        train = _take(train, take_share(rows, self.share, self.seed, train.labels[rows]))
        encode = self._encoder()
        found = {"train": train, "val": val, "test": test}
        self._parts = {name: encode(part) for name, part in found.items() if part is not None}

    def _encoder(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            encoder_folder(self.encoder), local_files_only=True
        )

        def encode(part: Labelled) -> SentenceRows:
            ids = tokenizer(
                part.sentences, padding=False, truncation=True, max_length=self.max_length
            )["input_ids"]
            return SentenceRows(ids, part.labels, tokenizer.pad_token_id or 0)

        return encode

    @property
    def num_classes(self) -> int:
        """Classes of the training and test sentences."""
        return 1 + max(int(part.labels.max()) for part in self._parts.values())

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches; the order depends on (seed, epoch) alone."""
        world = world_of(self.trainer)
        return make_loader(
            self._parts["train"],  # type: ignore[arg-type]
            self.batch_size,
            shuffle_seed=self.seed,
            num_workers=self.num_workers,
            world=world,
        )


def _take(part: Labelled, rows: Tensor) -> Labelled:
    return Labelled([part.sentences[i] for i in rows.tolist()], part.labels[rows])
