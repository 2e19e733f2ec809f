"""First Block Cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..criteria.relative_change import RelativeChange
from ..options import number
from ..probe import Blocks
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import OptionsWithWarmup


NAMES = {"threshold": "residual_diff_threshold", "max_consecutive": "max_consecutive_cache_hits"}


@register("fbcache", other_names=NAMES)
def FBCache(
    residual_diff_threshold: float = 0.0,
    start: float = 0.0,
    end: float = 1.0,
    max_consecutive_cache_hits: int = -1,
    object_to_patch: str = "diffusion_model",
    block: str | None = None,
    **common: Unpack[OptionsWithWarmup],
) -> Method:
    """First Block Cache, with the options and defaults of the node "Apply First Block Cache" (Comfy-WaveSpeed).

    Skips if what the first block adds to its input has changed by less than a share `residual_diff_threshold` since
    the last computed evaluation; the rule as a formula is at `stepcache.criteria.RelativeChange`. The first block
    is run for that; the forward then goes on, or is left and the network's residual of that evaluation is reused. In
    the original it is the blocks' residual, and the layers behind the blocks are run.

    Args:
        residual_diff_threshold (threshold, as in diffusers' `FirstBlockCacheConfig`, whose default is 0.05): higher is
            faster and worse. 0, the default, disables it.
        start, end: the window, as shares of the training timetable. `window="steps"` makes it this run's steps.
        max_consecutive_cache_hits: at most so many skips in a row, then one full call; -1 no limit, 0 disables it.
        object_to_patch: the part of the model that has the blocks if it has one of that name; not patched.
        block: the path of the block to look at. None: the first of the lists named in `stepcache.probe.CONTAINERS`.
        **common: every option of `Method`: mask, warmup, last_step, max_cached, predictor, ...

    Errors: "Unsupported model" if no block is found, at once; "STG is not supported" if the deciding branch is
    called with blocks left out. An invalid cache state (another shape, a block that was not reached, NaN) is computed,
    which restores it; the report says so.

    Example:
        >>> from stepcache import FBCache
        >>> FBCache(residual_diff_threshold=0.05).criterion.threshold
        0.05
        >>> FBCache().never_skips  # off at its published default
        True
    """
    rule = RelativeChange(residual_diff_threshold, Blocks(1, block, object_to_patch))
    start, end = number("start", start, high=1.0), number("end", end, high=1.0)
    return Method.make(
        common,
        criterion=rule,
        start=start,
        end=end,
        window=None if (start, end) == (0, 1) else "training",
        max_consecutive=max_consecutive_cache_hits,
        name="fbcache",
    )
