"""The relative change of a signal: the rule of First Block Cache and DBCache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..branch import Branch
from ..deferred import DeferredScalar, mean_abs, mean_abs_difference
from ..options import number
from ..plan import Verdict
from ..probe import Blocks
from .base import INVALID_STATE, Criterion, state


@dataclass
class RelativeChange(Criterion):
    """The rule of First Block Cache and DBCache:

        d = mean |s - s'| / mean |s'|;   skip while d < threshold

    with s the signal now and s' the signal of the last computed evaluation inside the window. The first evaluation
    there is computed. What the signal is: what the first blocks add to their input (`blocks`); of a network without
    blocks the network's input, for which the threshold is multiplied by `at_input`.

    Sources: chengzeyi/Comfy-WaveSpeed (commit 8253745), diffusers' `FirstBlockCacheConfig` (commit 58eb52c0),
    vipshop/cache-dit (commit f86744af); of the input, stable-diffusion.cpp (commit 97d29908).
    Keeps the signal of one call.

    Example:
        >>> from stepcache import Method
        >>> from stepcache.extend import Blocks, RelativeChange
        >>> Method(criterion=RelativeChange(0.1, Blocks(1)), warmup=4).criterion.threshold
        0.1
    """

    threshold: float = 0.08
    blocks: Blocks | None = None
    at_input: float = 1.0

    kept: tuple[Tensor, DeferredScalar] | None = state()  # s' and mean |s'|

    def __post_init__(self) -> None:
        number("threshold", self.threshold)
        number("at_input", self.at_input)

    @property
    def never_skips(self) -> bool:
        return self.threshold == 0

    def decide(self, branch: Branch) -> Verdict:
        threshold = self.threshold * (self.at_input if branch.signal is branch.x else 1.0)
        if self.kept is None:
            return Verdict(False, threshold=threshold)
        (before, size), signal = self.kept, branch.signal
        if signal is None or signal.shape != before.shape:
            return Verdict(False, threshold=threshold, reason=INVALID_STATE)
        change = branch.defer(mean_abs_difference(signal, before))
        share = float(change) / float(size) if float(size) > 0 else math.inf
        if not math.isfinite(share):
            return Verdict(False, threshold=threshold, reason=INVALID_STATE)
        return Verdict(share < threshold, share, threshold)

    def update(self, branch: Branch, forced: bool) -> None:
        signal = branch.signal
        self.kept = None if signal is None else (signal, branch.defer(mean_abs(signal)))
