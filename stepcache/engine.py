"""The engine: between one model and its sampler, it answers some evaluations without running the model."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .clock import Clock
from .methods.base import Method
from .methods.off import Off
from .options import OptionError, number, unknown
from .parametrization import Parametrization
from .planner import Planner
from .ranks import Ranks
from .report import Report
from .run import Evaluation, Run
from .run_info import RunInfo
from .runs import Runs
from .samples import Samples

DECIDE = ("batch", "any", "sample", "each")
"""Who decides whether an evaluation is skipped; see `Engine`."""


class Engine:
    """Answers a sampler's evaluations of one model, some of them without calling it.

    Args:
        method: what to skip and how to predict it. None computes everything.
        reference: the branch whose change decides for the whole evaluation. None: of branches batched in one call,
            "cond" if there is one, else the first; of branches in separate calls, the first one called.
        decide: "batch" (default): one decision for all samples of a batch, by their mean. "sample": every sample
            decides for itself, and the model is called for those alone that need it, so that a sample does not depend
            on its neighbours. "any": an evaluation is computed if any sample needs it. "each": as "batch", but every
            branch decides for itself; branches batched in one call are skipped if all of them agree.
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

    An engine follows one run at a time. Runs at the same time need an engine each, which `fork` gives: a call while
    another is being answered goes straight to the model, and a call from another thread or asyncio task finds no
    cache. That costs the speed, never the image.

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
        decide: str = "batch",
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
        if decide not in DECIDE:
            raise unknown("value of decide", str(decide), DECIDE)
        if decide == "each" and reference is not None:
            raise OptionError(
                f"reference={reference!r} with decide='each': if each branch decides there is no reference"
            )
        self.method = method or Off()
        self.off = self.method.never_skips
        self._network, self._warned = network, set[str]()
        ranks = group if isinstance(group, Ranks) else Ranks(group, network)
        self._planner = Planner(self.method, network, ranks, self.warn)
        known = RunInfo(
            training_sigma=training_sigma,
            second_only=self.method.evaluations == "second",
            coordinate=coordinate or math.log,
            parametrization=parametrization,
            network=network,
            notes=[*notes, *self._planner.notes],
        )
        each, noise = decide == "each", None if noise is None else number("noise", noise, high=1.0)
        clock = Clock(sigmas, lowest_sigma)
        self.runs = Runs(self.method, clock, known, reference, each, noise, ranks, self.warn)
        self._samples = Samples(self._planner, decide == "any") if decide in ("any", "sample") else None
        inside = f"{self.method.name}, which decides inside the model"
        if self.method.skip == "uncond" and not self.off and (decide != "batch" or self._planner.looks_inside):
            other = f"decide={decide!r}" if decide != "batch" else inside
            raise OptionError(f"skip='uncond' with {other}: the reference is always computed; use skip='all'")
        if self._samples is not None and self._planner.looks_inside:
            raise OptionError(f"decide={decide!r} with {inside} for the whole batch: use decide='batch'")
        self._computed: str | None = None
        self._lock, self._busy = threading.RLock(), False

    def __call__(self, call: Call) -> Any:
        """Answers one call. A second thread, or a call made by the model itself, goes straight to the model."""
        if not self._lock.acquire(blocking=False):
            self.warn("a second thread called while the first was being answered: give each run a wrapper of its own")
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
        """Passes the call to the model if nothing may be cached: `_pass_reason` says why."""
        evaluation = self.runs.locate(call)
        if reason := self._pass_reason(call, evaluation):
            evaluation.run.report.passed(evaluation.position, call.names, reason)
            answer = call.run_model()
        else:
            answer = self._answer_batch(call, evaluation)
        self.runs.free_if_over(evaluation)
        return answer

    def _answer_batch(self, call: Call, evaluation: Evaluation) -> Any:
        """A batch is taken apart if its samples decide each for themselves."""
        parts = None if self._samples is None else self._samples.parts(call, evaluation.run)
        if self._samples is None or not parts:
            return self._answer(call, evaluation)
        return self._samples.answer(call, evaluation, parts)

    def _answer(self, call: Call, evaluation: Evaluation) -> Any:
        """Answers one call: plan, compute, check, predict, remember, report."""
        run = evaluation.run
        branches = run.branches(call, evaluation)  # each with its input and its cache
        plan = self._planner.plan(evaluation, branches)  # compute or predict, branch by branch
        plan, outputs = self._planner.compute(call, run, plan, branches)  # a forward pass may change the plan
        plan, outputs = self._planner.checked(call, run, plan, branches, outputs)
        outputs |= {name: branches[name].predict() for name in plan.predicted}
        run.update(call, plan, branches, outputs)
        run.report.append(evaluation.position, plan, branches, evaluation.skip_reason)
        return (
            call.rebuild(tuple(outputs[name] for name in call.names)) if plan.predicted else call.raw
        )  # as returned, to the bit

    @property
    def report(self) -> Report:
        """What happened in the run in progress, or in the last one."""
        return self.runs.report

    @property
    def announced(self) -> bool:
        """Whether the run in progress was announced by the host, and has not ended yet."""
        return self.runs.clock.announced

    @property
    def has_cache(self) -> bool:
        """Whether anything that the run in progress has computed is kept."""
        return self.runs.current is not None and self.runs.current.has_cache

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
            self._computed = computed
            self.runs.announce(sigmas, stages, on_schedule, loops)

    def end(self) -> None:
        """The announced run is over; only its report stays."""
        with self._lock:
            self._computed = None
            self.runs.end()

    def reset(self) -> None:
        """Forgets the run in progress; only its report stays."""
        with self._lock:
            self.runs.reset()

    def free(self) -> None:
        """Drops what the run in progress has cached; its position and its report stay."""
        with self._lock:
            if self.runs.current is not None:
                self.runs.current.forget()

    def fork(self) -> Engine:
        """Another engine with the same options, for a run at the same time as this one's.

        The host knows which calls belong to its run, from whatever thread or task they come.
        """
        other = copy(self)
        other.runs = self.runs.fork()
        return other

    def set_step(self, step: int) -> None:
        """The sampler's callback: the first evaluation of this step has just been answered."""
        self.runs.clock.set_step(step)

    def _pass_reason(self, call: Call, evaluation: Evaluation) -> str | None:
        """Why the model is called without planning, and nothing is cached; None if there is no such reason."""
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
            self.warn(sentence)
            run.report.note(sentence)
            return "gradients are asked for"
        if position.mixed:
            self.warn("the rows of the batch have different sigmas: such evaluations are always computed")
            return "sigmas differ in the batch"
        return None

    def _trains(self, run: Run) -> bool:
        """Whether the network has parameters that require gradients; looked at once a run."""
        if run.trains is None:
            parameters = self._network.parameters() if isinstance(self._network, torch.nn.Module) else ()
            run.trains = any(parameter.requires_grad for parameter in parameters)
        return run.trains

    def warn(self, sentence: str) -> None:
        """Issues each warning once per engine."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled: options and the last report, no lock or run in progress."""
        return {**self.__dict__, "_computed": None, "_lock": None, "_busy": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
