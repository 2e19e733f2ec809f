"""UniPC in k-diffusion's convention, which has no sampler of that name.

Source: Zhao et al. (2023), arXiv 2302.04867: UniPC-2 with B2(h) = exp(h) - 1, predicting x0, multistep; the numbers of
diffusers' `UniPCMultistepScheduler` with its defaults. ComfyUI's `uni_pc_bh2` is the same at order 2.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import expm1, log
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def sample_unipc(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Samples x (B, ...) from sigmas[0] to sigmas[-1], with one evaluation a step: n for n + 1 sigmas.

    Every step predicts x at its end (UniP-2). The evaluation there then corrects that x (UniC-2) before the next step
    begins; the first step and the last one are of order 1. There is no progress bar: `disable` is there because the
    samplers of k-diffusion have it.
    """
    extra_args, levels = extra_args or {}, sigmas.tolist()
    at: list[float] = []  # the sigmas of the last two evaluations, and what came of them
    m: list[Tensor] = []
    corrected = x
    for i, (sigma, end) in enumerate(pairwise(levels)):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        if m:
            corrected = _unic(corrected, at, m, sigma, denoised)
        at, m = [*at[-1:], sigma], [*m[-1:], denoised]
        last = i == len(levels) - 2
        x = denoised if end == 0 else _unip(corrected, at[-1:] if last else at, m[-1:] if last else m, end)
    return x


def _unip(x: Tensor, at: list[float], m: list[Tensor], end: float) -> Tensor:
    """The predictor: x at sigma `end` from x at `at[-1]`. With two evaluations rho = 1/2, as in the paper."""
    h = log(at[-1] / end)
    x = _first(x, at, m, end)
    return x if len(m) == 1 else x - expm1(-h) / 2 * _d1(at, m, h)


def _unic(x: Tensor, at: list[float], m: list[Tensor], end: float, denoised: Tensor) -> Tensor:
    """The corrector: x at sigma `end` from x at `at[-1]`, with the evaluation at `end` known.

    rho solves sum_k rho_k r_k^(n-1) = n! h phi_(n+1)(h) / B(h), n = 1, 2, with r = 1 at `end`.
    """
    h = log(at[-1] / end)
    base, b = _first(x, at, m, end), expm1(-h)
    if len(m) == 1:
        return base - b / 2 * (denoised - m[-1])
    r = log(at[-1] / at[-2]) / h
    phi2 = -b / h - 1
    phi3 = -phi2 / h - 1 / 2
    rho1 = (phi2 - 2 * phi3) / b / (1 - r)
    rho2 = phi2 / b - rho1
    return base - b * (rho1 * _d1(at, m, h) + rho2 * (denoised - m[-1]))


def _first(x: Tensor, at: list[float], m: list[Tensor], end: float) -> Tensor:
    """The step of order 1, which is DDIM's: x (end / sigma) - (exp(-h) - 1) m."""
    return end / at[-1] * x - expm1(-log(at[-1] / end)) * m[-1]


def _d1(at: list[float], m: list[Tensor], h: float) -> Tensor:
    """D1 / r: the difference to the evaluation before, over a step of the same length in log sigma."""
    return (m[-2] - m[-1]) / (log(at[-1] / at[-2]) / h)
