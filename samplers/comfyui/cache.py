"""What a node leaves on a model: options, and the report of the last run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from stepcache import Method, OptionError, Report

from .others import other_caches
from .run import Run
from .samplers import ADAPTIVE, AT_STEP_ENDS, EVALUATIONS, NEGATIVE_ONLY, OFF_SCHEDULE, function_name
from .wrappers import with_wrappers

log = logging.getLogger("stepcache")


class Cache:
    """The options of a node, the report of the last run, and the wrapper at OUTER_SAMPLE.

    Args:
        method: what to skip and how to predict it.
        decide: "batch": the positive branch's change decides, for all images of a batch. "each": every branch of
            every image decides for itself, and an evaluation is skipped if all of them agree. "sample": every image of
            a batch decides for itself, and the model is called for those alone that need it.
        noisy: what acts instead of `method` if the sampler is one of `NEGATIVE_ONLY_SAMPLERS` and there is guidance.
            None: `method` acts with every sampler.

    All copies of a model share it: the state of a run is not in it. `report` is that of the run that ended last.
    """

    def __init__(self, method: Method, decide: str = "batch", noisy: Method | None = None) -> None:
        self.method = method
        self.decide = decide
        self.noisy = noisy
        self.report = Report(method.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return self

    def sample(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., Any] | None = None,
        *args: Any,
        **keywords: Any,
    ) -> Tensor:
        """The wrapper at OUTER_SAMPLE: one run, from its first evaluation to its end, even if that is an exception.

        Raises `OptionError` naming our node if an option does not fit the run, as a mask of another length.
        """
        guider = executor.class_obj
        try:
            run = self._begin(guider, sampler, sigmas)
        except OptionError as error:
            raise OptionError(f"in the node StepCache: {error}") from None
        usual = guider.model_options
        guider.model_options = with_wrappers(usual, predict_noise=run.count, calc_cond_batch=run.answer)

        def note(step: int, *info: Any) -> Any:
            run.engine.set_step(int(step))
            return callback(step, *info) if callback is not None else None

        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, note, *args, **keywords)
        finally:
            guider.model_options = usual
            run.engine.end()
            self.report = run.engine.report
            self.report.notes.extend(sentence for sentence in run.notes if sentence not in self.report.notes)
            log.info("StepCache: %s", in_one_line(self.report, run.engine.method.skip == "uncond"))

    def _begin(self, guider: Any, sampler: Any, sigmas: Tensor) -> Run:
        name = function_name(sampler)
        extra = getattr(sampler, "extra_options", {})
        method = self.method
        if self.noisy is not None and name in NEGATIVE_ONLY and extra.get("eta", 1) and _guided(guider):
            method = self.noisy
        run = Run(guider, method, self.decide, name)
        if method is self.noisy:
            sampler_name = name.removeprefix("sample_")
            run.notes.append(f"{sampler_name} adds noise at every step: only the negative prompt is skipped")
        stages = EVALUATIONS.get(name)
        churn = extra.get("s_churn")
        known = None if name in (*OFF_SCHEDULE, *ADAPTIVE) or len(sigmas) < 2 else sigmas
        run.engine.announce(known, stages, (stages == 1 or name in AT_STEP_ENDS) and not churn, loops=False)
        if not method.never_skips and (others := other_caches(guider.model_options)):
            sentence = (
                f"{' and '.join(others)} is on this model too: both skip, the errors add up, and what it skips is "
                "reported as computed here. Keep one of them"
            )
            run.notes.append(sentence)
            log.warning("StepCache: %s", sentence)
        return run


def _guided(guider: Any) -> bool:
    """Whether there is a negative prompt that may be skipped. Context windows need all prompts, see `Run.answer`."""
    scales = (getattr(guider, name, 1) for name in ("cfg", "cfg1", "cfg2"))
    return guider.model_options.get("context_handler") is None and any(scale != 1 for scale in scales)


def in_one_line(report: Report, negative_only: bool = False) -> str:
    """A report for the log: `forecast: 20 steps, 20 evaluations, 22 of 40 calls made, 18 skipped (1.82x fewer)`.

    If nothing was skipped, the report's notes follow, because one of them may be the reason.
    """
    notes = "".join(f"; {note}" for note in report.notes)
    if not report.events:
        return f"{report.method}: nothing was evaluated through it{notes}"
    steps = "" if report.steps is None else f"{report.steps} steps, "
    name = f"{report.method}, negative prompt only" if negative_only else report.method
    return (
        f"{name}: {steps}{report.evaluations} evaluations, {report.calls} of {len(report.events)} calls made, "
        f"{report.skipped} skipped ({report.speedup:.2f}x fewer){'' if report.skipped else notes}"
    )
