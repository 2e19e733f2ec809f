"""Forecast, our own: computes every second evaluation and predicts the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..gates.interval import Interval
from ..predictors.adaptive_order import AdaptiveOrder
from ..predictors.lagrange import Lagrange
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import CommonOptions


@register("forecast", main="interval")
def Forecast(interval: int = 2, **common: Unpack[CommonOptions]) -> Method:
    """Our own: computes every second evaluation and predicts the others, by an order that chooses itself.

    Nothing is calibrated, and the calls are known before the run: `stepcache.extend.Interval` says which. The
    prediction, as a formula at `stepcache.extend.AdaptiveOrder`, extrapolates what the sampler integrates. As far as
    the sampler adds fresh noise it follows the latent instead; the noise is measured in the run itself
    (`stepcache.extend.FreshNoise`).

    Args:
        interval: of so many evaluations one is computed: 2 (the default) is half the calls, 3 a third. 1 computes
            everything. The first two and the last step are computed too.
        **common: every option of `Method`: start, end, mask, warmup, last_step, max_cached, predictor, ... With
            skip="uncond" the predictor is `Lagrange(1)`, because a difference of branches is predicted, which fresh
            noise hardly touches; and only the first evaluation is computed in any case.

    For samplers with two evaluations a step (Heun, DPM2, DPM++ SDE) it should know so: use `sample`, or `sigmas` and
    the sampler's callback. What it reaches, and when it does not help, is measured in docs/measurements.md.

    Example:
        >>> from stepcache import Forecast
        >>> Forecast(3).name
        'forecast'
    """
    relative = common.get("skip") == "uncond"
    gates = (Interval(interval, start=1 if relative else 2),)
    predictor = Lagrange(1) if relative else AdaptiveOrder()
    return Method.make(common, predictor=predictor, last_step=True, gates=gates, name="forecast")
