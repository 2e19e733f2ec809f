"""Decides which branches of a call are computed and which are predicted, and runs the model for the former."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .branch import Branch
from .call import Call
from .criteria.base import INVALID_STATE
from .methods.base import Method
from .options import OptionError
from .plan import ComputeReason, Plan, Verdict
from .probe import Probe
from .ranks import Ranks
from .run import OTHERS_PREDICTED, Evaluation, Run

NO_CACHE = ComputeReason("no cache yet")
BEFORE_REFERENCE = ComputeReason("before the reference", observe=False)
NOT_FINITE = ComputeReason("prediction not finite")
CRITERION = ComputeReason("criterion")
OTHER_RANK = ComputeReason("another rank computes")
PENDING = ComputeReason("decided during the forward pass")
INDIVISIBLE = ComputeReason("cannot be taken apart")
UNRELATED = ComputeReason("output not related to the input", observe=False, record=False)
ALWAYS = Verdict(True)

SKIP_LAYERS = ("skip_layer_mask", "skip_layers", "perturbation_mask", "spatio_temporal_guidance_blocks")
"""Names under which models are told to leave blocks out, as spatio-temporal guidance (STG) does."""

INVALID = (
    f"{INVALID_STATE}: the signal was not reached, not finite, or of another shape than the one kept; such evaluations "
    "are computed, which restores it, and nothing needs resetting. If there are many, name another block with block="
)

Outputs = dict[str, Tensor]


class Planner:
    """Makes the plan of each call, and runs the model as far as the plan needs it.

    Args:
        method: what decides and predicts.
        network: the model, in which a criterion that looks at blocks finds them.
        ranks: those that call the model together with this one, and decide alike.
        warn: issues a warning, once.

    Attributes:
        notes: what the criterion looks at, for every report.
        looks_inside: whether the criterion looks at blocks of the model.
    """

    def __init__(self, method: Method, network: Any, ranks: Ranks, warn: Callable[[str], None]) -> None:
        self.notes: tuple[str, ...] = ()
        self._method, self._ranks, self._warn = method, ranks, warn
        blocks = None if method.never_skips else method.criterion.blocks
        if method.static and blocks is not None and not blocks.after:
            blocks = None  # the criterion is not asked
        self.looks_inside = blocks is not None
        self._probe = None if blocks is None else blocks.find(network)
        if self._probe is not None:
            self.notes = (f"looks at {self._probe.label}: run on skipped evaluations too",)
            if self._probe.note:
                warn(self._probe.note)
        elif blocks is not None:
            kind = type(network).__name__
            self.notes = (f"{kind} has no blocks that are known: the criterion looks at the network's input",)

    def plan(self, evaluation: Evaluation, branches: dict[str, Branch]) -> Plan:
        """Gates first, then the caches, then the criterion, which is asked of the reference, once an evaluation.

        The other branches of the evaluation follow the reference, in this call or in later ones.
        """
        run, gated = evaluation.run, evaluation.gated
        deciding = run.deciding(branches) if gated is None or gated.observe else []
        reason = gated or self._followed_reason(evaluation, deciding, branches)
        if reason is None and not all(branch.predictable for branch in branches.values()):
            reason = NO_CACHE
            if all(branch.history for branch in branches.values()):
                self._agree(False, branches)  # the other ranks may wait for this one's answer
        if reason is None and deciding and self._probe is not None:
            reason = PENDING
        if reason is not None:
            return Plan.compute(branches, reason, deciding)
        if deciding:
            plan = self._ask(run, branches, deciding)
        elif self._agree(all(map(self._sound, branches.values())), branches):
            plan = Plan.predict(branches)
        else:
            plan = Plan.compute(branches, NOT_FINITE)
        return self._keep_reference(evaluation, plan)

    def _followed_reason(
        self, evaluation: Evaluation, deciding: Sequence[str], branches: dict[str, Branch]
    ) -> ComputeReason | None:
        """Why branches that do not decide are computed: as the reference was, or because it has not been called yet."""
        if deciding or evaluation.decided:
            return None if deciding else evaluation.reason
        self._warn(
            f"branch {next(iter(branches))!r} is evaluated before the reference {evaluation.run.reference!r}, whose "
            "decision it would follow, and is therefore always computed: name the first one called as reference"
        )
        return BEFORE_REFERENCE

    def _ask(self, run: Run, branches: dict[str, Branch], deciding: Sequence[str]) -> Plan:
        """Asks the criterion of every deciding branch; one device-to-host transfer brings all the numbers."""
        predicted = [branch for branch in branches.values() if branch.has_baseline]
        for branch in predicted:
            branch.request("total")
        for name in deciding if not run.static else ():
            branches[name].request(*run.rules[name].measurements)
        verdicts = {name: ALWAYS if run.static else run.rules[name].decide(branches[name]) for name in deciding}
        finite = all(branch.finite for branch in predicted)
        if self._agree(finite and all(verdict.skip for verdict in verdicts.values()), branches):
            return Plan.predict(branches, deciding, verdicts)
        if not finite:
            return Plan.compute(branches, NOT_FINITE, deciding, verdicts)
        against = next((verdict for verdict in verdicts.values() if not verdict.skip), None)
        if against is None:
            return Plan.compute(branches, OTHER_RANK, deciding, verdicts)
        return Plan.compute(branches, ComputeReason(against.why) if against.why else CRITERION, deciding, verdicts)

    def _keep_reference(self, evaluation: Evaluation, plan: Plan) -> Plan:
        """With skip="uncond" the reference is computed at skipped evaluations, too: the others need its output."""
        run = evaluation.run
        if not run.relative or plan.computed or run.reference not in plan.reasons:
            return plan
        names = list(plan.reasons)
        if names == [run.reference] == list(evaluation.expected):
            run.report.obstacle(f"if {run.reference} is the only branch, nothing is skipped")
        if run.indivisible and len(names) > 1:
            return plan.all_computed(INDIVISIBLE)
        return plan.with_reasons({name: OTHERS_PREDICTED if name == run.reference else None for name in names})

    def compute(self, call: Call, run: Run, plan: Plan, branches: dict[str, Branch]) -> tuple[Plan, Outputs]:
        """Runs the model for what the plan computes: the plan, which that may change, and the raw outputs by name."""
        if not plan.computed:
            return plan, {}
        observed = plan.deciding and all(reason is None or reason.observe for reason in plan.reasons.values())
        if self._probe is not None and observed:
            plan, outputs = self._compute_probed(self._probe, call, run, plan, branches)
        else:
            outputs = call.compute(plan.computed)
        if plan.computed and not outputs:
            plan = plan.all_computed(UNRELATED)
        elif plan.predicted and len(outputs) == len(branches):
            run.indivisible = call.indivisible
            for note in (*call.notes, "branches that come in one call are computed together: it cannot be taken apart"):
                run.report.obstacle(note)
            plan = plan.all_computed(INDIVISIBLE)
        if any(outputs[name].shape != branch.x.shape for name, branch in branches.items() if name in outputs):
            for branch, x in zip(branches.values(), call.inputs(), strict=True):
                branch.replace_input(x)
        run.rebase(branches, outputs)
        return plan, outputs

    def _compute_probed(
        self, probe: Probe, call: Call, run: Run, plan: Plan, branches: dict[str, Branch]
    ) -> tuple[Plan, Outputs]:
        """Runs the model until the criterion has seen what it looks at, and on to the end unless it says skip.

        If it has been decided already, the criterion still sees the signal, for the next decision.
        """
        self._refuse_skipped_layers(call, plan.deciding)
        for branch in branches.values():
            branch.signal = None

        def look(signal: Tensor | None) -> bool:
            nonlocal plan
            call.signal = signal
            for branch, part in zip(branches.values(), _parts(signal, len(branches)), strict=True):
                branch.signal = part
            if PENDING in plan.reasons.values():
                plan = self._ask(run, branches, plan.deciding)
            return not plan.computed

        if call.signal is not None:
            look(call.signal)
        outputs = probe.call(partial(call.compute, call.names), look) or {}
        if PENDING in plan.reasons.values():
            plan = plan.all_computed(ComputeReason(INVALID_STATE))
        if any(reason is not None and reason.reason == INVALID_STATE for reason in plan.reasons.values()):
            run.report.note(INVALID)
        return plan, outputs

    def checked(
        self, call: Call, run: Run, plan: Plan, branches: dict[str, Branch], outputs: Outputs
    ) -> tuple[Plan, Outputs]:
        """Checks predictions relative to what was just computed; if one of them is unsound, everything is computed."""
        if not (plan.predicted and plan.computed):
            return plan, outputs
        predicted = [branches[name] for name in plan.predicted]
        possible = all(branch.predictable for branch in predicted)
        if self._agree(possible and all(map(self._sound, predicted)), branches):
            return plan, outputs
        return self.compute(call, run, plan.all_computed(NOT_FINITE if possible else NO_CACHE), branches)

    def _sound(self, branch: Branch) -> bool:
        """Whether a prediction is finite; read from its cache, without a transfer, if that is enough.

        It is not enough if the prediction is relative to another branch's output of this very evaluation.
        """
        if self._method.predictor.finite_if_cache_is and not branch.rebased:
            return all(math.isfinite(entry.size) for entry in branch.history)
        return branch.finite

    def _agree(self, skip: bool, branches: dict[str, Branch]) -> bool:
        """The decision of all ranks that call this model together: skip if every one would."""
        first = next(iter(branches.values()))
        return self._ranks.agree(skip, first.position.evaluation, first.x.device, first.run.slot)

    def _refuse_skipped_layers(self, call: Call, deciding: Sequence[str]) -> None:
        for key in SKIP_LAYERS:
            if call.keywords.get(key) is not None:
                raise OptionError(
                    f"STG is not supported with {self._method.name} in the deciding branch: {', '.join(deciding)} is "
                    f"called with {key}, which leaves blocks out. Turn it off, let another branch decide (reference=), "
                    "or use a method that looks at no block (forecast, ucache)"
                )


def _parts(signal: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The signal of each branch of a call; the whole signal for each if its rows do not divide."""
    if signal is None or not len(signal) or len(signal) % count:
        return [signal] * count
    return signal.chunk(count)
