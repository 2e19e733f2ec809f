"""UCache's rule."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from ..branch import Branch
from ..options import flag, number
from ..plan import Verdict
from .base import Criterion, caller_level, state
from .output_rate import OutputRate


@dataclass
class UCacheRule(Criterion):
    """UCache's decision, as stable-diffusion.cpp (commit 97d29908) makes it.

    With c the last computed evaluation, k, norm and average of `OutputRate`, m the skips since c, n the evaluations of
    the run (its steps, for samplers with one evaluation a step):

        a = k mean |x - x_c| / sqrt(max(norm, 1e-6) max(1.6 average, 1e-6))    (relative; norm for 1.6 average at first)
        a = k mean |x - x_c|                                                   (not relative: threshold times norm)
        E <- decay E + a (1 + m / 2);   skip while E < f threshold, else compute, and E <- 0 if reset
        f = 0.5 while fewer than 0.2 n evaluations were computed inside the window, 1.5 above 0.8 n, else 1

    Without a known schedule f = 1. The published n is the number of steps even if there are two evaluations a step,
    of which it then sees the second only; `evaluations="second"` does the same.

    Example:
        >>> from stepcache import Method
        >>> from stepcache.extend import Lagrange, UCacheRule
        >>> Method(criterion=UCacheRule(0.3), predictor=Lagrange(1), warmup=2).criterion.threshold
        0.3
    """

    threshold: float = 1.0
    decay: float = 1.0
    relative: bool = True
    reset: bool = True

    error: float = state(0.0)
    skips: int = state(0)
    computed: int = state(0)
    response: OutputRate = state(factory=OutputRate)

    def __post_init__(self) -> None:
        number("threshold", self.threshold)
        number("decay", self.decay, high=1.0)
        self.relative, self.reset = flag("relative", self.relative), flag("reset", self.reset)
        if not self.reset and self.decay == 1 and self.threshold > 0:
            warnings.warn(
                "UCache with reset=0 and decay=1: the error only grows, so after the first failed test little or "
                "nothing is skipped. Set decay below 1 (0.9, say), or keep reset=1.",
                stacklevel=caller_level(),
            )

    measurements = ("input_change",)

    @property
    def never_skips(self) -> bool:
        return self.threshold == 0

    def decide(self, branch: Branch) -> Verdict:
        change = self.response.expect(branch)
        norm, average = self.response.norm, self.response.average
        threshold = self.threshold * self._progress_factor(branch.run.evaluations) * (1 if self.relative else norm)
        if change is None:
            return Verdict(False, threshold=threshold)
        if self.relative:
            scale = max(norm, 1e-6)
            change /= math.sqrt(scale * (scale if average is None else max(1.6 * average, 1e-6)))
        self.error = self.error * self.decay + change * (1 + 0.5 * self.skips)
        verdict = Verdict(self.error < threshold, self.error, threshold)
        if verdict.skip:
            self.skips += 1
        elif self.reset:
            self.error = 0.0
        return verdict

    def update(self, branch: Branch, forced: bool) -> None:
        self.response.update(branch)
        self.computed += 1
        self.skips = 0
        if forced and self.reset:
            self.error = 0.0

    def _progress_factor(self, evaluations: int | None) -> float:
        if evaluations is None:
            return 1.0
        progress = self.computed / evaluations
        return 0.5 if progress < 0.2 else 1.5 if progress > 0.8 else 1.0
