"""Darcy flow, coefficient to pressure: a file of the real set, or a generated one."""

import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from experiments.data.cache import cached, fingerprint, writable_folder
from experiments.data.darcy_solver import darcy_sample
from experiments.data.field_module import FieldDataModule, FieldParts, pairs
from experiments.data.progress import track

Pair = tuple[torch.Tensor, torch.Tensor]


class _Darcy(FieldDataModule):
    """One input channel (1 where the coefficient is high, else 0), one output channel."""

    in_channels = out_channels = 1
    dim = 2
    autoregressive = False

    def __init__(
        self, root: str, batch_size: int, share: float, val_fraction: float, seed: int,
        num_workers: int, encode_input: bool, encode_output: bool, pixelwise: bool,
    ) -> None:  # fmt: skip
        super().__init__(
            batch_size=batch_size, share=share, val_fraction=val_fraction, seed=seed,
            num_workers=num_workers,
        )  # fmt: skip
        self.root = Path(root)
        self.encode_input, self.encode_output = encode_input, encode_output
        self.pixelwise = pixelwise

    def read(self) -> tuple[Pair, dict[str, Pair]]:
        """Training pair (N, 1, s, s) and test pairs by name."""
        raise NotImplementedError

    def build(self) -> FieldParts:
        """Split, normalise on the training part."""
        (x, y), tests = self.read()
        return pairs(
            x, y, self.split(len(x)), tests, encode_input=self.encode_input,
            encode_output=self.encode_output, pixelwise=self.pixelwise,
        )  # fmt: skip


class DarcyNpz(_Darcy):
    """Darcy flow from `root`/`file`, an npz of x_train y_train x_test y_test [x_test_32 y_test_32].

    Or, where that is not there, from the files darcy_{train_16,test_16,test_32}.pt as
    neuraloperator's `DarcyDataset` downloads them. x (N, s, s) of any type, y (N, s, s).
    `test_names` is ("test_16", "test_32"), or as many as there are, named by resolution. As in
    neuraloperator's own example the target is normalised by one mean and spread and the input (0
    or 1) is left as it is; `encode_input`, `pixelwise` (a mean and spread a point) change that.
    Defaults: batch 32, a tenth of the training samples for validation.

    Raises: FileNotFoundError saying what to fetch, ValueError for a damaged file or other arrays.
    Source: Zenodo record 12784353, the small set that neuraloperator ships.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        share: float = 1.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        file: str = "darcy.npz",
        encode_input: bool = False,
        encode_output: bool = True,
        pixelwise: bool = False,
    ) -> None:
        super().__init__(
            root, batch_size, share, val_fraction, seed, num_workers, encode_input,
            encode_output, pixelwise,
        )  # fmt: skip
        self.path = self.root / file

    @property
    def test_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the test sets in the order of the loaders."""
        return tuple(self.parts.test)

    def read(self) -> tuple[Pair, dict[str, Pair]]:
        """Arrays of the file as float32 with a channel."""
        arrays = self._arrays()
        missing = [n for n in ("x_train", "y_train", "x_test", "y_test") if n not in arrays]
        if missing:
            raise ValueError(
                f"{self.path} has no {', '.join(missing)}; it holds {', '.join(sorted(arrays))}"
            )

        def pair(part: str) -> Pair:
            x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
            if x.ndim != 3 or x.shape != y.shape:
                raise ValueError(
                    f"{self.path}: x_{part} {x.shape} and y_{part} {y.shape} must be equal "
                    "(samples, size, size)"
                )
            return torch.from_numpy(x)[:, None].float(), torch.from_numpy(y)[:, None].float()

        tests = {}
        for part in ["test", *sorted(n[2:] for n in arrays if n.startswith("x_test_"))]:
            x, y = pair(part)
            tests[f"test_{x.shape[-1]}"] = (x, y)
        return pair("train"), tests

    def _arrays(self) -> dict[str, np.ndarray]:
        if not self.path.exists():
            return self._downloaded()
        try:
            with np.load(self.path) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.path} is truncated or no npz file ({error}): fetch it again"
            ) from error

    def _downloaded(self) -> dict[str, np.ndarray]:
        """The same arrays from neuraloperator's files."""
        arrays: dict[str, np.ndarray] = {}
        for part, name in (("train", "train_16"), ("test", "test_16"), ("test_32", "test_32")):
            path = self.root / f"darcy_{name}.pt"
            if path.exists():
                pair = torch.load(path, weights_only=True)
                arrays |= {f"x_{part}": pair["x"].numpy(), f"y_{part}": pair["y"].numpy()}
            elif part != "test_32":
                raise FileNotFoundError(
                    f"no {path.name} and no {self.path.name} in {self.root}. Zenodo record "
                    "12784353, the small Darcy set of neuraloperator, is fetched there by\n"
                    '    python -c "from neuralop.data.datasets import DarcyDataset; '
                    f"DarcyDataset('{self.root}', 1000, [50, 50], 10, [50, 50], 16)\"\n"
                    "Or set data.root to a folder that has it; data=darcy_generated needs no file"
                )
        return arrays


@dataclass(frozen=True)
class _Recipe:
    """All that decides the generated numbers."""

    seed: int
    n_train: int
    n_test: int
    resolution: int
    cells: int
    high: float
    low: float
    alpha: float
    tau: float
    version: int = 1


class DarcyGenerated(_Darcy):
    """Darcy flow with a solver behind it: -div(a grad u) = 1, u = 0 on the boundary.

    a is `high` where a Gaussian random field is positive and `low` elsewhere (defaults 12 and 3,
    Li et al. 2021, with alpha 2 and tau 3). The small set that neuraloperator ships is another:
    high=0.375, low=0.0195, alpha=2, tau=6 give its mean, spread and share of high within 2%.
    Solved on `cells` (default 64) intervals a side and taken at the points i / resolution,
    i = 0 ... resolution - 1 (default 16); tested there and at twice the resolution where `cells`
    allows it. `data_seed` decides the samples and `seed` the split and the order, so that seeds
    of training share their data. Sample i depends on (data_seed, i) alone. Cached in `root`
    under a hash of everything that decides the numbers; about 9 ms a sample at 64 cells.

    Raises: ValueError where `cells` is no multiple of `resolution`.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        share: float = 1.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        n_train: int = 1000,
        n_test: int = 100,
        resolution: int = 16,
        cells: int = 64,
        high: float = 12.0,
        low: float = 3.0,
        alpha: float = 2.0,
        tau: float = 3.0,
        data_seed: int = 0,
        encode_input: bool = False,
        encode_output: bool = True,
        pixelwise: bool = False,
    ) -> None:
        super().__init__(
            root, batch_size, share, val_fraction, seed, num_workers, encode_input,
            encode_output, pixelwise,
        )  # fmt: skip
        if resolution < 2 or cells % resolution:
            raise ValueError(
                f"cells={cells} must be a multiple of resolution={resolution}, which is at least 2"
            )
        if n_train < 1 or n_test < 1:
            raise ValueError(f"n_train={n_train} and n_test={n_test} must be at least 1")
        self.recipe = _Recipe(data_seed, n_train, n_test, resolution, cells, high, low, alpha, tau)
        self._sizes = [s for s in (resolution, 2 * resolution) if cells % s == 0]
        self.test_names = tuple(f"test_{size}" for size in self._sizes)

    def prepare_data(self) -> None:
        """Generate and cache; Lightning calls this in one process of a node."""
        self._tensors()

    def read(self) -> tuple[Pair, dict[str, Pair]]:
        """Training pair at `resolution`, test pairs at each size."""
        stored = self._tensors()

        def pair(part: str) -> Pair:
            return stored[f"x_{part}"].float(), stored[f"y_{part}"]

        return pair("train"), {name: pair(name) for name in self.test_names}

    def _tensors(self) -> dict[str, torch.Tensor]:
        key = fingerprint({"darcy": asdict(self.recipe)})
        return cached(writable_folder(self.root) / f"darcy-{key}.pt", key, self._generate)

    def _generate(self) -> dict[str, torch.Tensor]:
        r = self.recipe
        train = self._sample_many(range(r.n_train), self._sizes[:1], "Darcy flow, training")
        # Test samples have their own numbers, so that a larger training set does not move them.
        first = 10**9
        test = self._sample_many(range(first, first + r.n_test), self._sizes, "Darcy flow, test")
        out = {"x_train": train[0][0], "y_train": train[0][1]}
        for size, (x, y) in zip(self._sizes, test, strict=True):
            out |= {f"x_test_{size}": x, f"y_test_{size}": y}
        return out

    def _sample_many(
        self, numbers: Sequence[int], sizes: Sequence[int], description: str
    ) -> list[Pair]:
        """Pairs (N, 1, size, size), x bool and y float32, for each size."""
        r = self.recipe
        found: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in sizes]
        for number in track(numbers, description, len(numbers)):
            mask, u = darcy_sample(r.seed, number, r.cells, r.high, r.low, r.alpha, r.tau)
            for size, (xs, ys) in zip(sizes, found, strict=True):
                grid = slice(0, r.cells, r.cells // size)
                xs.append(mask[grid, grid])
                ys.append(u[grid, grid].astype(np.float32))
        return [
            (torch.from_numpy(np.stack(xs)[:, None]), torch.from_numpy(np.stack(ys)[:, None]))
            for xs, ys in found
        ]
