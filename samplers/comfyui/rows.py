"""Whether the images of a batch can be computed without one another, and the conditioning of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

OF_THE_BATCH = ("control", "hooks", "gligen", "mask")
"""Parts of a prompt that may hold something for each image, in a form of their own."""

PATCHES = ("patches", "patches_replace")


def separable(conds: Sequence[list[dict[str, Any]] | None], options: dict[str, Any], rows: int) -> bool:
    """Whether nothing in a call is known to, or may, belong to some images of its batch that cannot be picked out."""
    if "model_function_wrapper" in options or any(options.get("transformer_options", {}).get(key) for key in PATCHES):
        return False
    return all(_separable(entry, rows) for cond in conds if cond is not None for entry in cond)


def _separable(entry: dict[str, Any], rows: int) -> bool:
    if any(entry.get(key) is not None for key in OF_THE_BATCH):
        return False
    values = (getattr(value, "cond", value) for value in entry.get("model_conds", {}).values())
    return all(_length(value) in (1, rows) for value in values)


def _length(value: Any) -> int:
    """How many images a value is for: 1 stands for all of them. 0: it cannot be told."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else 1
    return 1 if isinstance(value, (int, float, str, bool, type(None))) else 0


def of_rows(entry: dict[str, Any], rows: int, kept: list[int]) -> dict[str, Any]:
    """A separable prompt for some images of a batch of `rows`."""
    found = {name: _kept(value, rows, kept) for name, value in entry.get("model_conds", {}).items()}
    return {**entry, "model_conds": found} if found else entry


def _kept(value: Any, rows: int, kept: list[int]) -> Any:
    if rows == 1 or not isinstance(value.cond, Tensor) or _length(value.cond) == 1:
        return value
    return value._copy_with(value.cond[kept])
