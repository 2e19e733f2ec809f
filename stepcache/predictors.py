"""Predictors: what a skipped evaluation returns, in the network's own space.

A new one is one class: set `memory`, write `predict`; or, where the prediction is a weighted sum of what was computed
before, write `weights`.

Throughout, x and out are the network's input and raw output now, x_j and out_j those of computed evaluation j.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .clock import near
from .options import number, unknown

if TYPE_CHECKING:
    from .branch import Branch, CacheEntry, History

Baseline = Literal["input", "zero"]
Terms = Sequence[tuple["CacheEntry", "float | Tensor"]]


class Predictor(ABC):
    """Predicts the network's raw output from the evaluations computed before."""

    memory: int = 1
    """How many computed evaluations are kept for it, per branch; each costs two latents."""

    finite_where_memory_is: bool = False
    """Whether a prediction from finite outputs is sure to be finite; then a branch that follows the reference in a
    call of its own need not be checked, which would cost a transfer."""

    sampler_aware: bool = False
    """Whether it looks at `branch.noise` and `parametrization`, which are found out only then."""

    @abstractmethod
    def predict(self, branch: Branch) -> Tensor | None:
        """The raw output expected for the input `branch.x`, as a new tensor of its shape and in float32 or wider.

        `branch.history` holds 1 to `memory` computed evaluations of the same branch and shape, oldest first. None
        where nothing can be told: the evaluation is then computed.
        """

    def remember(self, history: History, entry: CacheEntry) -> None:
        """Takes a computed evaluation into the memory, out of which the oldest falls when it is full."""
        history.append(entry)


@dataclass(frozen=True)
class Reuse(Predictor):
    """Residual reuse, as UCache, EasyCache and most published caches do:

        out = out' + (x - x')

    with x', out' the network input and raw output of the last computed evaluation. Exact where the network is the
    identity plus a constant; of order 0 in sigma.
    """

    memory = 1
    finite_where_memory_is = True

    def predict(self, branch: Branch) -> Tensor:
        return branch.moved + branch.history[-1].out


class LinearPredictor(Predictor):
    """A sum of what was computed before, with weights that need nothing of the tensors:

        out = x + sum_j w_j (out_j - x_j)   baseline="input"
        out = sum_j w_j out_j               baseline="zero"

    The residual carries what is new in x (fresh noise, guidance) into the prediction; the output does not.
    """

    baseline: Baseline
    finite_where_memory_is = True

    def __post_init__(self) -> None:
        if self.baseline not in ("input", "zero"):
            raise unknown("baseline", str(self.baseline), ("input", "zero"))

    @abstractmethod
    def weights(self, branch: Branch) -> Terms | None:
        """Each evaluation used, with its weight; None where nothing can be told."""

    def predict(self, branch: Branch) -> Tensor | None:
        terms = self.weights(branch)
        return None if terms is None else weighted(branch.x, terms, self.baseline)


class FixedOrder(LinearPredictor):
    """A sum over the last order + 1 computed evaluations."""

    order: int

    def __post_init__(self) -> None:
        super().__post_init__()
        number("order", self.order, whole=True)

    @property
    def memory(self) -> int:
        return self.order + 1


def weighted(x: Tensor, terms: Terms, baseline: Baseline) -> Tensor:
    """The sum of `LinearPredictor`, in the dtype of x. A weight is a number, or a tensor of one number a row."""
    out = x.clone() if baseline == "input" else torch.zeros_like(x)
    for entry, weight in terms:
        if baseline == "input":
            _add(out, entry.x, -weight)
        _add(out, entry.out, weight)
    return out


def _add(out: Tensor, term: Tensor, weight: float | Tensor) -> None:
    if isinstance(weight, Tensor):
        out.addcmul_(term, weight.reshape(-1, *[1] * (term.ndim - 1)))
    else:
        out.add_(term, alpha=weight)


@dataclass(frozen=True)
class Lagrange(FixedOrder):
    """The polynomial of degree `order` through the last computed evaluations at different sigmas:

        w_j = product over i != j of (s - s_i) / (s_j - s_i)

    with s the coordinate of `RunInfo`: log sigma, or t for flow models. Exact where the residual (or the output) is a
    polynomial in s of that degree. Through fewer evaluations the degree is lower; degree 0 is `Reuse`.

    Args:
        order: 0 and up. 2 is best for isolated skips, 1 for long runs of them, 0 to 1 for samplers that add noise.
        baseline: what is extrapolated.

    Keeps order + 1 evaluations, 2 (order + 1) latents a branch. Of evaluations at one sigma (Heun's corrector and
    the next step's first) it keeps the newest; one without a coordinate (sigma = 0 in log sigma) is left out.
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
    entries: dict[float, CacheEntry] = {}
    for entry in reversed(history):
        if here is not None and entry.coordinate is not None and len(entries) <= order:
            entries.setdefault(entry.coordinate, entry)
    if not entries or not order:
        return [(history[-1], 1.0)]
    return [
        (entry, math.prod((here - other) / (there - other) for other in entries if other != there))
        for there, entry in entries.items()
    ]


@dataclass(frozen=True)
class TaylorSeer(FixedOrder):
    """TaylorSeer's series in the index n of the evaluation, around the last computed one:

        out = sum_k D_k(n') (n - n')^k / k!,   D_0(n') = out',   D_k(n') = (D_(k-1)(n') - D_(k-1)(n'')) / (n' - n'')

    with n' the last computed evaluation and n'' the one computed before it. At equal gaps D_k is the k-th derivative
    k / 2 gaps before n', at others not even that: degree 1 is reproduced, higher ones are not. Published so.

    Args:
        order: the highest k; lower while fewer evaluations were computed. Default 1, as in diffusers and cache-dit.
        baseline: what is extrapolated. Published is the output, but that of every attention block or block; here it is the
            network's.

    Keeps order + 1 evaluations, 2 (order + 1) latents a branch.
    Source: arXiv 2503.06923; diffusers' `TaylorSeerCacheConfig` (max_order), commit 58eb52c0.
    """

    order: int = 1
    baseline: Baseline = "zero"

    def weights(self, branch: Branch) -> Terms:
        entries = list(branch.history)[-self.memory :]
        index = _host([entry.position.evaluation for entry in entries])
        ahead = branch.position.evaluation - entries[-1].position.evaluation
        derivatives = torch.eye(
            len(entries), dtype=index.dtype, device=index.device
        )  # D_k at each node, over all nodes
        weights = derivatives[-1].clone()
        for k in range(1, len(entries)):
            derivatives = derivatives.diff(dim=0) / index.diff()[k - 1 :, None]
            weights += derivatives[-1] * (ahead**k / math.factorial(k))
        return list(zip(entries, weights.tolist(), strict=True))


@dataclass(frozen=True)
class FiniteDifference(LinearPredictor):
    """FSampler's h2, h3 and h4: order 1, 2 and 3, as if the evaluations were one step apart.

        h2: e = 2 e_1 - e_2,   h3: e = 3 e_1 - 3 e_2 + e_3,   h4: e = 4 e_1 - 6 e_2 + 4 e_3 - e_4

    with e_1 of the last computed evaluation, and e = denoised - x in the sampler's space. That is -sigma out for
    networks that predict noise or a velocity, so that here out = sum_j w_j (sigma_j / sigma) out_j. Even a constant
    output is reproduced only where sigma falls evenly, with every evaluation but this one computed. Published so.

    Args:
        order: 1 to 3; lower while fewer evaluations were computed, and nothing from a single one.

    Keeps order + 1 evaluations, 2 (order + 1) latents a branch. What FSampler does to a prediction besides (refusing
    one whose norm is below 1e-8 or 1e-6 of the last, dividing by a learned factor) is not part of it.
    Source: obisin/ComfyUI-FSampler 1.5.0, commit 5479059; default h2.
    """

    order: int = 1
    baseline = "zero"

    def __post_init__(self) -> None:
        number("order", self.order, low=1, high=3, whole=True)

    @property
    def memory(self) -> int:
        return self.order + 1

    def weights(self, branch: Branch) -> Terms | None:
        entries = list(branch.history)[-self.memory :][::-1]
        sigma, n = branch.position.sigma, len(entries)
        if n < 2 or not 0 < sigma < math.inf:
            return None
        return [
            (entry, (-1) ** j * math.comb(n, j + 1) * entry.position.sigma / sigma) for j, entry in enumerate(entries)
        ]


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
        steps: N. None: the evaluations of the run (50 where they are not known). 50 is what both sources take for all.
        baseline: what is fitted. Published is the last block's output in the paper and the guided denoised in
            stable-diffusion.cpp; for that, stand outside guidance with `scalings="denoised"`.

    Keeps max(m + 1, 6) evaluations, 12 latents a branch at the defaults.
    Source: stable-diffusion.cpp, commit 97d29908, and its defaults. The paper's code (hanjq17/Spectrum, f7b7841) has
    w = 1, m = 4, lam = 0.1 and keeps every computed evaluation. At lam = 0 the fit is done here in float64, with the
    pseudoinverse where there are few evaluations; the reference's depends on how float32 rounds.
    """

    w: float = 0.4
    m: int = 3
    lam: float = 1.0
    steps: int | None = None
    baseline: Baseline = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("w", self.w, high=1.0)
        number("m", self.m, whole=True)
        number("lam", self.lam)
        if self.steps is not None:
            number("steps", self.steps, low=1, whole=True)

    @property
    def memory(self) -> int:
        return max(self.m + 1, 6)

    def weights(self, branch: Branch) -> Terms | None:
        entries = list(branch.history)[-self.memory :]
        if len(entries) < 2:
            return None
        indices = [*(entry.position.evaluation for entry in entries), branch.position.evaluation]
        tau = 2 * _host(indices) / (self.steps or branch.run.asked or 50) - 1
        basis = [torch.ones_like(tau), tau]
        while len(basis) <= self.m:
            basis.append(2 * tau * basis[-1] - basis[-2])
        *fitted, here = torch.stack(basis[: self.m + 1], dim=1)
        fitted = torch.stack(fitted)
        normal = fitted.mT @ fitted
        normal.diagonal().add_(self.lam)
        weights = self.w * (fitted @ (torch.linalg.pinv(normal, hermitian=True) @ here))
        weights[-2:] += (1 - self.w) * _host([-0.5, 1.5])
        return list(zip(entries, weights.tolist(), strict=True))


@dataclass(frozen=True)
class DMD(Predictor):
    """Dynamic mode decomposition: the outputs as powers of one linear map, a sum of exponentials.

        y_(j+1) = A y_j,   out = A^k y' = sum_i phi_i lambda_i^k b_i,   k = (n - n') / (n' - n'')

    with y_j the last computed evaluations, as far back as they are equally far apart; y', y'' the last two; n, n', n''
    the indices of this evaluation and of those. With X = [y_1 ... y''] = U S V^T, cut at 1e-4 of the largest singular
    value, and Y = [y_2 ... y']: A is U^T Y V (S + ridge)^-1 on the columns of U, lambda its eigenvalues and W their
    vectors, phi the columns of Y V (S + ridge)^-1 W, b their least-squares fit to y'. Every row of the batch has its
    own. Exact where a row follows a linear map with no more modes than there are pairs.

    With fewer than four such evaluations, or where the decomposition fails, it is `TaylorSeer(order)`.

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
    """

    history: int = 6
    rank: int = 0
    ridge: float = 1e-8
    order: int = 1
    baseline: Baseline = "input"

    def __post_init__(self) -> None:
        number("history", self.history, low=4, whole=True)
        number("rank", self.rank, whole=True)
        number("ridge", self.ridge)
        TaylorSeer(self.order, self.baseline)

    @property
    def memory(self) -> int:
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
        """A weight for each row and evaluation (B, len(nodes)); None where there is no decomposition."""
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


def _host(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
