"""Numbers measured on the device, brought to the host together.

Reading a number off a GPU makes the host wait for everything queued before it. Measurements therefore stay on
their device until one of them is needed; then all of them come over in one transfer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DeferredScalar:
    """One number; `float(scalar)` fetches it, and with it every other one of the same pool."""

    __slots__ = ("_pool", "value")

    def __init__(self, value: Tensor | float, pool: DeferredScalars) -> None:
        self.value, self._pool = value, pool

    def __float__(self) -> float:
        if isinstance(self.value, Tensor):
            self._pool.fetch()
        return float(self.value)

    def __repr__(self) -> str:
        return f"DeferredScalar({float(self):.6g})"


class DeferredScalars:
    """The deferred numbers of one run."""

    def __init__(self) -> None:
        self._pending: list[DeferredScalar] = []

    def defer(self, number: Tensor) -> DeferredScalar:
        """Registers a 0-dimensional tensor without waiting for its value."""
        scalar = DeferredScalar(number, self)
        self._pending.append(scalar)
        return scalar

    def fetch(self) -> None:
        """One device-to-host transfer for all numbers still pending."""
        pending, self._pending = self._pending, []
        values = torch.stack([scalar.value.float() for scalar in pending if isinstance(scalar.value, Tensor)]).tolist()
        for scalar, value in zip(pending, values, strict=True):
            scalar.value = value


def mean_abs(x: Tensor) -> Tensor:
    """mean |x| over all elements, accumulated in float32 or wider (0-dimensional)."""
    lines = _lines(x)
    if lines is None:
        return x.abs().mean(dtype=wide(x.dtype))
    return torch.linalg.vector_norm(lines, 1, dim=-1, dtype=wide(x.dtype)).mean() / lines.shape[-1]


def mean_abs_difference(a: Tensor, b: Tensor) -> Tensor:
    """mean |a - b| over all elements, subtracted and accumulated in float32 or wider (0-dimensional).

    On the CPU `cdist` does it without a temporary, which costs as much there as reading a and b twice.
    """
    first, second = _lines(a), _lines(b)
    if first is None or second is None or a.dtype != b.dtype or a.dtype in HALF or not (a.is_cpu and b.is_cpu):
        return (widened(a) - b).abs_().mean()
    return torch.cdist(first, second, p=1).mean() / first.shape[-1]


LINE = 4096
"""The most numbers that are summed one by one. Summing 16 million of them in float32 is off by 1 %."""


def _lines(x: Tensor) -> Tensor | None:
    """A view of x as (count, 1, length) with at most `LINE` numbers a line; None if there is no sensible one."""
    length = math.gcd(x.numel(), LINE)
    return x.view(-1, 1, length) if length >= 64 and type(x) is Tensor and x.is_contiguous() else None


SAMPLE = 16384
"""Numbers per sample that are enough for a statistic: a latent of 4x64x64 is looked at whole."""


def some_rows(x: Tensor) -> Tensor:
    """x, or if it is large every k-th row of it (of the last dimension but one): at least `SAMPLE` numbers a sample.

    k is odd, so that it does not keep step with patches or blocks of two. A view of x. For what is estimated, not for
    what a published rule needs exactly.
    """
    rows = x.shape[-2] if x.ndim > 2 else 1
    k = min(x.shape[1:].numel() // SAMPLE, rows // 8)
    k -= k % 2 == 0
    return x[..., ::k, :] if k > 1 else x


HALF = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic is done in: float32 for the half-precision types, else the type itself."""
    return torch.float32 if dtype in HALF else dtype


def widened(x: Tensor) -> Tensor:
    """x in the dtype that arithmetic is done in; the very same tensor if it has it."""
    return x.float() if x.dtype in HALF else x
