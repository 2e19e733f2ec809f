"""Whether a latent continues a sampling loop, for loops that nobody announces."""

from __future__ import annotations

import torch
from torch import Tensor

ENOUGH = 64
"""With fewer numbers chance alone can look like a continuation: nothing is said then."""

MOST = 4096
"""So many numbers of a latent are looked at, evenly spread."""

CHANCE = 4.0
"""Correlations of unrelated noise are below this over sqrt(n), but for 1 in 30,000."""

ROUNDING = 1e-3
"""If less is left of the noise, relative to the latent, it may be rounding: nothing is said then."""


class Continuity:
    """Tells a sampling loop's next latent from another loop's.

    A sampler keeps part of the noise that is in its latent, and takes the rest away or replaces it: what it goes on
    with, relative to the answer it was given, correlates with what it had before.

        c = cos(x' - denoised, x - denoised) = sigma' / sigma with full ancestral noise, 1 without noise

    Another loop has other noise, so that c is 0 but for chance. A loop that replaces all noise at once (LCM) cannot be
    told from another; nor can loops that begin with the same noise, until they have parted.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None  # some of the last latent, and of what was answered

    @torch.no_grad()
    def broken(self, x: Tensor) -> bool:
        """Whether this latent is another loop's than the last one."""
        if self._last is None:
            return False
        before, denoised = self._last
        now = _few(x)
        if now is None or now.shape != before.shape or now.device != before.device or torch.equal(now, before):
            return False
        a, b = before - denoised, now - denoised
        size = a.norm()
        unrelated = a @ b < CHANCE / len(a) ** 0.5 * size * b.norm()
        return bool(unrelated & (size > ROUNDING * before.norm()))

    @torch.no_grad()
    def record(self, x: Tensor, denoised: Tensor) -> None:
        """What the loop was answered with."""
        before, answer = _few(x), _few(denoised)
        self._last = None
        if before is not None and answer is not None and before.shape == answer.shape:
            self._last = torch.stack((before, answer))

    def forget(self) -> None:
        self._last = None

    def __getstate__(self) -> dict[str, None]:
        return {"_last": None}


def _few(x: Tensor) -> Tensor | None:
    if x.device.type == "meta" or x.numel() < ENOUGH or not x.is_floating_point():
        return None
    return x.detach().reshape(-1)[:: -(-x.numel() // MOST)].to(torch.float32, copy=True)
