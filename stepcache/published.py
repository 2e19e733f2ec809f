"""First Block Cache, DBCache and TaylorSeer: methods that others offer, under their names, options and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from .criteria import Always, RelativeChange
from .gates import Interval, as_gates
from .masks import StepMask, preset_name
from .methods import METHODS, Method, _known, accepted_options
from .options import OptionError, number, unknown
from .predictors import TaylorSeer
from .probe import Blocks

PRESETS: dict[str, dict[str, Any]] = {
    "slow": {"mask": "slow", "threshold": 0.20, "warmup": 8, "Fn": 8},
    "medium": {"mask": "medium", "threshold": 0.25, "warmup": 6, "Fn": 8},
    "fast": {"mask": "fast", "threshold": 0.30, "warmup": 6, "Fn": 6},
    "ultra": {"mask": "ultra", "threshold": 0.34, "warmup": 4, "Fn": 4},
}
"""What stable-diffusion.cpp's `--cache-preset` stood for (commit 298b1106), with the masks of `StepMask`."""

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

OF_THE_HOST = ("enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate")


def published(**other_names: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """For a method whose options have a second name elsewhere, and presets: explicit options win over a preset's."""

    def decorate(function: Callable[..., Method]) -> Callable[..., Method]:
        signature, checked = inspect.signature(function), _known(function)

        @wraps(function)
        def named(*positional: Any, **keywords: Any) -> Method:
            known = [*accepted_options(function), *other_names]
            given: dict[str, Any] = {}
            for key, value in keywords.items():
                if key in OF_THE_HOST:
                    raise OptionError(
                        f"{key} is for the host, which knows how branches come: attach(pipe, method, {key}=...); "
                        "in k-diffusion name them with branches="
                    )
                if key not in known:
                    raise unknown("option", key, known)
                usual = other_names.get(key, key)
                if usual in given:
                    raise OptionError(f"{key}={value!r}: {usual} is given twice, under two names")
                given[usual] = value
            named_so = dict(zip(signature.parameters, positional, strict=False))
            chosen = given.get("preset", named_so.get("preset"))
            if chosen is not None:
                preset = PRESETS[preset_name(chosen)]
                given = {key: value for key, value in preset.items() if key not in named_so} | given
            return checked(*positional, **given)

        named.other_names = other_names
        named.presets = PRESETS if "preset" in signature.parameters else {}
        return named

    return decorate


def _masked(mask: Any, policy: str | None) -> StepMask | None:
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


@published(**OTHER_NAMES)
def DBCache(
    Fn: int = 8,
    Bn: int = 0,
    threshold: float = 0.08,
    warmup: int = 8,
    preset: str | None = None,
    policy: str | None = None,
    **common: Any,
) -> Method:
    """DBCache, with the options and defaults of cache-dit (v1.5.0) and of stable-diffusion.cpp's `dbcache`.

    Skips where the signal has changed by less than a share `threshold` since the last computed evaluation; the rule as
    a formula stands at `stepcache.criteria.RelativeChange`. A skipped evaluation reuses the network's residual.

    Args:
        Fn (Fn_compute_blocks): the first so many blocks are always computed; what they add to their input is the
            signal. Of a network with no more than Fn blocks all but the last are, and a warning says so.
        Bn (Bn_compute_blocks): the last so many blocks are always computed. A wrapper around the model cannot do that:
            under diffusers cache-dit, where it is installed, then runs its own DBCache inside (`samplers.inside`), and
            the wrapper skips the zeros of a static mask.
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
    """
    mask = _masked(common.pop("mask", None), policy)
    criterion = _dual_block(Fn, Bn, threshold)
    return Method(**{"criterion": criterion, "warmup": warmup, "mask": mask, "name": "dbcache", **common})


def _dual_block(Fn: int, Bn: int, threshold: float) -> RelativeChange | Always:
    """DBCache's criterion; `Always` from a threshold of 1 on, as cache-dit has it."""
    Fn, Bn = number("Fn", Fn, low=1, whole=True), number("Bn", Bn, whole=True)
    threshold = number("threshold", threshold)
    if threshold >= 1 and not Bn:
        return Always()
    at_input = min(2.0, max(0.5, 1 + 0.02 * (Fn - 8))) * min(1.0, max(0.5, 1 - 0.03 * Bn))
    return RelativeChange(threshold, Blocks(Fn, required=False, after=Bn), at_input)


@published(**OTHER_NAMES, taylorseer_order="order", n_derivatives="order", max_order="order", cache_interval="interval")
def TaylorSeerCache(
    Fn: int = 8,
    Bn: int = 0,
    threshold: float = 0.08,
    warmup: int = 8,
    preset: str | None = None,
    policy: str | None = None,
    order: int = 1,
    interval: int = 0,
    **common: Any,
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
    mask = _masked(common.pop("mask", None), policy)
    criterion = _dual_block(Fn, Bn, threshold)
    if number("interval", interval, whole=True):
        criterion, common["gates"] = Always(), (Interval(interval), *as_gates(common.get("gates", ())))
    predictor = TaylorSeer(order, baseline="zero")
    options = {"criterion": criterion, "predictor": predictor, "warmup": warmup, "mask": mask, "name": "taylorseer"}
    return Method(**{**options, **common})


@published(**OTHER_NAMES, taylorseer_order="order", n_derivatives="order")
def CacheDiT(
    Fn: int = 8,
    Bn: int = 0,
    threshold: float = 0.08,
    warmup: int = 8,
    preset: str | None = None,
    policy: str | None = None,
    order: int = 1,
    **common: Any,
) -> Method:
    """DBCache's decision with TaylorSeer's prediction, as cache-dit does it with its TaylorSeer calibrator.

    The series is of the residual, which is the calibrator's default, and of the whole network's instead of the blocks'
    that are left out. Arguments as for `DBCache`; `order` (taylorseer_order) as for `TaylorSeerCache`.
    """
    method = DBCache(Fn, Bn, threshold, warmup, policy=policy, **common)
    given = {key: common[key] for key in ("predictor", "name") if key in common}
    return method.replace(**{"predictor": TaylorSeer(order, baseline="input"), "name": "cache-dit", **given})


@published(threshold="residual_diff_threshold", max_consecutive="max_consecutive_cache_hits")
def FBCache(
    residual_diff_threshold: float = 0.0,
    start: float = 0.0,
    end: float = 1.0,
    max_consecutive_cache_hits: int = -1,
    object_to_patch: str = "diffusion_model",
    block: str | None = None,
    **common: Any,
) -> Method:
    """First Block Cache, with the options and defaults of the node "Apply First Block Cache" (Comfy-WaveSpeed).

    Skips where what the first block adds to its input has changed by less than a share `residual_diff_threshold` since
    the last computed evaluation; the rule as a formula stands at `stepcache.criteria.RelativeChange`. The first block
    is run for that; the forward then goes on, or is left and the network's residual of that evaluation is reused. In
    the original it is the blocks' residual, and the layers behind the blocks are run.

    Args:
        residual_diff_threshold (threshold, as in diffusers' `FirstBlockCacheConfig`, whose default is 0.05): higher is
            faster and worse. 0, the default, disables it.
        start, end: the window, as shares of the training timetable. `window="steps"` makes it this run's steps.
        max_consecutive_cache_hits: at most so many skips in a row, then one full call; -1 no limit, 0 disables it.
        object_to_patch: the part of the model that has the blocks, where it has one of that name; not patched.
        block: the path of the block to look at. None: the first of the lists named in `stepcache.blocks.CONTAINERS`.
        **common: every option of `Method`: mask, warmup, last_step, max_cached, predictor, ...

    Errors: "Unsupported model" where no block is found, at once; "STG is not supported" where the deciding branch is
    called with blocks left out. An invalid cache state (another shape, a block that was not reached, NaN) is computed,
    which restores it; the report says so.
    """
    rule = RelativeChange(residual_diff_threshold, Blocks(1, block, object_to_patch))
    options = {"criterion": rule, "start": start, "end": end, "name": "fbcache"}
    if (start, end) != (0, 1):
        options["window"] = "training"
    return Method(**{**options, "max_consecutive": max_consecutive_cache_hits, **common})


METHODS.update({"fbcache": FBCache, "dbcache": DBCache, "taylorseer": TaylorSeerCache, "cache-dit": CacheDiT})
