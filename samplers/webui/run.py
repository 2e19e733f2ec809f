"""One sampling loop of a host: an engine, a patch and a schedule, from the sampler's call to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from stepcache import Method, OptionError
from stepcache.extend import Engine

from .a1111 import A1111Patch
from .call import WebuiCall
from .evaluation import Evaluation
from .forge import ForgePatch
from .job import Job
from .messages import notify
from .patch import HostPatch
from .schedule import RunSchedule


class Run:
    """One sampling loop.

    Args:
        method: what is skipped, and how it is predicted.
        func: the host's sampler function.
        denoiser: the host's guidance wrapper, `p.sampler.model_wrap_cfg`, whose `step` counts the evaluations.
        keywords: what the sampler is called with. Its callback is wrapped.
        forge: the host is one of the Forge family.

    Raises OptionError if the sampler or the options do not allow caching.
    """

    def __init__(
        self, method: Method, func: Callable[..., Tensor], denoiser: Any, keywords: dict[str, Any], forge: bool
    ) -> None:
        self.denoiser = denoiser
        self.patch: HostPatch = (ForgePatch if forge else A1111Patch)(denoiser, self._answer)
        self.schedule = RunSchedule.of(func, keywords, self.patch.sigma_at)
        self.engine = Engine(
            method,
            training_sigma=self.patch.training_sigma(),
            coordinate=self.patch.coordinate(),
            parametrization=self.patch.parametrization,
        )
        self.engine.announce(self.schedule.sigmas, self.schedule.stages, self.schedule.on_schedule)
        if self.schedule.callback_counts and callable(keywords.get("callback")):
            keywords["callback"] = self._counting(keywords["callback"])
        self.failure: str | None = None
        self.indivisible_because: str | None = None

    def _counting(self, callback: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
        def counted(info: dict[str, Any]) -> Any:
            self.engine.set_step(int(info["i"]))
            return callback(info)

        return counted

    def begin_evaluation(self, params: Any) -> None:
        """The host announces the next evaluation. A refiner may have replaced the model, so this patches again."""
        if self.failure is not None:
            return
        try:
            self.patch.begin(Evaluation.of(self.denoiser, params))
            self.patch.install()
        except Exception as error:
            self._fail(error)

    def _answer(self, call: WebuiCall) -> Tensor:
        """Answers a call by the engine. An error of ours is not raised; an error of the model is."""
        if self.engine.method.skip == "uncond" and (reason := self.patch.unpaired()):
            self.indivisible_because = reason
            return call.run_model()
        call.place = None if call.evaluation is None else self.schedule.place(call.evaluation)
        try:
            return self.engine(call)
        except Exception as error:
            if error is call.error:
                raise
            self._fail(error)
            return call.run_model()
        finally:
            self.indivisible_because = call.indivisible_because or self.indivisible_because

    def _fail(self, error: Exception) -> None:
        """After an error of ours the rest of the run is computed."""
        self.failure = f"the rest of this run was computed: {type(error).__name__}: {error}"
        self.patch.pause()
        self.engine.reset()

    def remarks(self) -> list[str]:
        """What the user should know about the run, once it is over."""
        if self.failure is not None:
            return [self.failure]
        report, reason = self.engine.report, self.indivisible_because
        if any(event.reason == "short run" for event in report.events):
            return [f"every step was computed: a run of {report.evaluations} is too short to predict steps in it"]
        if self.engine.method.skip == "uncond" and (reason or not report.skipped):
            reasons = ([reason] if reason else []) + report.obstacles
            if reasons:
                return [f"negative prompt only: {reason}" for reason in reasons]
        if report.events:
            why = "; ".join(report.notes) or "these options leave none that may be"
            return [] if report.skipped else [f"no step of this run was skipped: {why}"]
        if self.patch.auxiliary:
            return ["nothing was cached: the images of the batch have different numbers of prompts joined by AND"]
        return ["nothing was cached: no call of the model was seen, another extension may have replaced it"]

    def close(self) -> None:
        """The run is over."""
        self.patch.remove()
        self.engine.end()


_running: list[Run] = []
"""The runs in progress, innermost last. There is more than one if an extension samples during a run."""


@contextmanager
def running(
    p: Any, job: Job, func: Callable[..., Tensor], denoiser: Any, keywords: dict[str, Any], hires: bool
) -> Iterator[None]:
    """Caches one sampling loop. If that is not possible, the loop runs as it is, and the user is told why."""
    try:
        guided = keywords.get("extra_args", {}).get("cond_scale", 1) != 1
        method = job.options.as_method(getattr(func, "__name__", ""), guided)
        run = Run(method, func, denoiser, keywords, forge=hasattr(p.sd_model, "forge_objects"))
    except Exception as error:
        reason = str(error) if isinstance(error, OptionError) else f"{type(error).__name__}: {error}"
        notify(p, f"{reason}; this run goes without the cache")
        job.forget_run(p)
        yield
        return
    _running.append(run)
    try:
        yield
    finally:
        _running.remove(run)
        run.close()
        job.record_run(p, run.engine.report, method.skip == "uncond", hires)
        for sentence in run.remarks():
            notify(p, sentence)


def on_cfg_denoiser(params: Any) -> None:
    """The host's callback, once per evaluation, before it calls the model. A1111 has `params.denoiser` from 1.7 on."""
    denoiser = getattr(params, "denoiser", None)
    run = next((run for run in reversed(_running) if denoiser is None or run.denoiser is denoiser), None)
    if run is not None:
        run.begin_evaluation(params)
