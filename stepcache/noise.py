"""Fresh noise: how much of the latent no deterministic sampler could have made of what it was given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor

from .offload import Offloaded, brought

Kept = Tensor | Offloaded

DEPTH = 3
"""How many evaluations a sampler may remember: UniPC and DPM++ 3M look back at three."""

HALF = 0.15
"""The innovation that counts as half noisy. Measured: at most 1e-3 without noise, 0.2 to 1 with it."""

DECAY = 0.7
"""What is left of the noise level at an evaluation that brings no noise, as the second ones of DPM++ 2S ancestral."""


class FreshNoise:
    """Measures at every evaluation how noisy the sampler is: 0 for a deterministic one, toward 1 under fresh noise.

    A deterministic sampler moves x inside the span of the latents and outputs that it has seen. So x is projected on
    those of the last three evaluations, and the rest compared with how far x has moved:

        innovation = |x - projection| / |x - its part along the last x|
        share = innovation^2 / (innovation^2 + 0.15^2),   level = max(share, 0.7 level before)

    Guidance of any scale stays in the span, since every branch's output is in it; what is not (a mask blended in,
    dynamic thresholding) counts as noise. Rounding of half-precision latents is subtracted. Everything is per sample
    and stays on the device. Keeps three evaluations, 3 (1 + branches) latents; with `offload`
    in the host's memory.

    Example:
        >>> import torch
        >>> from stepcache.extend import FreshNoise
        >>> noise, x, out = FreshNoise(), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        >>> noise.record(0, x, [out])
        >>> round(float(noise.level(1, x - 0.5 * out, 1e-7)), 3)  # as Euler moves
        0.0
        >>> noise.record(1, x, [out])
        >>> round(float(noise.level(2, x - 0.5 * out + torch.randn(x.shape), 1e-7)), 1)  # with fresh noise
        1.0
    """

    def __init__(self, offload: bool = False) -> None:
        self._kept: Callable[[Tensor], Kept] = Offloaded if offload else lambda tensor: tensor
        self._given: deque[tuple[int, Kept, list[Kept]]] = deque(maxlen=DEPTH)
        self._evaluation = -1
        self._level: Tensor | None = None

    def level(self, evaluation: int, x: Tensor, rounding: float) -> Tensor | None:
        """The noise level at this evaluation (B,), from its network input x; None before the second one.

        `rounding`: the relative rounding error of the latents, `torch.finfo(dtype).eps`.
        """
        if evaluation != self._evaluation:
            self._evaluation = evaluation
            if self._given and self._given[-1][1].shape != x.shape:
                self.forget()
            before, self._level = self._level, self._share(x, rounding)
            if before is not None and self._level is not None:
                self._level = torch.maximum(self._level, DECAY * before)
        return self._level

    def _share(self, x: Tensor, rounding: float) -> Tensor | None:
        if not self._given:
            return None
        last, outputs = brought(self._given[-1][1]), map(brought, self._given[-1][2])
        x = x.flatten(1)
        rest = moved = _without(x, basis := _basis([], [last]))
        earlier = (brought(t) for _, past, given in list(self._given)[-2::-1] for t in (*given, past))
        rest = _without(rest, _basis(basis, chain(outputs, earlier)))
        floor = (rounding * x).square().sum(1)
        innovation = ((rest.square().sum(1) - floor) / moved.square().sum(1)).clamp(min=0)
        return (innovation / (innovation + HALF**2)).nan_to_num(nan=0.0)

    def record(self, evaluation: int, x: Tensor, outputs: Iterable[Tensor]) -> None:
        """What the sampler was answered at x, computed or predicted, for one branch or several; outputs shaped as x."""
        given = [self._kept(out) for out in outputs if out.shape == x.shape and out.device == x.device]
        if self._given and self._given[-1][0] == evaluation:
            self._given[-1][2].extend(given)
        else:
            self._given.append((evaluation, self._kept(x), given))

    def forget(self) -> None:
        """Drops every tensor."""
        self._given.clear()
        self._level = None


def _basis(basis: list[Tensor], vectors: Iterable[Tensor]) -> list[Tensor]:
    """The orthonormal basis (each (B, N)) extended by the vectors; one that adds nothing becomes zero."""
    basis = list(basis)
    for vector in vectors:
        vector = vector.flatten(1)
        vector = vector / vector.norm(dim=1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny)
        vector = _without(_without(vector, basis), basis)
        size = vector.norm(dim=1, keepdim=True)
        basis.append(torch.where(size > 1e-5, vector / size, torch.zeros_like(vector)))
    return basis


def _without(x: Tensor, basis: Iterable[Tensor]) -> Tensor:
    """x (B, N) less its projection on an orthonormal basis."""
    for vector in basis:
        x = x - (x * vector).sum(1, keepdim=True) * vector
    return x
