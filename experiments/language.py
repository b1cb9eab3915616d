"""Tasks on text: the next token, and the class of a sentence; with any model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.metrics import BitsPerByte, Perplexity
from experiments.optimizers import groups_by_role
from experiments.tasks import Classification, OptimizerFactory, Schedule, Task


class LanguageModel(Task):
    """Cross entropy of the next token; perplexity, and bits per byte where the data have bytes.

    `model` is a causal language model of transformers (or gives `logits` alike), batches are x and
    y (B, T), y one token further. The data module's `byte_counts` (vocab_size,) says how many
    bytes a token stands for. `decay_vectors`: whether norms and biases have weight decay.
    """

    byte_counts: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        schedule: Schedule | None = None,
        *,
        decay_vectors: bool = True,
    ) -> None:
        super().__init__(model, optimizer, schedule)
        self.decay_vectors = decay_vectors
        self.register_buffer("byte_counts", None, persistent=False)
        stages = ("val_", "test_")
        self.perplexity = nn.ModuleDict({stage: Perplexity() for stage in stages})
        self.bits = nn.ModuleDict({stage: BitsPerByte() for stage in stages})

    def setup(self, stage: str) -> None:
        """Take over the bytes that tokens stand for; refuse a vocabulary that is too small."""
        counts = getattr(getattr(self.trainer, "datamodule", None), "byte_counts", None)
        if counts is None:
            return
        self.byte_counts = counts.to(self.device)
        rows = cast("Any", self.model).get_input_embeddings().num_embeddings
        if rows < len(counts):
            raise ValueError(
                f"the text has {len(counts)} tokens and the model's embedding {rows} rows: "
                "problem.vocab_size"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices, tables and vectors apart, so that an optimizer can treat them each its way."""
        return groups_by_role(self.model, self.decay_vectors)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of tokens (B, T)."""
        return self.model(input_ids=x, use_cache=False).logits

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).flatten(0, 1).float(), y.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross entropy of a batch, in nats a token."""
        loss = self._loss(batch)
        self._show("train/loss", loss, len(batch[1]), bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Perplexity and bits per byte on the validation data."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The same on the test data."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        loss, y = self._loss(batch), batch[1]
        self._show(f"{stage}/loss", loss, y.numel())
        perplexity = cast("Perplexity", self.perplexity[f"{stage}_"])
        perplexity.update(loss, y.numel())
        self._show(f"{stage}/perplexity", perplexity, len(y))
        if self.byte_counts is not None:
            bits = cast("BitsPerByte", self.bits[f"{stage}_"])
            bits.update(loss, y.numel(), self.byte_counts[y].sum())
            self._show(f"{stage}/bits_per_byte", bits, len(y), bar=True)


class SentenceClassification(Classification):
    """Cross entropy and accuracy of a classifier of transformers.

    Batches are x, the encoded sentences by name of argument (`input_ids`, `attention_mask`), and
    y (B,). Norms and biases have no weight decay, as is usual in fine-tuning.
    """

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        """Logits (B, classes)."""
        return self.model(**x).logits

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices, tables and vectors apart, vectors without decay."""
        return groups_by_role(self.model, decay_vectors=False)
