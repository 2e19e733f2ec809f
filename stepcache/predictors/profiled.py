"""A profile's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..branch import Branch, CacheEntry, History
from ..clock import near
from ..parametrization import Parametrization
from ..profile import HISTORY, Prediction, Profile
from .adaptive_order import lagrange
from .base import Predictor

Terms = Sequence[tuple[CacheEntry, float, float]]
"""Computed evaluations, each with its weight in the derivative and in the denoised image."""


@dataclass(frozen=True)
class Profiled(Predictor):
    """A weighted sum of computed evaluations, with weights that a calibration has chosen for each skipped one:

        d = sum_j a_j d_j + b_j (x - D_j) / s

    d is the derivative and D the denoised image (`Parametrization`), x the sampler's latent now and s its noise level.
    Learned weights a and b are used if the last computed evaluations are the ones that they were learned for. Else they
    are Lagrange's w_j of the profile's order in the step index: a = (1 - share) w, b = share w.

    Keeps three evaluations, 6 latents a branch.
    """

    profile: Profile
    finite_if_cache_is = True
    parametrized = True

    @property
    def history_size(self) -> int:
        return HISTORY

    def remember(self, history: History, entry: CacheEntry) -> None:
        remember(history, entry)

    def predict(self, branch: Branch) -> Tensor:
        known = self.profile.scaled(branch.run.evaluations or 0).predictions
        how = known.get(branch.position.evaluation, Prediction(1, 0.25))
        return combined(branch.x, terms(how, branch.index, list(branch.history)), branch.parametrization)


def remember(history: History, entry: CacheEntry) -> None:
    """Adds a computed evaluation; of several at one sigma the newest is kept."""
    kept = [old for old in history if not near(old.position.sigma, entry.position.sigma)]
    history.clear()
    history.extend([*kept, entry])


def terms(how: Prediction, index: float | None, history: Sequence[CacheEntry]) -> Terms:
    """The evaluations that a prediction is made of, with their weights."""
    used = history[-len(how.evaluations) :]
    if how.evaluations and tuple(entry.position.evaluation for entry in used) == how.evaluations:
        return list(zip(used, how.derivative, how.denoised, strict=True))
    by_order = lagrange(index, history, how.order)
    return [(entry, (1 - how.share) * weight, how.share * weight) for entry, weight in by_order]


def combined(x: Tensor, terms: Terms, now: Parametrization) -> Tensor:
    """The network's output at its input x that gives the derivative of `Profiled`."""
    (d_x, d_out), (image_x, image_out) = now.derivative, now.denoised
    by_image = sum(b for _, _, b in terms)
    out = x * -((1 - by_image) * d_x / d_out + by_image * image_x / image_out)
    for entry, a, b in terms:
        d, image = entry.parametrization.derivative, entry.parametrization.denoised
        for part, term in enumerate((entry.x, entry.out)):
            factor = a * d[part] / d_out + b * image[part] / image_out
            if factor:
                out.add_(term.to(out.dtype), alpha=factor)
    return out


def scale(now: Parametrization) -> tuple[float, float]:
    """(s, c) with denoised = c x - s derivative: the noise level, and the sampler's latent over the network's input."""
    (d_x, d_out), (image_x, image_out) = now.derivative, now.denoised
    s = -image_out / d_out
    return s, image_x + s * d_x


def derivative(x: Tensor, out: Tensor, now: Parametrization) -> Tensor:
    """The derivative that an input and an output of the network give."""
    return torch.add(x * now.derivative[0], out, alpha=now.derivative[1])


def output(x: Tensor, d: Tensor, now: Parametrization) -> Tensor:
    """The network's output that gives this derivative at the input x."""
    return torch.add(d, x, alpha=-now.derivative[0]).div_(now.derivative[1])
