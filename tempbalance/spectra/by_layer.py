"""ByLayer: windows that differ by layer, chosen by patterns of names and types."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from tempbalance.spectra.grid import Windows

WANTED = "an object such as Farms() or WholeMatrix(), or a mapping from patterns to such objects"


class Named(Protocol):
    """A layer, as far as patterns see it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True, repr=False)
class ByLayer:
    """Windows for each layer by the first pattern that its name or type matches.

    ``ByLayer({"Linear": Farms.released_linear(100, 1.0, per_dim=9), "*": Farms()})``; patterns are
    those of the shell, as ``exclude`` takes them, and upper and lower case differ. Wherever windows
    are taken, the mapping alone stands for this object.

    Args:
        windows: from patterns to windows, in the order in which they are tried.

    Raises:
        TypeError: for what is no mapping from text to windows.
        ValueError: for a mapping without a pattern.
    """

    windows: Mapping[str, Windows]

    def __post_init__(self) -> None:
        if not isinstance(self.windows, Mapping):
            raise TypeError(f"ByLayer takes patterns and their windows, got {self.windows!r}")
        if not self.windows:
            raise ValueError('windows by layer need a pattern, such as {"*": Farms()}')
        plain = _plain(self.windows)
        for pattern, value in plain.items():
            if not isinstance(pattern, str):
                raise TypeError(f"windows by layer: a pattern is text, got {pattern!r}")
            if isinstance(value, type):
                raise TypeError(f"windows[{pattern!r}] is the class {value.__name__}: call it")
            if not isinstance(value, Windows):
                raise TypeError(
                    f"windows[{pattern!r}] must be an object such as Farms(), got {value!r}"
                )
        object.__setattr__(self, "windows", plain)

    def __hash__(self) -> int:
        return hash(tuple(self.windows.items()))

    def __eq__(self, other: object) -> bool:
        """The same patterns for the same windows, in the same order."""
        if not isinstance(other, ByLayer):
            return NotImplemented
        return list(self.windows.items()) == list(other.windows.items())

    def __repr__(self) -> str:
        return f"ByLayer({self.windows!r})"

    def of(self, layer: Named) -> Windows:
        """The windows of a layer.

        Raises:
            ValueError: if no pattern matches it, naming the layer.
        """
        for pattern, windows in self.windows.items():
            if _matches(pattern, layer):
                return windows
        raise ValueError(_unmatched([layer], self.windows))

    def idle(self, layers: Iterable[Named]) -> list[str]:
        """Patterns that are the first match of no layer."""
        found = list(layers)
        firsts = {next((p for p in self.windows if _matches(p, x)), None) for x in found}
        return [pattern for pattern in self.windows if pattern not in firsts]


# Windows as the engine takes them, and as a user may give them.
AnyWindows = Windows | ByLayer
WindowsLike = Windows | ByLayer | Mapping[str, Windows]


def checked_windows(windows: object, layers: Iterable[Named] = ()) -> AnyWindows:
    """Windows as an option takes them: an object, or a mapping, which becomes a :class:`ByLayer`.

    Args:
        windows: the option.
        layers: what is to be measured with them.

    Raises:
        TypeError: for anything else, such as a name or a class.
        ValueError: if they differ by layer and no pattern matches some of the layers, naming them.
    """
    if isinstance(windows, Mapping):
        windows = ByLayer(windows)
    if isinstance(windows, ByLayer):
        patterns = windows.windows
        left = [x for x in layers if not any(_matches(p, x) for p in patterns)]
        if left:
            raise ValueError(_unmatched(left, patterns))
        return windows
    if isinstance(windows, type):
        raise TypeError(f"windows must be an object, got the class {windows.__name__}: call it")
    if not isinstance(windows, Windows):
        raise TypeError(f"windows must be {WANTED}, got {windows!r}")
    return windows


def windows_of(windows: AnyWindows, layer: Named) -> Windows:
    """The windows of one layer.

    Raises:
        ValueError: if they differ by layer and no pattern matches this one.
    """
    return windows.of(layer) if isinstance(windows, ByLayer) else windows


def _plain(windows: Mapping[str, Windows]) -> dict[str, Windows]:
    """A dict of the objects. OmegaConf, which a YAML's mapping comes in, hides them in its own."""
    if type(windows).__module__.startswith("omegaconf"):
        return dict(sys.modules["omegaconf"].OmegaConf.to_object(windows))
    return dict(windows)


def _matches(pattern: str, layer: Named) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for text in (layer.name, layer.kind))


def _unmatched(layers: list[Named], patterns: Iterable[str]) -> str:
    shown = ", ".join(f"{layer.name!r} ({layer.kind})" for layer in layers[:5])
    more = f" and {len(layers) - 5} more" if len(layers) > 5 else ""
    return (
        f"windows: none of the patterns {list(patterns)} matches the layer {shown}{more}; name it, "
        'or add a last pattern for all others, "*": Farms()'
    )
