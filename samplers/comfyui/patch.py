"""The cache on a model patcher."""

from __future__ import annotations

from typing import Any

from stepcache import Method
from stepcache.extend import Engine

from .cache import Cache
from .wrappers import KEY, wrapper_kinds


def patched(model: Any, method: Method, decide: str = "batch", noisy: Method | None = None) -> Any:
    """A clone of a model patcher with the cache on it. It replaces a cache of ours that was there.

    Args:
        model: a `ModelPatcher`, what the nodes call MODEL. It stays as it is.
        method: what to skip and how to predict it.
        decide: "batch", "each" or "sample"; see `Cache`.
        noisy: the method for samplers that add noise at every step; see `Cache`.

    Raises `OptionError` if the options do not go together, or not with this model (a method that looks at blocks), and
    RuntimeError if this ComfyUI is too old.
    """
    kinds = wrapper_kinds()
    Engine(method, decide=decide, network=model.model)  # what a run would refuse is refused here, at our node
    clone = model.clone()
    clone.remove_wrappers_with_key(kinds.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, Cache(method, decide, noisy).sample)
    return clone


def cache_of(model: Any) -> Cache | None:
    """The cache on a model patcher; None if there is none."""
    found = model.get_wrappers(wrapper_kinds().OUTER_SAMPLE, KEY)
    return found[-1].__self__ if found else None
