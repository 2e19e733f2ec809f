"""HiCache's Hermite series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..branch import Branch, CacheEntry
from ..options import number
from .base import Baseline, FixedOrder, Terms


@dataclass(frozen=True)
class Hermite(FixedOrder):
    """HiCache's series in the index n of the evaluation, around the last computed one:

        out = out' + sum over i >= 1 of D_i(n') / i! sigma^i H_i(sigma (n - n'))
        D_0(n') = out',   D_i(n') = (D_(i-1)(n') - D_(i-1)(n'')) / (n' - n'')
        H_0(x) = 1,   H_1(x) = 2 x,   H_(i+1)(x) = 2 x H_i(x) - 2 i H_(i-1)(x)

    with n' the last computed evaluation and n'' the one computed before it. It is `TaylorSeer` with
    sigma^i H_i(sigma k) in the place of k^i. Order 1 is TaylorSeer's step of order 1 times 2 sigma^2: half of it at
    sigma = 0.5, all of it at sqrt(1/2). From order 2 on the polynomials also have lower terms: of order 2 it is
    4 sigma^4 k^2 - 2 sigma^2. The weights do not depend on the tensors, so that the guided output, which the source
    predicts, and each branch alone come to the same.

    Args:
        order: the highest i; lower while fewer evaluations were computed. 0 repeats the last one. Default 1.
        sigma: the contraction, from 0 (repeats the last one) to 1. Default 0.5. It is no noise level.
        baseline: what is extrapolated. Published is the output.

    Raises `OptionError` for an order that is no whole number of at least 0, and a sigma outside 0 to 1.
    Keeps order + 1 evaluations, 2 (order + 1) latents a branch.
    Source: arXiv 2508.16984; defaults of hicache-pp 1.3.0.

    Example:
        >>> from stepcache import Static
        >>> from stepcache.extend import Hermite
        >>> Static("medium", predictor=Hermite(order=2)).predictor.history_size
        3
    """

    order: int = 1
    sigma: float = 0.5
    baseline: Baseline = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("sigma", self.sigma, high=1.0)

    def weights(self, branch: Branch) -> Terms:
        entries = list(branch.history)[-self.history_size :]
        ahead = branch.position.evaluation - entries[-1].position.evaluation
        weights = [0.0] * len(entries)
        polynomials = _hermite(len(entries), self.sigma * ahead)
        for i, (polynomial, shares) in enumerate(zip(polynomials, _differences(entries), strict=True)):
            factor = self.sigma**i * polynomial / math.factorial(i)
            weights = [weight + factor * share for weight, share in zip(weights, shares, strict=True)]
        return list(zip(entries, weights, strict=True))


def _hermite(count: int, x: float) -> list[float]:
    """H_0(x), H_1(x), ..., so many."""
    values = [1.0, 2 * x]
    while len(values) < count:
        i = len(values) - 1
        values.append(2 * x * values[i] - 2 * i * values[i - 1])
    return values[:count]


def _differences(entries: Sequence[CacheEntry]) -> list[list[float]]:
    """D_0, D_1, ... at the last of these evaluations, each as weights over all of them."""
    index, count = [entry.position.evaluation for entry in entries], len(entries)
    rows = {j: [float(i == j) for i in range(count)] for j in range(count)}  # D_i at evaluation j
    last = [rows[count - 1]]
    for order in range(1, count):
        rows = {
            j: [(a - b) / (index[j] - index[j - 1]) for a, b in zip(rows[j], rows[j - 1], strict=True)]
            for j in range(order, count)
        }
        last.append(rows[count - 1])
    return last
