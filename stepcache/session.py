"""The session: what stands between one model and its sampler, and decides about every evaluation."""

from __future__ import annotations

import math
import threading
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .criteria import Always, Criterion, Verdict
from .gates import Answer, Hold, Run, Tally
from .memory import Evidence, History
from .methods import Method, Off
from .options import OptionError, unknown
from .readings import Readings
from .report import Event, Report
from .timeline import Timeline, Where, same_sigma


class Request(ABC):
    """One call of the model as its host makes it, for one condition or for several batched together.

    A host adapter translates: `sigma` is the noise level (any shape, all elements equal), `names` are the conditions in
    the order of the tensors below, `latent` is what the host passed, `requires_grad` whether gradients are wanted
    through the call. `place` is (sigma, step, stage) where the host keeps count of its steps itself; `sigma` is then
    not looked at. `evaluation` is the host's own number of the evaluation, where it counts them: calls stand in one
    evaluation then if they have one number, whatever their sigma. `form` is what else must stay the same for a memory
    to hold, such as the prompt or the model itself. Inputs and outputs are one tensor a condition, in the network's own
    space: `x c_in` and the raw output, in float32 or wider, outside autograd.
    """

    sigma: Tensor
    names: tuple[str, ...]
    latent: Tensor
    requires_grad: bool = False
    place: tuple[float, int, int] | None = None
    evaluation: int | None = None
    form: tuple = ()

    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """The network's inputs, as new tensors."""

    @abstractmethod
    def compute(self) -> Any:
        """Calls the model and returns what the host expects, untouched."""

    @abstractmethod
    def outputs(self, answer: Any) -> tuple[Tensor, ...]:
        """The raw network outputs that `answer` stands for, as new tensors."""

    @abstractmethod
    def restore(self, outputs: tuple[Tensor, ...]) -> Any:
        """What the host expects, made from raw network outputs."""


@dataclass
class Decision:
    """What is done about an evaluation, and why. `hold` is None where it is skipped."""

    hold: Hold | None
    verdicts: dict[str, Verdict] = field(default_factory=dict)


@dataclass
class Evaluation:
    """The evaluation in progress; its conditions may come in one call or in several."""

    where: Where
    sigma: Tensor
    hold: Hold | None
    names: set[str] = field(default_factory=set)
    expected: frozenset[str] = frozenset()
    number: int | None = None
    decision: Decision | None = None


class RunState:
    """Everything that lives as long as a run. A new run is a new object: nothing can leak from one to the next."""

    def __init__(self, method: Method, run: Run, number: int) -> None:
        self.number = number
        self.signatures: dict[str, tuple] = {}
        self.run = run
        self.readings = Readings()
        self.gates: list[Answer] = [] if method.never_skips else [gate.begin(run) for gate in method.all_gates()]
        self.tally = Tally()
        self.anchor: str | None = None
        self.rules: dict[str, Criterion] = {}
        self.histories: dict[str, History] = {}
        self.evaluation: Evaluation | None = None


NO_MEMORY = Hold("no memory yet")
NOT_ASKED = Hold("before the anchor", observe=False)
NOT_FINITE = Hold("prediction not finite")
CRITERION = Hold("criterion")


class Session:
    """Answers a sampler's evaluations of one model, some of them without calling it.

    Args:
        method: what to skip and how to predict it. None computes everything.
        anchor: the condition whose change decides for the whole evaluation. None: of conditions batched in one call,
            "cond" if there is one, else the first; of conditions in separate calls, the first one called.
        decide: "anchor" (default), or "each": every condition decides for itself; conditions batched in one call are
            skipped when all of them agree.
        sigmas: the schedule, sigmas[0..n], of runs that the host does not announce with `begin`.
        training_sigma: share of the training timetable (0 to 1) -> sigma, where the model has such a table.
        coordinate: sigma -> the coordinate that predictors extrapolate in. None: log sigma.
        lowest_sigma: the model's lowest sigma: at or below it a run without a schedule is over and its memory is freed.
        group: a torch.distributed process group whose ranks work on one sample together. All of them then take the same
            decision: to skip where every rank would. None: no communication.
        notes: sentences of the host for every report.

    A session follows one run at a time. Runs in several threads need a session each: a call while another is being
    answered goes straight to the model, and a call from another thread finds no memory. That costs the speed, never the
    image.
    """

    def __init__(
        self,
        method: Method | None,
        *,
        anchor: str | None = None,
        decide: str = "anchor",
        sigmas: Tensor | Iterable[float] | None = None,
        training_sigma: Callable[[float], float] | None = None,
        coordinate: Callable[[float], float] | None = None,
        lowest_sigma: float = 0.0,
        group: Any = None,
        notes: Iterable[str] = (),
    ) -> None:
        if decide not in ("anchor", "each"):
            raise unknown("value of decide", str(decide), ("anchor", "each"))
        if decide == "each" and anchor is not None:
            raise OptionError(f"anchor={anchor!r} with decide='each': where each condition decides there is no anchor")
        self.method = method or Off()
        self.timeline = Timeline(sigmas)
        self.report = Report(self.method.name)
        self._named_anchor = anchor
        self._each = decide == "each"
        self._training_sigma = training_sigma
        self._coordinate = coordinate or math.log
        self._lowest_sigma = lowest_sigma
        self._group = group
        self._state: RunState | None = None
        self._warned: set[str] = set()
        self._notes = tuple(notes)
        self._lock, self._busy = threading.RLock(), False
        self._check_mask()

    def answer(self, request: Request) -> Any:
        """Answers one call. After an exception, the model's or our own, the next call begins a new run."""
        if not self._lock.acquire(blocking=False):
            self._warn("a second thread called while the first was being answered: give each run a wrapper of its own")
            return request.compute()
        try:
            if self._busy:
                return request.compute()
            self._busy = True
            try:
                return self._answer(request)
            except BaseException:
                self.reset()
                raise
            finally:
                self._busy = False
        finally:
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled: options and the last report, never a lock or a run in progress."""
        return {**self.__dict__, "_lock": None, "_busy": False, "_state": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self.timeline.restart()

    def _answer(self, request: Request) -> Any:
        """The life of one call, top to bottom."""
        # Where am I?
        evaluation = self._locate(request)
        state, where = self._state, evaluation.where
        direct = self._direct_reason(request, where)
        if direct:
            self._record(where, request.names, direct)
            answer = request.compute()
            self._free_if_over(evaluation)
            return answer
        evidence = {
            name: Evidence(where, state.run, x, self._memory(name), self.method.predictor, state.readings)
            for name, x in zip(request.names, request.inputs(), strict=True)
        }

        # May I? Shall I?
        decision = self._decide(evaluation, evidence)
        hold = decision.hold

        # What do I return?
        if hold is None:
            answer = request.restore(tuple(one.prediction for one in evidence.values()))
        else:
            answer = request.compute()
            for one, out in zip(evidence.values(), request.outputs(answer), strict=True):
                one.out = out

        # What do I record?
        for name, one in evidence.items():
            decides = name in state.rules
            if hold is not None:
                if decides:
                    one.off  # noqa: B018  measured now, before this evaluation joins the memory it is measured against
                    if hold.observe:
                        said = decision.verdicts.get(name)
                        state.rules[name].observe(one, forced=said is None or said.skip)
                if hold.record:
                    memory = state.histories.setdefault(name, deque(maxlen=self.method.predictor.memory))
                    self.method.predictor.remember(memory, one.node(request.latent.dtype))
            self._record(
                where, (name,), self._reason(hold), decision.verdicts.get(name), one if decides else None, hold
            )
        self._count(evaluation, request.names, skipped=hold is None)
        self._free_if_over(evaluation)
        return answer

    def begin(
        self,
        sigmas: Tensor | Iterable[float] | None = None,
        stages: int | None = None,
        on_schedule: bool | None = None,
    ) -> None:
        """The host announces a run, which lasts until `end`; see `Timeline.begin`."""
        with self._lock:
            self._state = None
            self.timeline.begin(sigmas, stages, on_schedule)
            try:
                self._check_mask()
            except BaseException:
                self.timeline.end()
                raise

    def end(self) -> None:
        """The announced run is over; only its report stays."""
        with self._lock:
            self.timeline.end()
            self._state = None

    def reset(self) -> None:
        """Forgets the run in progress; only its report stays."""
        with self._lock:
            self.timeline.restart()
            self._state = None

    def note(self, step: int) -> None:
        """The sampler's callback: the first evaluation of this step has just been answered."""
        self.timeline.note(step)

    def _locate(self, request: Request) -> Evaluation:
        """The evaluation a call belongs to: the one in progress, the next one, or the first of a new run."""
        rows = request.latent.shape[0] // len(request.names)
        signature = (
            rows,
            *request.latent.shape[1:],
            request.latent.dtype,
            request.latent.device,
            threading.get_ident(),
            request.form,
        )
        if self._state is not None:
            self._forget_changed(request.names, signature)
        current = self._state.evaluation if self._state is not None else None
        follows = current is not None and not current.names & set(request.names)
        if follows and self._together(current, request):
            current.names.update(request.names)
            return current
        where = self.timeline.locate(request.sigma) if request.place is None else self.timeline.put(*request.place)
        if self._state is None or self._state.number != where.run:
            self._state = self._begin_run(where)
            self._state.signatures.update(dict.fromkeys(request.names, signature))
        hold = next((h for h in (gate(where, self._state.tally) for gate in self._state.gates) if h is not None), None)
        expected = frozenset(current.names if current is not None else ())
        self._state.evaluation = Evaluation(
            where, request.sigma, hold, set(request.names), expected, request.evaluation
        )
        return self._state.evaluation

    def _together(self, current: Evaluation, request: Request) -> bool:
        """Whether a call stands where the evaluation in progress does."""
        if request.evaluation is not None:
            return request.evaluation == current.number
        if request.place is not None:
            where = current.where
            return request.place == (where.sigma, where.step, where.stage)
        return same_sigma(current.sigma, request.sigma)

    def _forget_changed(self, names: tuple[str, ...], signature: tuple) -> None:
        """Something of the signature has changed: the run ends, or, where the host announced it, the memory."""
        state = self._state
        changed = [name for name in names if state.signatures.setdefault(name, signature) != signature]
        if changed and not self.timeline.bounded:
            self.reset()
        elif changed:
            sentence = "shape, dtype, device, thread, prompt or model changed within the run: the memory was dropped"
            if sentence not in state.run.notes:
                state.run.notes.append(sentence)
            for name in changed:
                state.signatures[name] = signature
                state.histories.pop(name, None)
                state.rules.pop(name, None)

    def _begin_run(self, where: Where) -> RunState:
        timeline = self.timeline
        fits = where.step is not None or where.mixed or timeline.schedule is None
        second_only = self.method.evaluations == "second"
        schedule = timeline.schedule if fits else None
        run = Run(schedule, self._training_sigma, timeline.stages, second_only, self._coordinate)
        self.report = Report(self.method.name, where.run, run.steps, run.notes)
        if not fits:
            run.warnings.append(f"the schedule given lacks the run's first sigma, {where.sigma:g}: taken as not known")
        elif run.steps is None:
            run.notes.append("the schedule is not known: steps are not counted, and where a run begins is guessed")
        run.notes.extend(self._notes)
        state = RunState(self.method, run, where.run)
        if self.method.static and not isinstance(self.method.criterion, Always):
            run.notes.append(f"mask policy static: {self.method.name}'s own criterion is not asked")
        for sentence in run.warnings:
            self._warn(sentence)
        run.notes.extend(run.warnings)
        return state

    def _direct_reason(self, request: Request, where: Where) -> str | None:
        """Why the model is called without looking at tensors at all, if it is."""
        if self.method.never_skips:
            return "off"
        if torch.is_grad_enabled() and request.requires_grad:
            return "gradients are asked for"
        if where.mixed:
            self._warn("the rows of the batch have different sigmas: such evaluations are always computed")
            return "sigmas differ in the batch"
        return None

    def _memory(self, name: str) -> History:
        """The condition's memory; empty where it is older than the anchor's, because something changed in between."""
        state = self._state
        memory = state.histories.get(name, deque())
        anchors = state.histories.get(state.anchor)
        stale = memory and anchors and memory[-1].where.evaluation < anchors[-1].where.evaluation
        return deque() if stale else memory

    def _decide(self, evaluation: Evaluation, evidence: dict[str, Evidence]) -> Decision:
        """The decision about this call: made once an evaluation, by the anchor, and followed by the others."""
        state = self._state
        asleep = evaluation.hold is not None and not evaluation.hold.observe
        deciders = [] if asleep else self._deciders(evidence)
        if evaluation.hold is not None:
            return Decision(evaluation.hold)
        if not deciders and evaluation.decision is None:
            self._warn(
                f"condition {next(iter(evidence))!r} is evaluated before the anchor {state.anchor!r}, whose decision "
                "it would follow, and is therefore always computed: name the first one called as anchor"
            )
            return Decision(NOT_ASKED)
        if not deciders and evaluation.decision.hold is not None:
            decision = Decision(evaluation.decision.hold)
        elif any(one.prediction is None for one in evidence.values()):
            decision = Decision(NO_MEMORY)
        elif deciders:
            decision = self._ask(evidence, deciders)
        else:
            sound = all(self._sound(one) for one in evidence.values())
            device = next(iter(evidence.values())).x.device
            decision = Decision(None if self._agreed(sound, device) else NOT_FINITE)
        if deciders:
            evaluation.decision = decision
        return decision

    def _deciders(self, evidence: dict[str, Evidence]) -> list[str]:
        """The conditions of this call that decide; each has a rule of its own for this run."""
        state = self._state
        if self._each:
            deciders = list(evidence)
        else:
            if state.anchor is None:
                usual = "cond" if "cond" in evidence else next(iter(evidence))
                state.anchor = self._named_anchor or usual
            deciders = [state.anchor] if state.anchor in evidence else []
        for name in deciders:
            if name not in state.rules:
                state.rules[name] = self.method.criterion.begin(state.run)
        return deciders

    def _ask(self, evidence: dict[str, Evidence], deciders: list[str]) -> Decision:
        for one in evidence.values():
            one.total  # noqa: B018  requested before anything is read: everything comes over in one transfer
        for name in deciders if not self.method.static else ():
            evidence[name].input_change  # noqa: B018
        verdicts = {
            name: Verdict(True) if self.method.static else self._state.rules[name].decide(evidence[name])
            for name in deciders
        }
        finite = all(math.isfinite(one.total) for one in evidence.values())
        willing = finite and all(verdict.skip for verdict in verdicts.values())
        skip = self._agreed(willing, evidence[deciders[0]].x.device)
        return Decision(None if skip else CRITERION if finite else NOT_FINITE, verdicts)

    def _sound(self, one: Evidence) -> bool:
        """Whether a follower's prediction is finite; told from its memory, without a transfer, where that is enough."""
        if self.method.predictor.finite_where_memory_is:
            return all(math.isfinite(node.size) for node in one.history)
        return math.isfinite(one.total)

    def _agreed(self, skip: bool, device: torch.device) -> bool:
        """The decision of all ranks of the group: skip where every one would."""
        if self._group is None:
            return skip
        flag = torch.tensor(float(skip), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=self._group)
        return bool(flag.item())

    def _reason(self, hold: Hold | None) -> str:
        if hold is not None:
            return hold.reason
        return "mask" if self.method.static else "criterion"

    def _count(self, evaluation: Evaluation, names: tuple[str, ...], skipped: bool) -> None:
        """Counts the evaluation once: when its anchor was answered."""
        state = self._state
        first = evaluation.names == set(names)
        if not (first if self._each or state.anchor is None else state.anchor in names):
            return
        if skipped:
            state.tally.skipped += 1
            state.tally.consecutive += 1
        else:
            state.tally.computed += 1
            state.tally.consecutive = 0

    def _record(
        self,
        where: Where,
        names: tuple[str, ...],
        reason: str,
        verdict: Verdict | None = None,
        evidence: Evidence | None = None,
        hold: Hold | None = CRITERION,
    ) -> None:
        for name in names:
            checked = evidence is not None and evidence.out is not None
            off, size = (evidence.off, evidence.size) if checked else (None, None)
            estimate, threshold = (verdict.estimate, verdict.threshold) if verdict is not None else (None, None)
            self.report.add(Event(where, name, hold is not None, reason, estimate, threshold, off, size))

    def _free_if_over(self, evaluation: Evaluation) -> None:
        """Frees the latents after the run's last evaluation, where it can be known."""
        state, where, schedule = self._state, evaluation.where, self.timeline.schedule
        if not evaluation.expected <= evaluation.names:
            return
        if state.run.steps is None:
            over = where.sigma <= self._lowest_sigma * (1 + 1e-4)
        else:
            single = schedule[-1] == 0 or state.run.stages != 2
            over = where.step == state.run.steps - 1 and (single or where.stage == 1)
        if over:
            state.histories.clear()
            state.rules.clear()
            state.anchor = None

    def _check_mask(self) -> None:
        if self.method.mask is not None and self.timeline.steps is not None:
            self.method.mask.for_steps(self.timeline.steps)

    def _warn(self, sentence: str) -> None:
        """Says a thing once per session."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=2)
