"""diffusers: any pipeline, by passing a callback or inside a `with`.

The place to stand is the slot that `torch.nn.Module.__call__` looks into first (`_compiled_call_impl`), in the
instance's own `__dict__`: outside compilation, offloading and cache hooks, whose work goes on as before on computed
evaluations and is saved on skipped ones. No class is changed and no block is hooked; what was in the slot is kept.
"""

from __future__ import annotations

import inspect
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from stepcache import FBCache, Method, OptionError, Report, StepMask, method
from stepcache.extend import Call, Engine, Parametrization, flag, wide, widened

from .batching import cut, rows_of
from .cache_dit_backend import Inside, wanted

SLOT = "_compiled_call_impl"
COMPONENTS = ("unet", "transformer", "transformer_2", "prior", "decoder", "model", "denoiser")
LATENTS = ("hidden_states", "sample", "x")
BESIDE = ("audio_hidden_states",)
TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "time")
Place = tuple[float, int, int]


@dataclass(frozen=True)
class Guidance:
    """How the branches come, in cache-dit's names; None means that it is found out by looking.

    enable_separate_cfg: True: every branch comes in a call of its own. False: all come in one call, and a further
        call at the same place is computed. None: rows that repeat each other are branches batched in one call.
    cfg_compute_first: of separate calls, True: the first is uncond; False: the first is cond. None: the pipeline's
        `cache_context` names them, else they are "call", "call 2", ...
    cfg_diff_compute_separate: True: every branch decides by its own change. False and None: the reference decides.
    """

    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool | None = None
    cfg_diff_compute_separate: bool | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None:
                object.__setattr__(self, one.name, flag(one.name, value))
        if self.enable_separate_cfg is False and self.cfg_compute_first is not None:
            raise OptionError(
                f"cfg_compute_first={self.cfg_compute_first} with enable_separate_cfg=False: it orders separate calls; "
                "leave one of them out"
            )

    @classmethod
    def taken(cls, options: dict[str, Any]) -> Guidance:
        """Takes these options out of all that were given."""
        return cls(**{one.name: options.pop(one.name) for one in fields(cls) if one.name in options})


@contextmanager
def attach(
    pipe: Any,
    method: Method | str = "ucache",
    *,
    mask: StepMask | str | Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    controlnet: bool = True,
    **options: Any,
) -> Iterator[Attachment]:
    """Caches a pipeline's denoiser inside the block: `with attach(pipe, UCache()) as cache: pipe(prompt)`.

    Args:
        pipe: a pipeline with a `scheduler` and a denoiser.
        method: a `Method`, or the name of one, which then takes `**options`; or diffusers' `FirstBlockCacheConfig`.
        mask: a step mask for the method.
        components: the denoisers by name. None: those of `unet`, `transformer`, `transformer_2`, ... that it has.
        controlnet: skip the pipeline's ControlNet too where the denoiser is skipped. It is then run when its result is
            first looked at, which on a skipped step is never.
        **options: `enable_separate_cfg`, `cfg_compute_first`, `cfg_diff_compute_separate`, as for `Guidance`, and those
            of the method.

    Yields the attachment; `cache.report` says what happened in the last run. Nothing is left behind afterwards.
    """
    guidance = Guidance.taken(options)
    attachment = Attachment(pipe, _method(method, mask, options), components, guidance, controlnet)
    attachment.attach()
    try:
        yield attachment
    finally:
        attachment.detach()


class StepCacheCallback:
    """The cache as a pipeline's callback: `pipe(prompt, callback_on_step_end=StepCacheCallback("easycache"))`.

    It attaches when the first step is over (the first step is always computed anyway) and detaches at the last. An
    exception or interrupt in between leaves it attached until the pipeline's next run, whose first call removes it. One
    callback may be passed to many calls in a row, one at a time.

    Args:
        method: a `Method`, or the name of one, which then takes `**options`.
        mask: a step mask for the method.
        also: another callback, or a diffusers `PipelineCallback`; called first, its result is passed on.
        components, controlnet, **options: as for `attach`.
    """

    def __init__(
        self,
        method: Method | str = "ucache",
        *,
        mask: StepMask | str | Sequence[int] | None = None,
        also: Callable[..., dict[str, Any]] | None = None,
        components: Sequence[str] | None = None,
        controlnet: bool = True,
        **options: Any,
    ) -> None:
        self._also = also
        guidance = Guidance.taken(options)
        self._method = _method(method, mask, options)
        self._how = components, guidance, controlnet
        self._attachment: Attachment | None = None

    @property
    def __class__(self) -> type:
        """A `PipelineCallback` where `also` is one: pipelines pass `tensor_inputs` to nothing else."""
        return type(self._also) if hasattr(self._also, "tensor_inputs") else StepCacheCallback

    @property
    def tensor_inputs(self) -> list[str]:
        """What the pipeline is asked to pass: nothing for the cache itself."""
        return list(getattr(self._also, "tensor_inputs", []))

    @property
    def report(self) -> Report:
        """What happened in the run in progress, or in the last one."""
        return self._attachment.report if self._attachment is not None else Report(self._method.name)

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._also is not None:
            callback_kwargs = self._also(pipe, step, timestep, callback_kwargs)
        count = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
        current = self._attachment
        if step == 0:
            if current is not None:
                current.detach()
            self._attachment = Attachment(pipe, self._method, *self._how, this_run_only=True)
            self._attachment.attach()
        if step + 1 >= count and self._attachment is not None:
            self._attachment.detach()
        return callback_kwargs


class Attachment:
    """A cache standing in front of a pipeline's denoisers, each with a memory of its own."""

    def __init__(
        self,
        pipe: Any,
        method: Method,
        components: Sequence[str] | None = None,
        guidance: Guidance | None = None,
        controlnet: bool = True,
        this_run_only: bool = False,
    ) -> None:
        self.pipe = pipe
        self.attached = False
        self.guidance = guidance or Guidance()
        self.this_run_only = this_run_only
        self._timesteps = pipe.scheduler.timesteps if this_run_only else None
        self._plan: list[Place] = []
        self._first, self._at = 0, None
        self._shown = 0, 0
        if isinstance(components, str):
            raise OptionError(f"components={components!r}: accepted is a list of names, as components=[{components!r}]")
        names = components or [name for name in COMPONENTS if isinstance(getattr(pipe, name, None), nn.Module)]
        for name in names:
            if not isinstance(getattr(pipe, name, None), nn.Module):
                raise OptionError(f"components: {type(pipe).__name__} has no denoiser {name!r}")
        if not names:
            raise OptionError(
                f"{type(pipe).__name__} has no denoiser that can be found (looked for {', '.join(COMPONENTS)}): "
                "name it with components="
            )
        self._inside: Inside | None = None
        if wanted(method):
            if this_run_only:
                raise OptionError("Bn: cache-dit must be there when a run begins, a callback is not; use attach()")
            self._inside = Inside(pipe, [getattr(pipe, name) for name in names], method, vars(self.guidance))
            method = self._inside.outside
        self._slots = [_Slot(self, name, getattr(pipe, name), method) for name in names]
        self._stands: list[_Stand] = [*self._slots]
        if flag("controlnet", controlnet) and isinstance(getattr(pipe, "controlnet", None), nn.Module):
            self._stands.append(_ControlNet(self, "controlnet", pipe.controlnet))
        if this_run_only:
            self._begin_run(first=0)

    @property
    def report(self) -> Report:
        """The run in progress, or the last one. Several denoisers (experts) stand one after the other."""
        report = self._merged()
        if self._inside is not None and self.attached:
            report.notes[:] = [note for note in report.notes if not note.startswith("inside, ")]
            report.notes.append(self._inside.note())
        return report

    def _merged(self) -> Report:
        reports = [slot.engine.report for slot in self._slots if slot.engine.report.events]
        if len(reports) < 2:
            return reports[0] if reports else self._slots[0].engine.report
        notes = [f"{slot.name}: {note}" for slot in self._slots for note in slot.engine.report.notes]
        merged = Report(reports[0].method, reports[0].run, reports[0].scheduled_steps, notes)
        before = 0
        for report in reports:
            moved = [replace(e.position, evaluation=e.position.evaluation + before) for e in report.events]
            merged.events += [replace(e, position=position) for e, position in zip(report.events, moved, strict=True)]
            before += report.evaluations
        return merged

    @property
    def over(self) -> bool:
        """Whether the one run this was for has ended unsaid (an exception, an interrupt) and another has begun."""
        return self.this_run_only and self.pipe.scheduler.timesteps is not self._timesteps

    def attach(self) -> None:
        entered: list[_Stand] = []
        try:
            if self._inside is not None:
                self._inside.enter()
            for stand in self._stands:
                stand.enter()
                entered.append(stand)
        except BaseException:
            for stand in entered:
                stand.leave()
            if self._inside is not None:
                self._inside.leave()
            raise
        self.attached = True

    def detach(self) -> None:
        """Takes the cache away; every denoiser is the object it was."""
        if self.attached:
            for stand in self._stands:
                stand.leave()
            if self._inside is not None:
                self._inside.leave()
        self.attached = False

    def caller(self) -> types.FrameType | None:
        """The frame of the pipeline that is calling, where one is: the nearest whose `self` has a scheduler."""
        frame = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if not isinstance(owner, nn.Module) and hasattr(getattr(owner, "scheduler", None), "timesteps"):
                return frame
            frame = frame.f_back
        return None

    def serves(self, caller: types.FrameType | None) -> bool:
        """Whether a call is of this pipeline, and not of another one with a scheduler of its own."""
        return caller is None or caller.f_locals["self"].scheduler is self.pipe.scheduler

    def show(self, caller: types.FrameType | None, skipped: bool) -> None:
        """Counts an evaluation on the progress bar that the calling pipeline is holding, if it holds one."""
        self._shown = self._shown[0] + skipped, self._shown[1] + 1
        bar = caller.f_locals.get("progress_bar") if caller is not None else None
        if hasattr(bar, "set_postfix_str"):
            bar.set_postfix_str("skipped {}/{}".format(*self._shown), refresh=False)

    def free_if_over(self, at_work: _Slot) -> None:
        """Frees what the denoisers before the last one remember, at the run's last evaluation: it was not theirs."""
        if self._at == len(self._plan) - 1:
            for slot in self._slots:
                if slot is not at_work:
                    slot.engine.free()

    def locate(self, timestep: Tensor | float | None, again: bool) -> Place | None:
        """The place of a call; None where the scheduler cannot tell it. `again`: this call was already made here."""
        scheduler = self.pipe.scheduler
        if scheduler.timesteps is not self._timesteps:
            if self.this_run_only:
                return None
            self._timesteps, self._at = scheduler.timesteps, None
            self._begin_run(self._beginning(timestep))
        self._at = self._index(timestep, self._first if self._at is None else self._at + again)
        return self._plan[self._at] if self._at is not None and self._at < len(self._plan) else None

    def _beginning(self, timestep: Tensor | float | None) -> int:
        """Where in the scheduler's timesteps a run begins; of equal ones (PRK) the pipeline's own count tells which."""
        first = self._index(timestep, 0) or 0
        timesteps = self.pipe.scheduler.timesteps
        counted = len(timesteps) - (getattr(self.pipe, "num_timesteps", None) or len(timesteps))
        return counted if counted > first and timesteps[counted] == timesteps[first] else first

    def _index(self, timestep: Tensor | float | None, cursor: int) -> int | None:
        """The evaluation's number in the scheduler's timesteps: by its own count, or else by the timestep's value."""
        scheduler = self.pipe.scheduler
        if not hasattr(scheduler, "step_index"):
            following = self._by_value(timestep, cursor)
            return self._by_value(timestep, self._at) if following is None and self._at is not None else following
        if scheduler.step_index is not None:
            return scheduler.step_index
        if self._at is None:
            return getattr(scheduler, "begin_index", None) or 0
        # The first step is not over, or the pipeline steps a copy of its scheduler and this one never counts.
        following = self._by_value(timestep, self._at + 1)
        return following if following == self._at + 1 else self._at

    def _by_value(self, timestep: Tensor | float | None, cursor: int) -> int | None:
        if timestep is None:
            return None
        value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        timesteps = self.pipe.scheduler.timesteps.tolist()
        return next((k for k in range(cursor, len(timesteps)) if math.isclose(timesteps[k], value, rel_tol=1e-5)), None)

    def _begin_run(self, first: int) -> None:
        """Another run: its plan, from the scheduler as it has just been set, beginning where the run begins."""
        self._plan = plan(self.pipe.scheduler, first)
        self._first, self._at, self._shown = first, None, (0, 0)
        ahead = self._plan[first:]
        schedule = [*(sigma for sigma, _, stage in ahead if stage == 0), 0.0]
        if getattr(self.pipe, "denoising_end", None) is not None:  # SDXL's base model leaves the rest to the refiner
            calls = self.pipe.num_timesteps
            schedule = schedule[: sum(stage == 0 for *_, stage in ahead[:calls]) + 1]
        stages = (
            2 if 2 * sum(stage > 0 for *_, stage in ahead) >= len(ahead) - 1 > 0 else 1
        )  # PNDM's first step alone: 1
        for slot in self._slots:
            slot.begin(schedule, stages)


@cache
def slot_is_called() -> bool:
    """Whether this torch calls what stands in the slot, which is a private attribute of its modules."""
    module = nn.Module()
    module.__dict__[SLOT] = lambda: True
    try:
        return module() is True
    except (NotImplementedError, TypeError):
        return False


class _Stand:
    """What stands in a module's call slot."""

    def __init__(self, owner: Attachment, name: str, module: nn.Module) -> None:
        self.owner, self.name, self.module = owner, name, module
        self._previous: Callable[..., Any] | None = None

    def enter(self) -> None:
        if not slot_is_called():
            raise RuntimeError(
                f"torch {torch.__version__} does not call what stands in a module's {SLOT}: nothing can be attached; "
                "use torch 2.4 or newer, and report it if this is one"
            )
        occupant = self.module.__dict__.get(SLOT)
        if isinstance(occupant, _Stand):
            if not occupant.owner.this_run_only:
                raise OptionError(f"{self.name} is cached already: leave the other attachment first")
            occupant.owner.detach()  # a callback's, whose run was never finished
            occupant = self.module.__dict__.get(SLOT)
        self._previous = occupant
        self.module.__dict__[SLOT] = self

    def leave(self) -> None:
        if self.module.__dict__.get(SLOT) is not self:
            warnings.warn(
                f"{self.name}: something else, .compile() say, took the place of the cache; nothing was skipped since",
                stacklevel=5,
            )
        elif self._previous is None:
            del self.module.__dict__[SLOT]
        else:
            self.module.__dict__[SLOT] = self._previous

    def through(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The call as it is without the cache."""
        return (self._previous or self.module._call_impl)(*args, **kwargs)


class _Slot(_Stand):
    """What stands in one denoiser's slot, and what it knows of the denoiser's calls."""

    def __init__(self, owner: Attachment, name: str, module: nn.Module, method: Method) -> None:
        super().__init__(owner, name, module)
        scheduler = owner.pipe.scheduler
        self.engine = Engine(
            method,
            decide="each" if owner.guidance.cfg_diff_compute_separate else "reference",
            training_sigma=_training_sigma(scheduler),
            coordinate=_coordinate(scheduler),
            network=module,
            parametrization=_parametrization(scheduler),
        )
        self.parameters = list(inspect.signature(getattr(module, "_orig_mod", module).forward).parameters)
        self.pairing: Pairing | None = None
        self.candidates: list[Pairing] = []
        self.forms: dict[bool, Callable[[list[Tensor]], Any]] = {}
        self.refused: str | None = None
        self._waiting: ModuleCall | None = None
        self._context: str | None = None
        self._seen: list[str] = []
        self._place: Place | None = None
        self._branch_names: dict[str, tuple[tuple[str, ...], int]] = {}

    def enter(self) -> None:
        super().enter()
        if hasattr(self.module, "cache_context"):
            self.module.__dict__["cache_context"] = _ContextName(self, self.module.cache_context)

    def leave(self) -> None:
        super().leave()
        self.module.__dict__.pop("cache_context", None)
        self.engine.end()
        self._waiting = None

    def begin(self, schedule: list[float], stages: int) -> None:
        self.engine.begin(schedule, stages)
        self._seen, self._place, self._branch_names, self._waiting = [], None, {}, None

    def through(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        args, kwargs = _now((args, kwargs))
        return super().through(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = self.owner.caller()
        if not self.owner.serves(caller):
            return self.through(args, kwargs)
        call, context = ModuleCall(self, args, kwargs), self._context or ""
        place = self.owner.locate(call.timestep, again=context in self._seen)
        if place is None and self.owner.over:
            self.owner.detach()
        if place is None or self.refused or call.latent is None:
            return self.through(args, kwargs)
        if place != self._place:
            self._seen, self._place = [], place
        call.place, call.context, call.turn = place, context, self._seen.count(context)
        self._seen.append(context)
        if len(self._seen) > 1 and self.owner.guidance.enable_separate_cfg is False:
            self.engine.report.note(
                "enable_separate_cfg=False: further calls at the same place were computed, and are not counted"
            )
            return self.through(args, kwargs)
        call.names = self._names(call)
        if self.candidates:
            self._choose(call)
        answer = self._answer(call)
        if len(self._seen) == 1:
            self.owner.show(caller, skipped=call.computed is None)
        self.owner.free_if_over(self)
        return answer

    def refuse(self, reason: str) -> None:
        """The denoiser's answers cannot be predicted: from now on all are computed."""
        self.refused = f"{reason}: always computed"
        self.engine.report.note(self.refused)

    def _answer(self, call: ModuleCall) -> Any:
        """The engine's answer. If it is not known yet which part of the input the latents are, the call is kept."""
        answer = self.engine(call)
        if call.unpaired:
            self.engine.reset()
            self._waiting = call
        return answer

    def _choose(self, call: ModuleCall) -> None:
        """The latents are that part of the input which moves from one call to the next; the rest is conditioning."""
        before, self._waiting = self._waiting, None
        if before is None or before.latent.shape != call.latent.shape:
            return
        moved = [float((p.input(call.latent) - p.input(before.latent)).abs().mean()) for p in self.candidates]
        self.pairing, self.candidates = self.candidates[moved.index(max(moved))], []
        self._branch_names.clear()  # now it can be seen which rows repeat each other
        before.names, call.names = self._names(before), self._names(call)
        self._answer(before)

    def _names(self, call: ModuleCall) -> tuple[str, ...]:
        """The branches of a call: batched guidance repeats the latents; separate calls are told by the pipeline's
        `cache_context`, or else by their order.

        Where guidance ends within the run and the batch falls to one branch's rows, that branch is cond.
        """
        x = call.latent if self.pairing is None else self.pairing.input(call.latent)
        if call.context not in self._branch_names:
            split = self.owner.guidance.enable_separate_cfg is not True
            chunks = next((n for n in (2, 3) if split and _repeats(x, n)), 1)
            self._branch_names[call.context] = self._labels(call.context, chunks), x.shape[0] // chunks
        names, rows = self._branch_names[call.context]
        if x.shape[0] != rows * len(names):
            names = ("cond",) if x.shape[0] == rows else ("call",)
        first = self.owner.guidance.cfg_compute_first
        if names == ("call",) and first is not None and call.turn < 2:
            return ("uncond" if call.turn == (not first) else "cond",)
        return names if call.turn == 0 else tuple(f"{name} {call.turn + 1}" for name in names)

    def _labels(self, context: str, chunks: int) -> tuple[str, ...]:
        """Batched branches in diffusers' order: uncond and cond; with perturbed attention; InstructPix2Pix' three."""
        if chunks == 1:
            return (context or "call",)
        pipe = self.owner.pipe
        if not getattr(pipe, "do_perturbed_attention_guidance", False):
            labels = ("uncond", "cond") if chunks == 2 else ("cond", "image", "uncond")
        else:
            labels = ("uncond", "cond", "perturbed")[3 - chunks :]
        taken = {name for names, _ in self._branch_names.values() for name in names}
        return tuple(f"{label} of {context}" if label in taken else label for label in labels)


class _ContextName:
    """Stands before a denoiser's `cache_context` and tells its slot the name. A copy of the denoiser has its own."""

    def __init__(self, slot: _Slot, original: Callable[..., Any]) -> None:
        self._slot, self._original = slot, original

    @contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        before, self._slot._context = self._slot._context, name
        try:
            with self._original(name, *args, **kwargs):
                yield
        finally:
            self._slot._context = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        module = self._slot.module
        return types.MethodType(type(module).cache_context, memo[id(module)])


class _ControlNet(_Stand):
    """What stands in a ControlNet's slot: its work is put off until its result is looked at.

    Where the denoiser is computed, that is at once, with the very same arguments; where it is skipped, never. What the
    answer looks like is known from the run's first call, which is not put off.
    """

    _run: Tensor | None = None
    _leaves: list[Any] | None = None
    _form: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.serves(self.owner.caller()):
            return self.through(args, kwargs)
        timesteps = self.owner.pipe.scheduler.timesteps
        if self._leaves is None or timesteps is not self._run:
            self._run = timesteps
            answer = self.through(args, kwargs)
            leaves, self._form = tree_flatten(answer)
            self._leaves = [isinstance(leaf, Tensor) or leaf for leaf in leaves]
            return answer
        work = _Work(lambda: self.through(args, kwargs), self._form)
        leaves = [_Later.of(work, k) if leaf is True else leaf for k, leaf in enumerate(self._leaves)]
        return tree_unflatten(leaves, self._form)


class _Work:
    """A call that is made when the first of its results is wanted."""

    def __init__(self, call: Callable[[], Any], form: Any) -> None:
        self._call, self._form = call, form
        self._results: list[Any] | None = None

    def result(self, k: int) -> Tensor:
        if self._results is None:
            self._results, form = tree_flatten(self._call())
            if form != self._form:
                raise RuntimeError(
                    "the ControlNet's answer has another form than before in this run: attach with controlnet=False"
                )
        return self._results[k]


class _Later(Tensor):
    """One tensor of a `_Work`. Whatever is done with it is done with the result."""

    @classmethod
    def of(cls, work: _Work, k: int) -> _Later:
        later = Tensor._make_subclass(cls, torch.empty(0))
        later.work, later.k = work, k
        return later

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        args, kwargs = _now((args, kwargs or {}))
        return func(*args, **kwargs)


def _now(value: Any) -> Any:
    """The value with everything in it that was put off."""
    return tree_map(lambda one: one.work.result(one.k) if isinstance(one, _Later) else one, value)


@dataclass(frozen=True)
class Pairing:
    """Which part of the input an output belongs to: `size` channels from `start` of dimension `dim`.

    Where the output has more channels than the input (learned variance), zeros stand for the input of the rest, so that
    residual reuse repeats the rest as it was.
    """

    dim: int = 0
    start: int = 0
    size: int | None = None
    more: int = 0

    def input(self, x: Tensor) -> Tensor:
        if self.more:
            shape = [*x.shape]
            shape[self.dim] = self.more
            return torch.cat([x, x.new_zeros(shape)], dim=self.dim)
        return x if self.size is None else x.narrow(self.dim, self.start, self.size)


def pairings(x: Tensor, out: Tensor) -> list[Pairing]:
    """How an output may belong to an input; more than one where only movement can tell; none where nothing fits."""
    if x.shape == out.shape:
        return [Pairing()]
    if x.ndim != out.ndim:
        return []
    different = [d for d in range(x.ndim) if x.shape[d] != out.shape[d]]
    if len(different) != 1 or different[0] == 0:
        return []
    (dim,) = different
    inside, outside = x.shape[dim], out.shape[dim]
    if outside > inside:
        return [Pairing(dim, more=outside - inside)]
    return [Pairing(dim, 0, outside), Pairing(dim, inside - outside, outside)]


class ModuleCall(Call):
    """One call of a denoiser: in network space already, its input scaled and its output raw.

    Latents of several kinds that go in and out together (video and audio) are one flat tensor to the engine.
    """

    context, turn = "", 0

    def __init__(self, slot: _Slot, args: tuple, kwargs: dict[str, Any]) -> None:
        self.slot, self.args, self.keywords = slot, args, kwargs
        given = dict(zip(slot.parameters, args, strict=False)) | kwargs
        parts = [next((given[name] for name in LATENTS if name in given), None)]
        parts = [_stacked(part) for part in parts + [given[name] for name in BESIDE if name in given]]
        known = all(part is not None and part.is_floating_point() for part in parts)
        self.shapes = [part.shape[1:] for part in parts] if known else []
        self.latent = _packed(parts) if known else None
        self.timestep = next((given[name] for name in TIMESTEPS if name in given), None)
        self.sigma = self.computed = None
        self.unpaired = False
        self.requires_grad = self.latent is not None and self.latent.requires_grad

    @torch.no_grad()
    def inputs(self) -> tuple[Tensor, ...]:
        x = self.latent if self.slot.pairing is None else self.slot.pairing.input(self.latent)
        return x.to(wide(x.dtype), copy=True).chunk(len(self.names))

    def run_model(self) -> Any:
        if self.computed is None:
            self.computed = self.slot.through(self.args, self.keywords)
        return self.computed

    @torch.no_grad()
    def outputs(self, answer: Any) -> tuple[Tensor, ...] | None:
        slot, (parts, form) = self.slot, _opened(answer)
        self.unpaired = True
        if form is None or len(parts) != len(self.shapes):
            return slot.refuse(f"{slot.name} returns {len(parts)} tensors for {len(self.shapes)} of latents")
        shapes = [part.shape[1:] for part in parts]
        if len(parts) > 1 and shapes != self.shapes:
            return slot.refuse(f"{slot.name}: {_listed(self.shapes)} in and {_listed(shapes)} out cannot be paired")
        out = _packed(parts)
        slot.forms[bool(self.keywords.get("return_dict", True))] = form
        if slot.pairing is None or slot.pairing.input(self.latent).shape != out.shape:
            slot.candidates, slot.pairing = pairings(self.latent, out), None
            if not slot.candidates:
                shape = tuple(self.latent.shape)
                return slot.refuse(f"{slot.name}: {shape} in and {tuple(out.shape)} out cannot be paired")
            if len(slot.candidates) > 1:
                return None
            slot.pairing, slot.candidates = slot.candidates[0], []
        self.unpaired = False
        return widened(out).clone().chunk(len(self.names))

    def part(self, name: str) -> ModuleCall | None:
        if getattr(self.slot.module, "is_cache_enabled", False):
            return None  # a cache inside keeps what it saw, for batches of one size
        rows = len(self.latent)
        args, keywords = cut(_now((self.args, dict(self.keywords))), rows, rows_of(self.names, name, rows))
        part = ModuleCall(self.slot, args, keywords)
        part.names = (name,)
        return part

    @torch.no_grad()
    def rebuild(self, outputs: tuple[Tensor, ...]) -> Any:
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        form = self.slot.forms.get(bool(self.keywords.get("return_dict", True)))
        if form is None:
            return self.run_model()
        if len(self.shapes) == 1:
            return form([out])
        flat = out.split([shape.numel() for shape in self.shapes], dim=1)
        return form([part.unflatten(1, shape) for part, shape in zip(flat, self.shapes, strict=True)])


def _packed(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], dim=1)


def _listed(shapes: Sequence[torch.Size]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes)


def _opened(answer: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any] | None]:
    """The tensors in a denoiser's answer, and how to make such an answer from others; ([], None) otherwise.

    A list of tensors of one shape counts as the tensor that they make when stacked (Z-Image).
    """
    if isinstance(answer, dict):
        kind, keys = type(answer), [key for key, value in answer.items() if value is not None]
        tensors, form = _opened(tuple(answer[key] for key in keys))
        return tensors, None if form is None else lambda new: kind(**dict(zip(keys, form(new), strict=True)))
    if isinstance(answer, tuple):
        opened = [_opened(one) for one in answer]
        if any(form is None or len(tensors) != 1 for tensors, form in opened):
            return [], None
        forms = [form for _, form in opened]
        tensors = [tensor for (tensor,), _ in opened]
        return tensors, lambda new: tuple(form([one]) for form, one in zip(forms, new, strict=True))
    tensor = _stacked(answer)
    if tensor is None:
        return [], None
    if tensor is answer:
        return [tensor], lambda new, dtype=tensor.dtype: new[0].to(dtype)
    return [tensor], lambda new, dtype=tensor.dtype: list(new[0].to(dtype).unbind(0))


def _stacked(value: Any) -> Tensor | None:
    """A tensor, or a list of tensors of one shape as one tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list) and value and all(isinstance(v, Tensor) and v.shape == value[0].shape for v in value):
        return torch.stack(value)
    return None


def _repeats(x: Tensor, n: int) -> bool:
    """Whether a batch is one batch n times over, as batched guidance makes it."""
    if x.shape[0] % n:
        return False
    first, *others = x.chunk(n)
    return all(torch.equal(first, other) for other in others)


def plan(scheduler: Any, first: int = 0) -> list[Place]:
    """(sigma, step, stage) of every evaluation of a run that begins at its `first` (image to image), from a scheduler
    that has just been set. Sigmas are rounded to float32, steps before the first are negative.

    Sigma is the scheduler's own, or sqrt((1 - a) / a) with a its alphas_cumprod, or the timestep where it has neither.
    Schedulers of order 2 (Heun, KDPM2, KDPM2A, DPMSolverSDE, FlowMatchHeun) evaluate twice a step, once in the last;
    PNDM twice in its first step, or four times in each of its first three (PRK).
    """
    timesteps = scheduler.timesteps.tolist()
    sigmas, halfway = getattr(scheduler, "sigmas", None), getattr(scheduler, "sigmas_interpol", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(sigmas, Tensor) and len(sigmas) >= len(timesteps):
        levels = sigmas.tolist()
        if isinstance(halfway, Tensor):  # KDPM2A keeps the middle of a step where the step begins, KDPM2 where it ends
            back = 1 if hasattr(scheduler, "sigmas_down") else 0
            levels = [halfway[k - back].item() if k % 2 else level for k, level in enumerate(levels)]
    elif isinstance(alphas, Tensor):
        kept = alphas.double().clamp(min=1e-8)
        levels = [float(((1 - kept[int(t)]) / kept[int(t)]) ** 0.5) for t in timesteps]
    else:
        levels = [float(t) for t in timesteps]
    prk = len(
        getattr(scheduler, "prk_timesteps", None) if getattr(scheduler, "prk_timesteps", None) is not None else ()
    )
    twice_first = hasattr(scheduler, "plms_timesteps") and not prk

    def place(k: int) -> tuple[int, int]:
        if getattr(scheduler, "order", 1) == 2:
            return divmod(k, 2)
        if k < prk:
            return divmod(k, 4)
        if twice_first:
            return (0, k) if k < 2 else (k - 1, 0)
        return prk // 4 + k - prk, 0

    levels = torch.tensor(levels, dtype=torch.float32).tolist()
    return [(levels[k], *place(k - first)) for k in range(len(timesteps))]


def _coordinate(scheduler: Any) -> Callable[[float], float] | None:
    """The coordinate that predictors extrapolate in: t, which is sigma itself, for flow models; None for log sigma."""
    return float if _is_flow(scheduler) or not _has_sigma(scheduler) else None


def _parametrization(scheduler: Any) -> Callable[[float], Parametrization] | None:
    """`Run.parametrization` by what the network predicts. Its input is of unit scale, or a flow's interpolation."""
    if _is_flow(scheduler):
        return lambda t: Parametrization((0.0, 1.0), (1.0, -t)) if t > 0 else Parametrization()
    if not _has_sigma(scheduler):
        return None
    config = getattr(scheduler, "config", {})
    data, kind = config.get("sigma_data"), config.get("prediction_type", "epsilon")
    if data is not None and hasattr(scheduler, "precondition_outputs"):
        sign = -1 if kind == "v_prediction" else 1
        return lambda s: Parametrization.of(
            s, data**2 / (s**2 + data**2), sign * s * data / math.hypot(s, data), 1 / math.hypot(s, data)
        )
    by_kind = {
        "epsilon": lambda s: Parametrization.of(s, 1.0, -s, 1 / math.hypot(s, 1)),
        "v_prediction": lambda s: Parametrization.of(s, 1 / (s * s + 1), -s / math.hypot(s, 1), 1 / math.hypot(s, 1)),
        "sample": lambda s: Parametrization.of(s, 0.0, 1.0, 1 / math.hypot(s, 1)),
    }
    return by_kind.get(kind)


def _has_sigma(scheduler: Any) -> bool:
    return any(isinstance(getattr(scheduler, name, None), Tensor) for name in ("sigmas", "alphas_cumprod"))


def _is_flow(scheduler: Any) -> bool:
    return "Flow" in type(scheduler).__name__ or bool(getattr(scheduler, "config", {}).get("use_flow_sigmas"))


def _training_sigma(scheduler: Any) -> Callable[[float], float] | None:
    """Share of the training timetable -> sigma, where the scheduler has a fixed one."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    config = getattr(scheduler, "config", {})
    steps = config.get("num_train_timesteps", 1000)
    flow = _is_flow(scheduler)
    if flow and config.get("use_dynamic_shifting"):
        return None
    if flow:
        shift = config.get("shift") or config.get("flow_shift") or 1.0

        def by_shift(share: float) -> float:
            t = ((1 - share) * (steps - 1) + 1) / steps
            return shift * t / (1 + (shift - 1) * t)

        return by_shift
    if not isinstance(alphas, Tensor):
        return None
    logs = ((1 - alphas.double()) / alphas.double().clamp(min=1e-8)).sqrt().log().cpu()

    def by_table(share: float) -> float:
        t = (1 - share) * (len(logs) - 1)
        return float(torch.lerp(logs[math.floor(t)], logs[math.ceil(t)], t % 1).exp())

    return by_table


def _method(given: Any, mask: Any, options: dict[str, Any]) -> Method:
    if type(given).__name__ == "FirstBlockCacheConfig":
        given = FBCache(threshold=given.threshold)
    if isinstance(given, str):
        return method(given, **options, **({} if mask is None else {"mask": mask}))
    if not isinstance(given, Method):
        raise OptionError(f"method={given!r}: accepted are a Method, the name of one, and a FirstBlockCacheConfig")
    if options:
        raise OptionError(f"{', '.join(options)}: options go with a method's name; this Method has its own")
    return given if mask is None else given.replace(mask=mask)
