"""diffusers: any pipeline, by passing a callback or inside a `with`.

The place to stand is the slot that `torch.nn.Module.__call__` looks into first (`_compiled_call_impl`), in the
instance's own `__dict__`: outside compilation, offloading and cache hooks, whose work goes on as before on computed
evaluations and is saved on skipped ones. No class is changed and no block is hooked; what was in the slot is kept.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepcache import Method, OptionError, Report, Request, Session, StepMask, method
from stepcache.readings import wide, widened

SLOT = "_compiled_call_impl"
COMPONENTS = ("unet", "transformer", "transformer_2", "prior", "decoder", "model", "denoiser")
LATENTS = ("hidden_states", "sample", "x")
TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "time")
Place = tuple[float, int, int]


@contextmanager
def attach(
    pipe: Any,
    method: Method | str = "ucache",
    *,
    mask: StepMask | str | Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    **options: Any,
) -> Iterator[Attachment]:
    """Caches a pipeline's denoiser inside the block: `with attach(pipe, UCache()) as cache: pipe(prompt)`.

    Args:
        pipe: a pipeline with a `scheduler` and a denoiser.
        method: a `Method`, or the name of one, which then takes `**options`.
        mask: a step mask for the method.
        components: the denoisers by name. None: those of `unet`, `transformer`, `transformer_2`, ... that it has.

    Yields the attachment; `cache.report` says what happened in the last run. Nothing is left behind afterwards.
    """
    attachment = Attachment(pipe, _method(method, mask, options), components)
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
        components: the denoisers by name, as for `attach`.
    """

    def __init__(
        self,
        method: Method | str = "ucache",
        *,
        mask: StepMask | str | Sequence[int] | None = None,
        also: Callable[..., dict[str, Any]] | None = None,
        components: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self._method = _method(method, mask, options)
        self._also = also
        self._components = components
        self._attachment: Attachment | None = None

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
            self._attachment = Attachment(pipe, self._method, self._components, this_run_only=True)
            self._attachment.attach()
        if step + 1 >= count and self._attachment is not None:
            self._attachment.detach()
        return callback_kwargs


class Attachment:
    """A cache standing in front of a pipeline's denoisers, each with a memory of its own."""

    def __init__(
        self, pipe: Any, method: Method, components: Sequence[str] | None = None, this_run_only: bool = False
    ) -> None:
        self.pipe = pipe
        self.attached = False
        self._this_run_only = this_run_only
        self._timesteps = pipe.scheduler.timesteps if this_run_only else None
        self._plan: list[Place] = []
        self._first, self._at = 0, None
        self._bar, self._shown = None, (0, 0)
        names = components or [name for name in COMPONENTS if isinstance(getattr(pipe, name, None), nn.Module)]
        for name in names:
            if not isinstance(getattr(pipe, name, None), nn.Module):
                raise OptionError(f"components: {type(pipe).__name__} has no denoiser {name!r}")
        if not names:
            raise OptionError(
                f"{type(pipe).__name__} has no denoiser that can be found (looked for {', '.join(COMPONENTS)}): "
                "name it with components="
            )
        self._slots = [_Slot(self, name, getattr(pipe, name), method) for name in names]
        if this_run_only:
            self._begin_run(first=0)

    @property
    def report(self) -> Report:
        """The run in progress, or the last one. Several denoisers (experts) stand one after the other."""
        reports = [slot.session.report for slot in self._slots if slot.session.report.events]
        if len(reports) < 2:
            return reports[0] if reports else self._slots[0].session.report
        notes = [f"{slot.name}: {note}" for slot in self._slots for note in slot.session.report.notes]
        merged = Report(reports[0].method, reports[0].run, reports[0].scheduled_steps, notes)
        before = 0
        for report in reports:
            moved = [replace(e.where, evaluation=e.where.evaluation + before) for e in report.events]
            merged.events += [replace(e, where=where) for e, where in zip(report.events, moved, strict=True)]
            before += report.evaluations
        return merged

    @property
    def over(self) -> bool:
        """Whether the one run this was for has ended unsaid (an exception, an interrupt) and another has begun."""
        return self._this_run_only and self.pipe.scheduler.timesteps is not self._timesteps

    def attach(self) -> None:
        entered: list[_Slot] = []
        try:
            for slot in self._slots:
                slot.enter()
                entered.append(slot)
        except OptionError:
            for slot in entered:
                slot.leave()
            raise
        if hasattr(self.pipe, "progress_bar"):
            self.pipe.__dict__["progress_bar"] = self._watched_bar
        self.attached = True

    def detach(self) -> None:
        """Takes the cache away; every denoiser, and the pipeline, is the object it was."""
        if self.attached:
            for slot in self._slots:
                slot.leave()
            self.pipe.__dict__.pop("progress_bar", None)
        self.attached, self._bar = False, None

    def show(self, skipped: bool) -> None:
        """Counts an evaluation on the pipeline's progress bar."""
        self._shown = self._shown[0] + skipped, self._shown[1] + 1
        if self._bar is not None:
            self._bar.set_postfix_str("skipped {}/{}".format(*self._shown), refresh=False)

    def _watched_bar(self, *args: Any, **kwargs: Any) -> Any:
        self._bar = type(self.pipe).progress_bar(self.pipe, *args, **kwargs)
        return self._bar

    def locate(self, timestep: Tensor | float | None, again: bool) -> Place | None:
        """The place of a call; None where the scheduler cannot tell it. `again`: this call was already made here."""
        scheduler = self.pipe.scheduler
        if scheduler.timesteps is not self._timesteps:
            if self._this_run_only:
                return None
            self._timesteps, self._at = scheduler.timesteps, None
            self._begin_run(self._index(timestep, 0) or 0)
        self._at = self._index(timestep, self._first if self._at is None else self._at + again)
        return self._plan[self._at] if self._at is not None and self._at < len(self._plan) else None

    def _index(self, timestep: Tensor | float | None, cursor: int) -> int | None:
        """The evaluation's number in the scheduler's timesteps: by its own count, or else by the timestep's value."""
        scheduler = self.pipe.scheduler
        if not hasattr(scheduler, "step_index"):
            return self._by_value(timestep, cursor)
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
        scheduler = self.pipe.scheduler
        whole = plan(scheduler)
        offset = whole[first][1] if first < len(whole) else 0
        self._plan = [(sigma, step - offset, stage) for sigma, step, stage in whole]
        self._first, self._at, self._shown = first, None, (0, 0)
        ahead = self._plan[first:]
        schedule = [sigma for sigma, _, stage in ahead if stage == 0]
        for slot in self._slots:
            slot.begin([*schedule, 0.0], 2 if any(stage for *_, stage in ahead) else 1)


class _Unpaired(Exception):
    """The output does not go with the input as assumed. The computed answer is good all the same."""


class _Slot:
    """What stands in one denoiser's slot, and what it knows of the denoiser's calls."""

    def __init__(self, owner: Attachment, name: str, module: nn.Module, method: Method) -> None:
        self.owner = owner
        self.name = name
        self.module = module
        self.session = Session(method, training_sigma=_training_sigma(owner.pipe.scheduler))
        self.parameters = list(inspect.signature(module.forward).parameters)
        self.pairing: Pairing | None = None
        self.candidates: list[Pairing] = []
        self.forms: dict[bool, Callable[[Tensor], Any]] = {}
        self.refused: str | None = None
        self._waiting: _Call | None = None
        self._previous: Callable[..., Any] | None = None
        self._seen: list[str] = []
        self._place: Place | None = None
        self._rows: int | None = None
        self._branches: tuple[str, ...] = ()

    def enter(self) -> None:
        occupant = self.module.__dict__.get(SLOT)
        if isinstance(occupant, _Slot):
            raise OptionError(f"{self.name} is cached already: leave the other attachment first")
        self._previous = occupant
        self.module.__dict__[SLOT] = self

    def leave(self) -> None:
        if self.module.__dict__.get(SLOT) is not self:
            warnings.warn(
                f"{self.name}: something else, .compile() say, took the place of the cache; nothing was skipped since",
                stacklevel=4,
            )
        elif self._previous is None:
            del self.module.__dict__[SLOT]
        else:
            self.module.__dict__[SLOT] = self._previous
        self.session.end()
        self._waiting = None

    def begin(self, schedule: list[float], stages: int) -> None:
        self.session.begin(schedule, stages)
        self._seen, self._place, self._rows, self._waiting = [], None, None, None

    def through(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The call as it is without the cache."""
        return (self._previous or self.module._call_impl)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self, args, kwargs)
        place = self.owner.locate(call.timestep, again="" in self._seen)
        if place is None and self.owner.over:
            self.owner.detach()
        if place is None or self.refused or call.latent is None:
            return self.through(args, kwargs)
        if place != self._place:
            self._seen, self._place = [], place
        call.place, call.names = place, self._names(call.latent)
        self._seen.append("")
        if self.candidates:
            self._choose(call)
        answer = self._answer(call)
        if len(self._seen) == 1:
            self.owner.show(skipped=call.computed is None)
        return answer

    def _answer(self, call: _Call) -> Any:
        try:
            return self.session.answer(call)
        except _Unpaired:
            pass
        if self.pairing is not None and not self.refused:
            return self.session.answer(call)  # computed already; now it is known how to remember it
        self._waiting = call
        return call.computed

    def _choose(self, call: _Call) -> None:
        """The latents are that part of the input which moves from one call to the next; the rest is conditioning."""
        before, self._waiting = self._waiting, None
        if before is None or before.latent.shape != call.latent.shape:
            return
        moved = [float((p.input(call.latent) - p.input(before.latent)).abs().mean()) for p in self.candidates]
        self.pairing, self.candidates = self.candidates[moved.index(max(moved))], []
        self._answer(before)

    def _names(self, x: Tensor) -> tuple[str, ...]:
        """The conditions of a call: batched guidance repeats the latents; separate calls are told by their order.

        Where guidance ends within the run and the batch falls to one branch's rows, that branch is cond.
        """
        if self._rows is None:
            chunks = next((n for n in CHUNKS if _repeats(x, n)), 1)
            self._branches, self._rows = CHUNKS.get(chunks, ("call",)), x.shape[0] // chunks
        turn = len(self._seen)
        names = self._branches
        if x.shape[0] != self._rows * len(names):
            names = ("cond",) if x.shape[0] == self._rows else ("call",)
        return names if turn == 0 else tuple(f"{name} {turn + 1}" for name in names)


CHUNKS = {2: ("uncond", "cond"), 3: ("cond", "image", "uncond")}
"""The conditions of batched guidance, in diffusers' order: two branches, and InstructPix2Pix' three."""


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


class _Call(Request):
    """One call of a denoiser: in network space already, its input scaled and its output raw."""

    def __init__(self, slot: _Slot, args: tuple, kwargs: dict[str, Any]) -> None:
        self.slot, self.args, self.kwargs = slot, args, kwargs
        given = dict(zip(slot.parameters, args, strict=False)) | kwargs
        latent = _stacked(next((given[name] for name in LATENTS if name in given), None))
        self.latent = latent if latent is not None and latent.is_floating_point() else None
        self.timestep = next((given[name] for name in TIMESTEPS if name in given), None)
        self.sigma = self.computed = None
        self.requires_grad = self.latent is not None and self.latent.requires_grad

    @torch.no_grad()
    def inputs(self) -> tuple[Tensor, ...]:
        x = self.latent if self.slot.pairing is None else self.slot.pairing.input(self.latent)
        return x.to(wide(x.dtype), copy=True).chunk(len(self.names))

    def compute(self) -> Any:
        if self.computed is None:
            self.computed = self.slot.through(self.args, self.kwargs)
        return self.computed

    @torch.no_grad()
    def outputs(self, answer: Any) -> tuple[Tensor, ...]:
        slot, (out, form) = self.slot, _opened(answer)
        if out is None:
            self._refuse(f"{slot.name} returns more than one tensor, or none")
        slot.forms[bool(self.kwargs.get("return_dict", True))] = form
        if slot.pairing is None or slot.pairing.input(self.latent).shape != out.shape:
            slot.candidates = pairings(self.latent, out)
            if not slot.candidates:
                self._refuse(f"{slot.name}: {tuple(self.latent.shape)} in and {tuple(out.shape)} out cannot be paired")
            slot.pairing = None
            if len(slot.candidates) == 1:
                slot.pairing, slot.candidates = slot.candidates[0], []
            if slot.pairing != Pairing():
                raise _Unpaired
        return widened(out).clone().chunk(len(self.names))

    def _refuse(self, reason: str) -> None:
        self.slot.refused = f"{reason}: always computed"
        self.slot.session.report.notes.append(self.slot.refused)
        raise _Unpaired

    @torch.no_grad()
    def restore(self, outputs: tuple[Tensor, ...]) -> Any:
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        form = self.slot.forms.get(bool(self.kwargs.get("return_dict", True)))
        return self.compute() if form is None else form(out)


def _opened(answer: Any) -> tuple[Tensor | None, Callable[[Tensor], Any] | None]:
    """The one tensor in a denoiser's answer, and how to make such an answer from another; (None, None) otherwise.

    A list of tensors of one shape counts as the tensor that they make when stacked (Z-Image).
    """
    if isinstance(answer, dict):
        fields = [(key, value) for key, value in answer.items() if value is not None]
        if len(fields) == 1:
            (key, value), kind = fields[0], type(answer)
            inner, form = _opened(value)
            return inner, None if form is None else lambda t: kind(**{key: form(t)})
    if isinstance(answer, tuple) and len(answer) == 1:
        inner, form = _opened(answer[0])
        return inner, None if form is None else lambda t: (form(t),)
    tensor = _stacked(answer)
    if tensor is None:
        return None, None
    if tensor is answer:
        return tensor, lambda t, dtype=tensor.dtype: t.to(dtype)
    return tensor, lambda t, dtype=tensor.dtype: list(t.to(dtype).unbind(0))


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


def plan(scheduler: Any) -> list[Place]:
    """(sigma, step, stage) of every evaluation of a run, from a scheduler that has just been set.

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

    return [(levels[k], *place(k)) for k in range(len(timesteps))]


def _training_sigma(scheduler: Any) -> Callable[[float], float] | None:
    """Share of the training timetable -> sigma, where the scheduler has a fixed one."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    config = getattr(scheduler, "config", {})
    steps = config.get("num_train_timesteps", 1000)
    flow = "Flow" in type(scheduler).__name__ or config.get("use_flow_sigmas")
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


def _method(given: Method | str, mask: Any, options: dict[str, Any]) -> Method:
    if isinstance(given, str):
        return method(given, **options, **({} if mask is None else {"mask": mask}))
    if not isinstance(given, Method):
        raise OptionError(f"method={given!r}: accepted are a Method and the name of one")
    if options:
        raise OptionError(f"{', '.join(options)}: options go with a method's name; this Method has its own")
    return given if mask is None else given.but(mask=mask)
