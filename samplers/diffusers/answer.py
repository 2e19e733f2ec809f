"""The tensors in what a denoiser is given and returns, taken out and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rebuild = Callable[[list[Tensor]], Any]


def opened(answer: Any) -> tuple[list[Tensor], Rebuild | None]:
    """The tensors in a denoiser's answer, and how to make such an answer from others; ([], None) if it has no others.

    A list of tensors of one shape counts as the tensor that they make when stacked (Z-Image).
    """
    if isinstance(answer, dict):
        kind, keys = type(answer), [key for key, value in answer.items() if value is not None]
        tensors, rebuild = opened(tuple(answer[key] for key in keys))
        return tensors, None if rebuild is None else lambda new: kind(**dict(zip(keys, rebuild(new), strict=True)))
    if isinstance(answer, tuple):
        items = [opened(item) for item in answer]
        rebuilds = [rebuild for tensors, rebuild in items if rebuild is not None and len(tensors) == 1]
        if len(rebuilds) < len(items):
            return [], None
        tensors = [tensor for (tensor,), _ in items]
        return tensors, lambda new: tuple(rebuild([item]) for rebuild, item in zip(rebuilds, new, strict=True))
    tensor = stacked(answer)
    if tensor is None:
        return [], None
    if tensor is answer:
        return [tensor], lambda new, dtype=tensor.dtype: new[0].to(dtype)
    return [tensor], lambda new, dtype=tensor.dtype: list(new[0].to(dtype).unbind(0))


def stacked(value: Any) -> Tensor | None:
    """A tensor, or a list of tensors of one shape as one tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list) and value and all(isinstance(v, Tensor) and v.shape == value[0].shape for v in value):
        return torch.stack(value)
    return None


def packed(parts: Sequence[Tensor]) -> Tensor:
    """One tensor, or several as one flat tensor (B, N)."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], dim=1)


def listed(shapes: Sequence[torch.Size]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes)
