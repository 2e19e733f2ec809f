"""Arguments of a batched call, taken apart by rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class CannotSplit(ValueError):
    """Why a batched call cannot be taken apart with certainty."""


Rows = slice | list[int]


def cut_rows(value: Any, rows: int, kept: Rows, shared: bool = False) -> Any:
    """The part of an argument that belongs to `kept` of the batch's `rows` rows; `CannotSplit` if that is not certain.

    Tensors must be as long as the batch, or have no length at all; with `shared`, those of length 1 belong to all
    rows. Dictionaries, lists and tuples are rebuilt around their parts, but not lists of as many numbers or words as
    there are rows.
    """
    if isinstance(value, Tensor):
        if value.ndim and len(value) == rows:
            return value[kept]
        if not value.ndim or (shared and len(value) == 1):
            return value
        raise CannotSplit(f"a tensor of length {len(value)} in a call of {rows} rows")
    if isinstance(value, dict):
        return {key: cut_rows(item, rows, kept, shared) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) == rows and any(isinstance(item, (int, float, str)) for item in value):
            raise CannotSplit(f"a list of {len(value)} in a call of {rows} rows")
        items = [cut_rows(item, rows, kept, shared) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def may_be_ordered(value: Any, lengths: tuple[int, ...]) -> bool:
    """Whether a tensor, or a list of numbers or words, in it has one of these lengths. Tuples have places."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) in lengths
    if isinstance(value, dict):
        return any(may_be_ordered(item, lengths) for item in value.values())
    if isinstance(value, (list, tuple)):
        plain = isinstance(value, list) and any(isinstance(item, (int, float, str)) for item in value)
        return (plain and len(value) in lengths) or any(may_be_ordered(item, lengths) for item in value)
    return False


def rows_of_samples(branches: int, rows: int, samples: Sequence[int]) -> list[int]:
    """The rows of some samples of a batch, in each of the branches that come one after another."""
    each = rows // branches
    return [branch * each + sample for branch in range(branches) for sample in samples]


def samples_of(tensor: Tensor, branches: int) -> list[Tensor]:
    """The rows of each sample of a batch, one for each branch."""
    return list(tensor.reshape(branches, -1, *tensor.shape[1:]).unbind(1))


def batch_of(samples: Sequence[Tensor]) -> Tensor:
    """The reverse of `samples_of`."""
    return torch.stack(tuple(samples), dim=1).flatten(0, 1)


def rows_of(names: tuple[str, ...], name: str, rows: int) -> slice:
    """The rows of one of the branches that come in a batch, as many each."""
    each, place = rows // len(names), names.index(name)
    return slice(place * each, (place + 1) * each)
