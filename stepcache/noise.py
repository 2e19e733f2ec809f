"""Fresh noise: how much of the latent no deterministic sampler could have made of what it was given."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .deferred import some_rows
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
    and stays on the device. Keeps three evaluations, 3 (1 + branches) latents, of large ones
    `some_rows`; with `offload` in the host's memory.

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
        self._offload = offload
        self._given: deque[tuple[int, Kept, list[Kept]]] = deque(maxlen=DEPTH)
        self._evaluation = -1
        self._level: Tensor | None = None
        self._shape: torch.Size | None = None

    def level(self, evaluation: int, x: Tensor, rounding: float) -> Tensor | None:
        """The noise level at this evaluation (B,), from its network input x; None before the second one.

        `rounding`: the relative rounding error of the latents, `torch.finfo(dtype).eps`.
        """
        if evaluation != self._evaluation:
            self._evaluation = evaluation
            if self._given and self._shape != x.shape:
                self.forget()
            before, self._level = self._level, self._share(x, rounding)
            if before is not None and self._level is not None:
                self._level = torch.maximum(self._level, DECAY * before)
        return self._level

    def _share(self, x: Tensor, rounding: float) -> Tensor | None:
        if not self._given:
            return None
        _, last, outputs = self._given[-1]
        earlier = [t for _, past, given in list(self._given)[-2::-1] for t in (*given, past)]
        size, moved, rest = _unexplained(some_rows(x), [*map(brought, (last, *outputs, *earlier))])
        innovation = ((rest - rounding**2 * size) / moved).clamp(min=0)
        share = innovation / (innovation + HALF**2)
        return share.nan_to_num(nan=0.0).to(torch.promote_types(x.dtype, torch.float32))

    def record(self, evaluation: int, x: Tensor, outputs: Iterable[Tensor]) -> None:
        """What the sampler was answered at x, computed or predicted, for one branch or several; outputs shaped as x."""
        given = [self._kept(out) for out in outputs if out.shape == x.shape and out.device == x.device]
        if self._given and self._given[-1][0] == evaluation:
            self._given[-1][2].extend(given)
        else:
            self._shape = x.shape
            self._given.append((evaluation, self._kept(x), given))

    def _kept(self, x: Tensor) -> Kept:
        """`some_rows` of a large tensor, which does not keep the others alive; a small one itself."""
        few = some_rows(x)
        few = few if few is x else few.contiguous()
        return Offloaded(few) if self._offload else few

    def forget(self) -> None:
        """Drops every tensor."""
        self._given.clear()
        self._level = None


def _unexplained(x: Tensor, known: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """|x|^2 of each sample (B,): whole, beyond the first of the known vectors, and beyond all of them.

    By elimination in the matrix of inner products, in float64 if the device has it. A vector that adds nothing to those
    before it is passed over.
    """
    rows = torch.stack([vector.flatten(1) for vector in (*known, x)], 1)
    rows = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)
    products = rows @ rows.mT
    least = (1e-6 if rows.dtype == torch.float32 else 1e-12) * products.diagonal(dim1=1, dim2=2)
    left = [products[:, -1, -1]]
    for k in range(len(known)):
        pivot, column = products[:, :1, 0], products[:, 1:, 0]
        share = column / pivot.where(pivot > least[:, k : k + 1], torch.inf)
        products = products[:, 1:, 1:] - column[:, :, None] * share[:, None, :]
        left.append(products[:, -1, -1])
    return left[0], left[1], left[-1].clamp(min=0)
