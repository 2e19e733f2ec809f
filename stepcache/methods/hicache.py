"""HiCache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..gates.interval import Interval
from ..predictors.hermite import Hermite
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import OptionsWithWindow


@register("hicache", other_names={"max_order": "order", "first_enhance": "warmup"})
def HiCache(
    interval: int = 4, order: int = 1, sigma: float = 0.5, warmup: int = 2, **common: Unpack[OptionsWithWindow]
) -> Method:
    """HiCache, with the defaults of hicache-pp 1.3.0: a quarter of the calls, the rest by Hermite polynomials.

    Which evaluations are computed does not depend on the latents; the prediction as a formula is at
    `stepcache.predictors.hermite.Hermite`.

    Args:
        interval: after the warm-up one of so many evaluations is computed. 1 computes everything.
        order (max_order): of the series.
        sigma: the contraction, 0 to 1. Higher trusts the series more; at 0.7071 order 1 is TaylorSeer's.
        warmup (first_enhance): so many steps are computed first.
        **common: every option of `Method`: start, end, mask, last_step, max_cached, predictor, ... The source's
            `end_enhance`, from which step on everything is computed, is `end` as a share of the run.

    Raises `OptionError` for an unknown option (with the nearest name) and for numbers that are not accepted.
    Source: arXiv 2508.16984. Published is the guided output of the whole network; for samplers with two evaluations a
    step (Heun, DPM2) `stepcache.gates.Interval` says which ones are computed.

    Example:
        >>> from stepcache import HiCache, method
        >>> HiCache(interval=3, last_step=True) == method("hicache", "interval=3,last_step=1")
        True
    """
    gates = (Interval(interval),)
    return Method.make(common, predictor=Hermite(order, sigma), warmup=warmup, gates=gates, name="hicache")
