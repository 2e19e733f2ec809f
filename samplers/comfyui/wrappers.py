"""ComfyUI's wrappers: which kinds the cache needs, and how a run's own wrappers get into its options."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

KEY = "stepcache"
"""The key of our wrappers."""


def with_wrappers(options: dict[str, Any], **wrappers: Callable[..., Any]) -> dict[str, Any]:
    """A copy of a model's options with these wrappers, by kind, added after its own; `options` is left unchanged."""
    options = dict(options)
    transformer = options["transformer_options"] = dict(options.get("transformer_options", {}))
    kinds = transformer["wrappers"] = dict(transformer.get("wrappers", {}))
    for kind, wrapper in wrappers.items():
        kinds[kind] = {**kinds.get(kind, {}), KEY: [wrapper]}
    return options


def wrapper_kinds() -> Any:
    """ComfyUI's `WrappersMP`. RuntimeError if it lacks a kind that the cache needs."""
    extension = import_module("comfy.patcher_extension")
    for name in ("OUTER_SAMPLE", "PREDICT_NOISE", "CALC_COND_BATCH"):
        if not hasattr(extension.WrappersMP, name):
            raise RuntimeError(f"StepCache: this ComfyUI has no wrappers at {name}; update ComfyUI to 0.3.64 or newer")
    return extension.WrappersMP
