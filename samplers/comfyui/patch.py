"""The cache on a model patcher."""

from __future__ import annotations

from typing import Any

from stepcache import Method

from .cache import Cache
from .wrappers import KEY, wrapper_kinds


def patched(model: Any, method: Method, decide: str = "reference") -> Any:
    """A clone of a model patcher with the cache on it; a cache that was on it is replaced."""
    kinds = wrapper_kinds()
    clone = model.clone()
    clone.remove_wrappers_with_key(kinds.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, Cache(method, decide).sample)
    return clone


def cache_of(model: Any) -> Cache | None:
    """The cache on a model patcher, if there is one."""
    found = model.get_wrappers(wrapper_kinds().OUTER_SAMPLE, KEY)
    return found[-1].__self__ if found else None
