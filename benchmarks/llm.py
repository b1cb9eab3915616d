"""Shapes of large language models, and what measuring them takes, counted from the windows."""

from __future__ import annotations

from dataclasses import dataclass

from tempbalance.spectra.windows import Windows


@dataclass(frozen=True)
class Weight:
    """A matrix of a model by shape alone: what the library's ``cost`` and sharing look at."""

    name: str
    shape: tuple[int, int, int]  # (1, out, in), as of a measured layer

    @property
    def numel(self) -> int:
        return self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class Transformer:
    """A decoder with gated MLPs and grouped-query attention, as Llama's."""

    name: str
    blocks: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    source: str

    def weights(self) -> list[Weight]:
        """Every matrix that is measured: seven a block and the output head; not the embedding."""
        kv = self.width // self.heads * self.kv_heads
        shapes = {
            "q": (self.width, self.width),
            "k": (kv, self.width),
            "v": (kv, self.width),
            "o": (self.width, self.width),
            "gate": (self.ffn, self.width),
            "up": (self.ffn, self.width),
            "down": (self.width, self.ffn),
        }
        blocks = [
            Weight(f"{block}.{name}", (1, *shape))
            for block in range(self.blocks)
            for name, shape in shapes.items()
        ]
        return [*blocks, Weight("head", (1, self.vocabulary, self.width))]

    @property
    def parameters(self) -> int:
        """All parameters, the embedding (not tied to the head) and the norms included."""
        norms = (2 * self.blocks + 1) * self.width
        return sum(w.numel for w in self.weights()) + self.vocabulary * self.width + norms


MODELS = (
    Transformer("7B", 32, 4096, 11008, 32, 32, 32_000, "Llama 2 7B, arXiv 2307.09288"),
    Transformer("70B", 80, 8192, 28672, 64, 8, 128_256, "Llama 3 70B, arXiv 2407.21783, table 3"),
    Transformer(
        "405B", 126, 16384, 53248, 128, 8, 128_256, "Llama 3 405B, arXiv 2407.21783, table 3"
    ),
)


@dataclass(frozen=True)
class Work:
    """What measuring some windows takes. ``sides``: how many windows of which (n, k), n >= k."""

    sides: dict[tuple[int, int], int]

    @property
    def windows(self) -> int:
        return sum(self.sides.values())

    @property
    def gram_flops(self) -> float:
        """Gram matrices, 2 n k^2 each."""
        return sum(2.0 * n * k * k * count for (n, k), count in self.sides.items())

    @property
    def tridiagonal_flops(self) -> float:
        """Reduction to tridiagonal form, 4/3 k^3 each."""
        return sum(4 / 3 * k**3 * count for (_, k), count in self.sides.items())

    @property
    def tridiagonal_bytes(self) -> float:
        """Bytes that the reduction reads: the trailing float32 square once a column, 4/3 k^3."""
        return sum(4 / 3 * k**3 * count for (_, k), count in self.sides.items())


def work(weight: Weight, windows: Windows) -> Work:
    """The windows of one weight."""
    slices, rows, cols = weight.shape
    grid = windows.grid(rows, cols)
    side = (max(grid.height, grid.width), grid.eigenvalues)
    return Work({side: slices * grid.positions})


def together(works: list[Work]) -> Work:
    """All of it in one."""
    sides: dict[tuple[int, int], int] = {}
    for each in works:
        for side, count in each.sides.items():
            sides[side] = sides.get(side, 0) + count
    return Work(sides)
