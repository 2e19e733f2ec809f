"""The ranks of a serving engine that work on one image, by the engine's own coordinators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def groups_by(state: Any, getters: Iterable[str]) -> list[Any]:
    """The process groups that an engine's module of parallel state has, of more than one rank.

    Args:
        state: the module. Its getters return coordinators, and fail with an AssertionError before they are set up.
        getters: their names.
    """
    found = []
    for name in getters:
        try:
            coordinator = getattr(state, name)()
        except AssertionError:
            continue
        if coordinator.world_size > 1:
            found.append(coordinator.device_group)
    return found
