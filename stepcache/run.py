"""The state of one run: caches and rules of its branches, what was counted, and the evaluation in progress."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from .branch import Branch, History
from .call import Call
from .caller import Caller
from .clock import Position
from .criteria.base import Criterion
from .deferred import DeferredScalars
from .gates.base import GateCheck
from .methods.base import Method
from .noise import FreshNoise
from .plan import ComputeReason, Plan
from .report import Report
from .run_info import RunInfo, SkipCounts

OTHERS_PREDICTED = ComputeReason("the others follow", observe=False, record=False)


@dataclass
class Evaluation:
    """The evaluation in progress. Its branches come in one call or in several.

    Attributes:
        run: the run that it belongs to.
        position: run, step and evaluation.
        sigma: as the host gave it.
        gated: a gate's reason to compute it, or None.
        number: the host's own number of it, or None.
        expected: the branches of the evaluation before.
        names: the branches seen so far.
        decided: whether the deciding branch has been called.
        reason: why that branch was computed; None if the evaluation is skipped.
        skip_reason: why it is skipped, if it is.
        baseline: the reference branch's output, if the other branches are predicted from it.
        latents: the latent of each call, by its branches, and its version: they show that a call comes twice.
        repeated: its branches were called before in this evaluation.
    """

    run: Run
    position: Position
    sigma: Tensor
    gated: ComputeReason | None
    number: int | None = None
    expected: frozenset[str] = frozenset()
    names: set[str] = field(default_factory=set)
    decided: bool = False
    reason: ComputeReason | None = None
    skip_reason: str = ""
    baseline: Tensor | None = None
    latents: dict[tuple[str, ...], tuple[ReferenceType[Tensor], int]] = field(default_factory=dict)
    repeated: bool = False

    def add(self, call: Call) -> None:
        """Keeps which latent these branches were called with, without keeping it alive."""
        self.latents[call.names] = ref(call.latent), _version(call.latent)

    def same_latent(self, call: Call) -> bool:
        """Whether these branches were called before with this very latent, unchanged."""
        known, version = self.latents[call.names]
        return known() is call.latent and version == _version(call.latent)


class Run:
    """Everything that lives as long as a run. A new run is a new object: nothing can leak from one to the next.

    Attributes:
        info: what was known when it began.
        report: what happens in it.
        reference: the branch whose change decides, chosen by the run's first call.
        each: every branch decides for itself.
        caches: what each branch has computed.
        rules: the criterion of each branch that decides.
        counts: evaluations so far, of the reference (None) or of each branch that decides for itself.
        cache_keys: what must not change for a branch's cache to stay valid.
        indivisible: a batched call could not be split; no further one is tried.
        static: the mask's zeros are skipped without asking the criterion.
        relative: the other branches are predicted relative to the reference's output.
        trains: whether the network's parameters require gradients; None if nobody has looked yet.
        samples: the same for each sample of the batch, if they decide for themselves.
        repeats: whether branches come twice with different x in one evaluation; None: not known yet.
    """

    def __init__(
        self, method: Method, info: RunInfo, number: int, reference: str | None, each: bool, noise: float | None
    ) -> None:
        self.method, self.info, self.number, self.each = method, info, number, each
        self.report = Report(method.name, number, info.steps, info.notes)
        self._named_reference = reference
        self.static, self.relative = method.static, method.baseline == "reference"
        self.deferred = DeferredScalars()
        self.gates: list[GateCheck] = [] if method.never_skips else [gate.begin(info) for gate in method.all_gates()]
        self.counts: defaultdict[str | None, SkipCounts] = defaultdict(SkipCounts)
        self.reference: str | None = None
        self.rules: dict[str, Criterion] = {}
        self.caches: dict[str, History] = {}
        self.cache_keys: dict[str, tuple[Any, ...]] = {}
        self.indivisible = False
        self.repeats: bool | None = False
        self.trains: bool | None = None
        self.evaluation: Evaluation | None = None
        self.samples: list[Run] = []
        self._known_noise = noise
        self._caller: ReferenceType[Caller] | None = None
        measured = method.predictor.sampler_aware and not method.never_skips
        self._noise = FreshNoise(offload=method.offload is not None) if measured else None

    def sibling(self) -> Run:
        """The same run for one sample of its batch: with the same notes, and nothing learnt yet."""
        info = replace(self.info, notes=[], warnings=[])  # what gates say of the run has been said
        run = Run(self.method, info, self.number, self._named_reference, self.each, self._known_noise)
        info.notes = run.report.notes = self.info.notes
        return run

    def ends_with(self, who: Caller | None) -> None:
        """Forgets everything as soon as the thread or task has ended: nobody else can go on with this run."""
        this = ref(self)

        def forget(_: ReferenceType[Caller]) -> None:
            if run := this():
                run.forget()

        self._caller = None if who is None else ref(who, forget)

    @property
    def has_cache(self) -> bool:
        """Whether anything that was computed is kept."""
        return bool(self.caches) or any(sample.caches for sample in self.samples)

    def gated(self, position: Position, names: tuple[str, ...]) -> ComputeReason | None:
        """The first gate's reason to compute; with branches that decide for themselves, of any of them."""
        counts = [self.counts[name] for name in (names if self.each else (None,))]
        answers = (gate(position, one) for one in counts for gate in self.gates)
        return next((reason for reason in answers if reason is not None), None)

    def branches(self, call: Call, evaluation: Evaluation) -> dict[str, Branch]:
        """The branches of a call, each with its input, its cache and the noise level."""
        predictor = self.method.predictor
        branches = {
            name: Branch(
                evaluation.position,
                self.info,
                x,
                self._history(name, evaluation),
                predictor.predict,
                self.deferred,
                predictor.sampler_aware or predictor.parametrized,
                partial(call.rounded, name),
                name,
                predictor.needs_history,
            )
            for name, x in zip(call.names, call.inputs(), strict=True)
        }
        self._measure_noise(call, evaluation.position, branches)
        self.rebase(branches)
        return branches

    def _history(self, name: str, evaluation: Evaluation) -> History:
        """The branch's cache; empty if it is older than the reference's, because something changed in between.

        What the reference has just computed in this same evaluation does not count. If every branch decides for
        itself, it is empty if this branch was not asked for in the evaluation before.
        """
        cache = self.caches.get(name, deque())
        if self.each:
            return cache if name in evaluation.expected else deque()
        known = () if self.reference is None else self.caches.get(self.reference, ())
        reference = [entry for entry in known if entry.position is not evaluation.position]
        stale = cache and reference and cache[-1].position.evaluation < reference[-1].position.evaluation
        return deque() if stale else cache

    def _measure_noise(self, call: Call, position: Position, branches: dict[str, Branch]) -> None:
        if self._noise is None:
            return
        first, level = next(iter(branches.values())), None
        if self._known_noise is not None:
            level = first.x.new_full((len(first.x),), self._known_noise)
        else:
            level = self._noise.level(position.evaluation, first.x, torch.finfo(call.latent.dtype).eps)
        for branch in branches.values():
            branch.noise = level if branch.x.shape == first.x.shape else None

    def rebase(self, branches: dict[str, Branch], outputs: dict[str, Tensor] | None = None) -> None:
        """If the method's baseline is the reference, predicts relative to its output as soon as that is known."""
        evaluation = self.evaluation
        if not self.relative or evaluation is None:
            return
        if (reference := self.choose_reference(branches)) in branches:
            evaluation.baseline = (outputs or {}).get(reference)
        for name, branch in branches.items():
            if name != reference:
                branch.rebase(evaluation.baseline)

    def choose_reference(self, branches: dict[str, Branch]) -> str:
        """The run's reference branch: the one named, else "cond" if the first call has it, else its first branch."""
        if self.reference is None:
            self.reference = self._named_reference or ("cond" if "cond" in branches else next(iter(branches)))
        return self.reference

    def deciding(self, branches: dict[str, Branch]) -> list[str]:
        """The branches of a call that decide, each with a rule of its own."""
        names = [name for name in branches if self.each or name == self.choose_reference(branches)]
        for name in names:
            if name not in self.rules:
                self.rules[name] = self.method.criterion.begin(self.info)
        return names

    def update(self, call: Call, plan: Plan, branches: dict[str, Branch], outputs: dict[str, Tensor]) -> None:
        """Learns from what was computed, and counts. `outputs`: what the host gets."""
        self._remember_answers(branches, outputs)
        for name, branch in branches.items():
            reason = plan.reasons[name]
            if reason is None or name not in outputs:
                continue
            branch.out = outputs[name]
            if reason is not OTHERS_PREDICTED:
                self._learn(name, branch, plan, reason, call.latent.dtype)
        if plan.deciding and (evaluation := self.evaluation) is not None and evaluation.gated is None:
            reason = plan.reasons[plan.deciding[0]]
            evaluation.decided, evaluation.reason = True, None if reason is OTHERS_PREDICTED else reason
            verdict = plan.verdicts.get(plan.deciding[0])
            evaluation.skip_reason = (verdict and verdict.why) or self.method.timetable
        self._count(call, plan)

    def _learn(self, name: str, branch: Branch, plan: Plan, reason: ComputeReason, storage: torch.dtype) -> None:
        if reason.observe:
            for rule in self.rules.values():
                rule.update_any(name, branch)
        if name in self.rules or branch.rebased:
            branch.measure_error()
        if reason.observe and name in self.rules:
            verdict = plan.verdicts.get(name)
            self.rules[name].update(branch, forced=verdict is None or verdict.skip)
        if reason.record and branch.has_baseline:
            cache = self.caches.setdefault(name, deque(maxlen=self.method.predictor.history_size))
            chosen = storage if self.method.dtype is None else getattr(torch, self.method.dtype)
            self.method.predictor.remember(cache, branch.entry(chosen, narrower=chosen not in (storage, torch.float32)))
            if self.method.offload is not None:
                kept = [entry.offloaded() for entry in cache]
                cache.clear()
                cache.extend(kept)

    def _remember_answers(self, branches: dict[str, Branch], outputs: dict[str, Tensor]) -> None:
        """What the sampler is answered, from which the next evaluation's noise level is measured."""
        if self._noise is not None and self._known_noise is None and not self.relative and outputs:
            first = next(iter(branches.values()))
            self._noise.record(first.position.evaluation, first.x, outputs.values())

    def _count(self, call: Call, plan: Plan) -> None:
        """Counts the evaluation once, when its reference was answered; or for every branch that decides for itself."""
        names, evaluation = call.names, self.evaluation
        first = evaluation is not None and evaluation.names == set(names)
        if not (self.each or (first if self.reference is None else self.reference in names)):
            return
        skipped = all(reason in (None, OTHERS_PREDICTED) for reason in plan.reasons.values())
        for name in names if self.each else (None,):
            counts = self.counts[name]
            counts.computed += not skipped
            counts.skipped += skipped
            counts.consecutive = counts.consecutive + 1 if skipped else 0

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Drops the caches and rules of these branches, of all by default, and what the noise was measured from."""
        for sample in self.samples:
            sample.forget(names)
        if self._noise is not None:
            self._noise.forget()
        for name in [*self.caches, *self.rules] if names is None else names:
            self.caches.pop(name, None)
            self.rules.pop(name, None)
        if names is None:
            self.reference = None
            if self.evaluation is not None:
                self.evaluation.baseline = None


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version
