"""SeaCache: skips while the part of the input that is image, and not noise, hardly changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..branch import Branch
from ..criteria.base import Criterion, state
from ..deferred import DeferredScalar, mean_abs, mean_abs_difference
from ..options import number
from ..plan import Verdict
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import CommonOptions


@dataclass
class SeaCacheRule(Criterion):
    """SeaCache's decision. With x the input now, a and b its shares of image and noise, f the frequency on one axis:

        h(f) = a S / (a^2 S + b^2),   S = |f|^-power,   H = the product of h over the axes, divided by its mean
        y = F^-1(H F(x)),   d = mean |y - y'| / mean |y'| with y' of the evaluation before, skipped or not
        E <- E + d;   skip while E < threshold;   E <- 0 after every computed evaluation

    h is the Wiener filter for images whose power falls as S. It keeps low frequencies while there is much noise, and
    all of them at the end: the image is measured as it emerges.

    Args:
        threshold: how much change may accumulate. Higher is faster and worse. 0 never skips.
        power: how steeply the power of images falls. 2 for images, published; 3 for video.

    Published is y of the first block's modulated input, here it is the network's input. The axes are the last two, or
    the last three of video (B, C, T, H, W). Keeps one latent.
    Source: arXiv 2602.18993 and jiwoogit/SeaCache (commit 0a91c2b).
    """

    threshold: float = 0.3
    power: float = 2.0

    error: float = state(0.0)
    before: Tensor | None = state()
    size: DeferredScalar | None = state()
    _now: tuple[int, Tensor] | None = state()

    def __post_init__(self) -> None:
        number("threshold", self.threshold)
        number("power", self.power, high=10.0)

    @property
    def never_skips(self) -> bool:
        return self.threshold == 0

    def decide(self, branch: Branch) -> Verdict:
        filtered, before, size = self._filtered(branch), self.before, self.size
        self._keep(branch, filtered)
        if before is None or size is None or before.shape != filtered.shape:
            return Verdict(False, threshold=self.threshold)
        change = float(branch.defer(mean_abs_difference(filtered, before)))
        self.error += change / float(size) if float(size) > 0 else math.inf
        return Verdict(self.error < self.threshold, self.error, self.threshold)

    def update(self, branch: Branch, forced: bool) -> None:
        if forced:
            self._keep(branch, self._filtered(branch))
        self.error = 0.0

    def _keep(self, branch: Branch, filtered: Tensor) -> None:
        self.before, self.size = filtered, branch.defer(mean_abs(filtered))

    def _filtered(self, branch: Branch) -> Tensor:
        axes = tuple(range(-3 if branch.x.ndim == 5 else -min(2, branch.x.ndim - 1), 0))
        return wiener(branch.x, *shares(branch), self.power, axes)


def shares(branch: Branch) -> tuple[float, float]:
    """The shares of image and noise in the network's input: (1 - t, t) of a flow, else (1, sigma) at unit power."""
    sigma, known = branch.position.sigma, branch.run.parametrization
    if known is not None and (meaning := known(sigma)).derivative == (0.0, 1.0) and meaning.denoised[0] == 1:
        time = -meaning.denoised[1]  # denoised = x - t v
        return 1 - time, time
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def wiener(x: Tensor, image: float, noise: float, power: float, axes: tuple[int, ...]) -> Tensor:
    """x filtered along `axes` for images whose power falls as |f|^-power, at these shares of image and noise."""
    gain = x.new_ones(())
    for axis in axes:
        frequency = torch.fft.fftfreq(x.shape[axis], device=x.device, dtype=x.dtype).abs()
        # a S / (a^2 S + b^2), multiplied by |f|^power so that it is finite at f = 0; image and noise are never both 0
        one = image / (image**2 + noise**2 * frequency**power)
        gain = gain * one.reshape([-1 if k == axis % x.ndim else 1 for k in range(x.ndim)])
    return torch.fft.ifftn(torch.fft.fftn(x, dim=axes) * (gain / gain.mean()), dim=axes).real


@register("seacache")
def SeaCache(threshold: float = 0.3, power: float = 2.0, **common: Unpack[CommonOptions]) -> Method:
    """SeaCache: skips while the input, filtered for image content, changes little; `SeaCacheRule` has the formula.

    A skipped evaluation reuses the residual. The last step is computed, as published.

    Args:
        threshold: how much change may accumulate; 0.3 and 0.6 are published for FLUX. 0 never skips.
        power: 2 for images, 3 for video.
        **common: every option of `Method`: start, end, mask, warmup, last_step, max_cached, predictor, ...

    Source: arXiv 2602.18993; jiwoogit/SeaCache (commit 0a91c2b).

    Example:
        >>> from stepcache import method
        >>> method("seacache", "threshold=0.6").criterion.threshold
        0.6
    """
    return Method.make(common, criterion=SeaCacheRule(threshold, power), last_step=True, name="seacache")
