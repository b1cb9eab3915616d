"""Assignments as configurations build them."""

from __future__ import annotations

from tempbalance import ByRole
from tempbalance.assign import Assignment


def typed(map: Assignment, by_role: bool) -> Assignment:
    """An assignment whose types of layers are classes of modules, or roles in a block."""
    return ByRole(map) if by_role else map
