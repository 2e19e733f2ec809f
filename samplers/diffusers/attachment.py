"""The cache around a pipeline's denoisers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from stepcache import FBCache, Method, Off, OptionError, Report, StepMask
from stepcache import method as method_named
from stepcache.extend import flag

from .cache_dit_backend import CacheDiTInside, asks_for_blocks_behind
from .controlnet import ControlNetPatch
from .denoiser import DenoiserPatch, engine_of
from .frames import Key
from .guidance import Guidance
from .patch import HostPatch
from .reports import merged, with_first
from .runs import PipelineRuns

COMPONENTS = ("unet", "transformer", "transformer_2", "prior", "prior_prior", "decoder", "model", "denoiser")
"""Names under which pipelines keep their denoisers."""

MAIN = "scheduler"


@contextmanager
def attach(
    pipe: Any,
    method: Method | str = "forecast",
    *,
    mask: StepMask | str | Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    controlnet: bool = True,
    group: Any = None,
    decide: str = "batch",
    **options: Any,
) -> Iterator[Attachment]:
    """Caches a pipeline's denoiser inside the block: `with attach(pipe) as cache: pipe(prompt)`.

    Args:
        pipe: a pipeline with a `scheduler` and a denoiser.
        method: a `Method`, or the name of one, which then takes `**options`; or diffusers' `FirstBlockCacheConfig`.
        mask: a step mask for the method.
        components: the denoisers by name. None: those of `unet`, `transformer`, `transformer_2`, ... that it has.
        controlnet: skip the pipeline's ControlNet too if the denoiser is skipped. It is then run when its result is
            first looked at, which on a skipped step is never.
        group: the torch.distributed process group, or `DeviceMesh`, whose ranks work on one image together: all of them
            then take the same decision. None: found by itself if the denoiser is split by `enable_parallelism`, FSDP
            or tensor parallelism; give it if you have split it by hand. False: every rank decides alone.
        decide: "batch": one decision for all images of a batch, by their mean. "sample": one for each, and the denoiser
            is called for those alone that need it, so that an image does not depend on the others. "any": computed if
            any of them needs it. "each": every branch of guidance decides for itself. See `Engine`.
        **options: `enable_separate_cfg`, `cfg_compute_first`, `cfg_diff_compute_separate`, as for `Guidance`, and those
            of the method.

    Yields the attachment; `cache.report` is what happened in the last run. Nothing is left behind afterwards.

    Raises:
        OptionError: the pipeline has no such denoiser, or it is cached already; or the method cannot be used with it.

    Example:
        >>> import torch
        >>> from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
        >>> blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
        >>> pipe = DDIMPipeline(UNet2DModel(sample_size=8, norm_num_groups=4, **blocks), DDIMScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> with attach(pipe) as cache:
        ...     image = pipe(num_inference_steps=20, output_type="np").images[0]
        >>> cache.report.calls, cache.report.skipped
        (11, 9)
    """
    guidance = Guidance.pop(options)
    attachment = Attachment(pipe, chosen_method(method, mask, options), components, guidance, controlnet, group, decide)
    attachment.attach()
    try:
        yield attachment
    finally:
        attachment.detach()


class Attachment:
    """A cache in front of a pipeline's denoisers, each with a cache of its own.

    Args:
        pipe, method, components, guidance, controlnet, group, decide: as for `attach`.
        joined: (run, timestep) of a run in progress, the only one to be cached, whose first evaluation, at this
            timestep, is over.
    """

    def __init__(
        self,
        pipe: Any,
        method: Method,
        components: Sequence[str] | None = None,
        guidance: Guidance | None = None,
        controlnet: bool = True,
        group: Any = None,
        decide: str = "batch",
        joined: tuple[Key, Any] | None = None,
    ) -> None:
        self.attached = False
        guidance = guidance or Guidance()
        schedulers = {name: _scheduler_of(pipe, name) for name in _denoisers(pipe, components)}
        self._main = MAIN if MAIN in schedulers.values() else next(reversed(schedulers.values()))
        if joined is not None:  # the callback is called in the main scheduler's steps
            schedulers = {name: scheduler for name, scheduler in schedulers.items() if scheduler == self._main}
        self._inside: CacheDiTInside | None = None
        if asks_for_blocks_behind(method):
            if joined is not None:
                raise OptionError("Bn: cache-dit must be there when a run begins, a callback is not; use attach()")
            self._inside = CacheDiTInside(pipe, [getattr(pipe, name) for name in schedulers], method, vars(guidance))
            method = self._inside.outside
        only = None if joined is None else joined[0]
        abandon = None if joined is None else self._abandon
        self._runs = {
            scheduler: PipelineRuns(pipe, scheduler, partial(self._begin, scheduler), only)
            for scheduler in schedulers.values()
        }
        self._denoisers: dict[str, DenoiserPatch] = {}
        self._schedulers = schedulers
        for name, scheduler in schedulers.items():
            module, runs = getattr(pipe, name), self._runs[scheduler]
            engine = engine_of(module, method, runs.scheduler, guidance, group, decide)
            self._denoisers[name] = DenoiserPatch(name, module, engine, runs, guidance, self._free_others, abandon)
        self._patches: list[HostPatch] = [*self._denoisers.values()]
        if flag("controlnet", controlnet) and isinstance(getattr(pipe, "controlnet", None), nn.Module):
            self._patches.append(ControlNetPatch("controlnet", pipe.controlnet, self._runs[self._main], abandon))
        self._joined = joined is not None
        if joined is not None:
            self._runs[self._main].join(joined[1])

    def attach(self) -> None:
        """Puts the cache in place; if that fails, nothing is left."""
        installed: list[HostPatch] = []
        try:
            if self._inside is not None:
                self._inside.install()
            for patch in self._patches:
                patch.install()
                installed.append(patch)
        except BaseException:
            for patch in installed:
                patch.remove()
            if self._inside is not None:
                self._inside.remove()
            raise
        self.attached = True

    def detach(self) -> None:
        """Takes the cache away; every denoiser is the object it was."""
        if self.attached:
            for patch in self._patches:
                patch.remove()
            if self._inside is not None:
                self._inside.remove()
        self.attached = False

    def forget(self) -> None:
        """Forgets the run in progress, for a host that knows that another begins. Only its report stays."""
        for runs in self._runs.values():
            runs.forget()
        for denoiser in self._denoisers.values():
            denoiser.forget()

    @property
    def in_progress(self) -> bool:
        """Whether the run that was joined has not ended yet."""
        return self.attached and self._runs[self._main].in_progress(sys._getframe(1))

    @property
    def report(self) -> Report:
        """The run in progress, or the last one. Several denoisers (experts) follow one another in it."""
        main = [name for name, scheduler in self._schedulers.items() if scheduler == self._main]
        report = merged({name: self._denoisers[name].engine.report for name in main})
        if self._joined:
            report = with_first(report, self._runs[self._main].first)
        notes = [
            f"{name} has runs of its own, by {scheduler}: see cache.reports[{name!r}]"
            for name, scheduler in self._schedulers.items()
            if scheduler != self._main
        ]
        if self._inside is not None:
            notes.append(self._inside.note())
        return replace(report, notes=[*report.notes, *notes]) if notes else report

    @property
    def reports(self) -> dict[str, Report]:
        """The report of every denoiser, by its name in the pipeline."""
        return {name: denoiser.engine.report for name, denoiser in self._denoisers.items()}

    def _abandon(self) -> bool:
        """Detaches if the run that was joined has ended unsaid, by an exception or an interrupt."""
        if self.in_progress:
            return False
        self.detach()
        return True

    def _begin(self, scheduler: str, schedule: list[float], stages: int) -> None:
        for name, denoiser in self._denoisers.items():
            if self._schedulers[name] == scheduler:
                denoiser.begin(schedule, stages)

    def _free_others(self, at_work: DenoiserPatch) -> None:
        """Frees what the denoisers before the last one have cached: the run's last evaluation was not theirs."""
        for name, denoiser in self._denoisers.items():
            if denoiser is not at_work and self._schedulers[name] == self._schedulers[at_work.name]:
                denoiser.engine.free()


def _scheduler_of(pipe: Any, name: str) -> str:
    """The attribute with the scheduler that a denoiser's runs follow: its own (`prior_scheduler`) or the pipeline's."""
    found = (f"{name}_scheduler", f"{name.split('_')[0]}_scheduler", MAIN)
    for attribute in found:
        if hasattr(getattr(pipe, attribute, None), "timesteps"):
            return attribute
    raise OptionError(f"{type(pipe).__name__} has no scheduler for {name} (looked for {', '.join(found)})")


def _denoisers(pipe: Any, components: Sequence[str] | None) -> list[str]:
    """The names of the pipeline's denoisers: those that were given, or those that are found."""
    if isinstance(components, str):
        raise OptionError(f"components={components!r}: accepted is a list of names, as components=[{components!r}]")
    names = list(components or [name for name in COMPONENTS if isinstance(getattr(pipe, name, None), nn.Module)])
    for name in names:
        if not isinstance(getattr(pipe, name, None), nn.Module):
            raise OptionError(f"components: {type(pipe).__name__} has no denoiser {name!r}")
    if not names:
        raise OptionError(
            f"{type(pipe).__name__} has no denoiser that can be found (looked for {', '.join(COMPONENTS)}): "
            "name it with components="
        )
    return names


def chosen_method(given: Any, mask: Any, options: dict[str, Any]) -> Method:
    """The method that a user has given, or named with its options."""
    if type(given).__name__ == "FirstBlockCacheConfig":
        given = FBCache(given.threshold)
    if isinstance(given, str):
        chosen = method_named(given, **options, **({} if mask is None else {"mask": mask}))
        if chosen.never_skips and not options and chosen.name != Off().name:
            warnings.warn(f"{given} can skip nothing at its defaults: give it a threshold", stacklevel=4)
        return chosen
    if not isinstance(given, Method):
        raise OptionError(f"method={given!r}: accepted are a Method, the name of one, and a FirstBlockCacheConfig")
    if options:
        raise OptionError(f"{', '.join(options)}: options go with a method's name; this Method has its own")
    return given if mask is None else given.replace(mask=mask)
