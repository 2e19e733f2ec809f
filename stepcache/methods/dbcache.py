"""DBCache, and what cache-dit's methods have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..criteria.always import Always
from ..criteria.relative_change import RelativeChange
from ..masks import StepMask
from ..options import OptionError, number, unknown
from ..probe import Blocks
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import OptionsWithWindow


PRESETS: dict[str, dict[str, Any]] = {
    "slow": {"mask": "slow", "threshold": 0.20, "warmup": 8, "Fn": 8},
    "medium": {"mask": "medium", "threshold": 0.25, "warmup": 6, "Fn": 8},
    "fast": {"mask": "fast", "threshold": 0.30, "warmup": 6, "Fn": 6},
    "ultra": {"mask": "ultra", "threshold": 0.34, "warmup": 4, "Fn": 4},
}
"""What stable-diffusion.cpp's `--cache-preset` meant (commit 298b1106), with the masks of `StepMask`."""

OTHER_NAMES = {
    "fn": "Fn",
    "Fn_compute_blocks": "Fn",
    "bn": "Bn",
    "Bn_compute_blocks": "Bn",
    "residual_diff_threshold": "threshold",
    "max_warmup_steps": "warmup",
    "max_cached_steps": "max_cached",
    "max_continuous_cached_steps": "max_consecutive",
    "steps_computation_mask": "mask",
    "steps_computation_policy": "policy",
}
"""cache-dit's names of the options, and the lower-case ones of stable-diffusion.cpp."""


def masked(mask: Any, policy: str | None) -> StepMask | None:
    """The mask under a policy given apart from it."""
    if mask is None:
        if policy == "static":
            raise OptionError("policy='static' says what happens on a mask's zeros: give a mask or a preset too")
        if policy not in (None, "dynamic"):
            raise unknown("policy", str(policy), ("dynamic", "static"))
        return None
    if isinstance(mask, StepMask):
        return mask if policy is None else StepMask(mask.mask, policy)
    return StepMask(mask, policy or "dynamic")


@register("dbcache", main="threshold", other_names=OTHER_NAMES, presets=PRESETS)
def DBCache(
    Fn: int = 8,
    Bn: int = 0,
    threshold: float = 0.08,
    warmup: int = 8,
    preset: str | None = None,
    policy: str | None = None,
    **common: Unpack[OptionsWithWindow],
) -> Method:
    """DBCache, with the options and defaults of cache-dit (v1.5.0) and of stable-diffusion.cpp's `dbcache`.

    Skips if the signal has changed by less than a share `threshold` since the last computed evaluation; the rule as
    a formula is at `stepcache.criteria.RelativeChange`. A skipped evaluation reuses the network's residual.

    Args:
        Fn (Fn_compute_blocks): the first so many blocks are always computed; what they add to their input is the
            signal. If the network has Fn blocks or fewer, all but the last are used, with a warning.
        Bn (Bn_compute_blocks): the last so many blocks are always computed. A wrapper around the model cannot do that:
            under diffusers cache-dit, if it is installed, then runs its own DBCache inside, and the wrapper skips the
            zeros of a static mask.
        threshold (residual_diff_threshold): higher is faster and worse. 0 never skips, 1 and more always would.
        warmup (max_warmup_steps): so many steps are computed first.
        preset: "slow", "medium", "fast", "ultra", or the first letter: a mask, a threshold, a warm-up and Fn together,
            each replaced by what is given beside it.
        policy (steps_computation_policy): what happens on the zeros of the mask; "dynamic" (default) asks the
            threshold, "static" skips.
        **common: every option of `Method`, also under cache-dit's names: max_cached_steps, max_continuous_cached_steps,
            steps_computation_mask.

    Of a network without blocks (a plain callable) the signal is its input, Fn and Bn then only scale the threshold, by
    min(2, max(0.5, 1 + 0.02 (Fn - 8))) and min(1, max(0.5, 1 - 0.03 Bn)). That is stable-diffusion.cpp's form (commit
    97d29908), whose decisions it makes with `start=0.15, end=0.95, warmup=0`; there warm-up, mask, policy and limits do
    nothing, here they act.

    Example:
        >>> from stepcache import DBCache
        >>> method = DBCache(preset="fast", threshold=0.1)
        >>> method.criterion.threshold, method.warmup, str(method.mask)
        (0.1, 6, 'fast (dynamic)')
    """
    chosen = {**common, "mask": masked(common.get("mask"), policy)}
    return Method.make(chosen, criterion=dual_block(Fn, Bn, threshold), warmup=warmup, name="dbcache")


def dual_block(Fn: int, Bn: int, threshold: float) -> RelativeChange | Always:
    """DBCache's criterion; `Always` from a threshold of 1 on, as cache-dit has it."""
    Fn, Bn = number("Fn", Fn, low=1, whole=True), number("Bn", Bn, whole=True)
    threshold = number("threshold", threshold)
    if threshold >= 1 and not Bn:
        return Always()
    at_input = min(2.0, max(0.5, 1 + 0.02 * (Fn - 8))) * min(1.0, max(0.5, 1 - 0.03 * Bn))
    return RelativeChange(threshold, Blocks(Fn, required=False, after=Bn), at_input)
