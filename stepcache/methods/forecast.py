"""Forecast, our own: computes every second evaluation and predicts the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..gates.interval import Interval
from ..gates.short_run import ShortRun
from ..predictors.adaptive_order import AdaptiveOrder
from ..predictors.lagrange import Lagrange
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import CommonOptions


@register("forecast", main="interval")
def Forecast(interval: int = 2, min_evaluations: int = 9, **common: Unpack[CommonOptions]) -> Method:
    """Our own: computes every second evaluation and predicts the others, by an order that chooses itself.

    Nothing is calibrated, and the calls are known before the run: `stepcache.extend.Interval` says which. The
    prediction, as a formula at `stepcache.extend.AdaptiveOrder`, extrapolates what the sampler integrates. As far as
    the sampler adds fresh noise it follows the latent instead; the noise is measured in the run itself
    (`stepcache.extend.FreshNoise`).

    Args:
        interval: of so many evaluations one is computed: 2 (the default) is half the calls, 3 a third. 1 computes
            everything. The first two and the last step are computed too.
        min_evaluations: a run of fewer evaluations (LCM, Lightning, Turbo) is computed throughout, and the report says
            so. Default 9: in runs of 4, 5 and 6 evaluations, with three samplers and four networks, as many calls
            spent on a run of fewer steps were better in 34 of 36 cases, by 4.5 dB on average; in runs of 8 in 7 of 12,
            by 0.2 dB. 0: no run is too short. With skip="uncond", a smaller change, it does not act.
        **common: every option of `Method`: start, end, mask, warmup, last_step, max_cached, predictor, ... With
            skip="uncond" the predictor is `Lagrange(1)`, because a difference of branches is predicted, which fresh
            noise hardly touches; and only the first evaluation is computed in any case.

    A static mask is the whole timetable: the interval does not act beside it, only the last step is computed in any
    case (`last_step=False` leaves it to the mask). A dynamic mask adds to the interval: its ones are computed, too, so
    that a run gets slower, not faster.

    For samplers with two evaluations a step (Heun, DPM2, DPM++ SDE) it should know so: use `sample`, or `sigmas` and
    the sampler's callback. What it reaches, and when it does not help, is measured in docs/measurements.md.

    Example:
        >>> from stepcache import Forecast
        >>> Forecast(3).name
        'forecast'
    """
    relative = common.get("skip") == "uncond"
    gates = (ShortRun(0 if relative else min_evaluations), Interval(interval, start=1 if relative else 2))
    predictor = Lagrange(1) if relative else AdaptiveOrder()
    return Method.make(common, predictor=predictor, last_step=True, gates=gates, name="forecast")
