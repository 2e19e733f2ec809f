"""Which run a call of the model belongs to, and which of the run's evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from typing import Any
from weakref import ref

from torch import Tensor

from .call import Call
from .caller import caller
from .clock import Clock, Position, same_sigma
from .criteria.always import Always
from .methods.base import Method
from .ranks import Ranks
from .report import Report
from .run import Evaluation, Run
from .run_info import RunInfo

CHANGED = "shape, dtype, device, thread, task, prompt or model changed within the run: the cache was dropped"


class Runs:
    """The runs of one model, one after another.

    Args:
        method: what the runs are made for.
        clock: sigma -> position.
        known: what is known of every run; its notes go into every report.
        reference, each, noise: as for `Run`.
        ranks: those that call the model together with this one.
        warn: issues a warning, once.

    Attributes:
        current: the run in progress; None between runs.
        report: the report of the run in progress, or of the last one.
        slot: which of the runs of one model that are in progress at the same time these are; see `RunInfo`.
    """

    def __init__(
        self,
        method: Method,
        clock: Clock,
        known: RunInfo,
        reference: str | None,
        each: bool,
        noise: float | None,
        ranks: Ranks,
        warn: Callable[[str], None],
    ) -> None:
        self.clock, self.report = clock, Report(method.name)
        self.current: Run | None = None
        self._method, self._known, self._ranks, self._warn = method, known, ranks, warn
        self._reference, self._each, self._noise = reference, each, noise
        self._of_one_caller, self.slot = True, 0
        self.check_mask()

    def announce(
        self, sigmas: Tensor | Iterable[float] | None, stages: int | None, on_schedule: bool | None, loops: bool
    ) -> None:
        """The host announces a run; see `Clock.announce`. OptionError if the mask has another length."""
        self.current = None
        self.clock.announce(sigmas, stages, on_schedule, loops)
        try:
            self.check_mask()
        except BaseException:
            self.clock.end()
            raise

    def end(self) -> None:
        """The announced run is over; only its report stays."""
        self.clock.end()
        self.current = None

    def reset(self) -> None:
        """Forgets the run in progress; only its report stays."""
        self.clock.restart()
        self.current = None

    def __getstate__(self) -> dict[str, Any]:
        """A run in progress is its owner's, who will not end it in a copy."""
        clock = copy(self.clock)
        clock.end()
        return {**self.__dict__, "current": None, "clock": clock}

    def fork(self) -> Runs:
        """Others of the same model, called from any thread or task."""
        other = copy(self)
        other.clock = self.clock.fork()
        other.report, other._of_one_caller = Report(self._method.name), False
        return other

    def check_mask(self) -> None:
        """OptionError if the method's mask has another length than the schedule."""
        mask, steps = self._method.mask, self.clock.steps
        if mask is not None and steps is not None:
            mask.for_steps(steps)

    def locate(self, call: Call) -> Evaluation:
        """The evaluation that a call belongs to: the one in progress, the next one, or the first of a new run."""
        latent, names = call.latent, call.names
        rows = latent.shape[0] // len(names)
        who = ref(caller()) if self._of_one_caller else None
        key = (rows, *latent.shape[1:], latent.dtype, latent.device, who, call.cache_key)
        if self.current is not None and call.evaluation is None and call.place is None and not self._method.never_skips:
            twice = self._called_twice(self.current, call)
            if twice is not None:
                return twice
        if self.current is not None:
            self._drop_if_changed(self.current, names, key)
        current = self.current.evaluation if self.current is not None else None
        if current is not None and not current.names.intersection(names) and _same_evaluation(current, call):
            current.names.update(names)
            current.add(call)
            if self._each:
                current.gated = current.run.gated(current.position, names)
            return current
        position = self.clock.locate(call.sigma) if call.place is None else self.clock.advance(*call.place)
        run = self.current
        if run is None or run.number != position.run:
            run = self.current = self._new(position)
            if who is not None and not self.clock.announced:
                run.ends_with(who())
            run.cache_keys.update(dict.fromkeys(names, key))
            if current is not None and current.position.evaluation == 0 and position.sigma == current.position.sigma:
                run.repeats = None  # a second image at the first sigma, or the second part of a batch
        elif run.repeats is None and position.evaluation > 1:
            run.repeats = False
        expected = frozenset(current.names if current is not None else ())
        gated = run.gated(position, names)
        run.evaluation = Evaluation(run, position, call.sigma, gated, call.evaluation, expected, set(names))
        run.evaluation.add(call)
        return run.evaluation

    def _called_twice(self, run: Run, call: Call) -> Evaluation | None:
        """The evaluation in progress, marked as repeated, if the same branches were called in it before.

        If the latent is the very same, two branches share a name. With another latent they may be another part
        of the batch: certainly in a schedule with one evaluation a step, or if it was so before in this run; else it is
        Heun's next step. Parts of a batch cannot be told apart later, so nothing that they computed is kept.
        A sigma on an accelerator is not read for this; it must be the same tensor.
        """
        current = run.evaluation
        if current is None or call.names not in current.latents:
            return None
        again = run.repeats or (run.repeats is None and current.position.evaluation == 1)
        same = current.same_latent(call)
        if not (same or again or self.clock.one_evaluation(current.position)):
            return None
        if current.sigma is not call.sigma and (
            call.sigma.device.type != "cpu" or not same_sigma(current.sigma, call.sigma)
        ):
            return None
        if not same:
            run.repeats = True
            run.forget()
        sentence = (
            f"branch {', '.join(call.names)} was called twice in one evaluation: such calls are computed, and nothing "
            "is learnt from them. Give branches that come in separate calls a name each"
        )
        self._warn(sentence)
        run.report.note(sentence)
        return replace(current, repeated=True)

    def _drop_if_changed(self, run: Run, names: tuple[str, ...], key: tuple[Any, ...]) -> None:
        """If a branch's cache key has changed, the run ends; if the host announced it, only the branch's cache goes."""
        changed = [name for name in names if run.cache_keys.setdefault(name, key) != key]
        if changed and not self.clock.announced:
            self.reset()
        elif changed:
            run.report.note(CHANGED)
            run.forget(changed)
            run.cache_keys.update(dict.fromkeys(changed, key))

    def _new(self, position: Position) -> Run:
        clock, method = self.clock, self._method
        fits = position.step is not None or position.mixed or clock.schedule is None
        schedule = clock.schedule if fits else None
        info = replace(self._known, schedule=schedule, stages=clock.stages, slot=self.slot, notes=[], warnings=[])
        if not fits:
            info.warnings.append(
                f"the schedule given lacks the run's first sigma, {position.sigma:g}: taken as not known"
            )
        elif schedule is None:
            info.notes.append("the schedule is not known: steps are not counted, and where a run begins is guessed")
        info.notes.extend(self._known.notes)
        if not method.never_skips:
            info.notes.extend(self._ranks.begin())
        run = Run(method, info, position.run, self._reference, self._each, self._noise)
        if method.static and not isinstance(method.criterion, Always):
            info.notes.append(f"mask policy static: {method.name}'s own criterion is not asked")
        for sentence in info.warnings:
            self._warn(sentence)
        info.notes.extend(info.warnings)
        self.report = run.report
        return run

    def free_if_over(self, evaluation: Evaluation) -> None:
        """Frees the latents after the run's last evaluation, if it can be known."""
        run, position, schedule = evaluation.run, evaluation.position, evaluation.run.info.schedule
        if not evaluation.expected <= evaluation.names:
            return
        if schedule is None:
            over = position.sigma <= self.clock.lowest
        else:
            single = schedule[-1] == 0 or run.info.stages != 2
            over = position.step == len(schedule) - 2 and (single or position.stage == 1)
        if over:
            run.forget()


def _same_evaluation(current: Evaluation, call: Call) -> bool:
    """Whether a call belongs to the evaluation in progress."""
    if call.evaluation is not None:
        return call.evaluation == current.number
    if call.place is not None:
        position = current.position
        return call.place == (position.sigma, position.step, position.stage)
    return same_sigma(current.sigma, call.sigma)
