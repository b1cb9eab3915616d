"""Windows: fixed shape, inside the matrix, all of it covered, the weight never written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempbalance import Farms, WholeMatrix
from tempbalance.spectra.windows import Windows

sizes = st.integers(2, 60)
ratios = st.sampled_from([1.0, 0.5, 2.0, 0.75, 1.25, 1.5, 3 / 7, 7 / 3, 0.1, 10.0])
farms = st.builds(
    Farms,
    aspect_ratio=ratios,
    rows=st.none() | st.integers(1, 40),
    per_dim=st.none() | st.integers(1, 12),
)
strided = st.builds(
    Farms, aspect_ratio=ratios, rows=st.none() | st.integers(1, 40), stride=st.integers(1, 30)
)


def numbered(rows: int, cols: int) -> torch.Tensor:
    return torch.arange(rows * cols, dtype=torch.float64).reshape(1, rows, cols)


@given(windows=farms | strided, rows=sizes, cols=sizes)
def test_agrees_with_the_slow_twin(windows: Farms, rows: int, cols: int) -> None:
    matrix = numbered(rows, cols)
    got = windows.grid(rows, cols).gather(matrix)[:, 0].numpy()
    expected = reference.farms_windows(
        matrix[0].numpy(), windows.aspect_ratio, windows.rows, windows.per_dim, windows.stride
    )
    np.testing.assert_array_equal(got, np.stack(expected))


@given(windows=farms | strided, rows=sizes, cols=sizes)
def test_shape_and_transpose(windows: Farms, rows: int, cols: int) -> None:
    grid = windows.grid(rows, cols)
    long, short = max(rows, cols), min(rows, cols)
    assert 1 <= grid.height <= long
    assert 1 <= grid.width <= short
    assert windows.rows is None or grid.height <= windows.rows
    # The shape is that of the aspect ratio, to the rounding of its smaller side.
    q = windows.aspect_ratio
    exact = min(long, short / q, windows.rows or math.inf)
    assert exact - 1 < grid.height <= max(1, exact + 1e-9)
    assert exact * q - 1 < grid.width <= max(1, exact * q + 1e-9)
    turned = windows.grid(cols, rows)
    assert (turned.height, turned.width) == (grid.height, grid.width)
    assert (turned.row_starts, turned.col_starts) == (grid.row_starts, grid.col_starts)


@given(
    q=ratios,
    height=st.none() | st.integers(1, 40),
    rows=sizes,
    cols=sizes,
)
def test_default_covers_everything_and_no_more_than_needed(
    q: float, height: int | None, rows: int, cols: int
) -> None:
    grid = Farms(q, height).grid(rows, cols)
    matrix = numbered(rows, cols)
    assert set(grid.gather(matrix).flatten().tolist()) == set(range(rows * cols))
    long, short = max(rows, cols), min(rows, cols)
    fewest = math.ceil(long / grid.height) * math.ceil(short / grid.width)
    assert grid.positions == fewest * (2 if grid.both else 1)


@given(windows=farms | strided, rows=sizes, cols=sizes, data=st.data())
def test_any_run_of_windows_is_a_part_of_all(
    windows: Farms, rows: int, cols: int, data: st.DataObject
) -> None:
    grid = windows.grid(rows, cols)
    slices = torch.randn(3, rows, cols)
    whole = grid.gather(slices)
    assert whole.shape == (grid.positions, 3, grid.height, grid.width)
    start = data.draw(st.integers(0, grid.positions - 1))
    stop = data.draw(st.integers(start + 1, grid.positions))
    assert torch.equal(grid.gather(slices, start, stop), whole[start:stop])


def test_many_windows_are_gathered_as_few_are(device: torch.device) -> None:
    """More than the number that is stacked from views take the other path."""
    slices = torch.randn(2, 50, 40, device=device)
    grid = Farms(rows=8, stride=1).grid(50, 40)
    whole = grid.gather(slices)
    assert grid.positions == 43 * 33
    singles = [grid.gather(slices, i, i + 1) for i in range(0, grid.positions, 97)]
    assert torch.equal(whole[::97], torch.cat(singles))


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (Farms(), ((30, 30), (0, 23, 46, 70), (0,))),
        (Farms(per_dim=3), ((30, 30), (0, 35, 70), (0,))),
        (Farms(rows=20), ((20, 20), (0, 20, 40, 60, 80), (0, 10))),
        (Farms(2.0), ((15, 30), (0, 14, 28, 42, 56, 70, 85), (0,))),
        (Farms(0.5), ((60, 30), (0, 40), (0,))),
        (Farms(3 / 10), ((100, 30), (0,), (0,))),
        (Farms(rows=20, stride=40), ((20, 20), (0, 40, 80), (0, 10))),
        (Farms.released_conv(1.0), ((30, 30), (0, 30, 60), (0,))),
        (Farms.released_conv(2.0), ((15, 30), (0, 15, 30), (0,))),
        (Farms.released_conv(0.5), ((30, 15), (0, 30, 60), (0,))),
        (Farms.released_linear(20, 1.0, per_dim=3), ((20, 20), (0, 40, 80), (0, 5, 10))),
        (Farms.released_linear(20, 1.0, stride=30), ((20, 20), (0, 30, 60), (0,))),
        (Farms.released_linear(64, 0.5, stride=30), ((60, 30), (0, 30), (0,))),
        (WholeMatrix(), ((100, 30), (0,), (0,))),
    ],
)
def test_by_hand(windows: Windows, expected: tuple[tuple[int, ...], ...]) -> None:
    grid = windows.grid(100, 30)
    assert ((grid.height, grid.width), grid.row_starts, grid.col_starts) == expected


@pytest.mark.parametrize("q", [0.5, 0.75, 1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("shape", [(100, 30), (30, 100), (64, 64)])
def test_released_conv_agrees_with_its_twin(q: float, shape: tuple[int, int]) -> None:
    matrix = numbered(*shape)
    got = Farms.released_conv(q).grid(*shape).gather(matrix)[:, 0].numpy()
    np.testing.assert_array_equal(
        got, np.stack(reference.released_conv_windows(matrix[0].numpy(), q))
    )


@pytest.mark.parametrize(("per_dim", "stride"), [(9, None), (2, None), (None, 7), (None, 90)])
def test_released_linear_agrees_with_its_twin(per_dim: int | None, stride: int | None) -> None:
    matrix = numbered(90, 70)
    got = Farms.released_linear(24, 1.5, per_dim, stride).grid(90, 70).gather(matrix)[:, 0]
    expected = reference.released_linear_windows(matrix[0].numpy(), 24, 1.5, per_dim, stride)
    np.testing.assert_array_equal(got.numpy(), np.stack(expected))


def test_a_window_is_not_lost_to_rounding() -> None:
    assert 5 / (5 / 29) < 29  # in floating point
    assert Farms(5 / 29).grid(40, 5).height == 29


def test_square_slices_are_seen_from_both_sides() -> None:
    matrix = numbered(12, 12)
    windows = Farms(0.5)
    one, other = (windows.grid(12, 12).gather(m) for m in (matrix, matrix.mT))
    assert sorted(map(str, one.tolist())) == sorted(map(str, other.tolist()))
    assert windows.grid(12, 12).positions == 2 * 2


def test_a_single_window_is_a_view() -> None:
    slices = torch.randn(2, 30, 30)
    assert Farms().grid(30, 30).gather(slices).data_ptr() == slices.data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Farms(0.0),
        lambda: Farms(-1.0),
        lambda: Farms(math.nan),
        lambda: Farms(math.inf),
        lambda: Farms(rows=0),
        lambda: Farms(rows=2.5),  # type: ignore[arg-type]
        lambda: Farms(per_dim=0),
        lambda: Farms(stride=-1),
        lambda: Farms(per_dim=3, stride=3),
        lambda: Farms(pool="mean"),  # type: ignore[arg-type]
        lambda: Farms.released_conv(0.0),
        lambda: Farms.released_linear(0, 1.0, stride=1),
        lambda: Farms.released_linear(8, 1.0),
        lambda: Farms.released_linear(8, 1.0, per_dim=2, stride=2),
    ],
)
def test_misuse_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match="must be|not both|give per_dim"):
        make()  # type: ignore[operator]


def test_bool_is_not_a_count() -> None:
    with pytest.raises(ValueError, match="rows"):
        Farms(rows=True)
