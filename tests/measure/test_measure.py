"""Measuring: against the twin and random-matrix theory, invariances, hostile input, many ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tempbalance import Farms, Hill, KSFit, LayerRecord, Outcome, PeakFit, WholeMatrix, analyze
from tempbalance.layers.find import find_layers
from tempbalance.measure.measurement import measure
from tempbalance.spectra.powerlaw import Fit
from tempbalance.spectra.windows import Windows


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return linear(torch.randn(*shape, dtype=dtype))


LARGEST = Farms()
HALF = Hill()


def alpha(model: nn.Module, windows: Windows = LARGEST, fit: Fit = HALF) -> float:
    (record,) = analyze(model, windows=windows, fit=fit, min_eigs=2).layers
    assert record.alpha is not None
    return record.alpha


def numbers(record: LayerRecord) -> list[float]:
    row = [getattr(record, field.name) for field in dataclasses.fields(record)]
    found = [x for x in row if isinstance(x, float)]
    return found + ([] if record.eigenvalues is None else record.eigenvalues.tolist())


# --- against the twin ----------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [Hill(), Hill(3), KSFit()], ids=str)
@pytest.mark.parametrize(
    "windows", [Farms(), Farms(2.0), Farms(0.5, rows=10), Farms(rows=12, stride=5), WholeMatrix()]
)
@pytest.mark.parametrize("pool", ["spectrum", "alpha"])
def test_agrees_with_the_slow_twin(
    fit: Fit, windows: Windows, pool: str, device: torch.device
) -> None:
    if isinstance(windows, Farms):
        windows = dataclasses.replace(windows, pool=pool)  # type: ignore[arg-type]
    elif pool == "alpha":
        pytest.skip("one fit either way")
    torch.manual_seed(1)
    model = nn.ModuleList(
        [
            nn.Linear(30, 70),
            nn.Linear(44, 44),
            nn.Conv2d(24, 16, 3),
            nn.ConvTranspose1d(16, 40, 2),
            nn.Conv1d(32, 32, 1, groups=2),
        ]
    )
    own = nn.Module()
    own.weight = nn.Parameter(torch.randn(12, 18, 3, 2, dtype=torch.complex64))
    model.append(own)
    model.to(device)

    def twin_windows(matrix: reference.Array) -> list[reference.Array]:
        if isinstance(windows, WholeMatrix):
            return [matrix]
        assert isinstance(windows, Farms)
        return reference.farms_windows(
            matrix, windows.aspect_ratio, windows.rows, windows.per_dim, windows.stride
        )

    def twin_fit(values: reference.Array) -> reference.Law:
        if isinstance(fit, Hill):
            return reference.hill(values, fit.xmin_pos)
        return reference.ks(values)

    report = analyze(model, windows=windows, fit=fit, min_eigs=2)
    for layer, record in zip(find_layers(model).layers, report, strict=True):
        slices = layer.read().cpu().numpy()
        expected, d, values = reference.measure(slices, twin_windows, twin_fit, pool)
        assert record.alpha == pytest.approx(expected, rel=2e-5)
        assert pytest.approx(d, rel=2e-4) == record.D
        assert record.n_eigs == len(values)
        assert record.lambda_max == pytest.approx(values[-1], rel=1e-5)
        # The norms are the weight's own, whatever the windows.
        top = np.linalg.svd(slices.astype(np.complex128), compute_uv=False).max()
        total = (np.abs(slices.astype(np.complex128)) ** 2).sum()
        assert record.spectral_norm == pytest.approx(top, rel=1e-5)
        assert record.frobenius_norm == pytest.approx(total**0.5, rel=1e-5)
        assert record.stable_rank == pytest.approx(total / top**2, rel=1e-5)
        assert record.log_norm == pytest.approx(math.log10(total), abs=1e-5)
        assert record.alpha_hat == pytest.approx(2 * expected * math.log10(top), abs=2e-4)
        assert record.eigenvalues is not None
        np.testing.assert_allclose(record.eigenvalues, values, rtol=1e-2, atol=1e-5 * values[-1])
        assert (np.diff(record.eigenvalues) >= 0).all()


def test_peak_fit_agrees_with_the_slow_twin() -> None:
    weight = torch.randn(300, 200, dtype=torch.float64)
    law = reference.peak(reference.eigenvalues([weight.numpy()]))
    assert alpha(linear(weight), WholeMatrix(), PeakFit()) == pytest.approx(law.alpha, rel=1e-5)


# --- against theory ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(512, 512), (512, 256), (512, 128), (1024, 64), (96, 1536)])
def test_marchenko_pastur(shape: tuple[int, int]) -> None:
    """A whole i.i.d. Gaussian matrix reads what the law says; the tail has k / 2 eigenvalues.

    Eigenvalues repel, so that the fluctuations are far below the (alpha - 1) / sqrt(k / 2) of a
    sample; 10% of alpha - 1 covers the finite size (the upper edge is rounded off).
    """
    expected = reference.marchenko_pastur_alpha(min(shape) / max(shape))
    got = [alpha(gaussian(*shape), WholeMatrix()) for _ in range(3)]
    assert float(np.mean(got)) - 1 == pytest.approx(expected - 1, rel=0.03 + 3 / min(shape))


def test_marchenko_pastur_integral() -> None:
    """Against the quadrature in lambda, and the values of a large sample."""
    q = 0.25
    low, high = (1 - q**0.5) ** 2, (1 + q**0.5) ** 2
    x = np.linspace(low, high, 2_000_001)[1:-1]
    density = np.sqrt((high - x) * (x - low)) / (2 * np.pi * q * x) * (x[1] - x[0])
    assert density.sum() == pytest.approx(1, abs=1e-6)
    median = x[np.searchsorted(np.cumsum(density), 0.5)]
    tail = x >= median
    expected = 1 + 0.5 / float((density * np.log(x / median))[tail].sum())
    assert reference.marchenko_pastur_alpha(q) == pytest.approx(expected, abs=1e-4)


def structureless() -> nn.ModuleList:
    """I.i.d. Gaussian layers from 2048 x 96 to 96 x 96, convolutions both ways among them."""
    model = nn.ModuleList(
        [
            nn.Linear(96, 2048),
            nn.Linear(96, 1024),
            nn.Linear(128, 512),
            nn.Linear(512, 512),
            nn.Linear(96, 96),
            nn.Linear(2048, 96),
            nn.Linear(300, 700),
            nn.Linear(97, 384),
            nn.Conv2d(96, 512, 3),
            nn.Conv2d(256, 96, 1),
            nn.Conv1d(384, 96, 5),
            nn.Conv3d(96, 96, 2),
            nn.Conv2d(384, 384, 3, groups=4),
            nn.ConvTranspose2d(512, 96, 2),
            nn.ConvTranspose1d(96, 768, 4),
        ]
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("seed", range(2))
def test_farms_does_not_rank_shapes(seed: int) -> None:
    torch.manual_seed(seed)
    model = structureless()

    def spread(windows: Windows) -> float:
        alphas = [record.alpha or math.nan for record in analyze(model, windows=windows)]
        return max(alphas) - min(alphas)

    assert spread(WholeMatrix()) > 3
    assert spread(Farms()) < 0.25
    assert spread(Farms(rows=64)) < 0.12
    assert spread(Farms(0.5)) < 0.25
    assert spread(Farms(2.0)) < 0.25


def test_heavier_tails_read_lower() -> None:
    """The size of alpha means what it should: the heavier the tail of the spectrum, the lower."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(200, 200)).Q for _ in range(2))
    index = torch.arange(1, 201, dtype=torch.float32)
    alphas = [alpha(linear(u * index**-p @ v), WholeMatrix()) for p in (0.25, 0.5, 1.0)]
    assert alphas == sorted(alphas, reverse=True)
    # lambda_i ~ i^-2p is a power law of exponent 1 + 1 / 2p, up to the discrete sum.
    assert alphas[2] == pytest.approx(1.5, abs=0.05)


# --- invariances ---------------------------------------------------------------------------------

windows_of_any_kind = st.one_of(
    st.just(WholeMatrix()),
    st.builds(
        Farms,
        aspect_ratio=st.sampled_from([1.0, 0.5, 2.0, 1.5]),
        rows=st.none() | st.integers(4, 20),
        per_dim=st.none() | st.integers(1, 4),
        pool=st.sampled_from(["spectrum", "alpha"]),
    ),
)
shapes = st.tuples(st.integers(8, 48), st.integers(8, 48))


@given(shape=shapes, windows=windows_of_any_kind, exponent=st.integers(-115, 115))
def test_scaling(shape: tuple[int, int], windows: Windows, exponent: int) -> None:
    weight = torch.randn(*shape)
    factor = 1.37 * 2.0**exponent
    plain, scaled = (
        analyze(linear(w), windows=windows, min_eigs=2).layers[0] for w in (weight, weight * factor)
    )
    assert scaled.outcome is plain.outcome
    if plain.alpha is None:
        return
    assert scaled.alpha == pytest.approx(plain.alpha, rel=1e-4)
    assert pytest.approx(plain.D, rel=1e-3, abs=1e-6) == scaled.D
    assert scaled.stable_rank == pytest.approx(plain.stable_rank, rel=1e-5)
    assert plain.spectral_norm is not None
    assert scaled.spectral_norm == pytest.approx(plain.spectral_norm * factor, rel=1e-5)


@given(shape=shapes, windows=windows_of_any_kind)
def test_transposing(shape: tuple[int, int], windows: Windows) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    plain, turned = (
        analyze(linear(w), windows=windows, min_eigs=2).layers[0] for w in (weight, weight.T)
    )
    assert turned.outcome is plain.outcome
    assert turned.n_eigs == plain.n_eigs
    if plain.alpha is not None:
        assert turned.alpha == pytest.approx(plain.alpha, rel=1e-4)


@given(shape=shapes, seed=st.integers(0, 999))
def test_permutations_and_rotations_of_the_whole_matrix(shape: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, dtype=torch.float64, generator=generator)
    u, v = (
        torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
        for n in shape
    )
    rows, cols = (torch.randperm(n, generator=generator) for n in shape)
    expected = alpha(linear(weight), WholeMatrix())
    for other in (weight[rows], weight[:, cols], u @ weight, weight @ v, u @ weight @ v):
        assert alpha(linear(other), WholeMatrix()) == pytest.approx(expected, rel=1e-4)


@given(groups=st.sampled_from([2, 3, 6]), windows=windows_of_any_kind, transposed=st.booleans())
def test_channel_groups_are_slices_of_their_own(
    groups: int, windows: Windows, transposed: bool
) -> None:
    """A grouped convolution has the spectra of the convolutions that it stands for."""
    kind: Callable[..., nn.Conv2d | nn.ConvTranspose2d]
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    grouped = kind(36, 48, 2, groups=groups, bias=False)
    parts = nn.ModuleList(kind(36 // groups, 48 // groups, 2, bias=False) for _ in range(groups))
    for part, weight in zip(parts, grouped.weight.chunk(groups), strict=True):
        part.weight.data = weight.detach()
    whole = analyze(grouped, windows=windows, min_eigs=2).layers[0]
    apart = analyze(parts, windows=windows, min_eigs=2)
    assert whole.eigenvalues is not None
    parts_of = [record.eigenvalues for record in apart if record.eigenvalues is not None]
    pooled = np.sort(np.concatenate(parts_of))
    np.testing.assert_allclose(whole.eigenvalues, pooled, rtol=1e-3, atol=1e-5 * pooled[-1])


# --- bad input ----------------------------------------------------------------------------------


def filled(value: float, *shape: int) -> nn.Linear:
    return linear(torch.full(shape, value))


def with_entry(value: float) -> nn.Linear:
    layer = gaussian(64, 200)
    with torch.no_grad():
        layer.weight[3, 190] = value  # in one window only
    return layer


def conv_with_dead_slices() -> nn.Conv2d:
    conv = nn.Conv2d(32, 32, 3)
    with torch.no_grad():
        conv.weight[:, :, 0] = 0
    return conv


def noise(scale: float, double: bool = False) -> nn.Linear:
    return linear(torch.randn(40, 40, dtype=torch.float64 if double else torch.float32) * scale)


def product(rank: int) -> nn.Linear:
    return linear(torch.randn(64, rank) @ torch.randn(rank, 64))


def one_entry() -> nn.Linear:
    weight = torch.zeros(20, 20)
    weight[2, 3] = 1.0
    return linear(weight)


O = Outcome  # noqa: E741
HOSTILE: list[tuple[str, Callable[[], nn.Module], set[Outcome]]] = [
    ("nan", lambda: with_entry(math.nan), {O.NON_FINITE}),
    ("inf", lambda: with_entry(-math.inf), {O.NON_FINITE}),
    ("all nan", lambda: filled(math.nan, 20, 20), {O.NON_FINITE}),
    ("zero", lambda: filled(0.0, 20, 30), {O.ALL_ZERO}),
    ("negative zero", lambda: filled(-0.0, 20, 30), {O.ALL_ZERO}),
    ("constant", lambda: filled(3.0, 20, 20), {O.TOO_FEW_EIGENVALUES}),
    ("one entry", one_entry, {O.TOO_FEW_EIGENVALUES}),
    ("identity", lambda: linear(torch.eye(40)), {O.NO_SPREAD}),
    ("scaled identity", lambda: linear(1e-30 * torch.eye(40)), {O.NO_SPREAD}),
    ("rotation", lambda: linear(torch.linalg.qr(torch.randn(300, 300)).Q), {O.NO_SPREAD}),
    ("rank 20", lambda: product(20), {O.RANK_DEFICIENT}),
    ("rank 3", lambda: product(3), {O.TOO_FEW_EIGENVALUES}),
    ("dead slices", conv_with_dead_slices, {O.RANK_DEFICIENT}),
    ("two eigenvalues", lambda: gaussian(2, 50), {O.TOO_SMALL}),
    ("2 x 2", lambda: gaussian(2, 2), {O.TOO_SMALL}),
    ("long", lambda: gaussian(100_000, 4), {O.TOO_SMALL}),
    ("long and wide enough", lambda: gaussian(20_000, 12), {O.OK}),
    ("denormal", lambda: linear(torch.randint(-3, 4, (40, 40)) * 2.0**-149), {O.OK}),
    ("tiny", lambda: noise(1e-36), {O.OK}),
    ("huge", lambda: noise(5e37), {O.OK}),
    ("tiny float64", lambda: noise(1e-300, double=True), {O.OK}),
    ("denormal float64", lambda: noise(1e-311, double=True), {O.OK}),
    ("huge float64", lambda: noise(1e300, double=True), {O.OK}),
    ("beyond float32", lambda: noise(1e45, double=True), {O.OK}),
    ("float16", lambda: gaussian(40, 40, dtype=torch.float16), {O.OK}),
    ("float8", lambda: linear(torch.randn(40, 40).to(torch.float8_e4m3fn)), {O.OK}),
    ("wild columns", lambda: linear(torch.randn(60, 60) * torch.logspace(-30, 5, 60)),
     {O.TOO_FEW_EIGENVALUES, O.RANK_DEFICIENT}),
    ("one huge entry", lambda: with_entry(1e30),
     {O.OK, O.RANK_DEFICIENT, O.TOO_FEW_EIGENVALUES}),
    ("Cauchy", lambda: linear(torch.randn(64, 64) / torch.randn(64, 64)), {O.OK}),
    ("sparse", lambda: linear(torch.randn(64, 64) * (torch.rand(64, 64) < 0.02)),
     {O.RANK_DEFICIENT}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "outcomes"), HOSTILE, ids=[row[0] for row in HOSTILE])
@pytest.mark.parametrize(
    ("windows", "fit"),
    [
        (Farms(), Hill()),
        (Farms(pool="alpha"), KSFit()),
        (WholeMatrix(), PeakFit()),
        (WholeMatrix(), KSFit()),
    ],
    ids=str,
)
def test_hostile_weights_have_an_outcome_and_no_inf_or_nan(
    name: str,
    make: Callable[[], nn.Module],
    outcomes: set[Outcome],
    windows: Windows,
    fit: Fit,
    device: torch.device,
) -> None:
    if fit != Hill() and name.startswith("long"):
        pytest.skip("a search over thousands of eigenvalues: slow, and nothing new")
    model = nn.ModuleDict({"bad": make(), "good": nn.Linear(64, 64)}).to(device)
    alone = analyze(model["good"], windows=windows, fit=fit).layers[0]
    report = analyze(model, windows=windows, fit=fit)
    bad, good = report
    assert all(map(math.isfinite, numbers(bad)))
    assert good.alpha == pytest.approx(alone.alpha, rel=1e-6)  # the neighbour does not notice
    assert good.outcome is Outcome.OK
    if isinstance(windows, WholeMatrix) or name not in ("rotation", "identity", "scaled identity"):
        assert bad.outcome in outcomes
    assert (bad.alpha is not None) == bad.outcome.measured
    if bad.alpha is not None:
        assert bad.alpha > 1
    if bad.outcome is not Outcome.OK:
        assert "'bad'" in bad.message
        assert " x ".join(map(str, bad.shape)) in bad.message
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_cure_works() -> None:
    layer = gaussian(6, 50)
    assert analyze(layer, windows=WholeMatrix()).layers[0].outcome is Outcome.TOO_SMALL
    assert analyze(layer, windows=WholeMatrix(), min_eigs=6).layers[0].outcome is Outcome.OK


def test_dead_blocks_do_not_enter_a_mean_over_positions() -> None:
    weight = torch.randn(120, 40)
    whole = [alpha(linear(part)) for part in weight.split(40)]
    weight[40:80] = 0
    record = analyze(linear(weight), windows=Farms(pool="alpha")).layers[0]
    assert record.outcome is Outcome.RANK_DEFICIENT
    assert record.alpha == pytest.approx((whole[0] + whole[2]) / 2, rel=1e-5)


def test_positions_of_very_different_scale_are_each_exact() -> None:
    """float32 must suffice for every position's own fit, not for their mean."""
    torch.manual_seed(0)
    index = torch.arange(1.0, 41.0, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(2, 40, 40, dtype=torch.float64)).Q
    steep = q[0] * index**-2 @ q[1]  # eigenvalues down to 4e-7 of the largest, none lost
    weight = torch.cat([1e3 * torch.randn(40, 40, dtype=torch.float64), steep]).float()
    expected = np.mean(
        [reference.hill(reference.eigenvalues([w.numpy()])).alpha for w in weight.split(40)]
    )
    assert alpha(linear(weight), Farms(pool="alpha")) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("in_float64_too", [False, True])
def test_a_window_that_does_not_converge(
    monkeypatch: pytest.MonkeyPatch, in_float64_too: bool, device: torch.device
) -> None:
    """LAPACK gives up for a whole batch; it is redone window by window, then in float64."""
    solve = torch.linalg.eigvalsh
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(30, 90), nn.Linear(40, 40)]).to(device)
    expected = analyze(model)
    marked = find_layers(model).layers[0].read()[0, 30:60]
    trace = float(marked.double().square().sum())

    def fails(gram: Tensor, UPLO: str = "L") -> Tensor:
        traces = gram.diagonal(dim1=-2, dim2=-1).double().sum(-1)
        scale = torch.exp2(torch.round(torch.log2(traces / trace) / 2) * 2)
        hit = (traces / scale / trace - 1).abs() < 1e-6
        if gram.shape[-1] == 30 and hit.any() and (in_float64_too or gram.dtype == torch.float32):
            raise torch.linalg.LinAlgError("did not converge")
        return solve(gram, UPLO=UPLO)

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    first, second = analyze(model)
    assert second.alpha == pytest.approx(expected["1"].alpha, rel=1e-6)
    assert all(map(math.isfinite, numbers(first)))
    if in_float64_too:
        assert first.outcome is Outcome.NOT_CONVERGED
        assert first.alpha is None
    else:
        assert first.alpha == pytest.approx(expected["0"].alpha, rel=1e-5)


def test_records_are_frozen() -> None:
    record = analyze(gaussian(20, 20)).layers[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.alpha = 1.0  # type: ignore[misc]


# --- what a measurement leaves as it was ---------------------------------------------------------


def test_weights_gradients_and_modes_are_untouched(device: torch.device) -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.Linear(40, 30),
        nn.utils.parametrizations.spectral_norm(nn.Linear(30, 20)),
        nn.utils.parametrizations.weight_norm(nn.Linear(20, 12)),
    ).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    for windows in (Farms(), Farms(rows=4, stride=1), WholeMatrix()):
        analyze(model, windows=windows)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("setting", ["dtype", "device", "inference", "deterministic", "grad"])
def test_settings_of_the_user_change_nothing(setting: str) -> None:
    model = nn.Sequential(nn.Linear(300, 256), nn.Conv2d(64, 64, 3))
    windows = Farms(rows=8)
    expected = [record.alpha for record in analyze(model, windows=windows)]
    try:
        if setting == "dtype":
            torch.set_default_dtype(torch.float64)
        elif setting == "deterministic":
            torch.use_deterministic_algorithms(True)
        # (torch 2.4 does not forget a default device that was taken back.)
        device = torch.device("meta") if setting == "device" else contextlib.nullcontext()
        with device, torch.inference_mode(setting == "inference"):
            got = [record.alpha for record in analyze(model, windows=windows)]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert got == expected
    assert torch.is_grad_enabled()


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(40, 40)
    assert analyze(model).layers[0].outcome is Outcome.OK


def test_a_healthy_trained_network_is_measured_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look is rare: under a tenth of the windows, those of trained layers included."""
    datasets = pytest.importorskip("sklearn.datasets")
    from tempbalance.measure import engine as module

    redone = 0
    original = module.spectra_float64

    def count(tasks: list[tuple[object, object, Tensor]], *rest: object) -> list[Tensor]:
        nonlocal redone
        redone += sum(int(mask.sum()) for _, _, mask in tasks)
        return original(tasks, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "spectra_float64", count)
    x, y = datasets.load_digits(return_X_y=True)
    inputs, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(150):
        batch = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2
    windows = 0
    for strategy in (Farms(), Farms(rows=32), WholeMatrix()):
        for record in analyze(model, windows=strategy):
            assert record.outcome is Outcome.OK
            windows += strategy.grid(*record.shape[1:]).positions
    assert redone < windows / 10


@pytest.mark.parametrize("budget", [1, 10_000, 1_000_000])
def test_the_budget_changes_no_number(budget: int) -> None:
    model = nn.ModuleList(
        [nn.Linear(90, 60), nn.Conv2d(32, 20, 3), nn.Conv2d(64, 64, 3, groups=4), gaussian(60, 12)]
    )
    for windows in (Farms(), Farms(rows=8, stride=6, pool="alpha")):
        expected = analyze(model, windows=windows)
        for record, other in zip(
            expected, analyze(model, windows=windows, budget=budget), strict=True
        ):
            assert other.alpha == pytest.approx(record.alpha, rel=1e-6)
            assert other.n_eigs == record.n_eigs


def test_repeating_gives_the_same_bits() -> None:
    model = structureless()
    first, second = (analyze(model).to_dict() for _ in range(2))
    assert first == second


def test_progress_adds_up_to_one() -> None:
    done: list[float] = []
    analyze(structureless(), progress=done.append)
    assert sum(done) == pytest.approx(1, abs=1e-6)
    done.clear()
    copied = nn.utils.parametrizations.weight_norm(nn.Linear(40, 40))  # a batch of its own
    analyze(nn.Sequential(copied, nn.Linear(30, 30)), budget=1, progress=done.append)
    assert sum(done) == pytest.approx(1, abs=1e-6)


# --- processes ---------------------------------------------------------------------------------


def script(tmp_path: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "worker.py"
    file.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, str(file), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """5,041 windows of 64 KiB are 315 MiB; 96 MiB are enough, and 32 MiB for Python's heap."""
    result = script(
        tmp_path,
        """
        import resource, torch, tempbalance
        from torch import nn
        model = nn.Linear(1536, 1536)
        tempbalance.analyze(nn.Linear(256, 256))  # libraries and threads are not the measurement's
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tempbalance.analyze(
            model, windows=tempbalance.Farms(rows=128, stride=20), budget=96 * 2**20
        )
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        """,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 96 + 32


def test_a_single_rank_measures_all() -> None:
    layers = find_layers(structureless()).layers
    assert all(record.outcome is Outcome.OK for record in measure(layers))
