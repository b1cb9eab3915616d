"""Generated 2-D incompressible Navier-Stokes flow, for autoregressive training."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from experiments.data.cache import cached, fingerprint, writable_folder
from experiments.data.field_module import FieldDataModule, FieldParts
from experiments.data.navier_stokes_solver import Flow, integrate, random_vorticity
from experiments.data.progress import track
from experiments.data.trajectories import check_window, rollout_parts


@dataclass(frozen=True)
class _Recipe:
    """All that decides the generated numbers; device and type belong to the last bits of them."""

    seed: int
    n_train: int
    n_test: int
    resolution: int
    solver_resolution: int
    viscosity: float
    forced: bool
    frames: int
    interval: float
    start: float
    steps_a_frame: int
    device: str
    chunk: int
    version: int = 1


class NavierStokesGenerated(FieldDataModule):
    """Vorticity of a viscous flow in a periodic unit square, pseudo-spectral, seeded and cached.

    Trajectories of `t_train` (default 21) frames `interval` (default 1) apart from time `start`
    on; the first `initial_step` (default 10) are the input. Solved in float64 on
    `solver_resolution` points (default: `resolution`, 64) with `steps_a_frame` (default 20) steps
    between frames. `device` (default: cpu; "cuda" is some hundred times faster) is part of the
    key, since the last bits depend on it. `data_seed` decides the flows, `seed` the split and the
    order; flow i depends on (data_seed, i) alone. Defaults: viscosity 1e-3 with the forcing of
    Li et al. 2021, 200 flows to train and 50 to test, batch 20.

    Raises: ValueError for sizes that do not fit, FloatingPointError for a step that is too long.
    """

    out_channels = 1
    dim = 2
    autoregressive = True

    def __init__(
        self,
        root: str,
        batch_size: int = 20,
        share: float = 1.0,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        n_train: int = 200,
        n_test: int = 50,
        resolution: int = 64,
        solver_resolution: int | None = None,
        viscosity: float = 1e-3,
        forced: bool = True,
        initial_step: int = 10,
        t_train: int = 21,
        interval: float = 1.0,
        start: float = 0.0,
        steps_a_frame: int = 20,
        data_seed: int = 0,
        device: str = "cpu",
        chunk: int = 25,
    ) -> None:
        super().__init__(
            batch_size=batch_size, share=share, val_fraction=val_fraction, seed=seed,
            num_workers=num_workers,
        )  # fmt: skip
        fine = solver_resolution or resolution
        if fine % resolution:
            raise ValueError(
                f"solver_resolution={fine} must be a multiple of resolution={resolution}"
            )
        if n_train < 1 or n_test < 1:
            raise ValueError(f"n_train={n_train} and n_test={n_test} must be at least 1")
        if start < 0 or (start > 0 and round(start / interval) * interval != start):
            raise ValueError(f"start={start} must be a multiple of interval={interval}, from 0 on")
        check_window(initial_step, t_train, t_train, "the flow")
        self.root, self.initial_step = Path(root), initial_step
        self.rollout_steps = t_train - initial_step
        self.in_channels = initial_step
        self.recipe = _Recipe(
            data_seed, n_train, n_test, resolution, fine, viscosity, forced, t_train, interval,
            start, steps_a_frame, device, chunk,
        )  # fmt: skip

    def prepare_data(self) -> None:
        """Generate and cache; Lightning calls this in one process of a node."""
        self._tensors()

    def build(self) -> FieldParts:
        """Split the trajectories and normalise on the training part."""
        stored = self._tensors()
        rows = self.split(len(stored["train"]))
        return rollout_parts(stored["train"], rows, stored["test"], self.initial_step)

    def _tensors(self) -> dict[str, torch.Tensor]:
        key = fingerprint({"navier_stokes": asdict(self.recipe)})
        return cached(writable_folder(self.root) / f"navier-stokes-{key}.pt", key, self._generate)

    def _generate(self) -> dict[str, torch.Tensor]:
        r = self.recipe
        # Test flows have their own numbers, so that a larger training set does not move them.
        first = 10**9
        return {
            "train": self._solve_many(range(r.n_train), "Navier-Stokes, training"),
            "test": self._solve_many(range(first, first + r.n_test), "Navier-Stokes, test"),
        }

    def _solve_many(self, numbers: range, description: str) -> torch.Tensor:
        """Trajectories (N, T, 1, s, s) float32, a chunk of flows at a time."""
        r = self.recipe
        every = r.solver_resolution // r.resolution
        chunks = [numbers[i : i + r.chunk] for i in range(0, len(numbers), r.chunk)]
        frames = (frame for chunk in chunks for frame in self._frames(chunk))
        total = len(chunks) * self._frames_in_all
        kept: list[list[torch.Tensor]] = []
        for number, frame in enumerate(track(frames, description, total)):
            if number % self._frames_in_all == 0:
                kept.append([])
            if number % self._frames_in_all >= self._frames_in_all - r.frames:
                kept[-1].append(frame[:, None, ::every, ::every].float().cpu())
        return torch.cat([torch.stack(of_chunk, dim=1) for of_chunk in kept])

    @property
    def _frames_in_all(self) -> int:
        """Frames from time 0 on, those before `start` included."""
        return round(self.recipe.start / self.recipe.interval) + self.recipe.frames

    def _frames(self, chunk: range) -> Iterator[torch.Tensor]:
        """Vorticity (n, s, s) of some flows at 0, interval, 2 interval, ..."""
        r = self.recipe
        field = random_vorticity(r.seed, chunk, r.solver_resolution).to(r.device)
        yield field
        if self._frames_in_all > 1:
            yield from integrate(
                field,
                Flow(r.viscosity, forced=r.forced),
                r.interval / r.steps_a_frame,
                self._frames_in_all - 1,
                r.steps_a_frame,
            )
