"""Arguments of a batched call, taken apart by rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def cut(value: Any, rows: int, kept: slice) -> Any:
    """What of an argument belongs to `kept` of the batch's `rows` rows.

    Tensors whose length is the number of rows are cut, and lists of as many things; what they lie in is rebuilt, and
    everything else belongs to all rows. A tuple has places, not rows: a pair of cos and sin is not a batch of two.
    """
    if isinstance(value, Tensor):
        return value[kept] if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: cut(item, rows, kept) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        batched = any(isinstance(item, Tensor) and item.ndim and len(item) == rows for item in value)
        if isinstance(value, list) and len(value) == rows and not batched:
            return value[kept]
        items = [cut(item, rows, kept) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def rows_of(names: tuple[str, ...], name: str, rows: int) -> slice:
    """The rows of one of the conditions that come in a batch, as many each."""
    each, place = rows // len(names), names.index(name)
    return slice(place * each, (place + 1) * each)
