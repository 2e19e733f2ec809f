"""FSampler's finite differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..branch import Branch
from ..options import make_whole
from .base import LinearPredictor, Terms


@dataclass(frozen=True)
class FiniteDifference(LinearPredictor):
    """FSampler's h2, h3 and h4: order 1, 2 and 3, as if the evaluations were one step apart.

        h2: e = 2 e_1 - e_2,   h3: e = 3 e_1 - 3 e_2 + e_3,   h4: e = 4 e_1 - 6 e_2 + 4 e_3 - e_4

    with e_1 of the last computed evaluation, and e = denoised - x in the sampler's space. That is -sigma out for
    networks that predict noise or a velocity, so that here out = sum_j w_j (sigma_j / sigma) out_j. Even a constant
    output is reproduced only if sigma falls evenly, with every evaluation but this one computed. Published so.

    Args:
        order: 1 to 3; lower while fewer evaluations were computed, and nothing from a single one.

    Keeps order + 1 evaluations, 2 (order + 1) latents a branch. What FSampler does to a prediction besides (refusing
    one whose norm is below 1e-8 or 1e-6 of the last, dividing by a learned factor) is not part of it.
    Source: obisin/ComfyUI-FSampler 1.5.0, commit 5479059; default h2.

    Example:
        >>> from stepcache import Static
        >>> from stepcache.extend import FiniteDifference
        >>> Static("fast", predictor=FiniteDifference(2)).predictor.history_size
        3
    """

    order: int = 1
    baseline = "zero"

    def __post_init__(self) -> None:
        make_whole(self, "order", low=1, high=3)

    @property
    def history_size(self) -> int:
        return self.order + 1

    def weights(self, branch: Branch) -> Terms | None:
        entries = list(branch.history)[-self.history_size :][::-1]
        sigma, n = branch.position.sigma, len(entries)
        if n < 2 or not 0 < sigma < math.inf:
            return None
        return [
            (entry, (-1) ** j * math.comb(n, j + 1) * entry.position.sigma / sigma) for j, entry in enumerate(entries)
        ]
