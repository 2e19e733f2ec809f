"""The engine: it stands between one model and its sampler, and answers some evaluations without running the model."""

from __future__ import annotations

import dataclasses
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .branch import Branch
from .call import Call
from .clock import Clock, Position, same_sigma
from .criteria.always import Always
from .criteria.base import INVALID_STATE
from .methods.base import Method
from .methods.off import Off
from .options import OptionError, number, unknown
from .parametrization import Parametrization
from .plan import ComputeReason, Plan, Verdict
from .probe import Probe
from .ranks import Ranks
from .report import Report
from .run import OTHERS_PREDICTED, Evaluation, Run
from .run_info import RunInfo

NO_CACHE = ComputeReason("no cache yet")
BEFORE_REFERENCE = ComputeReason("before the reference", observe=False)
NOT_FINITE = ComputeReason("prediction not finite")
CRITERION = ComputeReason("criterion")
PENDING = ComputeReason("decided during the forward pass")
INDIVISIBLE = ComputeReason("cannot be taken apart")
ALWAYS = Verdict(True)
UNRELATED = ComputeReason("output not related to the input", observe=False, record=False)

SKIP_LAYERS = ("skip_layer_mask", "skip_layers", "perturbation_mask", "spatio_temporal_guidance_blocks")
"""Names under which models are told to leave blocks out, as spatio-temporal guidance (STG) does."""


class Engine:
    """Answers a sampler's evaluations of one model, some of them without calling it.

    Args:
        method: what to skip and how to predict it. None computes everything.
        reference: the branch whose change decides for the whole evaluation. None: of branches batched in one call,
            "cond" if there is one, else the first; of branches in separate calls, the first one called.
        decide: "reference" (default), or "each": every branch decides for itself; branches batched in one call are
            skipped if all of them agree.
        sigmas: the schedule, sigmas[0..n], of runs that the host does not announce with `announce`.
        training_sigma: share of the training timetable (0 to 1) -> sigma, if the model has such a table.
        coordinate: sigma -> the coordinate that predictors extrapolate in. None: log sigma.
        parametrization: sigma -> what the network's input and output mean there; None: not known. Forecast needs it.
        lowest_sigma: the model's lowest sigma: at or below it a run without a schedule is over and its cache is freed.
        noise: how noisy the sampler is, if the host knows: 0 for a deterministic one, 1 for one that adds fresh noise
            at every step. None: Forecast measures it in the run itself.
        group: the torch.distributed process group, or `DeviceMesh`, whose ranks call one model together. All of them
            then take the same decision: to skip if every rank would. None: found in the network if its parameters are
            split by FSDP or tensor parallelism. False: this rank decides alone. See `Ranks`.
        notes: sentences of the host for every report.
        network: the model, in which a criterion that looks at blocks finds them.

    An engine follows one run at a time. Runs in several threads need an engine each: a call while another is being
    answered goes straight to the model, and a call from another thread finds no cache. That costs the speed, never the
    image.

    Example:
        >>> import torch
        >>> from stepcache import Static
        >>> from stepcache.extend import Call, Engine
        >>> class Half(Call):
        ...     names = ("cond",)
        ...     def __init__(self, x, sigma):
        ...         self.latent, self.sigma = x, sigma
        ...     def inputs(self):
        ...         return (self.latent.clone(),)
        ...     def run_model(self):
        ...         return self.latent / 2
        ...     def outputs(self, answer):
        ...         return (answer.clone(),)
        ...     def rebuild(self, outputs):
        ...         return outputs[0]
        >>> engine = Engine(Static("101"), sigmas=(3.0, 2.0, 1.0, 0.0))
        >>> for sigma in (3.0, 2.0, 1.0):
        ...     answer = engine(Half(torch.ones(1, 4), torch.tensor([sigma])))
        >>> engine.report.decisions("cond")
        'CSC'
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
        self.off = self.method.never_skips
        self.clock = Clock(sigmas, lowest_sigma)
        self.report = Report(self.method.name)
        self._reference = reference
        self._each = decide == "each"
        self._training_sigma = training_sigma
        self._coordinate = coordinate or math.log
        self._parametrization = parametrization
        self._noise = None if noise is None else number("noise", noise, high=1.0)
        self._lowest_sigma = lowest_sigma
        self._ranks = Ranks(group, network)
        self._run: Run | None = None
        self._computed: str | None = None
        self._network = network
        self._warned: set[str] = set()
        self._notes = tuple(notes)
        blocks = None if self.method.never_skips else self.method.criterion.blocks
        if self.method.static and blocks is not None and not blocks.after:
            blocks = None  # the criterion is not asked
        self._probe = None if blocks is None else blocks.find(network)
        if blocks is not None:
            self._notes += (self._probed(network),)
        if self.method.skip == "uncond" and not self.method.never_skips and (self._each or blocks is not None):
            other = "decide='each'" if self._each else f"{self.method.name}, which decides inside the model"
            raise OptionError(f"skip='uncond' with {other}: the reference is always computed; use skip='all'")
        self._lock, self._busy = threading.RLock(), False
        self._check_mask()

    def __call__(self, call: Call) -> Any:
        """Answers one call. A second thread, or a call made by the model itself, goes straight to the model."""
        if not self._lock.acquire(blocking=False):
            self._warn("a second thread called while the first was being answered: give each run a wrapper of its own")
            return call.run_model()
        try:
            if self._busy:
                return call.run_model()
            self._busy = True
            try:
                return self._answer_or_reset(call)
            finally:
                self._busy = False
        finally:
            self._lock.release()

    def _answer_or_reset(self, call: Call) -> Any:
        """After an exception, the model's or our own, the next call begins a new run."""
        try:
            return self._answer_or_pass(call)
        except BaseException:
            self.reset()
            raise

    def _answer_or_pass(self, call: Call) -> Any:
        """Off, gradients and mixed sigmas are passed to the model, without a look at the tensors."""
        evaluation = self._locate(call)
        if reason := self._pass_reason(call, evaluation):
            self.report.passed(evaluation.position, call.names, reason)
            answer = call.run_model()
        else:
            answer = self._answer(call, evaluation)
        self._free_if_over(evaluation)
        return answer

    def _answer(self, call: Call, evaluation: Evaluation) -> Any:
        """The life of one evaluation, top to bottom, for the branches that one call asks for."""
        run = evaluation.run
        branches = run.branches(call, evaluation)  # each with its input and what it computed before
        plan = self._plan(evaluation, branches)  # compute or predict, for each branch
        plan, outputs = self._compute(call, run, plan, branches)
        plan, outputs = self._checked(call, run, plan, branches, outputs)
        outputs |= {name: branches[name].predict() for name in plan.predicted}
        run.update(call, plan, branches, outputs)
        self.report.append(evaluation.position, plan, branches)
        return call.rebuild(tuple(outputs[name] for name in call.names)) if plan.predicted else call.raw

    # Announcements of the host.

    def announce(
        self,
        sigmas: Tensor | Iterable[float] | None = None,
        stages: int | None = None,
        on_schedule: bool | None = None,
        loops: bool = True,
        computed: str | None = None,
    ) -> None:
        """The host announces a run, which lasts until `end`; see `Clock.announce`.

        `computed` is why everything in it is computed, if it is; the report gives it as the reason.
        """
        with self._lock:
            self._run, self._computed = None, computed
            self.clock.announce(sigmas, stages, on_schedule, loops)
            try:
                self._check_mask()
            except BaseException:
                self.clock.end()
                raise

    def end(self) -> None:
        """The announced run is over; only its report stays."""
        with self._lock:
            self.clock.end()
            self._run = self._computed = None

    def reset(self) -> None:
        """Forgets the run in progress; only its report stays."""
        with self._lock:
            self.clock.restart()
            self._run = None

    def free(self) -> None:
        """Drops what the run in progress has cached; its position and its report stay."""
        with self._lock:
            if self._run is not None:
                self._run.forget()

    def set_step(self, step: int) -> None:
        """The sampler's callback: the first evaluation of this step has just been answered."""
        self.clock.set_step(step)

    # Which run, which evaluation.

    def _locate(self, call: Call) -> Evaluation:
        """The evaluation that a call belongs to: the one in progress, the next one, or the first of a new run."""
        rows = call.latent.shape[0] // len(call.names)
        latent = call.latent
        key = (rows, *latent.shape[1:], latent.dtype, latent.device, threading.get_ident(), call.cache_key)
        numbered = self.off or call.evaluation is not None or call.place is not None
        if self._run is not None and not numbered and (twice := self._called_twice(self._run, call)):
            return twice
        if self._run is not None:
            self._drop_if_changed(self._run, call.names, key)
        current = self._run.evaluation if self._run is not None else None
        if current is not None and not current.names & set(call.names) and _same_evaluation(current, call):
            current.names.update(call.names)
            current.add(call)
            if self._each:
                current.gated = current.run.gated(current.position, call.names)
            return current
        position = self.clock.locate(call.sigma) if call.place is None else self.clock.advance(*call.place)
        if self._run is None or self._run.number != position.run:
            self._run = self._new_run(position)
            self._run.cache_keys.update(dict.fromkeys(call.names, key))
            if current is not None and current.position.evaluation == 0 and position.sigma == current.position.sigma:
                self._run.repeats = None  # a second image at the first sigma, or the second part of a batch
        elif self._run.repeats is None and position.evaluation > 1:
            self._run.repeats = False
        run = self._run
        run.evaluation = Evaluation(
            run,
            position,
            call.sigma,
            run.gated(position, call.names),
            call.evaluation,
            frozenset(current.names if current is not None else ()),
            set(call.names),
        )
        run.evaluation.add(call)
        return run.evaluation

    def _called_twice(self, run: Run, call: Call) -> Evaluation | None:
        """The evaluation in progress, marked as repeated, if the same branches were called in it before.

        With the very same latent they are other branches under one name. With another latent they may be another part
        of the batch: certainly in a plan with one evaluation a step, or if it was so before in this run; else it is
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
        self.report.note(sentence)
        return dataclasses.replace(current, repeated=True)

    def _drop_if_changed(self, run: Run, names: tuple[str, ...], key: tuple[Any, ...]) -> None:
        """If a branch's cache key has changed, the run ends; if the host announced it, only the branch's cache goes."""
        changed = [name for name in names if run.cache_keys.setdefault(name, key) != key]
        if changed and not self.clock.announced:
            self.reset()
        elif changed:
            sentence = "shape, dtype, device, thread, prompt or model changed within the run: the cache was dropped"
            if sentence not in run.info.notes:
                run.info.notes.append(sentence)
            run.forget(changed)
            run.cache_keys.update(dict.fromkeys(changed, key))

    def _new_run(self, position: Position) -> Run:
        clock = self.clock
        fits = position.step is not None or position.mixed or clock.schedule is None
        info = RunInfo(
            clock.schedule if fits else None,
            self._training_sigma,
            clock.stages,
            self.method.evaluations == "second",
            self._coordinate,
            self._parametrization,
        )
        skip_reason = "mask" if self.method.static else "criterion"
        self.report = Report(self.method.name, position.run, info.steps, info.notes, skip_reason=skip_reason)
        if not fits:
            info.warnings.append(
                f"the schedule given lacks the run's first sigma, {position.sigma:g}: taken as not known"
            )
        elif info.steps is None:
            info.notes.append("the schedule is not known: steps are not counted, and where a run begins is guessed")
        info.notes.extend(self._notes)
        if not self.off:
            info.notes.extend(self._ranks.begin())
        run = Run(self.method, info, position.run, self._reference, self._each, self._noise)
        if self.method.static and not isinstance(self.method.criterion, Always):
            info.notes.append(f"mask policy static: {self.method.name}'s own criterion is not asked")
        for sentence in info.warnings:
            self._warn(sentence)
        info.notes.extend(info.warnings)
        return run

    def _pass_reason(self, call: Call, evaluation: Evaluation) -> str | None:
        """Why the model is called without a look at the tensors; None if it is not."""
        run, position = evaluation.run, evaluation.position
        if self.off:
            return "off"
        if self._computed is not None:
            return self._computed
        if evaluation.repeated or run.repeats or (run.repeats is None and position.evaluation == 1):
            return "called twice"
        if torch.is_grad_enabled() and call.requires_grad:
            return "gradients are asked for"
        if torch.is_grad_enabled() and self._trains(run):
            sentence = (
                "the model's parameters require gradients, and skipped evaluations have none: everything is computed. "
                "Sample under torch.no_grad() if you do not train"
            )
            self._warn(sentence)
            self.report.note(sentence)
            return "gradients are asked for"
        if position.mixed:
            self._warn("the rows of the batch have different sigmas: such evaluations are always computed")
            return "sigmas differ in the batch"
        return None

    def _trains(self, run: Run) -> bool:
        """Whether the network has parameters that require gradients; looked at once a run."""
        if run.trains is None:
            parameters = self._network.parameters() if isinstance(self._network, torch.nn.Module) else ()
            run.trains = any(parameter.requires_grad for parameter in parameters)
        return run.trains

    # Compute or predict.

    def _plan(self, evaluation: Evaluation, branches: dict[str, Branch]) -> Plan:
        """Gates first, then the caches, then the criterion, which is asked of the reference, once an evaluation.

        The other branches of the evaluation follow the reference, in this call or in later ones.
        """
        run, gated = evaluation.run, evaluation.gated
        deciding = run.deciding(branches) if gated is None or gated.observe else []
        reason = gated or self._followed_reason(evaluation, deciding, branches)
        if reason is None and not all(branch.predictable for branch in branches.values()):
            reason = NO_CACHE
            if all(branch.history for branch in branches.values()):
                self._agree(False, branches)  # other ranks may have a prediction, and ask
        if reason is not None:
            plan = Plan.compute(branches, reason)
        elif not deciding:
            sound = self._agree(all(map(self._sound, branches.values())), branches)
            plan = Plan.predict(branches) if sound else Plan.compute(branches, NOT_FINITE)
        elif self._probe is not None:
            plan = Plan.compute(branches, PENDING)
        else:
            plan = self._ask(run, branches, deciding)
        plan.deciding = deciding
        return self._keep_reference(evaluation, plan)

    def _followed_reason(
        self, evaluation: Evaluation, deciding: list[str], branches: dict[str, Branch]
    ) -> ComputeReason | None:
        """Why branches that do not decide are computed: as the reference was, or because it has not been here yet."""
        if deciding or evaluation.decided:
            return None if deciding else evaluation.reason
        self._warn(
            f"branch {next(iter(branches))!r} is evaluated before the reference {evaluation.run.reference!r}, whose "
            "decision it would follow, and is therefore always computed: name the first one called as reference"
        )
        return BEFORE_REFERENCE

    def _ask(self, run: Run, branches: dict[str, Branch], deciding: list[str]) -> Plan:
        """Asks the criterion of every deciding branch; one device-to-host transfer brings all the numbers."""
        predicted = [branch for branch in branches.values() if branch.has_baseline]
        for branch in predicted:
            branch.request("total")
        for name in deciding if not run.static else ():
            branches[name].request("input_change")
        verdicts = {name: ALWAYS if run.static else run.rules[name].decide(branches[name]) for name in deciding}
        finite = all(branch.finite for branch in predicted)
        if self._agree(finite and all(verdict.skip for verdict in verdicts.values()), branches):
            return Plan.predict(branches, verdicts)
        own = next((verdict.reason for verdict in verdicts.values() if verdict.reason), None)
        reason = CRITERION if own is None else ComputeReason(own)
        return Plan.compute(branches, reason if finite else NOT_FINITE, verdicts)

    def _keep_reference(self, evaluation: Evaluation, plan: Plan) -> Plan:
        """If the others are predicted from the reference, it is computed at evaluations that are skipped too."""
        run = evaluation.run
        if not run.relative or plan.computed or run.reference not in plan.reasons:
            return plan
        names = list(plan.reasons)
        if names == [run.reference]:
            if evaluation.expected == {run.reference}:
                self._obstacle(f"where {run.reference} is the only branch nothing is skipped")
            kept = Plan.compute(names, OTHERS_PREDICTED, plan.verdicts)
        elif run.indivisible:
            kept = Plan.compute(names, INDIVISIBLE, plan.verdicts)
        else:
            kept = Plan({name: OTHERS_PREDICTED if name == run.reference else None for name in names}, plan.verdicts)
        kept.deciding = plan.deciding
        return kept

    def _compute(self, call: Call, run: Run, plan: Plan, branches: dict[str, Branch]) -> tuple[Plan, dict[str, Tensor]]:
        """Runs the model for what the plan computes: the raw outputs by name, and the plan as it came out."""
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
            self._obstacle(
                *call.notes, "branches that come in one call are computed together: it cannot be taken apart"
            )
            plan = plan.all_computed(INDIVISIBLE)
        if any(outputs[name].shape != branch.x.shape for name, branch in branches.items() if name in outputs):
            for branch, x in zip(branches.values(), call.inputs(), strict=True):
                branch.replace_input(x)
        run.rebase(branches, outputs)
        return plan, outputs

    def _compute_probed(
        self, probe: Probe, call: Call, run: Run, plan: Plan, branches: dict[str, Branch]
    ) -> tuple[Plan, dict[str, Tensor]]:
        """Runs the model until the criterion has seen what it looks at, and on to the end unless it says skip.

        If the decision has been made already, the criterion is shown the signal all the same, for the next one.
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
                deciding, plan = plan.deciding, self._ask(run, branches, plan.deciding)
                plan.deciding = deciding
            return not plan.computed

        if call.signal is not None:
            look(call.signal)
        outputs = probe.call(partial(call.compute, call.names), look) or {}
        if PENDING in plan.reasons.values():
            plan = plan.all_computed(ComputeReason(INVALID_STATE))
        if any(reason is not None and reason.reason == INVALID_STATE for reason in plan.reasons.values()):
            self.report.note(
                "invalid cache state: the signal was not reached, not finite, or of another shape than the one kept; "
                "such evaluations are computed, which restores it, and nothing needs resetting. If there are many, "
                "name another block with block="
            )
        return plan, outputs

    def _checked(
        self, call: Call, run: Run, plan: Plan, branches: dict[str, Branch], outputs: dict[str, Tensor]
    ) -> tuple[Plan, dict[str, Tensor]]:
        """Checks predictions relative to what was just computed; if one of them is unsound, everything is computed."""
        if not (plan.predicted and plan.computed):
            return plan, outputs
        predicted = [branches[name] for name in plan.predicted]
        possible = all(branch.predictable for branch in predicted)
        if self._agree(possible and all(map(self._sound, predicted)), branches):
            return plan, outputs
        return self._compute(call, run, plan.all_computed(NOT_FINITE if possible else NO_CACHE), branches)

    def _sound(self, branch: Branch) -> bool:
        """Whether a prediction is finite; seen from its cache, without a transfer, if that is enough.

        It is not if the prediction is relative to another branch's output of this very evaluation.
        """
        if self.method.predictor.finite_if_cache_is and not branch.rebased:
            return all(math.isfinite(entry.size) for entry in branch.history)
        return branch.finite

    def _agree(self, skip: bool, branches: dict[str, Branch]) -> bool:
        """The decision of all ranks that call this model together: skip if every one would."""
        first = next(iter(branches.values()))
        return self._ranks.agree(skip, first.position.evaluation, first.x.device)

    # What is said, and when a run is over.

    def _probed(self, network: Any) -> str:
        """What a criterion that looks at blocks looks at, for the report."""
        if self._probe is None:
            return f"{type(network).__name__} has no blocks that are known: the criterion looks at the network's input"
        if self._probe.note:
            self._warn(self._probe.note)
        return f"looks at {self._probe.label}: run on skipped evaluations too"

    def _refuse_skipped_layers(self, call: Call, deciding: list[str]) -> None:
        for key in SKIP_LAYERS:
            if call.keywords.get(key) is not None:
                raise OptionError(
                    f"STG is not supported with {self.method.name} where it decides: {', '.join(deciding)} is called "
                    f"with {key}, which leaves blocks out. Turn it off, let another branch decide (reference=), or use "
                    "a method that looks at no block (forecast, ucache)"
                )

    def _obstacle(self, *sentences: str) -> None:
        """Notes why skip='uncond' could not act."""
        for sentence in sentences:
            self.report.obstacle(sentence)

    def _free_if_over(self, evaluation: Evaluation) -> None:
        """Frees the latents after the run's last evaluation, if it can be known."""
        run, position, schedule = evaluation.run, evaluation.position, evaluation.run.info.schedule
        if not evaluation.expected <= evaluation.names:
            return
        if schedule is None:
            over = position.sigma <= self._lowest_sigma * (1 + 1e-4)
        else:
            single = schedule[-1] == 0 or run.info.stages != 2
            over = position.step == len(schedule) - 2 and (single or position.stage == 1)
        if over:
            run.forget()

    def _check_mask(self) -> None:
        mask, steps = self.method.mask, self.clock.steps
        if mask is not None and steps is not None:
            mask.for_steps(steps)

    def _warn(self, sentence: str) -> None:
        """Issues each warning once per engine."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled: options and the last report, no lock or run in progress."""
        return {**self.__dict__, "_computed": None, "_lock": None, "_busy": False, "_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self.clock.end()  # an announced run is its owner's, who will not end it here


def _same_evaluation(current: Evaluation, call: Call) -> bool:
    """Whether a call belongs to the evaluation in progress."""
    if call.evaluation is not None:
        return call.evaluation == current.number
    if call.place is not None:
        position = current.position
        return call.place == (position.sigma, position.step, position.stage)
    return same_sigma(current.sigma, call.sigma)


def _parts(signal: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The signal of each branch of a call; the whole signal for each if its rows do not divide."""
    if signal is None or not len(signal) or len(signal) % count:
        return [signal] * count
    return signal.chunk(count)
