"""Group state: an optimizer's checkpoints, of before the split by layer or after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tempbalance.optim.groups import Grouping, copied
from tempbalance.optim.scaled import is_base_key


def is_unsplit(grouping: Grouping, state: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state dict is of the groups as they were before the split."""
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes != [len(params) for params in grouping.original]:
        return False
    if any(is_base_key(key) for group in state["param_groups"] for key in group):
        return False
    names = [group.get("name") for group in state["param_groups"]]
    now = [len(group["params"]) for group in grouping.optimizer.param_groups]
    # Where every group was one layer's already, only the names that it was given tell.
    return sizes != now or names == grouping.original_names


def refuse_others(grouping: Grouping, state: Mapping[str, Any]) -> None:
    """Refuse an optimizer's state dict that is not of these groups.

    torch maps state by position: groups of equal sizes in another order would load without a
    word and give momentum to the wrong parameters.

    Raises:
        ValueError: naming the groups that differ, and the cure.
    """
    saved = state["param_groups"]
    names = [str(group.get("name", i)) for i, group in enumerate(saved)]
    if all("name" in group for group in saved):
        compare_groups(names, grouping.names)
    sizes = [len(group["params"]) for group in saved]
    here = [len(group["params"]) for group in grouping.optimizer.param_groups]
    before = [len(params) for params in grouping.original]
    if sizes != here:
        raise ValueError(
            f"the optimizer state has groups of {_short(sizes)} parameters; this optimizer has "
            f"{_short(here)} (before it was split by layer: {_short(before)}). Build model and "
            "optimizer with the same groups, in the same order, as in the run that saved it; "
            "groups which that run added later, add with add_param_group before loading"
        )


def expand_state(grouping: Grouping, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict from before the split, as one of the split groups."""
    saved_id = {
        id(p): key
        for params, group in zip(grouping.original, state["param_groups"], strict=True)
        for p, key in zip(params, group["params"], strict=True)
    }
    of_group = {id(p): i for i, params in enumerate(grouping.original) for p in params}
    groups = []
    for group in grouping.optimizer.param_groups:
        saved = state["param_groups"][of_group[id(group["params"][0])]]
        own = {"name": group["name"]} if "name" in group else {}
        keys = [saved_id[id(p)] for p in group["params"]]
        new = {**copied(saved), **own, "params": keys}
        if "param_names" in group:
            new["param_names"] = list(group["param_names"])
        groups.append(new)
    return {**state, "param_groups": groups}


def compare_groups(saved: Sequence[str], here: Sequence[str]) -> None:
    """Refuse names of groups, as saved in a checkpoint, that are not those here.

    Raises:
        ValueError: naming the differences and the cure.
    """
    if list(saved) == list(here):
        return
    gone = [name for name in saved if name not in here]
    new = [name for name in here if name not in saved]
    what = f"only in the checkpoint: {_short(gone)}; only here: {_short(new)}"
    if not gone and not new:
        what = "the same groups in another order"
    raise ValueError(
        f"the checkpoint's param groups are not those of this optimizer ({what}). Build the model "
        "and the optimizer's own groups as they were in the run that saved it; groups which that "
        "run added later, add with optimizer.add_param_group before loading."
    )


def _short(values: Sequence[Any]) -> str:
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return f"{list(values[:5])}{more}"
