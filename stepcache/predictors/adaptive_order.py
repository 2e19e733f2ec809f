"""Forecast's predictor: a polynomial of an order that chooses itself, through what the sampler integrates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..branch import Branch, CacheEntry, History
from ..clock import near
from ..deferred import widened
from ..options import make_whole, number
from ..parametrization import Parametrization
from .base import HIGHEST, Predictor

RESPONSE = 0.25, 0.8
"""The share of denoised in the prediction, without noise and under fresh noise."""

TRUST = 5.0, 1.3
"""The ratio of errors at which half of order 1 is kept, without noise and under fresh noise."""

HIGHER = 0.5
"""The most that is kept of an order above 1, as a share of the order below it."""

UNTRIED_REACH = 1.5
"""Extrapolation distance, relative to the span of the history, at which an untested order gets weight 1/2."""


@dataclass(frozen=True)
class AdaptiveOrder(Predictor):
    """A Lagrange polynomial in the schedule's step index s, through the derivative that the sampler integrates.

        d_p = sum_j w_j d_j,   D_p = sum_j w_j D_j,   w_j = product over i != j of (s - s_i) / (s_j - s_i)
        out_p = (1 - r) out(d_p) + r out(D_p)
        out = out_0 + sum over p >= 1 of g_p (out_p - out_(p-1)),   g_p = g_(p-1) h_p / (1 + (e_p / (t_p e_(p-1)))^4)

    d is the derivative, eps = (x - denoised) / sigma or a flow's velocity, and D the denoised image
    (`Parametrization`); out(...) is the network's output that gives this derivative, or this image, at the input now.
    The derivative is the smooth quantity along a deterministic run, whatever the network predicts and however its data
    are centred. The share r of the image lets the prediction follow x if x itself has left the smooth path: a little
    (r = 0.25) because earlier predictions have moved it, which otherwise builds up under multistep samplers; mostly
    (r = 0.8) under fresh noise, which the network would see. Between the two r follows the measured noise level
    (`noise.FreshNoise`).

    e_p is the backtest error: how far order p would have been off at the last computed evaluation, in rms over the
    sample. h_1 = 1 and h_p = 1/2 above; t_1 is 5, or 1.3 under noise, and t_p = 1.3 above. An order that has not been
    tested yet is kept up to one and a half times as far as its history spans. Everything is per sample and stays on the
    device: a sample does not depend on its neighbours, and a prediction costs no network call and no transfer.

    Args:
        order: the highest order. Default 2.
        trust: t_p above order 1. Default 1.3.

    Keeps order + 1 evaluations, 2 (order + 1) latents a branch.
    Source: ours; chosen on the development networks of the zoo (docs/measurements.md).

    Example:
        >>> from stepcache import Static
        >>> from stepcache.extend import AdaptiveOrder
        >>> Static("medium", predictor=AdaptiveOrder(order=1)).predictor.history_size
        2
    """

    order: int = 2
    trust: float = 1.3
    finite_if_cache_is = True
    sampler_aware = True

    def __post_init__(self) -> None:
        make_whole(self, "order", high=HIGHEST)
        number("trust", self.trust)

    @property
    def history_size(self) -> int:
        return self.order + 1

    def remember(self, history: History, entry: CacheEntry) -> None:
        kept = [old for old in history if not near(old.position.sigma, entry.position.sigma)]
        if kept:
            entry = replace(entry, backtest_errors=_backtest_errors(entry, kept))
        history.clear()
        history.extend([*kept, entry])

    def predict(self, branch: Branch) -> Tensor:
        history, x = list(branch.history), branch.x
        here = branch.index
        kept = [*self._kept(history, here, branch.noise), 0.0]
        total: dict[int, Tensor | float] = dict.fromkeys(range(len(history)), 0.0)
        place = {id(entry): k for k, entry in enumerate(history)}
        for p in range(len(history)):
            share = kept[p] - kept[p + 1]
            for entry, weight in lagrange(here, history, p):
                total[place[id(entry)]] = total[place[id(entry)]] + weight * share
        weights = [(entry, total[k]) for k, entry in enumerate(history)]
        return _combined(x, weights, branch.parametrization, branch.noise)

    def _kept(self, history: Sequence[CacheEntry], here: float | None, noise: Tensor | None) -> list[Tensor | float]:
        """g_0, g_1, ... as far as there are evaluations for; each a number, or one a sample."""
        errors = history[-1].backtest_errors
        kept: list[Tensor | float] = [1.0]
        for p in range(1, len(history)):
            share: Tensor | float = 1.0 if p == 1 else HIGHER
            if errors is not None and p < len(errors):
                trust = self.trust if p > 1 else _between(TRUST, noise)
                ratio = errors[p] / (trust * errors[p - 1] + torch.finfo(errors.dtype).tiny)
                share = (share / (1 + ratio**4)).nan_to_num(nan=0.0)
            else:
                reach = _reach(here, history[-1].index, history[-1 - p].index)
                share /= 1 + (reach / UNTRIED_REACH) ** 8
            kept.append(kept[-1] * share)
        return kept


def lagrange(here: float | None, history: Sequence[CacheEntry], order: int) -> list[tuple[CacheEntry, float]]:
    """Each of the last order + 1 evaluations at different indices, with its weight; the last one alone at worst."""
    if here is None or not order:
        return [(history[-1], 1.0)]
    entries: dict[float, CacheEntry] = {}
    for entry in reversed(history):
        if entry.index is not None and len(entries) <= order:
            entries.setdefault(entry.index, entry)
    if not entries:
        return [(history[-1], 1.0)]
    return [
        (entry, math.prod((here - other) / (there - other) for other in entries if other != there))
        for there, entry in entries.items()
    ]


def _backtest_errors(entry: CacheEntry, history: Sequence[CacheEntry]) -> Tensor:
    """How far each order would have been off at a computed evaluation: rms over `some_rows` of each sample (P, B).

    out(d_p) is off by (d_p - d) / b and out(D_p) by (D_p - D) / scale (`Parametrization`), so that a mixture of both is
    extrapolated.
    """
    entry, history = entry.some_rows(), [old.some_rows() for old in history]
    by_derivative, by_denoised = (_rows(one, widened(entry.x)) for one in _shares(entry.parametrization, entry.noise))

    def mixture(one: CacheEntry) -> Tensor:
        x, out, kind = widened(one.x), widened(one.out), one.parametrization
        return (_linear(kind.derivative, x, out) * by_derivative).addcmul_(_linear(kind.denoised, x, out), by_denoised)

    known, now = {id(old): mixture(old) for old in history}, mixture(entry)
    errors = []
    for p in range(len(history)):
        error = -now
        for old, weight in lagrange(entry.index, history, p):
            error.add_(known[id(old)], alpha=weight)
        errors.append(error)
    return torch.stack(errors).flatten(2).square_().mean(2).sqrt_()


def _shares(now: Parametrization, noise: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """What the output takes of a derivative, and of a denoised image."""
    share = _between(RESPONSE, noise)
    return (1 - share) / now.derivative[1], share / now.denoised[1]


def _linear(pair: tuple[float, float], x: Tensor, out: Tensor) -> Tensor:
    """pair[0] x + pair[1] out."""
    return torch.add(out if pair[1] == 1 else out * pair[1], x, alpha=pair[0]) if pair[0] else out * pair[1]


def _combined(
    x: Tensor, weights: Sequence[tuple[CacheEntry, Tensor | float]], now: Parametrization, noise: Tensor | None
) -> Tensor:
    """The output at x whose derivative and denoised are the weighted sums of the nodes', mixed as `RESPONSE` has it."""
    by_derivative, by_denoised = _shares(now, noise)
    out = x * _rows(-by_derivative * now.derivative[0] - by_denoised * now.denoised[0], x)
    for entry, weight in weights:
        d, D = entry.parametrization.derivative, entry.parametrization.denoised
        for part, term in enumerate((entry.x, entry.out)):
            factor = weight * (by_derivative * d[part] + by_denoised * D[part])
            if isinstance(factor, Tensor) or factor:
                out.addcmul_(term.to(out.dtype), _rows(factor, out).to(out.dtype).expand_as(out))
    return out


def _rows(factor: Tensor | float, x: Tensor) -> Tensor:
    """A number, or one a sample (B,), as a factor for x (B, ...)."""
    if not isinstance(factor, Tensor):
        return torch.full([1] * x.ndim, factor, dtype=x.dtype, device=x.device)
    return factor.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _between(ends: tuple[float, float], noise: Tensor | None) -> Tensor | float:
    """The value for a noise level from 0 to 1 (B,), between the one without noise and the one under it."""
    return ends[0] if noise is None else ends[0] + (ends[1] - ends[0]) * noise


def _reach(here: float | None, newest: float | None, oldest: float | None) -> float:
    """How far a place is beyond the history, relative to the history's span; 0 if that is not known or empty."""
    if here is None or newest is None or oldest is None or newest == oldest:
        return 0.0
    return abs(here - newest) / abs(newest - oldest)
