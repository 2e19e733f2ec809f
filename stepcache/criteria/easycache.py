"""EasyCache's rule."""

from __future__ import annotations

from dataclasses import dataclass

from ..branch import Branch
from ..options import number
from ..plan import Verdict
from .base import Criterion, state
from .output_rate import OutputRate


@dataclass
class EasyCacheRule(Criterion):
    """EasyCache's decision, as stable-diffusion.cpp (commit 97d29908) makes it.

    With c the last computed evaluation, k the rate and norm of `OutputRate`:

        E <- E + k mean |x - x_c| / norm;   skip while E < threshold, else compute;   E <- 0 after every computed one

    The paper's repository (H-EmbodVis/EasyCache) measures the input change against the previous step, skipped or not;
    this form, also ComfyUI's, measures it against the last computed one, which is stricter at the same threshold.

    Example:
        >>> from stepcache import Method
        >>> from stepcache.extend import EasyCacheRule, Lagrange
        >>> Method(criterion=EasyCacheRule(0.1), predictor=Lagrange(1)).criterion.threshold
        0.1
    """

    threshold: float = 0.2

    error: float = state(0.0)
    response: OutputRate = state(factory=OutputRate)

    def __post_init__(self) -> None:
        number("threshold", self.threshold)

    measurements = ("input_change",)

    @property
    def never_skips(self) -> bool:
        return self.threshold == 0

    def decide(self, branch: Branch) -> Verdict:
        change = self.response.expect(branch)
        if change is None:
            return Verdict(False, threshold=self.threshold)
        self.error += change / self.response.norm
        return Verdict(self.error < self.threshold, self.error, self.threshold)

    def update(self, branch: Branch, forced: bool) -> None:
        self.response.update(branch)
        self.error = 0.0
