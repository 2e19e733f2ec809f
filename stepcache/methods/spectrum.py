"""Spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..gates.spectrum import SpectrumCadence
from ..predictors.chebyshev import Chebyshev
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import OptionsWithWindow


@register("spectrum", main="window_size")
def Spectrum(
    w: float = 0.4,
    m: int = 3,
    lam: float = 1.0,
    window_size: float = 2,
    flex_window: float = 0.5,
    warmup: int = 4,
    stop: float = 0.9,
    steps: int | None = None,
    **common: Unpack[OptionsWithWindow],
) -> Method:
    """Spectrum, with the defaults of stable-diffusion.cpp (commit 97d29908) and the names of the paper's code.

    Computes at growing gaps, whatever the latents do (`stepcache.gates.SpectrumCadence`), and fits Chebyshev
    polynomials to what was computed (`stepcache.predictors.Chebyshev`) as well; the formulas are there.

    Args:
        w: the share of the polynomials in the prediction; the rest is a line.
        m: their highest degree.
        lam: the ridge of their fit.
        window_size, flex_window: every so many evaluations one is computed, and how much that grows with each.
        warmup: so many evaluations are computed first.
        stop: from this share of the run on everything is computed; 0 does not stop.
        steps: the length of the run that the polynomials are scaled to. None: its own; 50 is published for every run.
        **common: every option of `Method`: mask, last_step, max_cached, max_consecutive, predictor, ...

    Published for the guided denoised: `CachedDenoiser(guided, Spectrum(), scalings="denoised")`.

    Example:
        >>> from stepcache import Spectrum
        >>> Spectrum(w=0.5, window_size=3).predictor
        Chebyshev(w=0.5, m=3, lam=1.0, steps=None, baseline='zero')
    """
    cadence = SpectrumCadence(window_size, flex_window, warmup, stop)
    return Method.make(common, predictor=Chebyshev(w, m, lam, steps), gates=(cadence,), name="spectrum")
