"""The samples of a batch decide each for themselves, as if each were sampled alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .branch import Branch
from .call import CANNOT_BE_SPLIT, Call
from .plan import ComputeReason, Plan
from .planner import Planner
from .report import Report
from .run import Evaluation, Run

ANOTHER = ComputeReason("another sample is computed")
WHOLE = "the batch cannot be taken apart into its samples: one decision is made for all of them"
COMPUTED = "the model cannot be called for some samples of the batch: it is called for all, and what is skipped dropped"


class Samples:
    """Answers a call for a batch, each sample by caches, rules and counts of its own.

    Args:
        planner: makes the plan of each sample.
        together: an evaluation is skipped only if every sample would skip it. If False, the model is called for those
            samples alone that need it.
    """

    def __init__(self, planner: Planner, together: bool) -> None:
        self._planner, self._together = planner, together

    def parts(self, call: Call, run: Run) -> list[Call]:
        """The call of each sample; none for a batch of one, or if it cannot be taken apart."""
        count = call.latent.shape[0] // len(call.names)
        parts = [part for k in range(count if count > 1 else 0) if (part := call.of_samples([k])) is not None]
        if count > 1 and len(parts) < count:
            run.report.note(WHOLE)
            return []
        return parts

    def answer(self, call: Call, evaluation: Evaluation, parts: Sequence[Call]) -> Any:
        """The life of one evaluation, for all samples."""
        run = evaluation.run
        if len(run.samples) != len(parts):
            run.samples = [run.sibling() for _ in parts]
        evaluations = [_of_sample(sample, evaluation, call.names) for sample in run.samples]
        branches = [one.run.branches(part, one) for part, one in zip(parts, evaluations, strict=True)]
        plans = [self._planner.plan(one, of) for one, of in zip(evaluations, branches, strict=True)]
        chosen = [k for k, plan in enumerate(plans) if plan.computed]
        if chosen and self._together:
            plans = [plan if plan.computed else plan.all_computed(ANOTHER) for plan in plans]
            chosen = [*range(len(parts))]
        if chosen and not _compute(call, run, parts, chosen):
            run.report.note(WHOLE)
            run.report.passed(evaluation.position, call.names, "cannot be taken apart")
            return call.raw
        of_samples = zip(parts, evaluations, plans, branches, strict=True)
        answers = [self._finish(run.report, k + 1, *one) for k, one in enumerate(of_samples)]
        return call.raw if len(chosen) == len(parts) else call.join(answers)

    def _finish(
        self, report: Report, number: int, part: Call, evaluation: Evaluation, plan: Plan, branches: dict[str, Branch]
    ) -> Any:
        run = evaluation.run
        plan, outputs = self._planner.compute(part, run, plan, branches)
        plan, outputs = self._planner.checked(part, run, plan, branches, outputs)
        outputs |= {name: branches[name].predict() for name in plan.predicted}
        run.update(part, plan, branches, outputs)
        report.append(evaluation.position, plan, branches, evaluation.skip_reason, f" of sample {number}")
        return part.rebuild(tuple(outputs[name] for name in part.names)) if plan.predicted else part.raw


def _of_sample(run: Run, evaluation: Evaluation, names: tuple[str, ...]) -> Evaluation:
    """The evaluation as one sample has it; its branches may come in several calls."""
    current, position = run.evaluation, evaluation.position
    if current is None or current.position is not position:
        gated, number, expected = run.gated(position, names), evaluation.number, evaluation.expected
        current = run.evaluation = Evaluation(run, position, evaluation.sigma, gated, number, expected)
    current.names.update(names)
    return current


def _compute(call: Call, run: Run, parts: Sequence[Call], chosen: Sequence[int]) -> bool:
    """Calls the model once, for the chosen samples; the call of each has its answer then, unless this gives False."""
    answers: Sequence[Any] = ()
    few = None if run.indivisible or len(chosen) == len(parts) else call.of_samples(chosen)
    if few is not None:
        try:
            answers = few.split(few.run_model())
            if len(answers) != len(chosen):
                raise ValueError
        except CANNOT_BE_SPLIT:  # if the model itself fails, the call for all samples fails as well
            run.indivisible, few = True, None
            run.report.note(COMPUTED)
    if few is None:
        call.raw = call.run_model()
        everything = call.split(call.raw)
        answers = [everything[k] for k in chosen] if everything else ()
    if not answers:
        return False
    for k, answer in zip(chosen, answers, strict=True):
        parts[k].answer = answer
    return True
