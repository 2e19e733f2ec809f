"""What a node leaves on a model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from stepcache import Method, Report

from .run import Run
from .samplers import ADAPTIVE, AT_STEP_ENDS, EVALUATIONS, OFF_SCHEDULE, function_name
from .wrappers import with_wrappers

log = logging.getLogger("stepcache")


class Cache:
    """What a node leaves on a model: options, and the report of the last run. It is the wrapper at OUTER_SAMPLE.

    Args:
        method: what to skip and how to predict it.
        decide:"reference": the positive branch's change decides, over all images of a batch. "each": every branch
            of every image decides for itself, and an evaluation is skipped if all of them would.

    Copies of a model share it: it holds nothing of a run.
    """

    def __init__(self, method: Method, decide: str = "reference") -> None:
        self.method = method
        self.decide = decide
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
        """The wrapper at OUTER_SAMPLE: one run, from its first evaluation to its end, however it ends."""
        guider = executor.class_obj
        name = function_name(sampler)
        run = Run(guider, self.method, self.decide, name)
        stages = EVALUATIONS.get(name)
        churn = getattr(sampler, "extra_options", {}).get("s_churn")
        known = None if name in (*OFF_SCHEDULE, *ADAPTIVE) or len(sigmas) < 2 else sigmas
        run.engine.begin(known, stages, (stages == 1 or name in AT_STEP_ENDS) and not churn, loops=False)
        usual = guider.model_options
        guider.model_options = with_wrappers(usual, predict_noise=run.count, calc_cond_batch=run.answer)

        def note(step: int, *info: Any) -> Any:
            run.engine.note(int(step))
            return callback(step, *info) if callback is not None else None

        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, note, *args, **keywords)
        finally:
            guider.model_options = usual
            run.engine.end()
            self.report = run.engine.report
            self.report.notes.extend(sentence for sentence in run.notes if sentence not in self.report.notes)
            log.info("StepCache: %s", in_one_line(self.report))


def in_one_line(report: Report) -> str:
    """A report for the log: `forecast: 20 steps, 20 evaluations, 22 of 40 calls made, 18 skipped (1.82x fewer)`."""
    if not report.events:
        return f"{report.method}: nothing was evaluated through it" + "".join(f"; {note}" for note in report.notes)
    steps = "" if report.steps is None else f"{report.steps} steps, "
    return (
        f"{report.method}: {steps}{report.evaluations} evaluations, {report.calls} of {len(report.events)} calls made, "
        f"{report.skipped} skipped ({report.speedup:.2f}x fewer)"
    )
