"""The cache as a pipeline's callback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from stepcache import Method, Report, StepMask
from stepcache.extend import Ranks

from .attachment import Attachment, chosen_method
from .frames import Key, find_caller, key
from .guidance import Guidance


class StepCacheCallback:
    """The cache as a pipeline's callback: `pipe(prompt, callback_on_step_end=StepCacheCallback())`.

    It attaches when the first step is over (the first step is always computed anyway) and detaches at the last. An
    exception or interrupt in between leaves it attached until the pipeline's next run, whose first call removes it. One
    callback may be passed to many calls in a row, one at a time.

    Args:
        method: a `Method`, or the name of one, which then takes `**options`.
        mask: a step mask for the method.
        also: another callback, or a diffusers `PipelineCallback`; called first, its result is passed on.
        components, controlnet, group, decide, **options: as for `attach`.

    A run that another callback begins inside this one is not cached.
    """

    def __init__(
        self,
        method: Method | str = "forecast",
        *,
        mask: StepMask | str | Sequence[int] | None = None,
        also: Callable[..., dict[str, Any]] | None = None,
        components: Sequence[str] | None = None,
        controlnet: bool = True,
        group: Any = None,
        decide: str = "batch",
        **options: Any,
    ) -> None:
        self._also = also
        guidance = Guidance.pop(options)
        self._method = chosen_method(method, mask, options)
        ranks = None if group is None else Ranks(group)  # which can be copied and pickled
        self._how = components, guidance, controlnet, ranks, decide
        self._attachment: Attachment | None = None
        self._run: Key | None = None
        self._count = 0

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """A `PipelineCallback` if `also` is one: pipelines pass `tensor_inputs` to nothing else."""
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
        caller = find_caller(sys._getframe(1))
        run = key(sys._getframe(1)) if caller is None else caller.run
        if self._attachment is not None and self._run != run and self._attachment.in_progress:
            return callback_kwargs  # a run inside the one that is cached
        if step == 0:
            self._join(pipe, run, timestep)
        if step + 1 >= self._count and self._attachment is not None:
            self._attachment.detach()
        return callback_kwargs

    def _join(self, pipe: Any, run: Key, timestep: Any) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        self._run = run
        self._count = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
        self._attachment = Attachment(pipe, self._method, *self._how, joined=(run, timestep))
        self._attachment.attach()
