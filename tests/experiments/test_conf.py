"""Every configuration composes, builds its objects, and every experiment runs a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from standins import composed, save_encoder, sentences, substitute

import tempbalance
from experiments import extras, sweep
from experiments.train import train


def options(group: str) -> list[str]:
    """Names of the files of a configuration group."""
    return sorted(path.stem for path in (sweep.CONF / group).glob("*.yaml"))


EXPERIMENTS = options("experiment")
METHODS = options("balance")
LANGUAGE = {"llr", "llr_farms"}  # of head and embedding, which other networks have not


def test_the_published_experiments_and_the_controls_are_there() -> None:
    cifar = ("resnet18", "resnet34", "vgg16", "vgg19")
    assert set(EXPERIMENTS) >= {
        "quickstart",
        *(f"cifar100_{name}" for name in cifar),
        "cifar10_resnet18",
        "tinyimagenet_wrn16_8",
        *("lm_tiny", "lm_60m", "lm_130m", "lm_350m", "lm_1b", "sst2_minilm"),
        *(f"{data}_{model}" for data in ("darcy", "cfd1d", "cfd2d") for model in ("fno", "unet")),
    }
    controls = {"shuffled", "reversed", "constant", "frozen", "pertype", "type_unit"}
    controls |= {"level", "shuffled_type", "pertype_measured", "depth", "llrd"}
    methods = {"tb", "farms", "tb_sigmoid", "farms_sigmoid", "llr", "tb_sigmoid_block"}
    methods |= {"nullscore", "progress"}
    controls |= {f"nullscore_{name}" for name in ("shuffled", "reversed", "frozen")}
    controls |= {"equal_updates", "progress_reversed"}
    assert set(METHODS) >= {"none", *methods, *controls}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_files_hold_overrides_a_seed_and_their_command(experiment: str) -> None:
    text = (sweep.CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert f"# python -m experiments.train experiment={experiment}" in text
    content = OmegaConf.create(text)
    assert content.name == experiment
    assert isinstance(content.seed, int)
    assert "_target_" not in {key for key in content if key != "tuned"}


# What only the user knows: the text.
NEEDED = {f"lm_{size}": ["data.path=text.txt"] for size in ("60m", "130m", "350m", "1b")}


def complete(cfg: DictConfig, balance: str) -> None:
    """Nothing is missing from a configuration, and every reference in it is found."""
    resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    assert resolved["method"] == balance
    assert (resolved["balance"] is None) == (balance == "none")


@pytest.mark.parametrize("balance", METHODS)
def test_methods_compose_and_build_their_strategies(balance: str, tmp_path: Path) -> None:
    """With published values; without, every method runs a step below."""
    cfg = composed(tmp_path, "experiment=cfd2d_fno", f"balance={balance}")
    complete(cfg, balance)
    if balance == "none":
        return
    callback = instantiate(cfg.balance)
    assert instantiate(cfg.balance.windows).grid(30, 20).height > 0
    assign = callback.options["assign"]
    layers = tempbalance.Population(
        ("Conv2d", "Conv2d", "SpectralConv", "Linear"),
        (9, 9, 50, 10),
        ("b.0.x", "b.1.x", "s", "l"),
        lambda: [(2.1, 0.1)] * 4,
    )
    multipliers = assign([2.0, 3.0, 4.0, math.nan], layers)
    assert multipliers.shape == (4,)
    assert bool((multipliers > 0).all())


def test_tuned_values_reach_the_methods(tmp_path: Path) -> None:
    def built(experiment: str, balance: str, *more: str) -> tuple[Any, Any]:
        cfg = composed(tmp_path, f"experiment={experiment}", f"balance={balance}", *more)
        return cfg, instantiate(cfg.balance.assign)

    cfg, assign = built("cifar100_resnet18", "farms")
    assert assign == tempbalance.LinearMap(0.1, 1.9)
    callback = instantiate(cfg.balance)
    assert callback.options["windows"] == tempbalance.ByLayer(
        {
            "Linear": tempbalance.Farms.released_linear(100, 1.0, per_dim=9),
            "*": tempbalance.Farms.released_conv(1.0),
        }
    )
    assert (cfg.balance.skip_first, cfg.balance.skip_last) == (False, False)
    assert cfg.balance.min_eigs == 5
    cfg, assign = built("cifar100_vgg19", "farms_inner")
    assert assign == tempbalance.LinearMap(0.4, 1.6)
    assert (cfg.balance.skip_first, cfg.balance.skip_last) == (False, True)
    cfg, assign = built("cifar100_resnet34", "tb_inner")
    assert assign == tempbalance.LinearMap(0.3, 1.7)
    assert instantiate(cfg.balance.windows) == tempbalance.WholeMatrix()
    assert (cfg.balance.skip_first, cfg.balance.skip_last) == (True, True)
    assert built("cfd2d_fno", "tb_sigmoid")[1] == tempbalance.SigmoidMap(0.125)
    assert built("cfd2d_fno", "tb_sigmoid", "data.share=0.025")[1] == tempbalance.SigmoidMap(0.5)
    # Without published values: the library's own defaults.
    cfg, assign = built("quickstart", "farms")
    assert assign == tempbalance.LinearMap()
    assert instantiate(cfg.balance.windows) == tempbalance.Farms()
    # A value on the command line comes last.
    assert built("cifar100_vgg16", "tb", "balance.assign.s1=0.9")[1].s1 == 0.9


# Layers that are tuned, and parameters that keep the base rate, as published: layers left out with
# their norms, the norms of shortcuts, and the last norm of the wide ResNet.
TUNED = {
    ("cifar10_resnet18", "tb"): (19, {"conv1.weight", "bn1.weight", "bn1.bias", "fc.weight",
        "fc.bias", *(f"layer{i}.0.downsample.1.{p}" for i in (2, 3, 4)
        for p in ("weight", "bias"))}),
    ("tinyimagenet_wrn16_8", "farms"): (14, {"conv1.weight", "fc.weight", "fc.bias", "bn.weight",
        "bn.bias", "stages.0.0.shortcut.weight"}),
    ("cifar100_resnet18", "farms"): (21, {f"layer{i}.0.downsample.1.{p}" for i in (2, 3, 4)
        for p in ("weight", "bias")}),
    ("cifar100_vgg16", "farms_inner"): (13, {"classifier.weight", "classifier.bias"}),
}  # fmt: skip


@pytest.mark.parametrize(("experiment", "balance"), TUNED)
def test_published_rows_tune_the_layers_that_they_say(
    experiment: str, balance: str, tmp_path: Path
) -> None:
    wanted, at_base = TUNED[experiment, balance]
    cfg = composed(tmp_path, f"experiment={experiment}", f"balance={balance}")
    model = instantiate(cfg.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {**instantiate(cfg.balance).options, "assign": tempbalance.Constant(0.5)}
    scheduler = tempbalance.TempBalanceLR(optimizer, model, **options)
    assert len(scheduler.balancer.layers) == wanted
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for g in optimizer.param_groups if g["lr"] == 1.0 for p in g["params"]}
    assert kept == at_base


def test_published_models_begin_and_see_as_released(tmp_path: Path) -> None:
    for experiment in ("cifar10_resnet18", "cifar100_vgg16", "tinyimagenet_wrn16_8"):
        model = instantiate(composed(tmp_path, f"experiment={experiment}").model)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5  # PyTorch's: uniform, 1 / sqrt(fan in)
                assert 0.95 * bound < module.weight.abs().max().item() < 1.0001 * bound
        stem = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
        assert stem.stride == (1, 1)
    cfg = composed(tmp_path, "experiment=cfd2d_fno", "balance=tb_sigmoid")
    assert cfg.optimizer._target_.endswith("ComplexAdam")
    assert list(cfg.balance.exclude) == ["SpectralConv"]


def test_windows_by_layer_come_from_a_mapping_in_yaml() -> None:
    text = """
    windows:
      Linear: {_target_: tempbalance.WholeMatrix}
      "*": {_target_: tempbalance.Farms, rows: 8}
    """
    windows = instantiate(OmegaConf.create(text)).windows
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 20, 3), torch.nn.Linear(20, 40))
    wanted = {"Linear": tempbalance.WholeMatrix(), "*": tempbalance.Farms(rows=8)}
    got, same = (tempbalance.analyze(model, windows=each) for each in (windows, wanted))
    assert [r.alpha for r in got] == [r.alpha for r in same]
    assert (
        got["1"].alpha == tempbalance.analyze(model, windows=tempbalance.WholeMatrix())["1"].alpha
    )
    balancer = tempbalance.Balancer(model, windows=windows)
    assert balancer.options.windows == tempbalance.ByLayer(wanted)


def test_published_settings_for_language_models(tmp_path: Path) -> None:
    callback = instantiate(composed(tmp_path, "experiment=lm_1b", "balance=llr").balance)
    options = callback.options
    assert options["assign"] == tempbalance.LinearMap(1.0, 5.0)
    assert dict(options["fixed"]) == {"*lm_head": 5.0, "Embedding": 5.0, "*norm*": 1.0}
    assert options["windows"] == tempbalance.WholeMatrix()
    assert options["fit"] == tempbalance.Hill(2)
    assert (callback.by_step, callback.every) == (True, 100)
    assert (options["ramp"], options["hold"], options["min_eigs"]) == (50, 8000, 50)
    cfg = composed(tmp_path, "balance=tb_sigmoid_block", "tuned.sigmoid.s=[2,1]")
    callback = instantiate(cfg.balance)
    assert callback.options["assign"] == tempbalance.SigmoidMap((2.0, 1.0), 10.0)
    assert callback.options["fit"] == tempbalance.Hill(1.5)
    assert (callback.options["unit"], callback.every, callback.by_step) == ("block", 100, True)


def test_rates_of_the_published_rows(tmp_path: Path) -> None:
    def rate(*overrides: str) -> float:
        return float(composed(tmp_path, *overrides).optimizer.lr)

    assert rate("experiment=cifar100_resnet34", "balance=none") == 0.05
    assert rate("experiment=cifar100_resnet34", "balance=farms") == 0.1
    assert rate("experiment=cifar100_resnet34", "balance=none", "optimizer.lr=0.1") == 0.1
    assert rate("experiment=cifar100_resnet18") == 0.1
    assert rate("experiment=cifar100_vgg16") == rate("experiment=cifar100_vgg19") == 0.05
    assert rate("experiment=cfd2d_fno") == 2.5e-3
    cfg = composed(tmp_path, "experiment=cifar100_resnet18")
    assert (cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.9, 5e-4)
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (128, 200)
    cfg = composed(tmp_path, "experiment=cfd1d_fno", "data.share=0.025")
    assert (cfg.data.batch_size, cfg.optimizer.weight_decay) == (10, 0.1)


def test_cosine_reaches_zero_at_the_end_of_the_run(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "experiment=cifar100_resnet18", "trainer.max_epochs=7")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = instantiate(cfg.schedule.scheduler)(optimizer)
    for _ in range(7):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_missing_package_is_named_with_its_cure() -> None:
    extras.require("torch")
    with pytest.raises(SystemExit, match=r"no_such_package.*'tempbalance\[experiments\]'"):
        extras.require("torch", "no_such_package")


def test_settings_by_share_of_the_data() -> None:
    table = {0.025: "a", 0.1: "b", 1.0: "c"}
    found = [sweep.at_share(share, table) for share in (0.006, 0.025, 0.05, 0.1, 0.5, 1)]
    assert found == ["a", "a", "b", "b", "c", "c"]
    with pytest.raises(ValueError, match=r"data\.share=2"):
        sweep.at_share(2, table)


# A step of every experiment with its real model, on random data of the right shapes. Measuring the
# largest models takes seconds, so these train without balancing here.
LARGE = ("cifar100_resnet34", "cifar100_vgg19", "tinyimagenet_wrn16_8")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_runs_a_step(experiment: str, tmp_path: Path) -> None:
    balance = "none" if experiment in LARGE else "farms_sigmoid"
    overrides = [f"experiment={experiment}", f"balance={balance}", "trainer.fast_dev_run=true"]
    if experiment == "sst2_minilm":
        root, encoder = sentences(tmp_path / "sst2", 8), save_encoder(tmp_path / "encoder")
        small = ["tuned.min_eigs=5", "data.share=1"]
        overrides += [*small, f"model.encoder={encoder}", f"data.root={root}"]
    cfg = composed(tmp_path, *overrides, *NEEDED.get(experiment, ()))
    complete(cfg, balance)
    result = train(cfg if experiment == "sst2_minilm" else substitute(cfg))
    assert result["name"] == experiment
    assert math.isfinite(result["value"])
    assert math.isfinite(result["last"]["train/loss"])


@pytest.mark.parametrize("balance", [name for name in METHODS if name not in LANGUAGE])
def test_every_method_runs_a_step(balance: str, tmp_path: Path) -> None:
    epochs = 2 if balance.endswith("frozen") else 1  # measured first after a third of training
    overrides = ("experiment=quickstart", f"balance={balance}", f"trainer.max_epochs={epochs}")
    cfg = substitute(composed(tmp_path, *overrides))
    result = train(cfg)
    assert result["method"] == balance
    assert math.isfinite(result["last"]["train/loss"])
    assert (result["measuring_share"] is None) == (balance == "none")
    assert (Path(cfg.folder) / "tempbalance.csv").exists() == (balance != "none")


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_slurm"])
def test_launchers_compose(launcher: str, tmp_path: Path) -> None:
    if launcher != "basic":
        plugin = {"joblib": "joblib", "submitit_slurm": "submitit"}[launcher]
        pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    with initialize_config_dir(str(sweep.CONF), version_base="1.3"):
        cfg = compose(
            "train",
            ["experiment=quickstart", "balance=farms", "seed=7", f"hydra/launcher={launcher}"],
            return_hydra_config=True,
        )
    HydraConfig.instance().set_config(cfg)
    target = str(cfg.hydra.launcher._target_).lower()
    assert launcher.split("_")[-1] in target
    assert "summary" in cfg.hydra.callbacks
    # The folder of a sweep's job is that of the same run alone.
    alone = cfg.hydra.run.dir
    assert f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}" == alone
    assert alone == "outputs/quickstart/farms-seed7"


@pytest.mark.parametrize("logger", options("logger"))
def test_loggers_compose(logger: str, tmp_path: Path) -> None:
    cfg = sweep.compose([f"outputs={tmp_path}", f"logger={logger}"])
    OmegaConf.resolve(cfg)
    assert ("csv" in cfg.logger) == (logger != "none")


@pytest.mark.parametrize("trainer", options("trainer"))
def test_trainers_compose(trainer: str, tmp_path: Path) -> None:
    cfg = sweep.compose([f"outputs={tmp_path}", f"trainer={trainer}"])
    OmegaConf.resolve(cfg)
    if trainer == "fsdp2":
        assert type(instantiate(cfg.trainer.strategy)).__name__ == "ModelParallelStrategy"


@pytest.mark.parametrize("data", options("data"))
def test_data_modules_take_their_configuration(data: str, tmp_path: Path) -> None:
    needed = {"sst2": ["model=encoder"], "text": ["model=llama", "data.path=text.txt"]}
    given = needed.get(data, ["model=unet"])
    cfg = composed(tmp_path, f"data={data}", f"data_root={tmp_path}", *given)
    asked = {name for name in cfg.problem if OmegaConf.is_missing(cfg.problem, name)}
    # Only the owner of the images knows their classes.
    assert asked == ({"num_classes"} if data == "image_folder" else set())
    module = instantiate(cfg.data)
    assert module.batch_size == cfg.data.batch_size
    for name in ("num_classes", "in_channels", "out_channels", "dim"):
        if name not in asked and isinstance(getattr(type(module), name, None), int):
            assert getattr(module, name) == cfg.problem[name]
