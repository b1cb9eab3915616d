"""Options: what can be chosen of measuring and balancing, written and checked once.

:class:`~tempbalance.Balancer`, :class:`~tempbalance.TempBalanceLR`,
:class:`~tempbalance.StepHooks`, :class:`~tempbalance.AlphaDecay` and the callbacks take them as
keywords.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

import torch.distributed as dist

from tempbalance.assign import Assignment, Clipped, LinearMap, check_assignment
from tempbalance.balance.units import Unit
from tempbalance.layers import Fused
from tempbalance.measure import DEFAULT_BUDGET
from tempbalance.measure.method import check_engine
from tempbalance.spectra.by_layer import WindowsLike, checked_windows
from tempbalance.spectra.powerlaw import Fit, Hill
from tempbalance.spectra.windows import Farms

T = TypeVar("T", bound=type)
Ends = Literal["balanced", "measurable"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checked options of measuring and balancing.

    Args:
        windows: which submatrices are measured, of all layers or by the first pattern that a
            layer's name or type matches (``{"Linear": WholeMatrix(), "*": Farms()}``).
        fit: the power-law fit.
        assign: alphas to multipliers.
        every: ticks between measurements (a tick is a call of ``step``, or what a callback says).
        start: the first tick with balancing; before it all multipliers are 1 (for a warm-up).
        stop: the tick from which on multipliers are 1 again, or ``None``.
        hold: the tick, before ``stop``, from which on nothing is measured and multipliers stay as
            they are then, or ``None``.
        skip_first, skip_last: leave out the first or last layer, in definition order.
        ends: which layers ``skip_first`` and ``skip_last`` count: ``"balanced"``, those that are
            left by all other options, or ``"measurable"``, all that can be measured, small ones
            and excluded ones too (as the released codes do).
        min_eigs: layers with fewer eigenvalues are not balanced and do not vote.
        exclude: patterns of layers to leave alone, by name or type (``("lm_head", "SpectralConv",
            "encoder.*")``): not measured, no vote, base rate.
        fixed: multipliers of modules that need no alpha, by pattern of name or type
            (``{"lm_head": 5.0, "Embedding": 5.0}``): not measured, no vote. Modules inside of one
            that matches go with it; the first pattern that matches wins.
        unit: what shares one rate: ``"layer"``, ``"block"`` (a numbered module, such as
            ``layer1.0`` or ``h.3``), ``"type"`` (the module's class), or a function from a layer's
            name to that of its unit. A unit votes with the mean alpha of its layers. Without
            effect on assignments that look at no alpha.
        normalize: divide by the mean multiplier over parameters, so that only the spread is left.
        ramp: ticks over which new multipliers are approached, linearly.
        clip: clip alphas to so many robust standard deviations around the median.
        fused: projections that share one weight, by name pattern: ``{"*.kv": 2}``; a ``qkv`` is
            found by itself, and ``False`` leaves all whole.
        budget: extra memory of a measurement, in bytes.
        process_group: ranks that share the work. Default: those of a model wrapped in DDP, all of
            them for one with sharded parameters (FSDP2), else none.
        delay: ticks from a measurement to its effect, at most ``every``. With 0 training waits.
            Otherwise the weights are copied, and measured in the background while training goes
            on; the new multipliers hold from exactly ``delay`` ticks later on, when training waits
            if it must. The first measurement has no delay.

    Raises:
        ValueError: for an option out of range.
        TypeError: for an option of another kind, such as a class where an object is due.
    """

    windows: WindowsLike = Farms()
    fit: Fit = Hill()
    assign: Assignment = LinearMap()
    every: int = 1
    start: int = 0
    stop: int | None = None
    hold: int | None = None
    skip_first: bool = False
    skip_last: bool = False
    ends: Ends = "balanced"
    min_eigs: int = 10
    exclude: Iterable[str] = ()
    fixed: Mapping[str, float] | None = None
    unit: Unit = "layer"
    normalize: bool = False
    ramp: int = 0
    clip: float | None = None
    fused: Fused | Literal[False] | None = None
    budget: int = DEFAULT_BUDGET
    process_group: dist.ProcessGroup | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        check_engine(self.windows, self.fit, self.budget)
        check_assignment("assign", self.assign)
        for name, least in (("every", 1), ("start", 0), ("ramp", 0), ("min_eigs", 2), ("delay", 0)):
            _check_whole(name, getattr(self, name), least)
        for name in ("stop", "hold"):
            self._check_after_start(name, getattr(self, name))
        if self.stop is not None and self.hold is not None and self.hold >= self.stop:
            raise ValueError(
                f"hold={self.hold} is not before stop={self.stop}: from stop on every multiplier "
                f"is 1, so that there is nothing to hold. Use a hold below {self.stop}, or leave "
                "out one of the two"
            )
        if self.delay > self.every:
            raise ValueError(
                f"delay={self.delay} is longer than every={self.every}: a measurement would begin "
                f"before the last one takes effect. Use a delay of at most {self.every}, or a "
                "larger every"
            )
        if not callable(self.unit) and self.unit not in ("layer", "block", "type"):
            raise ValueError(
                f"unit must be 'layer', 'block', 'type' or a function, got {self.unit!r}"
            )
        if self.ends not in ("balanced", "measurable"):
            raise ValueError(f"ends must be 'balanced' or 'measurable', got {self.ends!r}")
        for name in ("skip_first", "skip_last", "normalize"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        object.__setattr__(self, "windows", checked_windows(self.windows))
        object.__setattr__(self, "exclude", _patterns(self.exclude))
        object.__setattr__(self, "fixed", _multipliers(self.fixed))
        if self.clip is not None:
            object.__setattr__(self, "assign", Clipped(self.assign, self.clip))
            object.__setattr__(self, "clip", None)  # it is in assign now

    def _check_after_start(self, name: str, value: Any) -> None:
        if value is None:
            return
        if not _is_whole(value) or value <= self.start:
            never = {"stop": "None never stops", "hold": "None never holds"}[name]
            raise ValueError(
                f"{name} must be an integer after start={self.start}, got {value!r}; {never}"
            )


class GivenRest(TypedDict, total=False):
    """:class:`Options` as keywords, all of which may be left out, but for assign and every."""

    windows: WindowsLike
    fit: Fit
    start: int
    stop: int | None
    hold: int | None
    skip_first: bool
    skip_last: bool
    ends: Ends
    min_eigs: int
    exclude: Iterable[str]
    fixed: Mapping[str, float] | None
    unit: Unit
    normalize: bool
    ramp: int
    clip: float | None
    fused: Fused | Literal[False] | None
    budget: int
    process_group: dist.ProcessGroup | None
    delay: int


class GivenAssign(GivenRest, total=False):
    """:class:`Options` as keywords, but for every."""

    assign: Assignment


class Given(GivenAssign, total=False):
    """:class:`Options` as keywords."""

    every: int


NAMES = tuple(field.name for field in dataclasses.fields(Options))


def checked(owner: type, given: Mapping[str, Any]) -> Options:
    """The options that were given to a class, checked.

    Raises:
        TypeError, ValueError: as :class:`Options`, and for one that the class does not have.
    """
    check_names(owner, given)
    return Options(**given)


def check_names(owner: type, given: Iterable[str]) -> None:
    """Raises TypeError for an option that a class does not have, with the nearest right name."""
    known = [p for p in inspect.signature(owner).parameters if p != "self"]
    for name in given:
        if name not in known or name not in NAMES:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise TypeError(f"{owner.__name__} has no option {name!r}; {hint}")


# Options that are objects: in the signature of a class that is also built from files their default
# is None, for a file cannot hold an object, and a tool that reads the signature tries to.
OBJECTS = ("windows", "fit", "assign")


def with_options(
    *, without: tuple[str, ...] = (), files: bool = False, **defaults: Any
) -> Callable[[T], T]:
    """Show the options in a class's signature, where ``**options`` stands in its code.

    So help, completion and command lines that read signatures see every option, its type and its
    default.

    Args:
        without: options that the class does not take.
        files: whether it is also built from files (YAML, by class_path): objects default to None.
        defaults: those that it has other defaults for.
    """

    if files:
        defaults = {**dict.fromkeys(OBJECTS), **defaults}

    def show(cls: T) -> T:
        init: Any = cls.__init__  # type: ignore[misc]
        own = inspect.signature(init)
        hints = get_type_hints(Options)
        types = get_type_hints(init)
        named = [
            p.replace(annotation=types.get(p.name, p.annotation))
            for p in own.parameters.values()
            if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        taken = {p.name for p in named} | set(without)
        more = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(field.name, field.default),
                annotation=Any if files and field.name in OBJECTS else hints[field.name],
            )
            for field in dataclasses.fields(Options)
            if field.name not in taken
        ]
        init.__signature__ = own.replace(parameters=[*named, *more], return_annotation=None)
        return cls

    return show


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, least: int) -> None:
    if not _is_whole(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _patterns(exclude: Any) -> tuple[str, ...]:
    if isinstance(exclude, str):
        raise ValueError(f"exclude takes a list of patterns: exclude=[{exclude!r}]")
    patterns = tuple(exclude) if isinstance(exclude, Iterable) else (exclude,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"exclude takes a list of patterns (text) of layers, got {exclude!r}")
    return patterns


def _multipliers(fixed: Any) -> dict[str, float]:
    if fixed is None:
        return {}
    if not isinstance(fixed, Mapping) or not all(isinstance(key, str) for key in fixed):
        raise TypeError(
            f'fixed takes multipliers by pattern, such as {{"lm_head": 5.0}}; got {fixed!r}'
        )
    for pattern, value in fixed.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ValueError(f"fixed[{pattern!r}] must be a positive number, got {value!r}")
    return {pattern: float(value) for pattern, value in fixed.items()}
