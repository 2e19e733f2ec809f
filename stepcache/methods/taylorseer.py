"""TaylorSeer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..criteria.always import Always
from ..gates.base import as_gates
from ..gates.interval import Interval
from ..options import number
from ..predictors.taylorseer import TaylorSeer
from .base import Method
from .dbcache import OTHER_NAMES, PRESETS, dual_block, masked
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import CommonOptions


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
    **common: Unpack[CommonOptions],
) -> Method:
    """TaylorSeer: a skipped evaluation continues the network's output as a Taylor series (`predictors.TaylorSeer`).

    Args:
        Fn, Bn, threshold, warmup, preset, policy: as for `DBCache`, which decides; so it is in stable-diffusion.cpp.
        order (taylorseer_order, max_order, n_derivatives): of the series.
        interval (cache_interval): not 0: after the warm-up one of so many evaluations is computed, and neither blocks
            nor threshold are looked at. That is the paper's rule; 5 with `warmup=3` are diffusers' numbers.
        **common: every option of `Method`.

    Source: arXiv 2503.06923; names and defaults of stable-diffusion.cpp's `taylorseer`, where the series is kept and
    never read, so that it reuses as `dbcache` does.
    """
    mask = masked(common.pop("mask", None), policy)
    criterion = dual_block(Fn, Bn, threshold)
    if number("interval", interval, whole=True):
        criterion, common["gates"] = Always(), (Interval(interval), *as_gates(common.get("gates", ())))
    predictor = TaylorSeer(order, baseline="zero")
    options = {"criterion": criterion, "predictor": predictor, "warmup": warmup, "mask": mask, "name": "taylorseer"}
    return Method(**{**options, **common})
