"""UCache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..criteria.ucache import UCacheRule
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import OptionsWithWarmup


@register("ucache")
def UCache(
    threshold: float = 1.0,
    start: float = 0.15,
    end: float = 0.95,
    decay: float = 1.0,
    relative: bool = True,
    reset: bool = True,
    **common: Unpack[OptionsWithWarmup],
) -> Method:
    """UCache, with the published names and defaults (stable-diffusion.cpp, commit 97d29908); made for U-Nets.

    Skips while an accumulated estimate of the relative change of the network's output stays under `threshold`; the rule
    as a formula is at `stepcache.criteria.ucache.UCacheRule`. A skipped evaluation reuses the residual.

    Args:
        threshold: how much error may accumulate. Higher is faster and worse. At 0 nothing is skipped.
        start, end: the window, as shares of this run's steps.
        decay: what of the error is kept at each evaluation, 0 to 1.
        relative: measure the change against the size of the output; else against threshold times that size.
        reset: forget the error when an evaluation is computed. With `reset=False` and `decay=1` little or nothing is
            skipped after the first failed test, which is published so and kept, with a warning.
        **common: every option of `Method`: mask, warmup, last_step, max_cached, max_consecutive, predictor, ...

    It fails on data that is not centred: the residual carries the input along, and with it the mean of the data. Under
    Euler, 20 steps, UCache is 28 dB from the full run on hsc32 at 11 calls (fewer steps: 44 dB) and 4.5 dB on lsst60,
    whose mean is 6, at 12 calls (fewer steps: 46 dB): there the image is destroyed. docs/measurements.md has the table.

    For ancestral and SDE samplers the published advice is reset=0. Measured on two networks, 20 steps of Euler a, it
    never skips at the default threshold; reset=1 with threshold 0.5 to 1 makes 18 to 14 of 20 calls on the U-Net, 47 to
    30 dB from the full run (14 to 13 calls and 34 dB on the DiT). Keep reset=1 and lower the threshold; the whole table
    is in docs/measurements-digits.md.

    Example:
        >>> from stepcache import UCache
        >>> method = UCache(threshold=0.3, max_consecutive=3)
        >>> method.criterion.threshold, method.predictor
        (0.3, Reuse())
    """
    rule = UCacheRule(threshold, decay, relative, reset)
    return Method.make(common, criterion=rule, start=start, end=end, window="steps", name="ucache")
