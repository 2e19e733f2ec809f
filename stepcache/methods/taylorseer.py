"""TaylorSeer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..criteria.always import Always
from ..gates.interval import Interval
from ..options import number
from ..predictors.taylorseer import TaylorSeer
from .base import Method
from .dbcache import OTHER_NAMES, PRESETS, dual_block, masked
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import OptionsWithWindow


NAMES = {
    **OTHER_NAMES,
    **dict.fromkeys(("taylorseer_order", "n_derivatives", "max_order"), "order"),
    "cache_interval": "interval",
}


@register("taylorseer", main="threshold", other_names=NAMES, presets=PRESETS)
def TaylorSeerCache(
    Fn: int = 8,
    Bn: int = 0,
    threshold: float = 0.08,
    warmup: int = 8,
    preset: str | None = None,
    policy: str | None = None,
    order: int = 1,
    interval: int = 0,
    **common: Unpack[OptionsWithWindow],
) -> Method:
    """TaylorSeer: a skipped evaluation continues the network's output as a Taylor series (`predictors.TaylorSeer`).

    Args:
        Fn, Bn, threshold, warmup, preset, policy: as for `DBCache`, which decides; so it is in stable-diffusion.cpp.
        order (taylorseer_order, max_order, n_derivatives): of the series.
        interval (cache_interval): not 0: after the warm-up one of so many evaluations is computed, and neither blocks
            nor threshold are looked at. That is the paper's rule; 5 with `warmup=3` are diffusers' numbers.
        **common: every option of `Method`.

    Source: arXiv 2503.06923; names and defaults of stable-diffusion.cpp's `taylorseer`. There the series is kept and
    never read, so that it reuses as `dbcache` does.

    Example:
        >>> from stepcache import TaylorSeerCache
        >>> TaylorSeerCache(interval=5, warmup=3).predictor
        TaylorSeer(order=1, baseline='zero')
    """
    at_intervals = number("interval", interval, whole=True) > 0
    return Method.make(
        {**common, "mask": masked(common.get("mask"), policy)},
        criterion=Always() if at_intervals else dual_block(Fn, Bn, threshold),
        predictor=TaylorSeer(order, baseline="zero"),
        warmup=warmup,
        gates=(Interval(interval),) if at_intervals else (),
        name="taylorseer",
    )
