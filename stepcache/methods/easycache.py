"""EasyCache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..criteria.easycache import EasyCacheRule
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import OptionsWithWarmup


@register("easycache")
def EasyCache(
    threshold: float = 0.2, start: float = 0.15, end: float = 0.95, **common: Unpack[OptionsWithWarmup]
) -> Method:
    """EasyCache, with the names and defaults of stable-diffusion.cpp (commit 97d29908) and ComfyUI.

    Skips while an accumulated estimate of the relative change of the network's output stays under `threshold`; the rule
    as a formula is at `stepcache.criteria.EasyCacheRule`. A skipped evaluation reuses the residual.

    Args:
        threshold: how much error may accumulate. Higher is faster and worse. At 0 nothing is skipped.
        start, end: the window, as shares of the training timetable: for img2img and shifted flows 0.15 is not 15 % of
            your steps. `window="steps"` makes it so.
        **common: every option of `Method`: mask, warmup, last_step, max_cached, max_consecutive, predictor, ...

    It fails on data that is not centred, as UCache does: under Euler, 20 steps, it is 22 dB from the full run on hsc32
    and -4 dB on lsst60 at 9 calls, fewer steps 41 dB on both (docs/measurements.md).

    On ancestral and SDE samplers it rarely skips: fresh noise changes the input more than any skip could repay.

    Example:
        >>> from stepcache import EasyCache
        >>> EasyCache(threshold=0.1, window="steps").window
        'steps'
    """
    rule = EasyCacheRule(threshold)
    return Method.make(common, criterion=rule, start=start, end=end, window="training", name="easycache")
