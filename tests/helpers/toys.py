"""Toy models whose every number can be worked out by hand.

Their network space is the latent space (`plain`: c_skip 0, c_out 1, c_in 1), so what a toy returns is its raw output.
With `twice`, out = 2 x, residual reuse after a computed evaluation at x' gives x + (2 x' - x') = x + x': a skipped
evaluation returns x + x', a computed one 2 x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepcache import Method
from stepcache.extend import Branch, Criterion, Predictor, Verdict
from stepcache.samplers.k_diffusion import CachedDenoiser

SIX = (10.0, 8.0, 6.0, 4.0, 2.0, 1.0, 0.0)
"""Six steps; no sigma is another's Heun corrector or half-way point."""


def plain(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(sigma), torch.ones_like(sigma), torch.ones_like(sigma)


def twice(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
    return 2 * x


class Toy(nn.Module):
    """`denoised = function(x, sigma, **extra)`, remembering what it was called with and what it returned."""

    def __init__(self, function: Callable[..., Tensor] = twice) -> None:
        super().__init__()
        self.function = function
        self.seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        self.returned: list[Tensor] = []

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        self.seen.append((x, sigma, extra))
        self.returned.append(self.function(x, sigma, **extra))
        return self.returned[-1]


class Forgetful(nn.Module):
    """As `Toy`, remembering nothing: for tests of what stays alive."""

    def __init__(self, function: Callable[..., Tensor] = twice, **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        return self.function(x, sigma, **extra)


class SkipOdd(Criterion):
    """Skips every odd evaluation: a criterion in two lines."""

    def decide(self, branch: Branch) -> Verdict:
        return Verdict(branch.position.evaluation % 2 == 1)


class LogSigmaLine(Predictor):
    """The line through the last two outputs over log sigma: a predictor in four lines."""

    history_size = 2
    finite_if_cache_is = True

    def predict(self, branch: Branch) -> Tensor | None:
        if len(branch.history) < 2:
            return None
        (s0, a), (s1, b) = ((math.log2(entry.position.sigma), entry.out) for entry in list(branch.history)[-2:])
        return b + (b - a) * ((math.log2(branch.position.sigma) - s1) / (s1 - s0))


def level(sigma: float, rows: int = 1) -> Tensor:
    return torch.full((rows,), float(sigma))


def filled(value: float, rows: int = 1) -> Tensor:
    return torch.full((rows, 1, 2, 2), float(value))


def cached(network: Callable[..., Tensor], method: Method | str | None, **keywords: Any) -> CachedDenoiser:
    inner = network if isinstance(network, nn.Module) else Toy(network)
    return CachedDenoiser(inner, method, scalings=plain, **keywords)


def drive(model: CachedDenoiser, sigmas: Iterable[float], xs: Iterable[float] | float, **extra: Any) -> list[float]:
    """Evaluates at each sigma with x filled with each number; the numbers that the answers are filled with."""
    sigmas = tuple(sigmas)
    xs = [xs] * len(sigmas) if isinstance(xs, (int, float)) else list(xs)
    answers = [model(filled(x), level(s), **extra) for s, x in zip(sigmas, xs, strict=True)]
    assert all((answer == answer.flatten()[0]).all() or answer.isnan().all() for answer in answers)
    return [float(answer.flatten()[0]) for answer in answers]


def decisions(model: CachedDenoiser, branch: str = "guided") -> str:
    return model.report.decisions(branch)


def reasons(model: CachedDenoiser, branch: str = "guided") -> list[str]:
    return [event.reason for event in model.report.events if event.branch == branch]


def heun(sigmas: Sequence[float]) -> list[float]:
    """The sigmas at which Heun evaluates: sigma[i] and, but for the last step, sigma[i + 1]."""
    asked = [sigmas[0]]
    for sigma in sigmas[1:-1]:
        asked += [sigma, sigma]
    return asked if sigmas[-1] == 0 else [*asked, sigmas[-1]]
