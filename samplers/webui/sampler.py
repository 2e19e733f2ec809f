"""Wraps the host's sampler function for one run: there the schedule is known, and there the run ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .messages import notify
from .run import running


def wrap_sampler(p: Any) -> None:
    """Caches the next run of the sampler of `p`. Its attribute `func` is wrapped until it is called."""
    job, sampler = getattr(p, "stepcache_job", None), getattr(p, "sampler", None)
    if job is None or sampler is None:
        return
    hires = bool(getattr(p, "is_hr_pass", False))
    if hires and not job.options.hires:
        return
    func: Callable[..., Tensor] | None = getattr(sampler, "func", None)
    if not callable(func):
        notify(p, f"the sampler {type(sampler).__name__} is not supported: it runs without the cache")
        return
    if hasattr(func, "stepcache_wrapper"):
        return

    @functools.wraps(func)
    def cached(denoiser: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if sampler.func is cached:
            sampler.func = func
        with running(p, job, func, denoiser, keywords, hires):
            return func(denoiser, x, *arguments, **keywords)

    cached.__dict__["stepcache_wrapper"] = True
    sampler.func = cached


def wrap_sampler_when_conditioned(p: Any) -> None:
    """The same for A1111 before 1.10, which has no hook between making a sampler and starting it.

    In between it asks `p` for the image conditioning. That method is replaced in this one object, until it is called.
    """
    ask = getattr(p, "txt2img_image_conditioning", None)
    if ask is None or "txt2img_image_conditioning" in vars(p):
        return

    @functools.wraps(ask)
    def conditioning(*arguments: Any, **keywords: Any) -> Any:
        vars(p).pop("txt2img_image_conditioning", None)
        wrap_sampler(p)
        return ask(*arguments, **keywords)

    p.txt2img_image_conditioning = conditioning
