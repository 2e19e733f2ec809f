"""What is put in a denoiser's call slot: it finds out where a call belongs, and asks the engine."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from stepcache import Method, Off, OptionError
from stepcache.extend import Engine

from ..compiled import COMPILE_FIRST
from .branches import BranchNames, ContextName
from .call import LATENTS, Layout, ModuleCall
from .controlnet import computed
from .frames import find_caller
from .guidance import Guidance
from .parallel import parallel_groups
from .parametrization import coordinate, parametrization, training_sigma
from .patch import Abandon, HostPatch
from .runs import PipelineRuns
from .schedule import Place
from .watch import Watch

MAX_TURNS = 4
"""Calls of one context in one evaluation that count as branches of their own. Each has a cache."""


def engine_of(module: nn.Module, method: Method, scheduler: Any, guidance: Guidance, group: Any, decide: str) -> Engine:
    """The engine of a denoiser whose runs follow this scheduler."""
    if guidance.cfg_diff_compute_separate:
        if decide not in ("batch", "each"):
            raise OptionError(f"cfg_diff_compute_separate with decide={decide!r}: use one of them")
        decide = "each"
    idle = method.never_skips and method.name != Off().name
    return Engine(
        method,
        decide=decide,
        training_sigma=training_sigma(scheduler),
        coordinate=coordinate(scheduler),
        network=module,
        parametrization=parametrization(scheduler),
        group=partial(parallel_groups, module) if group is None else group,
        notes=(f"{method.name} with these options can skip nothing",) if idle else (),
    )


class DenoiserPatch(HostPatch):
    """Answers a denoiser's calls: some by its engine's predictions, the others by the denoiser itself.

    Args:
        name, module, abandon: as for `HostPatch`.
        engine: the engine, with a cache for this denoiser alone.
        runs: which run is in progress, and where in it a call is.
        guidance: what the user has said about branches.
        at_end: called with this patch after the run's last evaluation: what other denoisers have cached can go.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        engine: Engine,
        runs: PipelineRuns,
        guidance: Guidance,
        at_end: Callable[[DenoiserPatch], None],
        abandon: Abandon | None = None,
    ) -> None:
        super().__init__(name, module, abandon)
        self.engine = engine
        self._runs, self._guidance, self._at_end = runs, guidance, at_end
        self._parameters = list(inspect.signature(getattr(module, "_orig_mod", module).forward).parameters)
        self._layout = Layout(name)
        self._context = ContextName(module)
        pipe = runs.pipe
        self._branches = BranchNames(guidance, lambda: getattr(pipe, "do_perturbed_attention_guidance", False))
        self._watch = Watch(module)
        self._waiting: ModuleCall | None = None
        self._warned: set[str] = set()
        self._turns: list[str] = []
        self._place: Place | None = None

    def install(self) -> None:
        super().install()
        self._context.install()

    def remove(self) -> None:
        super().remove()
        self._context.remove()
        self.forget()

    def forget(self) -> None:
        """The run is over; only its report stays."""
        self.engine.end()
        self._watch.end()
        self._waiting = None

    def begin(self, schedule: list[float], stages: int) -> None:
        """Another run."""
        self.engine.announce(schedule, stages)
        self._branches.forget()
        self._watch.begin()
        self._turns, self._place, self._waiting = [], None, None

    def original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = computed((args, kwargs))
        return super().original(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._not_compiled)(*args, **kwargs)  # type: ignore[no-untyped-call]
        frame = sys._getframe(1)
        caller = find_caller(frame)
        if (self.abandon is not None and self.abandon()) or not self._runs.serves(caller, frame):
            return self.original(args, kwargs)
        call = ModuleCall(self.module, self._parameters, self._layout, self.original, args, kwargs)
        place = self._runs.locate(caller, call.timestep, again=self._context.name in self._turns)
        if place is None or self._obstacle(call):
            return self.original(args, kwargs)
        call.place, call.context, call.turn = place, self._context.name, self._turn(place)
        if self._surplus(call):
            return self.original(args, kwargs)
        call.names = self._names(call)
        if self._layout.candidates:
            self._choose(call)
        if not self.engine.method.never_skips:
            changes = self._watch.changes(call.names, len(call.latent), call.arguments)
            call.cache_key = (call.flags, changes)
        answer = self._ask(call)
        if len(self._turns) == 1:
            self._runs.show(caller, skipped=not call.forwards)
        if self._runs.at_last:
            self._watch.end()
            self._at_end(self)
        return answer

    def _not_compiled(self, *args: Any, **kwargs: Any) -> Any:
        """What `torch.compile` around a cached denoiser calls: what is decided at every evaluation is no graph."""
        sentence = COMPILE_FIRST.format(f"pipe.{self.name}.compile() before attach(pipe)")
        self.engine.warn(sentence)
        self.engine.report.note(sentence)
        return self(*args, **kwargs)

    def _obstacle(self, call: ModuleCall) -> bool:
        """Whether the denoiser's calls cannot be predicted at all; warns of it once."""
        reason = self._layout.refused
        if call.latent is None:
            reason = (
                f"{self.name}: its latents are not found (looked for a tensor {', '.join(LATENTS)}): such calls are "
                "always computed"
            )
        if reason is None:
            return False
        self.engine.report.note(reason)
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(reason, stacklevel=2)
        return True

    def _surplus(self, call: ModuleCall) -> bool:
        """Whether this is a further call at one place that no branch is expected to make."""
        if len(self._turns) > 1 and self._guidance.enable_separate_cfg is False:
            self.engine.report.note(
                "enable_separate_cfg=False: further calls at the same place were computed, and are not counted"
            )
            return True
        if call.turn >= MAX_TURNS:
            self.engine.report.note(
                f"more than {MAX_TURNS} calls at the same place: the further ones were computed, and are not counted"
            )
            return True
        return False

    def _turn(self, place: Place) -> int:
        """How many calls of this context the evaluation has had before this one, which is counted."""
        if place != self._place:
            self._turns, self._place = [], place
        turn = self._turns.count(self._context.name)
        self._turns.append(self._context.name)
        return turn

    def _names(self, call: ModuleCall) -> tuple[str, ...]:
        return self._branches.of(call.latents, call.context, call.turn)

    def _ask(self, call: ModuleCall) -> Any:
        """The engine's answer. If it is not known yet which part of the input the latents are, the call is kept."""
        answer = self.engine(call)
        if self._layout.remark is not None:
            self.engine.report.note(self._layout.remark)
        self._obstacle(call)
        if call.unpaired:
            self.engine.reset()
            self._waiting = call
        return answer

    def _choose(self, call: ModuleCall) -> None:
        """Now that the latents have moved, the call that was kept is answered again, from what it has computed."""
        before, self._waiting = self._waiting, None
        if before is None or before.latent.shape != call.latent.shape:
            return
        self._layout.choose(before.latent, call.latent)
        self._branches.forget()  # now it can be seen which rows repeat each other
        before.names, call.names = self._names(before), self._names(call)
        self._ask(before)
