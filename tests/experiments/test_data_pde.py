"""PDE data: normalisers, the Darcy file, PDEBench's layouts."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data.darcy import DarcyNpz
from experiments.data.normalizer import Normalizer
from experiments.data.pdebench import PDEBench

h5py = pytest.importorskip("h5py")
DATA = os.environ.get("TEMPBALANCE_DATA")


# Normaliser


@pytest.mark.parametrize("pixelwise", [False, True])
def test_normalizer_round_trip_and_moments(pixelwise):
    torch.manual_seed(0)
    fields = torch.randn(50, 2, 6, 5) * torch.tensor([3.0, 0.01]).reshape(2, 1, 1) + 7
    norm = Normalizer.fit(fields, pixelwise)
    assert norm.mean.shape == ((2, 6, 5) if pixelwise else (2, 1, 1))
    out = norm.encode(fields)
    dims = [0] if pixelwise else [0, 2, 3]
    torch.testing.assert_close(out.mean(dims), torch.zeros_like(out.mean(dims)), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.std(dims), torch.ones_like(out.std(dims)), atol=1e-3, rtol=0)
    torch.testing.assert_close(norm.decode(out), fields)
    # Over time too: (B, T, C, *grid).
    stacked = torch.stack([fields, fields], dim=1)
    assert torch.equal(norm.encode(stacked)[:, 1], out)


def test_normalizer_per_point_on_a_finer_grid():
    coarse = (torch.arange(4) + 0.5) / 4
    norm = Normalizer.of(coarse.expand(1, 4, 4), torch.full((1, 4, 4), 2.0))
    fine = (torch.arange(8) + 0.5) / 8
    got = norm.decode(torch.zeros(1, 1, 8, 8))[0, 0, 3]
    # Linear in between, constant outside the outermost centres.
    torch.testing.assert_close(got[1:-1], fine[1:-1])


def test_normalizer_of_a_constant_and_of_too_few():
    norm = Normalizer.fit(torch.full((4, 1, 3), 5.0))
    assert norm.encode(torch.full((1, 1, 3), 5.0)).abs().max() == 0
    with pytest.raises(ValueError, match="1 samples are too few"):
        Normalizer.fit(torch.zeros(1, 1, 3), pixelwise=True)


# Darcy file


def write_darcy(folder, n=20, **replaced):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count, size in (("train", n, 16), ("test", 4, 16), ("test_32", 5, 32)):
        arrays[f"x_{part}"] = rng.integers(0, 2, (count, size, size)).astype(bool)
        arrays[f"y_{part}"] = rng.normal(3, 2, (count, size, size)).astype(np.float32)
    arrays |= replaced
    np.savez(folder / "darcy.npz", **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def test_darcy_npz(tmp_path):
    arrays = write_darcy(tmp_path)
    data = DarcyNpz(str(tmp_path), val_fraction=0.25, batch_size=8, share=0.4)
    data.setup()
    assert data.test_names == ("test_16", "test_32")
    assert [data.size_of(p) for p in ("train", "val", "test_16", "test_32")] == [6, 5, 4, 5]
    sizes = [next(iter(loader))[0].shape for loader in data.test_dataloader()]
    assert sizes == [(4, 1, 16, 16), (5, 1, 32, 32)]
    x, y = next(iter(data.test_dataloader()[1]))
    assert np.array_equal(x[:, 0].numpy(), arrays["x_test_32"].astype(np.float32))
    back = data.normalizer.decode(y)[:, 0].numpy()
    np.testing.assert_allclose(back, arrays["y_test_32"], rtol=1e-5, atol=1e-5)
    # Statistics come from the training samples that are used, and from no other.
    used = torch.cat([data.normalizer.decode(b[1]) for b in data.train_dataloader()])
    assert data.normalizer.mean.item() == pytest.approx(used.mean().item(), rel=1e-5)
    rows = {row.tobytes() for row in used[:, 0].numpy().round(3)}
    assert rows < {row.tobytes() for row in arrays["y_train"].round(3)}


def test_darcy_as_neuraloperator_downloads_it(tmp_path):
    """Its own reader and ours find the same fields in the files."""
    datasets = pytest.importorskip("neuralop.data.datasets")
    arrays = write_darcy(tmp_path)
    for part, name in (("train", "train_16"), ("test", "test_16"), ("test_32", "test_32")):
        pair = {k: torch.from_numpy(arrays[f"{k}_{part}"]) for k in ("x", "y")}
        torch.save(pair, tmp_path / f"darcy_{name}.pt")
    npz = DarcyNpz(str(tmp_path))
    npz.setup()
    (tmp_path / "darcy.npz").unlink()
    data = DarcyNpz(str(tmp_path))
    data.setup()
    theirs = datasets.DarcyDataset(
        tmp_path, 20, [4, 5], 8, [4, 5], 16, encode_output=False, download=False
    )
    for i, name in enumerate(data.test_names):
        x, y = next(iter(data.test_dataloader()[i]))
        their = theirs.test_dbs[int(name.split("_")[1])][:]
        assert x.equal(their["x"])
        torch.testing.assert_close(data.normalizer.decode(y), their["y"])
    for a, b in zip(data.train_dataloader(), npz.train_dataloader(), strict=True):
        assert a[0].equal(b[0]) and a[1].equal(b[1])
    (tmp_path / "darcy_test_32.pt").unlink()
    data = DarcyNpz(str(tmp_path))
    data.setup()
    assert data.test_names == ("test_16",)


def test_darcy_npz_encodings(tmp_path):
    write_darcy(tmp_path)
    data = DarcyNpz(str(tmp_path), encode_input=True, pixelwise=True)
    data.setup()
    assert data.normalizer.mean.shape == data.input_normalizer.std.shape == (1, 16, 16)
    x, y = next(iter(data.train_dataloader()))
    assert abs(x.mean()) < 1e-5
    assert y.std(0).mean() == pytest.approx(1, abs=1e-3)
    x32, _ = next(iter(data.test_dataloader()[1]))
    assert x32.shape[-1] == 32
    plain = DarcyNpz(str(tmp_path), encode_output=False)
    plain.setup()
    assert plain.normalizer.decode(y).equal(y)


def test_darcy_npz_errors(tmp_path):
    data = DarcyNpz(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"(?s)Zenodo record 12784353.*neuralop.*data.root"):
        data.setup()
    with pytest.raises(RuntimeError, match=r"call setup\(\)"):
        _ = data.normalizer
    write_darcy(tmp_path, x_test=None)
    with pytest.raises(ValueError, match="has no x_test; it holds x_test_32"):
        data.setup()
    write_darcy(tmp_path, y_train=np.zeros((3, 16, 16)))
    with pytest.raises(ValueError, match=r"y_train \(3, 16, 16\) must be equal"):
        data.setup()
    path = tmp_path / "darcy.npz"
    write_darcy(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="truncated or no npz"):
        data.setup()
    write_darcy(tmp_path)
    with pytest.raises(ValueError, match=r"share=0.01 of 18"):
        DarcyNpz(str(tmp_path), share=0.01).setup()


@pytest.mark.skipif(DATA is None, reason="TEMPBALANCE_DATA names no folder with darcy/darcy.npz")
def test_real_darcy():
    root = Path(DATA) / "darcy"
    if not (root / "darcy.npz").exists():
        pytest.skip(f"no darcy.npz in {root}")
    data = DarcyNpz(str(root), share=0.025)
    data.setup()
    sizes = [data.size_of(p) for p in ("train", "val", "test_16", "test_32")]
    assert sizes == [round(0.025 * 900), 100, 50, 50]
    for loader in data.test_dataloader():
        for x, y in loader:
            assert set(x.unique().tolist()) == {0.0, 1.0}
            # Pressure is 0 on the boundary that the grid includes, high inside.
            field = data.normalizer.decode(y)[:, 0]
            assert field[:, 0].abs().mean() < 0.02
            size = field.shape[-1]
            assert field[:, size // 4 : -size // 4, size // 4 : -size // 4].mean() > 0.4


# PDEBench


def write_flow(path, n=20, frames=21, grid=(8,), seed=0):
    rng = np.random.default_rng(seed)
    names = ["density", "pressure", "Vx", "Vy"][: 2 + len(grid)]
    arrays = {
        name: (10.0**k * rng.normal(size=(n, frames, *grid)) + 5 * 10**k).astype(np.float32)
        for k, name in enumerate(names)
    }
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        file["x-coordinate"] = np.linspace(0, 1, grid[0], dtype=np.float32)
        file["t-coordinate"] = np.linspace(0, 1, frames + 1, dtype=np.float32)
        file.attrs["eta"] = 0.01
    return np.stack(list(arrays.values()), axis=2)  # (N, T, C, *grid)


@pytest.mark.parametrize(("grid", "every"), [((8,), 2), ((8, 8), 2), ((8, 6), 1), ((8,), 3)])
def test_flow_windows(tmp_path, grid, every):
    truth = write_flow(tmp_path / "f.hdf5", grid=grid, frames=23)
    data = PDEBench(
        str(tmp_path), "f.hdf5", reduced_resolution=every, initial_step=4, t_train=11,
        reduced_resolution_t=2, val_fraction=0.0, batch_size=5,
    )  # fmt: skip
    data.setup()
    fields = 2 + len(grid)
    assert data.autoregressive
    assert (data.dim, data.in_channels, data.out_channels) == (len(grid), 4 * fields, fields)
    assert (data.rollout_steps, data.size_of("test"), data.size_of("train")) == (7, 2, 18)
    spatial = (slice(None, None, every),) * len(grid)
    wanted = truth[(slice(None), slice(0, 22, 2), slice(None), *spatial)]
    x, y = next(iter(data.test_dataloader()[0]))
    small = tuple(-(-size // every) for size in grid)
    assert x.shape == (2, 4 * fields, *small)
    assert y.shape == (2, 7, fields, *small)
    # The first tenth is the test set.
    first = data.normalizer.decode(x.unflatten(1, (4, fields)))
    np.testing.assert_allclose(first.numpy(), wanted[:2, :4], rtol=1e-4)
    np.testing.assert_allclose(data.normalizer.decode(y).numpy(), wanted[:2, 4:], rtol=1e-4)
    axes = (0, 1, *range(3, wanted.ndim))
    np.testing.assert_allclose(
        data.normalizer.mean.flatten().numpy(), wanted[2:].mean(axes), rtol=1e-4
    )
    np.testing.assert_allclose(
        data.normalizer.std.flatten().numpy(), wanted[2:].astype(np.float64).std(axes), rtol=1e-3
    )


def test_flow_lazily_in_workers_and_in_memory(tmp_path):
    write_flow(tmp_path / "f.hdf5", n=40)

    def batches(**options):
        data = PDEBench(str(tmp_path), "f.hdf5", share=0.5, batch_size=6, seed=4, **options)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)
        return data, list(loader)

    data, plain = batches()
    pickle.dumps(data.parts.train)  # an open h5py file could not be
    assert [len(b[0]) for b in plain] == [6, 6, 4]
    for options in ({"num_workers": 2}, {"in_memory": True}):
        _, other = batches(**options)
        for (x, y), (x2, y2) in zip(plain, other, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


def test_statistics_of_a_field_that_hardly_varies(tmp_path):
    with h5py.File(tmp_path / "f.hdf5", "w") as file:
        values = 1e4 + np.tile(np.array([0.5, -0.5], dtype=np.float32), (20, 21, 4))
        for name in ("density", "pressure", "Vx"):
            file[name] = values
    data = PDEBench(str(tmp_path), "f.hdf5")
    data.setup()
    # Half a unit each way, Bessel's factor aside.
    assert data.normalizer.std.flatten().tolist() == pytest.approx([0.5] * 3, rel=1e-3)


def test_darcy_layout(tmp_path):
    rng = np.random.default_rng(0)
    nu, u = rng.uniform(0.1, 1, (30, 8, 8)), rng.normal(2, 3, (30, 1, 8, 8))
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file["nu"], file["tensor"] = nu.astype("f4"), u.astype("f4")
        file["x-coordinate"] = np.arange(8.0)
    data = PDEBench(str(tmp_path), "d.hdf5", reduced_resolution=2, share=0.5)
    data.setup()
    assert not data.autoregressive
    assert (data.in_channels, data.out_channels, data.dim) == (1, 1, 2)
    assert [data.size_of(p) for p in ("train", "val", "test")] == [12, 3, 3]
    x, y = next(iter(data.test_dataloader()[0]))
    np.testing.assert_allclose(data.input_normalizer.decode(x)[:, 0], nu[:3, ::2, ::2], rtol=1e-5)
    np.testing.assert_allclose(data.normalizer.decode(y), u[:3, :, ::2, ::2], rtol=1e-4, atol=1e-5)


def test_scalar_layout(tmp_path):
    with h5py.File(tmp_path / "s.hdf5", "w") as file:
        file["tensor"] = np.random.default_rng(0).normal(size=(20, 25, 16)).astype("f4")
    data = PDEBench(str(tmp_path), "s.hdf5")
    data.setup()
    x, y = next(iter(data.val_dataloader()[0]))
    assert x.shape == (2, 10, 16)
    assert y.shape == (2, 11, 1, 16)


def test_pdebench_errors(tmp_path):
    name = "2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5"
    data = PDEBench(str(tmp_path), name)
    with pytest.raises(
        FileNotFoundError, match=f"fetch {name} and put it in .*DaRUS, doi:10.18419"
    ):
        data.setup()
    path = tmp_path / name
    write_flow(path, grid=(8, 8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"truncated or no HDF5 file.*fetch {name} again"):
        data.setup()
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"t_train=22 frames, but .* has 21"):
        PDEBench(str(tmp_path), name, t_train=22).setup()
    with pytest.raises(ValueError, match="has 11: lower t_train or reduced_resolution_t"):
        PDEBench(str(tmp_path), name, reduced_resolution_t=2).setup()
    with pytest.raises(ValueError, match=r"initial_step=10 .* t_train=10"):
        PDEBench(str(tmp_path), name, t_train=10).setup()
    with pytest.raises(ValueError, match=r"share=0.02 of 16"):
        PDEBench(str(tmp_path), name, share=0.02).setup()
    with pytest.raises(ValueError, match=r"test_fraction=0.01 of 20"):
        PDEBench(str(tmp_path), name, test_fraction=0.01).setup()
    with pytest.raises(ValueError, match="reduced_resolution=0"):
        PDEBench(str(tmp_path), name, reduced_resolution=0)


@pytest.mark.parametrize(
    "arrays",
    [
        {"tensor": (4, 5, 6, 6)},
        {"density": (4, 5, 6), "pressure": (4, 5, 6)},
        {"density": (4, 5, 6), "pressure": (4, 5, 6), "Vx": (4, 5, 7)},
        {"nu": (4, 6, 6), "tensor": (5, 1, 6, 6)},
        {"u": (4, 5, 6)},
        {},
    ],
)
def test_wrong_layouts_say_what_the_file_holds(tmp_path, arrays):
    with h5py.File(tmp_path / "w.hdf5", "w") as file:
        for name, shape in arrays.items():
            file[name] = np.zeros(shape)
    held = sorted(arrays)[0] if arrays else "nothing"
    with pytest.raises(ValueError, match=f"none of the layouts.*It holds {held}"):
        PDEBench(str(tmp_path), "w.hdf5").setup()
