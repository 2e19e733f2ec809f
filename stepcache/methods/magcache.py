"""MagCache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..criteria.magcache import MagCacheRule
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import CommonOptions


NAMES = {"mag_ratios": "ratios", "magcache_thresh": "threshold", "K": "max_skip_steps"}


@register("magcache", other_names=NAMES)
def MagCache(
    ratios: Any = "",
    threshold: float = 0.06,
    max_skip_steps: int = 3,
    retention_ratio: float = 0.2,
    calibrate: bool = False,
    **common: Unpack[CommonOptions],
) -> Method:
    """MagCache, with the names and defaults of diffusers' `MagCacheConfig` (0.42.1).

    Skips as long as the ratios of a calibration run say that the residual hardly changes; the rule as a formula is at
    `stepcache.criteria.magcache.MagCacheRule`. A skipped evaluation reuses the residual.

    Args:
        ratios (mag_ratios): of a calibration run, as text (1/0.98/0.97, also with ; or spaces) or numbers. They belong
            to one model and one sampler. For another number of steps the nearest are taken.
        threshold (magcache_thresh): how much error may accumulate. Higher is faster and worse. 0 never skips.
        max_skip_steps (K): at most so many skips in a row, then one evaluation is computed. 0 never skips.
        retention_ratio: the share of the run that is computed first.
        calibrate: computes everything, whatever else is given, and writes the ratios of the deciding branch into
            the report's notes; `stepcache.extend.calibration` reads them.
        **common: every option of `Method`: start, end, mask, warmup, last_step, max_cached, predictor, ...

    Raises `OptionError` without ratios, unless it calibrates; for ratios that are no numbers of at least 0, an unknown
    option (with the nearest name), and numbers that are not accepted.
    Source: arXiv 2506.09045; diffusers' hooks/mag_cache.py.

    Example:
        >>> import torch
        >>> from stepcache import MagCache
        >>> from stepcache.extend import calibration
        >>> from stepcache.samplers.k_diffusion import CachedDenoiser
        >>> def sample(method):  # Euler, with your model in the place of x / (1 + sigma^2)
        ...     sigmas, x = torch.linspace(1, 0, 11), torch.ones(1, 4, 8, 8)
        ...     model = CachedDenoiser(lambda x, sigma: x / (1 + sigma**2), method, sigmas=sigmas, scalings="eps")
        ...     for sigma, lower in zip(sigmas, sigmas[1:]):
        ...         x = x + (x - model(x, sigma[None])) / sigma * (lower - sigma)
        ...     return model.report
        >>> ratios = calibration(sample(MagCache(calibrate=True)))
        >>> ratios.split("/")[:3]
        ['1', '1.1287', '1.1318']
        >>> sample(MagCache(ratios, threshold=0.2)).decisions("guided")
        'CCSCSCSCSC'
    """
    rule = MagCacheRule(ratios, threshold, max_skip_steps, retention_ratio, calibrate)
    method = Method.make(common, criterion=rule, name="magcache")
    if rule.calibrate:
        return Method(criterion=rule, evaluations=method.evaluations, name=method.name)
    return method
