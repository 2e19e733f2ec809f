"""Dynamic mode decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..branch import Branch, CacheEntry
from ..options import make_whole, number
from .base import HIGHEST, Baseline, Predictor, weighted
from .taylorseer import TaylorSeer


@dataclass(frozen=True)
class DMD(Predictor):
    """Dynamic mode decomposition: the outputs as powers of one linear map, a sum of exponentials.

        y_(j+1) = A y_j,   out = A^k y' = sum_i phi_i lambda_i^k b_i,   k = (n - n') / (n' - n'')

    with y_j the last computed evaluations, as far back as they are equally far apart; y', y'' the last two; n, n', n''
    the indices of this evaluation and of those. With X = [y_1 ... y''] = U S V^T, cut at 1e-4 of the largest singular
    value, and Y = [y_2 ... y']: A is U^T Y V (S + ridge)^-1 on the columns of U, lambda its eigenvalues and W their
    vectors, phi the columns of Y V (S + ridge)^-1 W, b their least-squares fit to y'. Every row of the batch has its
    own. Exact if a row follows a linear map with no more modes than there are pairs.

    With fewer than four such evaluations, or if the decomposition fails, it is `TaylorSeer(order)`.

    Args:
        history: how many evaluations are looked at.
        rank: at most so many modes; 0: as many as there are.
        ridge: added to the singular values before they are inverted.
        order: of the series in place of it.
        baseline: what is forecast. Published is the residual of the blocks that are left out; here it is the network's.

    All of it follows from the products of the y_j with each other, which is how it is done here: `history` squared
    numbers a row go to the host at every evaluation, computed ones too, for the report. They need `history` latents of
    float64 for a moment, and a device that has float64. Keeps `history` evaluations, 12 latents a branch at the
    default.
    Source: vipshop/cache-dit, commit f86744af, and its defaults.

    Example:
        >>> from stepcache import Forecast
        >>> from stepcache.extend import DMD
        >>> Forecast(predictor=DMD(history=4)).predictor.history_size
        4
    """

    history: int = 6
    rank: int = 0
    ridge: float = 1e-8
    order: int = 1
    baseline: Baseline = "input"

    def __post_init__(self) -> None:
        make_whole(self, "history", low=4, high=HIGHEST)
        make_whole(self, "rank", high=HIGHEST)
        number("ridge", self.ridge)
        TaylorSeer(self.order, self.baseline)

    @property
    def history_size(self) -> int:
        return max(self.history, self.order + 1)

    def predict(self, branch: Branch) -> Tensor | None:
        entries = self._evenly_spaced(branch.history)
        weights = self._weights(branch, entries) if len(entries) >= 4 else None
        if weights is None:
            return TaylorSeer(self.order, self.baseline).predict(branch)
        terms = list(zip(entries, weights.to(branch.x).unbind(1), strict=True))
        return weighted(branch.x, terms, self.baseline)

    def _evenly_spaced(self, history: Sequence[CacheEntry]) -> list[CacheEntry]:
        """The newest evaluations, as far back as all are equally far apart."""
        entries = list(history)[-self.history :]
        index = [entry.position.evaluation for entry in entries]
        first = max(len(entries) - 2, 0)
        while first > 0 and index[first] - index[first - 1] == index[-1] - index[-2]:
            first -= 1
        return entries[first:]

    def _weights(self, branch: Branch, entries: list[CacheEntry]) -> Tensor | None:
        """A weight for each row and evaluation (B, len(nodes)); None if there is no decomposition."""
        rows = [self._values(entry).reshape(len(branch.x), -1) for entry in entries]
        stacked = torch.stack(rows, dim=1)
        products = (stacked @ stacked.mT).cpu()
        last, before = entries[-1].position.evaluation, entries[-2].position.evaluation
        ahead = (branch.position.evaluation - last) / (last - before)
        try:
            weights = torch.stack([self._forecast(product, ahead) for product in products])
        except RuntimeError:  # not finite, or no eigenvalues found
            return None
        return weights if weights.isfinite().all() else None

    def _values(self, entry: CacheEntry) -> Tensor:
        return entry.out.double() - entry.x if self.baseline == "input" else entry.out.double()

    def _forecast(self, products: Tensor, k: float) -> Tensor:
        """Weights over the y_j of one row, from their products among each other."""
        squares, v = torch.linalg.eigh(products[:-1, :-1])
        s = squares.clamp(min=0).sqrt()
        modes = max(1, int((s > 1e-4 * s[-1]).sum()))
        modes = min(modes, self.rank or modes)
        s, v = s[-modes:], v[:, -modes:]
        rates, w = torch.linalg.eig((v / s).mT @ products[:-1, 1:] @ (v / (s + self.ridge)))
        phi = (v / (s + self.ridge)).to(w) @ w
        squares, q = torch.linalg.eigh(products[1:, 1:])
        y = (squares.clamp(min=0).sqrt()[:, None] * q.mT).to(w)  # as Y, in its own columns' space
        b = torch.linalg.lstsq(y @ phi, y[:, -1:]).solution
        weights = (phi @ (rates[:, None] ** k * b)).real[:, 0]
        return torch.cat([weights.new_zeros(1), weights])
