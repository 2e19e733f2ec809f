"""The cache around a pipeline's denoisers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from stepcache import FBCache, Method, OptionError, Report, StepMask
from stepcache import method as method_named
from stepcache.extend import flag

from .cache_dit_backend import CacheDiTInside, asks_for_blocks_behind
from .controlnet import ControlNetPatch
from .denoiser import DenoiserPatch, engine_of
from .guidance import Guidance
from .patch import HostPatch
from .runs import PipelineRuns

COMPONENTS = ("unet", "transformer", "transformer_2", "prior", "decoder", "model", "denoiser")
"""Names under which pipelines keep their denoisers."""


@contextmanager
def attach(
    pipe: Any,
    method: Method | str = "forecast",
    *,
    mask: StepMask | str | Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    controlnet: bool = True,
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
        **options: `enable_separate_cfg`, `cfg_compute_first`, `cfg_diff_compute_separate`, as for `Guidance`, and those
            of the method.

    Yields the attachment; `cache.report` is what happened in the last run. Nothing is left behind afterwards.
    """
    guidance = Guidance.pop(options)
    attachment = Attachment(pipe, chosen_method(method, mask, options), components, guidance, controlnet)
    attachment.attach()
    try:
        yield attachment
    finally:
        attachment.detach()


class Attachment:
    """A cache in front of a pipeline's denoisers, each with a memory of its own.

    Args:
        pipe, method, components, guidance, controlnet: as for `attach`.
        one_run: the run in progress is the only one, and its first evaluation is over.
    """

    def __init__(
        self,
        pipe: Any,
        method: Method,
        components: Sequence[str] | None = None,
        guidance: Guidance | None = None,
        controlnet: bool = True,
        one_run: bool = False,
    ) -> None:
        self.attached = False
        guidance = guidance or Guidance()
        names = _denoisers(pipe, components)
        self._inside: CacheDiTInside | None = None
        if asks_for_blocks_behind(method):
            if one_run:
                raise OptionError("Bn: cache-dit must be there when a run begins, a callback is not; use attach()")
            self._inside = CacheDiTInside(pipe, [getattr(pipe, name) for name in names], method, vars(guidance))
            method = self._inside.outside
        abandon = self.detach if one_run else None
        runs = PipelineRuns(pipe, self._begin, one_run)
        self._denoisers: list[DenoiserPatch] = []
        for name in names:
            module = getattr(pipe, name)
            engine = engine_of(module, method, pipe.scheduler, guidance)
            self._denoisers.append(DenoiserPatch(name, module, engine, runs, guidance, self._free_others, abandon))
        self._patches: list[HostPatch] = [*self._denoisers]
        if flag("controlnet", controlnet) and isinstance(getattr(pipe, "controlnet", None), nn.Module):
            self._patches.append(ControlNetPatch("controlnet", pipe.controlnet, runs, abandon))
        if one_run:
            runs.begin(first=0)

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

    @property
    def report(self) -> Report:
        """The run in progress, or the last one. Several denoisers (experts) follow one another in it."""
        report = self._merged()
        if self._inside is not None:
            report = replace(report, notes=[*report.notes, self._inside.note()])
        return report

    def _merged(self) -> Report:
        reports = [denoiser.engine.report for denoiser in self._denoisers if denoiser.engine.report.events]
        if len(reports) < 2:
            return reports[0] if reports else self._denoisers[0].engine.report
        notes = [f"{denoiser.name}: {note}" for denoiser in self._denoisers for note in denoiser.engine.report.notes]
        merged = Report(reports[0].method, reports[0].run, reports[0].scheduled_steps, notes)
        before = 0
        for report in reports:
            moved = [replace(e.position, evaluation=e.position.evaluation + before) for e in report.events]
            merged.events += [replace(e, position=position) for e, position in zip(report.events, moved, strict=True)]
            before += report.evaluations
        return merged

    def _begin(self, schedule: list[float], stages: int) -> None:
        for denoiser in self._denoisers:
            denoiser.begin(schedule, stages)

    def _free_others(self, at_work: DenoiserPatch) -> None:
        """Frees what the denoisers before the last one have cached: the run's last evaluation was not theirs."""
        for denoiser in self._denoisers:
            if denoiser is not at_work:
                denoiser.engine.free()


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
        given = FBCache(threshold=given.threshold)
    if isinstance(given, str):
        return method_named(given, **options, **({} if mask is None else {"mask": mask}))
    if not isinstance(given, Method):
        raise OptionError(f"method={given!r}: accepted are a Method, the name of one, and a FirstBlockCacheConfig")
    if options:
        raise OptionError(f"{', '.join(options)}: options go with a method's name; this Method has its own")
    return given if mask is None else given.replace(mask=mask)
