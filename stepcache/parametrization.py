"""What a network's input and raw output mean at one noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

Pair = tuple[float, float]
"""(a, b) means a x + b out."""


@dataclass(frozen=True)
class Parametrization:
    """How the network's input x and its raw output out make what a sampler works with, at one noise level:

        derivative = derivative[0] x + derivative[1] out
        denoised   = denoised[0] x + denoised[1] out

    The derivative is what a deterministic sampler integrates: eps = (x - denoised) / sigma in the sampler's space, or
    the velocity of a flow. The default is for a network of which nothing is known: its raw output counts as the
    derivative, and its residual out - x takes the place of denoised.

    Example:
        >>> from stepcache.extend import Parametrization
        >>> eps = Parametrization.of(2.0, 1.0, -2.0, 5**-0.5)  # sigma, c_skip, c_out, c_in
        >>> eps.derivative  # the network predicts eps, which is the derivative
        (0.0, 1.0)
    """

    derivative: Pair = (0.0, 1.0)
    denoised: Pair = (-1.0, 1.0)

    @classmethod
    def of(cls, sigma: float, c_skip: float, c_out: float, c_in: float) -> Parametrization:
        """From k-diffusion's scalings: denoised = c_skip x + c_out network(c_in x), with x the sampler's latent.

        If denoised is the network's input plus a multiple of its output, the network is a flow and its output the
        derivative.

        Example, of a network that predicts noise:
            >>> Parametrization.of(2.0, c_skip=1.0, c_out=-2.0, c_in=5**-0.5).denoised
            (2.23606797749979, -2.0)
        """
        if not (sigma > 0 and c_in and c_out and math.isfinite(c_skip / c_in)):
            return cls()
        denoised = c_skip / c_in, c_out
        if abs(denoised[0] - 1) < 1e-5:
            return cls((0.0, 1.0), denoised)
        return cls(((1 / c_in - denoised[0]) / sigma, -c_out / sigma), denoised)

    @classmethod
    def flow(cls, t: float) -> Parametrization:
        """Of a flow network v = network(x_t, t) = noise - x0 at x_t = (1 - t) x0 + t noise, which samplers call as is.

        Example:
            >>> Parametrization.flow(0.25).denoised
            (1.0, -0.25)
        """
        return cls((0.0, 1.0), (1.0, -t)) if t > 0 else cls()
