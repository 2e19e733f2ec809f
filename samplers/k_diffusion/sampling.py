"""k-diffusion's samplers by name: what is known of each, and `sample`, which tells the cache about the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from stepcache import OptionError
from stepcache.extend import require, unknown

from .denoiser import CachedDenoiser, find

EVALUATIONS = {
    "sample_euler": 1,
    "sample_euler_ancestral": 1,
    "sample_lms": 1,
    "sample_dpmpp_2m": 1,
    "sample_dpmpp_2m_sde": 1,
    "sample_dpmpp_3m_sde": 1,
    "sample_unipc": 1,
    "sample_heun": 2,
    "sample_dpm_2": 2,
    "sample_dpm_2_ancestral": 2,
    "sample_dpmpp_2s_ancestral": 2,
    "sample_dpmpp_sde": 2,
}
"""Evaluations of one step in those samplers of k-diffusion 0.1.1 that take a schedule; the last step has one."""


NEGATIVE_ONLY_SAMPLERS = frozenset({"sample_euler_ancestral", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"})
"""Samplers with which ComfyUI's nodes and the web UIs' panel skip the negative prompt only, if nothing else is chosen.

They add noise at every evaluation. With whole steps Forecast is not always better there than fewer steps, and with the
negative prompt only it is. The figures are in docs/webui.md.
"""


ADAPTIVE = ("sample_dpm_adaptive",)
"""Samplers that measure their error on the model's answers: on predicted answers that estimate would mean nothing."""


def sample(
    sampler: str | Callable[..., Tensor],
    model: Callable[..., Tensor],
    x: Tensor,
    *args: Any,
    cache: CachedDenoiser | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    **keywords: Any,
) -> Tensor:
    """Runs one of k-diffusion's samplers with the schedule known: `sample("euler", model, x, sigmas)`.

    Args:
        sampler: a sampler function, or the name of one in k-diffusion, with or without "sample_".
        model: what the sampler calls: a `CachedDenoiser`, or something with one inside.
        x, *args, **keywords: as the sampler takes them (`sigmas`, `extra_args`, ...).
        cache: the `CachedDenoiser`, where it is inside `model` and cannot be found among its submodules.
        callback: your own; it is called as usual.
    """
    if isinstance(sampler, str):
        sampler = _sampler(sampler)
    cache = cache or find(model)
    signature = inspect.signature(sampler)
    kinds = {p.kind for p in signature.parameters.values()}
    if "callback" in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        keywords["callback"] = cache.callback(callback)
    elif callback is not None:
        raise OptionError(f"callback: {getattr(sampler, '__name__', sampler)!r} takes no callback")
    arguments = signature.bind(model, x, *args, **keywords)
    name = getattr(sampler, "__name__", "")
    stages = EVALUATIONS.get(name)
    on_schedule = (stages == 1 or name == "sample_heun") and not arguments.arguments.get("s_churn")
    computed = "the sampler measures its error on it" if name in ADAPTIVE else None
    with cache._announced(arguments.arguments.get("sigmas"), stages, on_schedule, computed):
        return sampler(*arguments.args, **arguments.kwargs)


def _sampler(name: str) -> Callable[..., Tensor]:
    sampling = require("k_diffusion.sampling", "k-diffusion")
    full = name if name.startswith("sample_") else f"sample_{name}"
    if not hasattr(sampling, full):
        raise unknown("sampler", name, [known[7:] for known in dir(sampling) if known.startswith("sample_")])
    return getattr(sampling, full)
