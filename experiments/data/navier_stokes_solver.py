"""Two-dimensional incompressible Navier-Stokes on a torus, pseudo-spectral in vorticity form."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


class Torus:
    """Wave numbers of a periodic square of `length` with `size` points a side.

    Arrays broadcast against rfft2 coefficients (B, size, size // 2 + 1).
    """

    def __init__(
        self,
        size: int,
        length: float = 1.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 4 or size % 2:
            raise ValueError(f"the grid needs an even number of points, at least 4, not {size}")
        self.size, self.length, self.dtype = size, length, dtype
        whole = torch.fft.fftfreq(size, 1.0 / size, dtype=dtype, device=device)
        half = torch.fft.rfftfreq(size, 1.0 / size, dtype=dtype, device=device)
        unit = 2 * math.pi / length
        self.kx, self.ky = unit * whole[:, None], unit * half[None, :]
        self.square = self.kx**2 + self.ky**2
        # 1/k^2 with 0 for the mean: the stream function has none, so the flow has no drift.
        self.inverse = torch.where(self.square > 0, 1.0 / self.square.clamp_min(1e-30), 0.0)
        # 2/3 rule: with modes from a third of the grid on removed, the products of two fields
        # alias only into removed modes.
        kept = size / 3
        self.dealias = ((whole.abs()[:, None] < kept) & (half[None, :] < kept)).to(dtype)

    def to_modes(self, field: torch.Tensor) -> torch.Tensor:
        """Values (..., size, size) to dealiased coefficients."""
        return torch.fft.rfft2(field) * self.dealias

    def to_field(self, modes: torch.Tensor) -> torch.Tensor:
        """Coefficients to values (..., size, size)."""
        return torch.fft.irfft2(modes, s=(self.size, self.size))

    def velocity(self, modes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(u, v) of a vorticity given by coefficients: u = dpsi/dy, v = -dpsi/dx, -Lap psi = w."""
        stream = modes * self.inverse
        return self.to_field(1j * self.ky * stream), self.to_field(-1j * self.kx * stream)

    def advection(self, modes: torch.Tensor) -> torch.Tensor:
        """Coefficients of -(u dw/dx + v dw/dy)."""
        u, v = self.velocity(modes)
        slope_x, slope_y = self.to_field(1j * self.kx * modes), self.to_field(1j * self.ky * modes)
        return -self.to_modes(u * slope_x + v * slope_y)

    def energy(self, vorticity: torch.Tensor) -> torch.Tensor:
        """Mean of |velocity|^2 / 2 of each field (B,)."""
        u, v = self.velocity(torch.fft.rfft2(vorticity))
        return (u**2 + v**2).mean((-2, -1)) / 2

    @staticmethod
    def enstrophy(vorticity: torch.Tensor) -> torch.Tensor:
        """Mean of vorticity^2 / 2 of each field (B,)."""
        return (vorticity**2).mean((-2, -1)) / 2


@dataclass(frozen=True)
class Flow:
    """dw/dt + u . grad w = viscosity Laplace w + forcing, on a torus of side `length`.

    `forced` adds 0.1 (sin 2 pi (x + y) + cos 2 pi (x + y)), x and y in units of `length`
    (Li et al. 2021).
    """

    viscosity: float = 1e-3
    length: float = 1.0
    forced: bool = True


def integrate(
    vorticity: torch.Tensor, flow: Flow, step: float, frames: int, steps_a_frame: int
) -> Iterator[torch.Tensor]:
    """Yield the vorticity (B, s, s) at `frames` times, the first being steps_a_frame steps on.

    Viscosity is integrated exactly (integrating factor), advection by the classical Runge-Kutta
    method of order 4: error O(step^4), stable while max|u| pi s / length * 2/3 * step < 2.8.
    On the device and in the type (float32 or float64) of `vorticity`.

    Raises: ValueError for a non-positive step, FloatingPointError where the flow is unstable.
    """
    if step <= 0 or frames < 1 or steps_a_frame < 1:
        raise ValueError(
            f"step={step}, frames={frames} and steps_a_frame={steps_a_frame} must be positive"
        )
    torus = Torus(vorticity.shape[-1], flow.length, vorticity.dtype, vorticity.device)
    half = torch.exp(-flow.viscosity * torus.square * step / 2)
    full = half * half
    push = torus.to_modes(_forcing(torus, vorticity.device)) if flow.forced else None

    def slope(modes: torch.Tensor) -> torch.Tensor:
        out = torus.advection(modes)
        return out if push is None else out + push

    modes = torus.to_modes(vorticity)
    for frame in range(frames):
        for _ in range(steps_a_frame):
            a = slope(modes)
            b = slope(half * (modes + step / 2 * a))
            c = slope(half * modes + step / 2 * b)
            d = slope(full * modes + step * half * c)
            modes = full * modes + step / 6 * (full * a + 2 * half * (b + c) + d)
        field = torus.to_field(modes)
        if not bool(torch.isfinite(field).all()):
            raise FloatingPointError(
                f"the flow is no longer finite by t={(frame + 1) * steps_a_frame * step:.3g} with "
                f"step={step} on {torus.size} points: halve the step"
            )
        yield field


def _forcing(torus: Torus, device: torch.device) -> torch.Tensor:
    """0.1 (sin 2 pi (x + y) + cos 2 pi (x + y)) at the grid points (s, s)."""
    line = torch.arange(torus.size, dtype=torus.dtype, device=device) / torus.size
    phase = 2 * math.pi * (line[:, None] + line[None, :])
    return 0.1 * (torch.sin(phase) + torch.cos(phase))


def random_vorticity(
    seed: int, indices: range, size: int, alpha: float = 2.5, tau: float = 7.0, modes: int = 32
) -> torch.Tensor:
    """Samples of N(0, tau^(2 alpha - 2) (-Laplace + tau^2)^(-alpha)), periodic, (n, size, size).

    float64 on the CPU. Sample i depends on (seed, i) alone: a Fourier sum over |k| < `modes` a
    dimension without the mean, so that it is the same function on every grid that resolves it.

    Source: initial conditions of Li et al. 2021 (alpha 2.5, tau 7).
    """
    kept = min(modes, size // 2)
    wave = np.arange(-modes + 1, modes)
    square = wave[:, None] ** 2 + wave[None, :] ** 2
    amplitude = tau ** (alpha - 1) * (4 * np.pi**2 * square + tau**2) ** (-alpha / 2)
    amplitude[modes - 1, modes - 1] = 0.0
    amplitude *= (np.abs(wave)[:, None] < kept) & (np.abs(wave)[None, :] < kept)
    place = wave % size
    out = np.empty((len(indices), size, size))
    for row, index in enumerate(indices):
        rng = np.random.default_rng([seed, index])
        draws = rng.standard_normal((2, *square.shape))
        full = np.zeros((size, size), dtype=np.complex128)
        # The real part of a sum with independent complex coefficients is the real field wanted:
        # each pair k, -k contributes variance amplitude(k)^2 each.
        np.add.at(full, np.ix_(place, place), (draws[0] + 1j * draws[1]) * amplitude)
        out[row] = np.fft.ifft2(full).real * size**2
    return torch.from_numpy(out)
