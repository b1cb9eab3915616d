"""From text to tokens: bytes as they are, or a byte-pair encoding learned from the training text.

Both know how many bytes each token stands for, so that bits per byte compare across vocabularies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_END = "<|end|>"
_CHUNK = 2**20  # bytes that are encoded at a time


class Tokenizer(Protocol):
    """Text to token ids; `end` stands between documents and for no byte."""

    vocab_size: int
    end: int

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids of a document, int32."""
        ...

    def byte_counts(self) -> Tensor:
        """Bytes that each token stands for (vocab_size,), int64."""
        ...


class Bytes:
    """A token a byte, and one for the end of a document."""

    vocab_size = 257
    end = 256

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes themselves, int32."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.int32)

    def byte_counts(self) -> Tensor:
        """One each, none for the end."""
        counts = torch.ones(self.vocab_size, dtype=torch.int64)
        counts[self.end] = 0
        return counts


class BytePairs:
    """Byte-level byte-pair encoding, of the `tokenizers` library."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.vocab_size = int(model.get_vocab_size())
        self.end = int(model.token_to_id(_END))

    @classmethod
    def learned(cls, texts: Iterable[bytes], vocab_size: int, cache: Path) -> BytePairs:
        """Learn at most `vocab_size` tokens from texts, or read what was learned from the same.

        Raises: ValueError for a vocabulary that cannot hold all bytes.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < Bytes.vocab_size:
            raise ValueError(f"bpe={vocab_size}: at least {Bytes.vocab_size}, or null for bytes")
        texts = list(texts)
        digest = hashlib.sha256(f"{vocab_size} {tokenizers.__version__}".encode())
        for text in texts:
            digest.update(hashlib.sha256(text).digest())
        path = cache / f"bpe-{digest.hexdigest()[:16]}.json"
        if path.is_file():
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        pieces = (piece for text in texts for piece in chunks(text))
        model.train_from_iterator(pieces, trainer)
        partial = path.with_suffix(".part")
        model.save(str(partial))
        partial.replace(path)
        return cls(model)

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids, int32; long documents in pieces, so that memory stays bounded."""
        found = [self._model.encode(piece).ids for piece in chunks(text)]
        return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in found])

    def decode(self, ids: Iterable[int]) -> str:
        """The text that tokens stand for."""
        return str(self._model.decode(list(ids)))

    def byte_counts(self) -> Tensor:
        """A character of a byte-level token is a byte; the end of a document is none."""
        counts = torch.zeros(self.vocab_size, dtype=torch.int64)
        for token, index in self._model.get_vocab().items():
            counts[index] = 0 if token == _END else len(token)
        return counts


def chunks(text: bytes) -> Iterator[str]:
    """Pieces of a document, cut after a line where there is one."""
    begin = 0
    while begin < len(text):
        end = min(begin + _CHUNK, len(text))
        if end < len(text):
            line = text.rfind(b"\n", begin, end)
            end = line + 1 if line >= begin else _character(text, end)
        yield text[begin:end].decode()
        begin = end


def _character(text: bytes, end: int) -> int:
    while text[end] & 0xC0 == 0x80:  # inside a UTF-8 sequence
        end -= 1
    return end
