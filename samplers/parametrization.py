"""What a host's model means by its input and output, asked of its own scalings: once for all hosts.

Scalings are a function sigma -> (c_skip, c_out, c_in) with denoised = c_skip x + c_out network(c_in x); c_skip = None
means 1. Everything else follows from them: whether the model is a flow, which coordinate predictors extrapolate
in, and what the network's output is (`stepcache.extend.Parametrization`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepcache.extend import Parametrization

Scalings = Callable[[Tensor], tuple[Tensor | None, Tensor, Tensor]]
Factors = tuple[float, float, float]


def eps_scalings(sigma: Tensor) -> tuple[None, Tensor, Tensor]:
    """x = x0 + sigma noise, the network predicts the noise: denoised = x - sigma eps(x / sqrt(sigma^2 + 1))."""
    return None, -sigma, (sigma * sigma + 1).rsqrt()


def flow_scalings(sigma: Tensor) -> tuple[None, Tensor, Tensor]:
    """x = (1 - sigma) x0 + sigma noise, the network predicts noise - x0: denoised = x - sigma v(x)."""
    return None, -sigma, torch.ones_like(sigma)


def denoised_scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The network's output counts as denoised itself, whatever it predicts: what Spectrum and others extrapolate."""
    return torch.zeros_like(sigma), torch.ones_like(sigma), torch.ones_like(sigma)


SCALINGS: dict[str, Scalings] = {"eps": eps_scalings, "flow": flow_scalings, "denoised": denoised_scalings}


class ScalingsAsFloats:
    """Scalings at a sigma as numbers, and what follows from them; `device` is the one that the scalings accept."""

    def __init__(self, scalings: Scalings, device: torch.device | str = "cpu") -> None:
        self._scalings, self._device = scalings, device

    @torch.no_grad()
    def factors(self, sigma: float) -> Factors:
        """(c_skip, c_out, c_in) at sigma."""
        found = self._scalings(torch.tensor([sigma], dtype=torch.float32, device=self._device))
        c_skip, c_out, c_in = (1.0 if c is None else float(c) for c in found)
        return c_skip, c_out, c_in

    def parametrization(self, sigma: float) -> Parametrization:
        """What the network's input and output mean at sigma."""
        return Parametrization.of(sigma, *self.factors(sigma))

    def coordinate(self) -> Callable[[float], float] | None:
        """The coordinate that predictors extrapolate in: flow time t for a flow; None for the usual one, log sigma.

        A flow's network gets x_t = (1 - t) x0 + t noise and predicts noise - x0. Its sigma is t itself, or
        t / (1 - t) if the sampler's x is x_t / (1 - t).
        """
        factors = self.factors(0.5)
        if factors == (1, -0.5, 1):
            return float
        third = 1 / 3
        if all(abs(c - goal) < 1e-6 for c, goal in zip(factors, (2 * third, -third, 2 * third), strict=True)):
            return flow_time
        return None


def flow_time(sigma: float) -> float:
    """t of x_t = (1 - t) x0 + t noise at sigma = t / (1 - t)."""
    return sigma / (1 + sigma)
