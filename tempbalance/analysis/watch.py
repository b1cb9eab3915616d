"""Watch: correlation traps of a training, look by look, and when they are worth a word.

One look says little: entries of a healthy weight may be atypical, and stay so. What the literature
ties to a network that forgets what it learned is that traps appear, grow and stay. They may be
harmless all the same; held-out data decide.

Source: Prakash and Martin on anti-grokking (arXiv 2506.04434, 2602.02859); that alpha below 2 alone
tells it is disputed (arXiv 2605.20441), so it has no part in this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tempbalance.analysis.traps import Traps, find_traps
from tempbalance.layers import Layer
from tempbalance.words import some


class TrapWatch:
    """Traps of some layers over the looks so far.

    Args:
        looks: a layer is named once each of its last so many looks found a trap, and the largest
            moved away from the random edge over them.
        seed: of the shuffles, the same at every look, so that looks compare.
    """

    def __init__(self, looks: int = 3, seed: int = 0) -> None:
        if looks < 2:
            raise ValueError(f"looks must be at least 2 to tell what rises, got {looks!r}")
        self.looks, self.seed = looks, seed
        self._seen: dict[str, list[Traps]] = {}

    def look(self, layers: Sequence[Layer]) -> dict[str, Traps]:
        """Look for traps in layers now, and remember them; costs several measurements."""
        found = find_traps(layers, seed=self.seed)
        for name, traps in found.items():
            self._seen[name] = [*self._seen.get(name, ()), traps][-self.looks :]
        return found

    def rising(self) -> list[str]:
        """The layers whose traps persist and rise."""
        return [name for name, seen in self._seen.items() if self._rises(seen)]

    def message(self, names: Sequence[str] | None = None) -> str:
        """What is known of these layers, in a sentence; empty where there are none.

        Args:
            names: some of those of :meth:`rising`; default all.
        """
        names = self.rising() if names is None else names
        if not names:
            return ""
        return (
            f"correlation traps (atypical entries) have been there for {self.looks} looks and grow "
            f"in {some(names)}. In some networks this came before held-out accuracy fell, in "
            "others it was harmless: look at yours"
        )

    def state_dict(self) -> dict[str, list[list[float | None]]]:
        """Plain values by layer: count and units of its last looks."""
        return {n: [[t.traps, t.trap_units] for t in seen] for n, seen in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """Continue where :meth:`state_dict` left off."""
        self._seen = {
            name: [Traps(count, units) for count, units in seen][-self.looks :]
            for name, seen in state.items()
        }

    def _rises(self, seen: Sequence[Traps]) -> bool:
        if len(seen) < self.looks or not all(traps.traps for traps in seen):
            return False
        units = [traps.trap_units or 0.0 for traps in seen]
        return units[-1] > units[0] and (seen[-1].traps or 0) >= (seen[0].traps or 0)
