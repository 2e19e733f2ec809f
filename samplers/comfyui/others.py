"""Other caches on the same model, as far as they can be recognised."""

from __future__ import annotations

from typing import Any

BY_WRAPPER = {"easycache": "EasyCache", "lazycache": "LazyCache"}
"""ComfyUI's own nodes, by the key of their wrappers."""

BY_OPTION = {"rel_l1_thresh": "TeaCache"}
"""Nodes that replace the model's forward, by what they leave in `transformer_options`: TeaCache and its relatives."""


def other_caches(model_options: dict[str, Any]) -> list[str]:
    """The caches beside ours in a run's `model_options`, by name.

    A cache that leaves no mark cannot be recognised: one that only sets a model function wrapper, or replaces blocks.
    """
    transformer = model_options.get("transformer_options", {})
    keys = {key for kind in transformer.get("wrappers", {}).values() for key, wrappers in kind.items() if wrappers}
    by_wrapper = [name for key, name in BY_WRAPPER.items() if key in keys]
    return by_wrapper + [name for key, name in BY_OPTION.items() if key in transformer]
