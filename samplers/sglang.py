"""SGLang-diffusion: the cache around the denoising loop of every request, as a plug-in.

    SGLANG_FORECAST_CACHE=forecast SGLANG_FORECAST_CACHE_OPTIONS=interval=3 sglang generate --model-path MODEL ...

SGLang loads it by the entry point `sglang.multimodal_gen.plugins`; without the variable it does nothing. Nothing of
SGLang is imported before that. A stage with a denoising loop of its own (video generated in chunks) is left alone.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import stepcache
from stepcache import Method, Off, OptionError
from stepcache.extend import Always

from .coordinators import groups_by
from .diffusers import attach

METHOD, OPTIONS = "SGLANG_FORECAST_CACHE", "SGLANG_FORECAST_CACHE_OPTIONS"
"""The environment variables with the method's name, and with its options as text."""

TARGET = "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising.DenoisingStage._run_denoising_loop"
"""The function that the cache is put around."""

STATE = "sglang.multimodal_gen.runtime.distributed.parallel_state"

logger = logging.getLogger(__name__)


def register() -> None:
    """Registers the hook if the environment asks for the cache.

    Raises:
        SystemExit: the variables name no method, or options that it does not take. SGLang would log any other
            exception, and serve without the cache.
    """
    try:
        method = asked_for(os.environ.get(METHOD, ""), os.environ.get(OPTIONS, ""))
    except OptionError as error:
        raise SystemExit(f"{METHOD}, {OPTIONS}: {error}") from error
    if method is None:
        return
    plugins = import_module("sglang.multimodal_gen.runtime.platforms.plugins")
    plugins.HookRegistry.register(TARGET, LoopCache(method), plugins.HookType.AROUND)


def asked_for(name: str, options: str) -> Method | None:
    """The method that the variables name; None without one."""
    if not name and options:
        raise OptionError(f"{OPTIONS}={options!r}: it needs {METHOD}, the name of a method")
    if not name:
        return None
    method = stepcache.method(name, options)
    if method.never_skips and not options and method.name != Off().name:
        raise OptionError(f"{METHOD}={name!r} can skip nothing at its defaults: give it a threshold in {OPTIONS}")
    return method


class LoopCache:
    """Runs a stage's denoising loop with a cache of its own, which is gone afterwards, also after an exception.

    Attributes:
        method: what is skipped and how it is predicted.
        report: the last request's.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.report: stepcache.Report | None = None

    def __call__(self, loop: Callable[..., Any], stage: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        """`loop(stage, context, ...)`, as SGLang's hooks of type AROUND are called."""
        if context.is_warmup:
            return loop(stage, context, *args, **kwargs)
        if stage.server_args.enable_breakable_cuda_graph:
            logger.warning("%s: breakable CUDA graphs do not call the transformer, so nothing is cached", METHOD)
            return loop(stage, context, *args, **kwargs)
        run = StageRun(stage, context.scheduler)
        group = functools.partial(image_ranks, self.method)
        with attach(run, self.method, group=group, cfg_compute_first=False) as cache:  # the positive branch is first
            answer = run(loop, stage, context, *args, **kwargs)
            self.report = cache.report
        logger.debug("%s", self.report)
        return answer


class StageRun:
    """One denoising loop in a pipeline's place: a scheduler, the transformers that follow it, and a call.

    A request may have a scheduler of its own; then it is not the stage's.
    """

    def __init__(self, stage: Any, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.transformer, self.transformer_2 = stage.transformer, stage.transformer_2

    def __call__(self, loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return loop(*args, **kwargs)


def image_ranks(method: Method) -> list[Any]:
    """The groups of ranks that must take the same decision: those that split one call of the transformer.

    Ranks that compute a branch of guidance each decide together if the method has a criterion, which would see another
    branch on each.
    """
    names = ("get_sp_group", "get_tp_group", "get_cfg_group")
    return groups_by(import_module(STATE), names[:2] if isinstance(method.criterion, Always) else names)
