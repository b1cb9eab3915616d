"""Loaders that slice whole batches, in an order that the seed and the epoch alone decide."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler


class BatchDataset(Protocol):
    """Samples that can be read many at a time."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]: ...


class TensorRows(Dataset[tuple[torch.Tensor, ...]]):
    """Rows of tensors of one length, a batch of them in one indexing operation.

    `rows` (n,) picks which rows of the tensors there are; `with_index` adds the row numbers as a
    last tensor, int64.
    """

    def __init__(
        self, *tensors: torch.Tensor, rows: torch.Tensor | None = None, with_index: bool = False
    ) -> None:
        self.tensors = tensors
        self.rows = torch.arange(len(tensors[0])) if rows is None else rows
        self.with_index = with_index

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        rows = self.rows[torch.as_tensor(indices)]
        batch = tuple(tensor.index_select(0, rows) for tensor in self.tensors)
        return (*batch, rows) if self.with_index else batch


def _as_is(batch: Any) -> Any:
    """Collate function: the data set already returns batches."""
    return batch


def make_loader(
    dataset: BatchDataset,
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    num_workers: int = 0,
    world: tuple[int, int] = (1, 0),
    sampler: DistributedSampler[Any] | None = None,
) -> DataLoader[Any]:
    """DataLoader over a data set that reads whole batches.

    With `shuffle_seed` the order of epoch e depends on (seed, e) alone: Lightning calls
    `set_epoch` on the sampler, also after a resume. `world` is (number of processes, rank) of a
    training loader. A `sampler` of one's own stands in the place of both. Without any: in order,
    left to Lightning to spread over processes.

    Raises: ValueError for a batch size under 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if shuffle_seed is not None:
        # With one replica this is a plain permutation of (seed + epoch); no process group needed.
        sampler = DistributedSampler(
            dataset,  # type: ignore[arg-type]
            num_replicas=world[0],
            rank=world[1],
            shuffle=True,
            seed=shuffle_seed,
        )
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        # Its own generator, so that starting an epoch draws nothing from the global one.
        generator=torch.Generator().manual_seed(shuffle_seed or 0),
    )


def world_of(trainer: Any) -> tuple[int, int]:
    """(number of processes, rank) of a Lightning trainer; (1, 0) without one."""
    return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)


class InOrder:
    """Parts by name, those for validation and test read in their order.

    Mixed into a data module with `_parts`, `batch_size` and `num_workers`.
    """

    batch_size: int
    num_workers: int
    _parts: Mapping[str, Any]

    def size_of(self, part: str) -> int:
        """Samples in "train", "val" or "test"; 0 for a part that there is not."""
        return len(self._parts[part]) if part in self._parts else 0

    def val_dataloader(self) -> Any:
        """The validation part in its order; an empty list where there is none."""
        return single(self._in_order("val"))

    def test_dataloader(self) -> Any:
        """The test part in its order; an empty list where there is none."""
        return single(self._in_order("test"))

    def _in_order(self, name: str) -> DataLoader[Any] | None:
        if name not in self._parts:
            return None
        return make_loader(self._parts[name], self.batch_size, num_workers=self.num_workers)


def single(loader: DataLoader[Any] | None) -> Sequence[DataLoader[Any]]:
    """The loader in a list, or an empty list for none: Lightning then skips that stage."""
    return [] if loader is None else [loader]
