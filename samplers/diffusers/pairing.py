"""Which part of a denoiser's input its output belongs to, by their shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairing:
    """Which part of the input an output belongs to: `size` channels from `start` of dimension `dim`.

    If the output has `more` channels than the input (learned variance), zeros take the place of the rest's input, so
    that residual reuse repeats the rest as it was.

    Example:
        >>> import torch
        >>> from stepcache.samplers.diffusers.pairing import Pairing
        >>> Pairing(dim=1, start=0, size=4).input(torch.ones(2, 9, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    dim: int = 0
    start: int = 0
    size: int | None = None
    more: int = 0

    def input(self, x: Tensor) -> Tensor:
        """The part of x that the output belongs to."""
        if self.more:
            shape = [*x.shape]
            shape[self.dim] = self.more
            return torch.cat([x, x.new_zeros(shape)], dim=self.dim)
        return x if self.size is None else x.narrow(self.dim, self.start, self.size)


def pairings(x: Tensor, out: Tensor) -> list[Pairing]:
    """How an output may belong to an input: several if only movement can decide, none if nothing fits."""
    if x.shape == out.shape:
        return [Pairing()]
    if x.ndim != out.ndim:
        return []
    different = [d for d in range(x.ndim) if x.shape[d] != out.shape[d]]
    if len(different) != 1 or different[0] == 0:
        return []
    (dim,) = different
    channels_in, channels_out = x.shape[dim], out.shape[dim]
    if channels_out > channels_in:
        return [Pairing(dim, more=channels_out - channels_in)]
    return [Pairing(dim, 0, channels_out), Pairing(dim, channels_in - channels_out, channels_out)]
