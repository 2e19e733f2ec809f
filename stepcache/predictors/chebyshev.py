"""Spectrum's Chebyshev polynomials."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..branch import Branch
from ..masks import LONGEST
from ..options import make_whole, number
from .base import HIGHEST, Baseline, LinearPredictor, Terms, on_host


@dataclass(frozen=True)
class Chebyshev(LinearPredictor):
    """Spectrum's predictor: Chebyshev polynomials T_j fitted by ridge regression, mixed with a line.

        out = w sum_j a_j T_j(tau) + (1 - w) (out_1 + (out_1 - out_2) / 2),   tau = 2 n / N - 1
        a = (X'X + lam I)^-1 X'H,   X the T_j at the last max(m + 1, 6) computed evaluations, H their outputs

    with n the evaluation's index and out_1, out_2 the last two outputs; the line goes half a gap on, however far n is.
    With fewer than two outputs there is no prediction.

    Args:
        w: the share of the polynomials, 0 to 1.
        m: their highest degree.
        lam: the ridge. It also pulls a constant output toward 0: at lam = 1 by some per cent.
        steps: N. None: the evaluations of the run (50 if they are not known). 50 is what both sources take for all.
        baseline: what is fitted. Published is the last block's output in the paper and the guided denoised in
            stable-diffusion.cpp; for that, put the cache outside guidance with `scalings="denoised"`.

    Keeps max(m + 1, 6) evaluations, 12 latents a branch at the defaults.
    Source: stable-diffusion.cpp, commit 97d29908, and its defaults. The paper's code (hanjq17/Spectrum, f7b7841) has
    w = 1, m = 4, lam = 0.1 and keeps every computed evaluation. At lam = 0 the fit is done here in float64, with the
    pseudoinverse if there are few evaluations; the original's depends on how float32 rounds.

    Example:
        >>> from stepcache import Static
        >>> from stepcache.extend import Chebyshev
        >>> Static("fast", predictor=Chebyshev(m=2)).predictor.m
        2
    """

    w: float = 0.4
    m: int = 3
    lam: float = 1.0
    steps: int | None = None
    baseline: Baseline = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("w", self.w, high=1.0)
        make_whole(self, "m", high=HIGHEST)
        number("lam", self.lam, high=1e6)
        if self.steps is not None:
            make_whole(self, "steps", low=1, high=LONGEST)

    @property
    def history_size(self) -> int:
        return max(self.m + 1, 6)

    def weights(self, branch: Branch) -> Terms | None:
        entries = list(branch.history)[-self.history_size :]
        if len(entries) < 2:
            return None
        indices = [*(entry.position.evaluation for entry in entries), branch.position.evaluation]
        tau = 2 * on_host(indices) / (self.steps or branch.run.asked or 50) - 1
        basis = [torch.ones_like(tau), tau]
        while len(basis) <= self.m:
            basis.append(2 * tau * basis[-1] - basis[-2])
        rows = torch.stack(basis[: self.m + 1], dim=1)
        fitted, here = rows[:-1], rows[-1]
        normal = fitted.mT @ fitted
        normal.diagonal().add_(self.lam)
        weights = self.w * (fitted @ (torch.linalg.pinv(normal, hermitian=True) @ here))
        weights[-2:] += (1 - self.w) * on_host([-0.5, 1.5])
        return list(zip(entries, weights.tolist(), strict=True))
