"""Whether a latent continues a sampling loop, for loops that nobody announces."""

from __future__ import annotations

from typing import Any
from weakref import ref

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


NOTHING = torch.empty(0)

Known = tuple[ref[Tensor], int]
"""A tensor, without keeping it alive, and how often it had been changed in place."""


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
        self._latent: Known | None = None  # that latent itself
        self._sigma: tuple[Known | None, Tensor] = None, NOTHING  # the last sigma, and as it was read

    @torch.no_grad()
    def read(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, bool]:
        """sigma in the host's memory, and whether x is another loop's than the last one.

        Both come over in one transfer; another branch of the same evaluation needs none.
        """
        unrelated = None if _same(self._latent, x) else self._unrelated(x)
        if unrelated is None or unrelated.device != sigma.device:
            return self._on_host(sigma), unrelated is not None and bool(unrelated)
        found = torch.cat((sigma.flatten(), unrelated.to(sigma.dtype)[None])).cpu()
        read = found[:-1].reshape(sigma.shape)
        self._sigma = _known(sigma), read
        return read, bool(found[-1])

    def _on_host(self, sigma: Tensor) -> Tensor:
        if not _same(self._sigma[0], sigma):
            self._sigma = _known(sigma), sigma.cpu()
        return self._sigma[1]

    def _unrelated(self, x: Tensor) -> Tensor | None:
        """A truth value on the device of x; None if the last latent cannot be compared."""
        now = None if self._last is None else _few(x)
        if self._last is None or now is None:
            return None
        before, denoised = self._last
        if now.shape != before.shape or now.device != before.device:
            return None
        a, b = before - denoised, now - denoised
        size, size_now, whole = (torch.linalg.vector_norm(one) for one in (a, b, before))
        unrelated = (a @ b < CHANCE / len(a) ** 0.5 * size * size_now) & (size > ROUNDING * whole)
        return unrelated & (now != before).any()

    @torch.no_grad()
    def record(self, x: Tensor, denoised: Tensor) -> None:
        """What the loop was answered with."""
        before, answer = _few(x), _few(denoised)
        self._last = self._latent = None
        if before is not None and answer is not None and before.shape == answer.shape:
            self._last, self._latent = torch.stack((before, answer)), _known(x)

    def forget(self) -> None:
        self._last = self._latent = None
        self._sigma = None, NOTHING

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None, "_latent": None, "_sigma": (None, NOTHING)}


def _known(tensor: Tensor) -> Known | None:
    """By which a tensor is known again, unless it does not count its changes."""
    return None if tensor.is_inference() else (ref(tensor), tensor._version)


def _same(known: Known | None, tensor: Tensor) -> bool:
    return known is not None and known[0]() is tensor and known[1] == tensor._version


def _few(x: Tensor) -> Tensor | None:
    if x.device.type == "meta" or x.numel() < ENOUGH or not x.is_floating_point():
        return None
    return x.detach().reshape(-1)[:: -(-x.numel() // MOST)].to(torch.float32, copy=True)
