"""Any text file or folder as tokens to predict, in an endless stream cut into epochs of steps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from experiments.data.cache import cached, fingerprint, user_cache, writable_folder
from experiments.data.corpus import Document, Parts, documents, split
from experiments.data.loaders import InOrder, make_loader, world_of
from experiments.data.splits import take_share
from experiments.data.tokens import BytePairs, Bytes, Tokenizer


class TokenBlocks(Dataset[tuple[Tensor, ...]]):
    """Blocks of `context` tokens, one after another, each with the tokens that follow them.

    `tokens` (n,) int32; block i holds x = tokens[i c : i c + c] and y, one further: every token
    but the first is predicted once. `rows` picks blocks.

    Raises: ValueError where the text does not fill one block.
    """

    def __init__(self, tokens: Tensor, context: int, rows: Tensor | None = None) -> None:
        if len(tokens) <= context:
            raise ValueError(
                f"{len(tokens)} tokens do not fill a block of {context}: give more text, larger "
                "fractions, or a smaller data.context"
            )
        self.blocks = tokens.unfold(0, context + 1, context)
        self.rows = torch.arange(len(self.blocks)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """Blocks of a batch: x (B, context) and y (B, context), int64."""
        block = self.blocks[self.rows[torch.as_tensor(indices)]].long()
        return block[:, :-1], block[:, 1:]


class StepSampler(DistributedSampler[Any]):
    """`steps` batches an epoch, out of an endless stream of passes over the data.

    Pass p is a permutation of (seed, p), and epoch e goes on where epoch e - 1 ended: a run that
    is resumed after any epoch sees what it would have seen, wherever in a pass that was.
    """

    def __init__(
        self, size: int, batch_size: int, steps: int, seed: int, world: tuple[int, int]
    ) -> None:
        super().__init__(range(size), world[0], world[1], seed=seed)  # type: ignore[arg-type]
        self.size, self.batch_size, self.steps = size, batch_size, steps

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        everyone = self.batch_size * self.num_replicas
        first = self.epoch * self.steps * everyone
        place = np.arange(self.steps)[:, None] * everyone + np.arange(self.batch_size)
        place = first + self.rank * self.batch_size + place.ravel()
        passes, offset = place // self.size, place % self.size
        found = np.empty(len(place), dtype=np.int64)
        for number in np.unique(passes):
            order = np.random.default_rng([self.seed, int(number)]).permutation(self.size)
            found[passes == number] = order[offset[passes == number]]
        return iter(found.tolist())


class TextData(InOrder, pl.LightningDataModule):
    """Tokens of a text file, of all text files of a folder, or of Python's standard library.

    Args:
        path: file, folder, or `stdlib`; `pattern` and `exclude` choose files of a folder.
        context: tokens of a sequence.
        steps: batches an epoch of training counts; validation and checkpoint follow each.
        share: of the training blocks, seeded and nested.
        val_fraction, test_fraction: shares of the bytes that are held out (`corpus.split`).
        bpe: entries of a byte-pair encoding that is learned from the training part; None: bytes.
        val_tokens: validate on so many tokens at most, blocks spread evenly over the part.
        cache_dir: keeps what a byte-pair encoding costs; default: the user's cache.

    Batches are x and y (B, context) int64. Attributes after `setup`: `tokenizer`, `byte_counts`
    (vocab_size,), `parts`.
    """

    test_names = ("test",)

    def __init__(
        self,
        path: str,
        batch_size: int = 8,
        context: int = 128,
        steps: int = 100,
        share: float = 1.0,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        bpe: int | None = None,
        val_tokens: int | None = None,
        pattern: str = "*",
        exclude: Sequence[str] = (),
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("context", context), ("steps", steps), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"TextData: {name} must be at least 1, not {value}")
        self.path, self.pattern, self.exclude = path, pattern, tuple(exclude)
        self.batch_size, self.context, self.steps = batch_size, context, steps
        self.share, self.seed, self.num_workers = share, seed, num_workers
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.bpe, self.val_tokens, self.cache_dir = bpe, val_tokens, cache_dir
        self.tokenizer: Tokenizer = Bytes()
        self._parts: dict[str, TokenBlocks] = {}

    def prepare_data(self) -> None:
        """Learn the encoding and cache it; Lightning calls this in one process of a node."""
        if self.bpe is not None:
            self._read()

    def setup(self, stage: str | None = None) -> None:
        """Read, encode and cut into blocks, once."""
        if self._parts:
            return
        tokens = self._read()
        train = TokenBlocks(tokens["train"], self.context)
        train.rows = take_share(train.rows, self.share, self.seed)
        self._parts["train"] = train
        for name in ("val", "test"):
            if len(tokens[name]):
                self._parts[name] = TokenBlocks(tokens[name], self.context)
        if self.val_tokens is not None and "val" in self._parts:
            _thin(self._parts["val"], max(1, self.val_tokens // self.context))

    def _read(self) -> dict[str, Tensor]:
        found = documents(self.path, self.pattern, self.exclude)
        parts = split(found, self.val_fraction, self.test_fraction)
        if self.bpe is None:
            return _encoded(parts, self.tokenizer)
        folder = writable_folder(Path(self.cache_dir) if self.cache_dir else user_cache() / "text")
        texts = [document.text for document in parts.train]
        pairs = self.tokenizer = BytePairs.learned(texts, self.bpe, folder)
        key = fingerprint({"vocabulary": pairs.vocab_size, **_digest(parts)})
        return cached(folder / f"tokens-{key}.pt", key, lambda: _encoded(parts, pairs))

    @property
    def byte_counts(self) -> Tensor:
        """Bytes that each token stands for (vocab_size,)."""
        return self.tokenizer.byte_counts()

    def train_dataloader(self) -> DataLoader[Any]:
        """`steps` batches of the stream."""
        part, world = self._part("train"), world_of(self.trainer)
        sampler = StepSampler(len(part), self.batch_size, self.steps, self.seed, world)
        return make_loader(part, self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def _part(self, name: str) -> TokenBlocks:
        if name not in self._parts:
            raise RuntimeError("TextData: call setup() first (a Trainer does)")
        return self._parts[name]


def _encoded(parts: Parts, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Token ids (n,) int32 of each part, the end token after every document."""
    return {
        name: torch.from_numpy(_joined(getattr(parts, name), tokenizer))
        for name in ("train", "val", "test")
    }


def _joined(found: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    end = np.array([tokenizer.end], dtype=np.int32)
    pieces = [piece for document in found for piece in (tokenizer.encode(document.text), end)]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)


def _digest(parts: Parts) -> dict[str, list[str]]:
    return {
        name: [hashlib.sha256(document.text).hexdigest() for document in getattr(parts, name)]
        for name in ("train", "val", "test")
    }


def _thin(part: TokenBlocks, count: int) -> None:
    if count < len(part):
        part.rows = part.rows[torch.linspace(0, len(part) - 1, count).round().long()]
