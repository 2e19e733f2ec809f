"""DBCache with TaylorSeer, as cache-dit combines them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..predictors.taylorseer import TaylorSeer
from .base import Method
from .dbcache import OTHER_NAMES, PRESETS, DBCache
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import OptionsWithWindow


NAMES = {**OTHER_NAMES, **dict.fromkeys(("taylorseer_order", "n_derivatives"), "order")}


@register("cache-dit", main="threshold", other_names=NAMES, presets=PRESETS)
def CacheDiT(
    Fn: int = 8,
    Bn: int = 0,
    threshold: float = 0.08,
    warmup: int = 8,
    preset: str | None = None,
    policy: str | None = None,
    order: int = 1,
    **common: Unpack[OptionsWithWindow],
) -> Method:
    """DBCache's decision with TaylorSeer's prediction, as cache-dit does it with its TaylorSeer calibrator.

    The series is of the residual, which is the calibrator's default, and of the whole network's instead of the blocks'
    that are left out. Arguments as for `DBCache`; `order` (taylorseer_order) as for `TaylorSeerCache`.

    Example:
        >>> from stepcache import CacheDiT
        >>> CacheDiT(Fn=1, threshold=0.12, order=2).predictor
        TaylorSeer(order=2, baseline='input')
    """
    predictor = common.pop("predictor", TaylorSeer(order, baseline="input"))
    method = DBCache(Fn, Bn, threshold, warmup, policy=policy, **common)
    return method.replace(predictor=predictor, name="cache-dit")
