"""The Lagrange polynomial of a fixed order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..branch import Branch, CacheEntry, History
from ..clock import near
from .base import Baseline, FixedOrder, Terms


@dataclass(frozen=True)
class Lagrange(FixedOrder):
    """The polynomial of degree `order` through the last computed evaluations at different sigmas:

        w_j = product over i != j of (s - s_i) / (s_j - s_i)

    with s the coordinate of `RunInfo`: log sigma, or t for flow models. Exact if the residual (or the output) is a
    polynomial in s of that degree. Through fewer evaluations the degree is lower; degree 0 is `Reuse`.

    Args:
        order: 0 and up. 2 is best for isolated skips, 1 for long runs of them, 0 to 1 for samplers that add noise.
        baseline: what is extrapolated.

    Keeps order + 1 evaluations, 2 (order + 1) latents a branch. Of evaluations at one sigma (Heun's corrector and
    the next step's first) it keeps the newest; one without a coordinate (sigma = 0 in log sigma) is left out.

    Example:
        >>> from stepcache import Static
        >>> from stepcache.extend import Lagrange
        >>> Static("fast", predictor=Lagrange(1, baseline="zero")).predictor
        Lagrange(order=1, baseline='zero')
    """

    order: int = 2
    baseline: Baseline = "input"

    def remember(self, history: History, entry: CacheEntry) -> None:
        kept = [old for old in history if not near(old.position.sigma, entry.position.sigma)]
        history.clear()
        history.extend([*kept, entry])

    def weights(self, branch: Branch) -> Terms:
        return _lagrange(branch.coordinate(branch.position), branch.history, self.order)


def _lagrange(here: float | None, history: Sequence[CacheEntry], order: int) -> list[tuple[CacheEntry, float]]:
    """Each of the last order + 1 evaluations at different coordinates, with its weight; the last one alone at worst."""
    if here is None or not order:
        return [(history[-1], 1.0)]
    entries: dict[float, CacheEntry] = {}
    for entry in reversed(history):
        if entry.coordinate is not None and len(entries) <= order:
            entries.setdefault(entry.coordinate, entry)
    if not entries:
        return [(history[-1], 1.0)]
    return [
        (entry, math.prod((here - other) / (there - other) for other in entries if other != there))
        for there, entry in entries.items()
    ]
