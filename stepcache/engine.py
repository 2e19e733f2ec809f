"""The engine: what stands between one model and its sampler, and decides about every evaluation."""

from __future__ import annotations

import math
import threading
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .branch import Branch, History
from .clock import Clock, Position, same_sigma
from .criteria import INVALID_STATE, Always, Criterion, Verdict
from .deferred import DeferredScalars
from .gates import Answer, ComputeReason, RunInfo, SkipCounts
from .methods import Method, Off
from .noise import FreshNoise
from .options import OptionError, number, unknown
from .parametrization import Parametrization
from .probe import LEFT
from .report import Event, Report


class Call(ABC):
    """One call of the model as its host makes it, for one branch or for several batched together.

    A host adapter translates: `sigma` is the noise level (any shape, all elements equal), `names` are the branches in
    the order of the tensors below, `latent` is what the host passed, `requires_grad` whether gradients are wanted
    through the call. `place` is (sigma, step, stage) where the host keeps count of its steps itself; `sigma` is then
    not looked at. `evaluation` is the host's own number of the evaluation, where it counts them: calls stand in one
    evaluation then if they have one number, whatever their sigma. `form` is what else must stay the same for a memory
    to hold, such as the prompt or the model itself. `keywords` are what the host passes to the model by name. Inputs
    and outputs are one tensor a branch, in the network's own space: `x c_in` and the raw output, in float32 or
    wider, outside autograd.
    """

    sigma: Tensor
    names: tuple[str, ...]
    latent: Tensor
    requires_grad: bool = False
    place: tuple[float, int, int] | None = None
    evaluation: int | None = None
    form: tuple = ()
    keywords: Mapping[str, Any] = MappingProxyType({})
    signal: Tensor | None = None
    """What blocks were seen to add; kept for a host that answers one request twice and computes it once."""

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

    def part(self, name: str) -> Call | None:
        """The same call for one of its branches alone; None where the host's call cannot be taken apart."""
        return None


@dataclass
class Decision:
    """What is done about an evaluation, and why. `hold` is None where it is skipped.

    It is `LOOK` where the criterion looks inside the model and is asked during the forward, which settles it.
    """

    hold: ComputeReason | None
    verdicts: dict[str, Verdict] = field(default_factory=dict)


@dataclass
class Evaluation:
    """The evaluation in progress; its branches may come in one call or in several."""

    position: Position
    sigma: Tensor
    hold: ComputeReason | None
    names: set[str] = field(default_factory=set)
    expected: frozenset[str] = frozenset()
    number: int | None = None
    decision: Decision | None = None
    lead: Tensor | None = None
    """The reference's output, where the others are predicted from it (`Method.skip`)."""


class RunState:
    """Everything that lives as long as a run. A new run is a new object: nothing can leak from one to the next."""

    def __init__(self, method: Method, run: RunInfo, number: int) -> None:
        self.number = number
        self.signatures: dict[str, tuple] = {}
        self.run = run
        self.deferred = DeferredScalars()
        self.gates: list[Answer] = [] if method.never_skips else [gate.begin(run) for gate in method.all_gates()]
        self.tallies: defaultdict[str | None, SkipCounts] = defaultdict(SkipCounts)
        self.reference: str | None = None
        self.rules: dict[str, Criterion] = {}
        self.histories: dict[str, History] = {}
        self.whole = False
        self.noise = FreshNoise() if method.predictor.sampler_aware and not method.never_skips else None
        self.evaluation: Evaluation | None = None


NO_MEMORY = ComputeReason("no memory yet")
NOT_ASKED = ComputeReason("before the reference", observe=False)
NOT_FINITE = ComputeReason("prediction not finite")
CRITERION = ComputeReason("criterion")
LOOK = ComputeReason("not settled")
KEPT = ComputeReason("the others follow", observe=False, record=False)
WHOLE = ComputeReason("cannot be taken apart")

SKIP_LAYERS = ("skip_layer_mask", "skip_layers", "perturbation_mask", "spatio_temporal_guidance_blocks")
"""Names under which models are told to leave blocks out, as spatio-temporal guidance (STG) does."""


class Engine:
    """Answers a sampler's evaluations of one model, some of them without calling it.

    Args:
        method: what to skip and how to predict it. None computes everything.
        reference: the branch whose change decides for the whole evaluation. None: of branches batched in one call,
            "cond" if there is one, else the first; of branches in separate calls, the first one called.
        decide:"reference" (default), or "each": every branch decides for itself; branches batched in one call are
            skipped when all of them agree.
        sigmas: the schedule, sigmas[0..n], of runs that the host does not announce with `begin`.
        training_sigma: share of the training timetable (0 to 1) -> sigma, where the model has such a table.
        coordinate: sigma -> the coordinate that predictors extrapolate in. None: log sigma.
        parametrization: sigma -> what the network's input and output mean there; None: not known. Forecast needs it.
        lowest_sigma: the model's lowest sigma: at or below it a run without a schedule is over and its memory is freed.
        noise: how noisy the sampler is, if the host knows: 0 for a deterministic one, 1 for one that adds fresh noise
            at every step. None: Forecast measures it in the run itself.
        group: a torch.distributed process group whose ranks work on one sample together. All of them then take the same
            decision: to skip where every rank would. None: no communication.
        notes: sentences of the host for every report.
        network: the model, in which a criterion that looks at blocks finds them.

    A engine follows one run at a time. Runs in several threads need a engine each: a call while another is being
    answered goes straight to the model, and a call from another thread finds no memory. That costs the speed, never the
    image.
    """

    def __init__(
        self,
        method: Method | None,
        *,
        reference: str | None = None,
        decide: str = "reference",
        sigmas: Tensor | Iterable[float] | None = None,
        training_sigma: Callable[[float], float] | None = None,
        coordinate: Callable[[float], float] | None = None,
        parametrization: Callable[[float], Parametrization] | None = None,
        lowest_sigma: float = 0.0,
        noise: float | None = None,
        group: Any = None,
        notes: Iterable[str] = (),
        network: Any = None,
    ) -> None:
        if decide not in ("reference", "each"):
            raise unknown("value of decide", str(decide), ("reference", "each"))
        if decide == "each" and reference is not None:
            raise OptionError(
                f"reference={reference!r} with decide='each': where each branch decides there is no reference"
            )
        self.method = method or Off()
        self.clock = Clock(sigmas)
        self.report = Report(self.method.name)
        self._named_reference = reference
        self._each = decide == "each"
        self._training_sigma = training_sigma
        self._coordinate = coordinate or math.log
        self._parametrization = parametrization
        self._noise = None if noise is None else number("noise", noise, high=1.0)
        self._lowest_sigma = lowest_sigma
        self._group = group
        self._state: RunState | None = None
        self._warned: set[str] = set()
        self._notes = tuple(notes)
        blocks = None if self.method.never_skips else self.method.criterion.blocks
        if self.method.static and blocks is not None and not blocks.after:
            blocks = None  # the criterion is not asked
        self._watch = None if blocks is None else blocks.find(network)
        if blocks is not None:
            self._notes += (self._looks_at(network),)
        self._leads = self.method.skip == "uncond" and not self.method.never_skips
        if self._leads and (self._each or blocks is not None):
            other = "decide='each'" if self._each else f"{self.method.name}, which decides inside the model"
            raise OptionError(f"skip='uncond' with {other}: the reference is always computed; use skip='all'")
        self._lock, self._busy = threading.RLock(), False
        self._check_mask()

    def answer(self, request: Call) -> Any:
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
        self.clock.end()  # an announced run is its owner's, who will not end it here

    def _answer(self, request: Call) -> Any:
        """The life of one call, top to bottom."""
        # Where am I?
        evaluation = self._locate(request)
        state, position = self._state, evaluation.position
        direct = self._direct_reason(request, position)
        if direct:
            self._record(position, request.names, direct)
            answer = request.compute()
            self._free_if_over(evaluation)
            return answer
        branch = {
            name: Branch(position, state.run, x, self._memory(name, evaluation), self.method.predictor, state.deferred)
            for name, x in zip(request.names, request.inputs(), strict=True)
        }
        self._measure_noise(request, position, branch)
        self._lean(evaluation, branch)

        # May I? Shall I? A criterion that looks inside the model is asked during the forward, which is left on a skip.
        decision = self._decide(evaluation, branch)
        if decision.hold is None and self._leads:
            decision = self._keep_reference(request, evaluation, branch, decision)
        answer = LEFT if decision.hold is None else self._compute(request, branch, decision)
        hold = decision.hold

        # What do I return?
        if hold is None:
            answer = request.restore(tuple(one.prediction if one.out is None else one.out for one in branch.values()))
        else:
            for one, out in zip(branch.values(), request.outputs(answer), strict=True):
                one.out = out
            self._lean(evaluation, branch)

        # What do I record?
        self._give(position, branch)
        for name, one in branch.items():
            held = KEPT if hold is None and one.out is not None else hold
            decides, checked = name in state.rules, name in state.rules or one.leans
            if held is not None and held is not KEPT:
                for rule in state.rules.values() if held.observe else ():
                    rule.witness(name, one)
                if checked:
                    one.off  # noqa: B018  measured now, before this evaluation joins the memory it is measured against
                if decides and held.observe:
                    said = decision.verdicts.get(name)
                    state.rules[name].observe(one, forced=said is None or said.skip)
                if held.record and one.x is not None:
                    memory = state.histories.setdefault(name, deque(maxlen=self.method.predictor.memory))
                    self.method.predictor.remember(memory, one.entry(request.latent.dtype))
            verdict = decision.verdicts.get(name)
            self._record(
                position, (name,), self._reason(held), verdict, one if checked and held is not KEPT else None, held
            )
        self._count(evaluation, request.names, skipped=hold is None or hold is KEPT)
        self._free_if_over(evaluation)
        return answer

    def begin(
        self,
        sigmas: Tensor | Iterable[float] | None = None,
        stages: int | None = None,
        on_schedule: bool | None = None,
        loops: bool = True,
    ) -> None:
        """The host announces a run, which lasts until `end`; see `Clock.begin`."""
        with self._lock:
            self._state = None
            self.clock.begin(sigmas, stages, on_schedule, loops)
            try:
                self._check_mask()
            except BaseException:
                self.clock.end()
                raise

    def end(self) -> None:
        """The announced run is over; only its report stays."""
        with self._lock:
            self.clock.end()
            self._state = None

    def reset(self) -> None:
        """Forgets the run in progress; only its report stays."""
        with self._lock:
            self.clock.restart()
            self._state = None

    def free(self) -> None:
        """Forgets what the run in progress has remembered; its place and its report stay."""
        with self._lock:
            if (state := self._state) is not None:
                state.histories.clear()
                state.rules.clear()
                if state.noise is not None:
                    state.noise.forget()
                state.reference = None
                if state.evaluation is not None:
                    state.evaluation.lead = None

    def note(self, step: int) -> None:
        """The sampler's callback: the first evaluation of this step has just been answered."""
        self.clock.note(step)

    def _locate(self, request: Call) -> Evaluation:
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
            if self._each:
                current.hold = self._held(current.position, request.names)
            return current
        position = self.clock.locate(request.sigma) if request.place is None else self.clock.put(*request.place)
        if self._state is None or self._state.number != position.run:
            self._state = self._begin_run(position)
            self._state.signatures.update(dict.fromkeys(request.names, signature))
        hold = self._held(position, request.names)
        expected = frozenset(current.names if current is not None else ())
        self._state.evaluation = Evaluation(
            position, request.sigma, hold, set(request.names), expected, request.evaluation
        )
        return self._state.evaluation

    def _held(self, position: Position, names: tuple[str, ...]) -> ComputeReason | None:
        """What the gates say, of all that were counted: the reference, or every branch that decides for itself."""
        tallies = [self._state.tallies[name] for name in (names if self._each else (None,))]
        answers = (gate(position, counts) for counts in tallies for gate in self._state.gates)
        return next((hold for hold in answers if hold is not None), None)

    def _together(self, current: Evaluation, request: Call) -> bool:
        """Whether a call stands where the evaluation in progress does."""
        if request.evaluation is not None:
            return request.evaluation == current.number
        if request.place is not None:
            position = current.position
            return request.place == (position.sigma, position.step, position.stage)
        return same_sigma(current.sigma, request.sigma)

    def _forget_changed(self, names: tuple[str, ...], signature: tuple) -> None:
        """Something of the signature has changed: the run ends, or, where the host announced it, the memory."""
        state = self._state
        changed = [name for name in names if state.signatures.setdefault(name, signature) != signature]
        if changed and not self.clock.bounded:
            self.reset()
        elif changed:
            sentence = "shape, dtype, device, thread, prompt or model changed within the run: the memory was dropped"
            if sentence not in state.run.notes:
                state.run.notes.append(sentence)
            if state.noise is not None:
                state.noise.forget()
            for name in changed:
                state.signatures[name] = signature
                state.histories.pop(name, None)
                state.rules.pop(name, None)

    def _begin_run(self, position: Position) -> RunState:
        clock = self.clock
        fits = position.step is not None or position.mixed or clock.schedule is None
        second_only = self.method.evaluations == "second"
        schedule = clock.schedule if fits else None
        run = RunInfo(
            schedule, self._training_sigma, clock.stages, second_only, self._coordinate, self._parametrization
        )
        self.report = Report(self.method.name, position.run, run.steps, run.notes)
        if not fits:
            run.warnings.append(
                f"the schedule given lacks the run's first sigma, {position.sigma:g}: taken as not known"
            )
        elif run.steps is None:
            run.notes.append("the schedule is not known: steps are not counted, and where a run begins is guessed")
        run.notes.extend(self._notes)
        state = RunState(self.method, run, position.run)
        if self.method.static and not isinstance(self.method.criterion, Always):
            run.notes.append(f"mask policy static: {self.method.name}'s own criterion is not asked")
        for sentence in run.warnings:
            self._warn(sentence)
        run.notes.extend(run.warnings)
        return state

    def _direct_reason(self, request: Call, position: Position) -> str | None:
        """Why the model is called without looking at tensors at all, if it is."""
        if self.method.never_skips:
            return "off"
        if torch.is_grad_enabled() and request.requires_grad:
            return "gradients are asked for"
        if position.mixed:
            self._warn("the rows of the batch have different sigmas: such evaluations are always computed")
            return "sigmas differ in the batch"
        return None

    def _memory(self, name: str, evaluation: Evaluation) -> History:
        """The branch's memory; empty where it is older than the reference's, because something changed in between.

        What the reference has just remembered of this same evaluation does not count. Where each branch decides, it is
        empty if this one was not asked for at the evaluation before.
        """
        state = self._state
        memory = state.histories.get(name, deque())
        if self._each:
            return memory if name in evaluation.expected else deque()
        references = [
            entry for entry in state.histories.get(state.reference, ()) if entry.position is not evaluation.position
        ]
        stale = memory and references and memory[-1].position.evaluation < references[-1].position.evaluation
        return deque() if stale else memory

    def _decide(self, evaluation: Evaluation, branch: dict[str, Branch]) -> Decision:
        """The decision about this call: made once an evaluation, by the reference, and followed by the others."""
        state = self._state
        asleep = evaluation.hold is not None and not evaluation.hold.observe
        deciders = [] if asleep else self._deciders(branch)
        if evaluation.hold is not None:
            return Decision(evaluation.hold)
        if not deciders and evaluation.decision is None:
            self._warn(
                f"branch {next(iter(branch))!r} is evaluated before the reference {state.reference!r}, whose decision "
                "it would follow, and is therefore always computed: name the first one called as reference"
            )
            return Decision(NOT_ASKED)
        if not deciders and evaluation.decision.hold is not None:
            decision = Decision(evaluation.decision.hold)
        elif any(not one.history if one.x is None else one.prediction is None for one in branch.values()):
            decision = Decision(NO_MEMORY)
        elif deciders:
            decision = Decision(LOOK) if self._watch is not None else self._ask(branch, deciders)
        else:
            sound = all(self._sound(one) for one in branch.values())
            device = next(iter(branch.values())).x.device
            decision = Decision(None if self._agreed(sound, device) else NOT_FINITE)
        if deciders:
            evaluation.decision = decision
        return decision

    def _measure_noise(self, request: Call, position: Position, branch: dict[str, Branch]) -> None:
        """Says to a predictor that asks for it how noisy the sampler is."""
        noise = self._state.noise
        if noise is None:
            return
        first = next(iter(branch.values()))
        if self._noise is not None:
            level = first.x.new_full((len(first.x),), self._noise)
        else:
            level = noise.level(position.evaluation, first.x, torch.finfo(request.latent.dtype).eps)
        for one in branch.values():
            one.noise = level if one.shape == first.shape else None

    def _give(self, position: Position, branch: dict[str, Branch]) -> None:
        """What the sampler has been answered, for the next evaluation's noise level."""
        if self._state.noise is not None and self._noise is None and not self._leads:
            first = next(iter(branch.values()))
            answers = (one.prediction if one.out is None else one.out for one in branch.values())
            self._state.noise.give(position.evaluation, first.x, answers)

    def _lean(self, evaluation: Evaluation, branch: dict[str, Branch]) -> None:
        """Puts the reference's output in the place of the others' input, once it is known, where they lean on it."""
        if not self._leads:
            return
        reference = self._reference(branch)
        if reference in branch:
            evaluation.lead = branch[reference].out
        for name in branch.keys() - {reference}:
            branch[name].lean(evaluation.lead)

    def _keep_reference(
        self, request: Call, evaluation: Evaluation, branch: dict[str, Branch], decision: Decision
    ) -> Decision:
        """An evaluation that may be skipped, of which only what follows the reference is: computes the reference.

        A call for the reference alone is computed as it is. Of a batched one the reference's part is; where that cannot be,
        or a prediction that leans on it may not be finite, the whole.
        """
        reference = self._state.reference
        if reference not in branch:
            return decision
        if len(branch) == 1:
            if evaluation.expected == {reference}:
                self._note(f"skip='uncond': where {reference} is the only branch nothing is skipped")
            return Decision(KEPT, decision.verdicts)
        part = None if self._state.whole else request.part(reference)
        if part is not None:
            try:
                part.inputs()
                (out,) = part.outputs(part.compute())
                if out.shape != branch[reference].shape:
                    raise ValueError(f"{tuple(out.shape)} came of {tuple(branch[reference].shape)}")
                branch[reference].out = out
            except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
                # Arguments that are not ordered by rows. Of an error of the model's own the whole call dies too.
                part, self._state.whole = None, True
                self._note(f"skip='uncond': the call for {reference} alone fails: {error}"[:300])
        if part is None:
            self._note("skip='uncond': branches that come in one call are computed together: it cannot be taken apart")
            decision.hold = WHOLE
            return decision
        self._lean(evaluation, branch)
        followers = [one for name, one in branch.items() if name != reference]
        told = all(one.prediction is not None for one in followers)
        if not self._agreed(told and all(self._sound(one) for one in followers), out.device):
            decision.hold = NOT_FINITE if told else NO_MEMORY
        return decision

    def _reference(self, branch: dict[str, Branch]) -> str:
        """The run's reference, chosen by its first call."""
        state = self._state
        if state.reference is None:
            state.reference = self._named_reference or ("cond" if "cond" in branch else next(iter(branch)))
        return state.reference

    def _deciders(self, branch: dict[str, Branch]) -> list[str]:
        """The branches of this call that decide; each has a rule of its own for this run."""
        state = self._state
        deciders = [name for name in branch if self._each or name == self._reference(branch)]
        for name in deciders:
            if name not in state.rules:
                state.rules[name] = self.method.criterion.begin(state.run)
        return deciders

    def _ask(self, branch: dict[str, Branch], deciders: list[str]) -> Decision:
        predicted = [one for one in branch.values() if one.x is not None]
        for one in predicted:
            one.total  # noqa: B018  requested before anything is read: everything comes over in one transfer
        for name in deciders if not self.method.static else ():
            branch[name].input_change  # noqa: B018
        verdicts = {
            name: Verdict(True) if self.method.static else self._state.rules[name].decide(branch[name])
            for name in deciders
        }
        finite = all(math.isfinite(one.total) for one in predicted)
        willing = finite and all(verdict.skip for verdict in verdicts.values())
        skip = self._agreed(willing, branch[deciders[0]].x.device)
        reason = next((verdict.reason for verdict in verdicts.values() if verdict.reason), None)
        said = CRITERION if reason is None else ComputeReason(reason)
        return Decision(None if skip else said if finite else NOT_FINITE, verdicts)

    def _compute(self, request: Call, branch: dict[str, Branch], decision: Decision) -> Any:
        """Calls the model; `LEFT` where a criterion that looks inside it says, on the way, that it need not go on.

        Where the decision has been made already the criterion is shown the signal all the same, for the next one.
        """
        deciders = [name for name in branch if name in self._state.rules]
        if self._watch is None or not deciders or not decision.hold.observe:
            answer = request.compute()
        else:
            self._refuse_skipped_layers(request, deciders)
            for one in branch.values():
                one.signal = None

            def look(signal: Tensor | None) -> bool:
                request.signal, rows = signal, 0 if signal is None else len(signal)
                parts = [signal] * len(branch) if not rows or rows % len(branch) else signal.chunk(len(branch))
                for one, part in zip(branch.values(), parts, strict=True):
                    one.signal = part
                if decision.hold is LOOK:
                    settled = self._ask(branch, deciders)
                    decision.hold, decision.verdicts = settled.hold, settled.verdicts
                return decision.hold is None

            if request.signal is not None:
                look(request.signal)
            answer = self._watch.call(request.compute, look)
            if decision.hold is LOOK:
                decision.hold = ComputeReason(INVALID_STATE)
        if decision.hold is not None and decision.hold.reason == INVALID_STATE:
            self._note(
                "invalid cache state: the signal was not reached, not finite, or of another shape than the one kept; "
                "such evaluations are computed, which restores it, and nothing needs resetting. If there are many, "
                "name another block with block="
            )
        return answer

    def _looks_at(self, network: Any) -> str:
        """What a criterion that looks at blocks looks at, for the report."""
        if self._watch is None:
            return f"{type(network).__name__} has no blocks that are known: the criterion looks at the network's input"
        if self._watch.note:
            self._warn(self._watch.note)
        return f"looks at {self._watch.label}: run on skipped evaluations too"

    def _refuse_skipped_layers(self, request: Call, deciders: list[str]) -> None:
        for key in SKIP_LAYERS:
            if request.keywords.get(key) is not None:
                raise OptionError(
                    f"STG is not supported with {self.method.name} where it decides: {', '.join(deciders)} is called "
                    f"with {key}, which leaves blocks out. Turn it off, let another branch decide (reference=), or use "
                    "a method that looks at no block (forecast, ucache)"
                )

    def _note(self, sentence: str) -> None:
        if sentence not in self.report.notes:
            self.report.notes.append(sentence)

    def _sound(self, one: Branch) -> bool:
        """Whether a follower's prediction is finite; told from its memory, without a transfer, where that is enough."""
        if self.method.predictor.finite_where_memory_is:
            return all(math.isfinite(entry.size) for entry in one.history)
        return math.isfinite(one.total)

    def _agreed(self, skip: bool, device: torch.device) -> bool:
        """The decision of all ranks of the group: skip where every one would."""
        if self._group is None:
            return skip
        flag = torch.tensor(float(skip), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=self._group)
        return bool(flag.item())

    def _reason(self, hold: ComputeReason | None) -> str:
        if hold is not None:
            return hold.reason
        return "mask" if self.method.static else "criterion"

    def _count(self, evaluation: Evaluation, names: tuple[str, ...], skipped: bool) -> None:
        """Counts the evaluation once, when its reference was answered; or for every branch that decides for itself."""
        state = self._state
        first = evaluation.names == set(names)
        if not (self._each or (first if state.reference is None else state.reference in names)):
            return
        for name in names if self._each else (None,):
            counts = state.tallies[name]
            counts.computed += not skipped
            counts.skipped += skipped
            counts.consecutive = counts.consecutive + 1 if skipped else 0

    def _record(
        self,
        position: Position,
        names: tuple[str, ...],
        reason: str,
        verdict: Verdict | None = None,
        branch: Branch | None = None,
        hold: ComputeReason | None = CRITERION,
    ) -> None:
        for name in names:
            checked = branch is not None and branch.out is not None
            off, size = (branch.off, branch.size) if checked else (None, None)
            estimate, threshold = (verdict.estimate, verdict.threshold) if verdict is not None else (None, None)
            self.report.add(Event(position, name, hold is not None, reason, estimate, threshold, off, size))

    def _free_if_over(self, evaluation: Evaluation) -> None:
        """Frees the latents after the run's last evaluation, where it can be known."""
        state, position, schedule = self._state, evaluation.position, self.clock.schedule
        if not evaluation.expected <= evaluation.names:
            return
        if state.run.steps is None:
            over = position.sigma <= self._lowest_sigma * (1 + 1e-4)
        else:
            single = schedule[-1] == 0 or state.run.stages != 2
            over = position.step == state.run.steps - 1 and (single or position.stage == 1)
        if over:
            self.free()

    def _check_mask(self) -> None:
        if self.method.mask is not None and self.clock.steps is not None:
            self.method.mask.for_steps(self.clock.steps)

    def _warn(self, sentence: str) -> None:
        """Says a thing once per engine."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=2)
