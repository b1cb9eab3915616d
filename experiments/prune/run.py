"""One run: load, allocate, prune, score."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress as RichBar
from torch import nn

import tempbalance
from experiments import provenance
from experiments.prune import texts
from experiments.prune.models import Loaded, load
from experiments.prune.perplexity import finetune, perplexity
from tempbalance.pruning import Pruned, prune


@functools.lru_cache(maxsize=1)
def _loaded(path: str, dtype: str, device: str) -> Loaded:
    """The dense model, kept for the next run of this process."""
    return load(path, dtype, device)


@functools.lru_cache(maxsize=4)
def _measured(path: str, dtype: str, device: str, windows: Any, fit: Any) -> tempbalance.Report:
    return tempbalance.analyze(_loaded(path, dtype, device).model, windows=windows, fit=fit)


@functools.lru_cache(maxsize=4)
def _tokens(model: str, path: str, part: tuple[float, float], loaded: Loaded) -> torch.Tensor:
    return texts.tokens(texts.read(path, part), loaded.tokenizer)


def run(cfg: DictConfig) -> dict[str, Any]:
    """What the configuration says; the content of `result.json`.

    Raises: ValueError for a split that is neither validation nor test.
    """
    if cfg.split not in ("validation", "test"):
        raise ValueError(f"split must be validation or test, got {cfg.split!r}")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    began = time.time()
    place = (str(cfg.model.path), str(cfg.model.dtype), str(cfg.model.device))
    loaded = _loaded(*place)
    model = copy.deepcopy(loaded.model)
    ids = {
        name: _tokens(place[0], str(each.path), tuple(each.part), loaded)
        for name, each in cfg.text.items()
        if name in ("calibration", cfg.split)
    }
    scored = texts.windows(
        ids[cfg.split], cfg.length, cfg.stride, cfg.text[cfg.split].get("windows")
    )
    source: Any = model
    if cfg.allocation.windows is not None:
        source = _measured(*place, instantiate(cfg.allocation.windows), instantiate(cfg.fit))
    ratios = instantiate(cfg.allocation.ratios)(source, cfg.total)
    calibration = texts.drawn(ids["calibration"], cfg.length, cfg.calibration_windows, cfg.seed)
    with _bar(f"{cfg.method.name} {cfg.allocation.name} {cfg.total}") as progress:
        pruned = prune(
            model,
            ratios,
            instantiate(cfg.method.pruner, _convert_="all"),
            [{"input_ids": window.unsqueeze(0)} for window in calibration],
            keep_masks=cfg.finetune.steps > 0,
            progress=progress,
        )
    if cfg.finetune.steps:
        more = texts.drawn(ids["calibration"], cfg.length, cfg.finetune.steps, cfg.seed + 1000)
        finetune(model, more, cfg.finetune.steps, cfg.finetune.lr)
    with _bar(f"scoring {cfg.split}") as progress:
        value = perplexity(model, scored, progress)
    if cfg.save is not None:
        _save(model, loaded.tokenizer, Path(cfg.save))
    return _result(cfg, pruned, value, scored.numel() - len(scored), began)


def _result(
    cfg: DictConfig, pruned: Pruned, value: float, tokens: int, began: float
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "method": cfg.method.name,
        "total": cfg.total,
        "split": cfg.split,
        "spread": None if cfg.allocation.name == "uniform" else cfg.spread,
        "finetuned": cfg.finetune.steps,
    }
    apart = [f"{name}={told[name]}" for name in ("method", "total", "split")]
    if cfg.finetune.steps:
        apart.append(f"finetuned={cfg.finetune.steps}")
    return {
        "name": cfg.name,
        "method": cfg.allocation.name,
        "seed": cfg.seed,
        "settings": [f"model={Path(cfg.model.path).stem}", *apart],
        "metric": {"name": "perplexity", "monitor": "perplexity", "mode": "min"},
        "value": value,
        "test": {"perplexity": value},
        "pruning": {
            **told,
            "allocation": cfg.allocation.name,
            "tokens": tokens,
            "sparsity": pruned.sparsity,
            "sparsity_before": pruned.sparsity_before,
        },
        "seconds": time.time() - began,
        "started": began,
        "finished": time.time(),
        **provenance.commit(),
        "device": provenance.device_name(),
        "versions": provenance.versions(),
    }


def _save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """As transformers loads it again, masks made permanent."""
    from torch.nn.utils import prune as torch_prune

    for module in model.modules():
        if hasattr(module, "weight_mask"):
            torch_prune.remove(module, "weight")
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Callable[[float], None] | None]:
    """A bar on stderr while a person watches."""
    if not sys.stderr.isatty():
        yield None
        return
    with RichBar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=1.0)
        yield functools.partial(bar.advance, task)
