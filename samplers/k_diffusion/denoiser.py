"""A k-diffusion model with a cache in front of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepcache import Method, OptionError, Report, method
from stepcache.extend import Engine, unknown

from ..arguments import ArgumentChanges
from ..branches import InTurn, distinct
from ..compiled import COMPILE_FIRST
from ..continuity import Continuity
from ..open_runs import OUTSIDE, OpenRuns
from ..parametrization import Scalings, ScalingsAsFloats
from .call import DenoiserCall
from .model import ModelScalings, TrainingTable, lowest_sigma_of, owner_of, scalings_of

BranchNames = Sequence[str] | Callable[..., str | Sequence[str]] | None


class CachedDenoiser(nn.Module):
    """A k-diffusion model that answers some of its evaluations without running the network.

    Where to put it:
        (a) around the guidance wrapper: `CachedDenoiser(guided, method)`;
        (b) inside it, where cond and uncond come batched in one call, in the order named:
            `Guided(CachedDenoiser(model, method, branches=("uncond", "cond")))`;
        (c) inside it, where they come in separate calls: `branches=InTurn("cond", "uncond")`, or a function
            `(x, sigma, **extra) -> name` (or names, for a batch of several).
    Inside is better: each branch is predicted from its own past, before guidance amplifies the error.

    Args:
        inner: the model, `denoised = inner(x, sigma, **extra)`; x (B, ...), sigma (B,) or a scalar.
        method: a `Method`, a published name ("ucache"), or None for off; Forecast by default.
        sigmas: the schedule of every run, sigmas[0..n]; better given per run, by `sample` or `run`.
        branches: names as above. None: one branch a call, "guided".
        reference: the branch that decides; see `Engine`. With separate calls it must be the first one called.
        decide: "batch": one decision for all samples of a batch. "sample": one for each of them, and the model is
            called for those alone that need it. "any": computed if any sample needs it. "each": every branch decides
            for itself. See `Engine`.
        scalings: how denoised and the network's output belong together: "eps", "flow" (x = (1 - sigma) x0 + sigma
            noise), "denoised" (they are taken for one), or a function sigma -> (c_skip, c_out, c_in) with denoised =
            c_skip x + c_out network(c_in x), with 1 for c_skip if it is None. None: taken from the `get_scalings` of
            the model or of the model inside it, else "eps".
        coordinate: sigma -> the coordinate that predictors extrapolate in. None: flow time if the scalings are
            a flow's, else log sigma.
        noise: how noisy the sampler is, from 0 to 1, if you know; None: Forecast sees it in the run. See `Engine`.
        group: the torch.distributed process group whose ranks call one model together; None: found if FSDP or tensor
            parallelism splits it. See `Engine`.

    If the prompt or another argument changes in mid-run, its cache is dropped (`ArgumentChanges` says what counts as
    changed). Weights are not looked at: after loading a LoRA in mid-run call `reset`.

    The output is the inner model's own, bit for bit, wherever it is computed. Attributes of the inner model
    (`sigma_to_t`, `sigmas`, `get_sigmas`, ...) stay reachable. A run ends by itself; nothing needs resetting.
    """

    def __init__(
        self,
        inner: Callable[..., Tensor],
        method: Method | str | None = "forecast",
        *,
        sigmas: Tensor | Iterable[float] | None = None,
        branches: BranchNames = None,
        reference: str | None = None,
        decide: Literal["batch", "any", "sample", "each"] = "batch",
        scalings: Literal["eps", "flow", "denoised"] | Scalings | None = None,
        coordinate: Callable[[float], float] | None = None,
        noise: float | None = None,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.inner_model = inner
        self.branches: tuple[str, ...] | Callable[..., str | Sequence[str]]
        if callable(branches):
            self.branches = branches
        else:
            self.branches = ("guided",) if branches is None else distinct(branches)
            if reference is not None and reference not in self.branches:
                raise unknown("reference", reference, self.branches)
        self._scalings = scalings_of(inner, scalings)
        self._dtypes: dict[torch.dtype, torch.dtype] = {}
        self._changes = ArgumentChanges()
        self._continuity: Continuity | None = Continuity()
        self._open: OpenRuns[CachedDenoiser] = OpenRuns()
        self._is_run = False
        meaning = ScalingsAsFloats(self._scalings)
        assumed = isinstance(self._scalings, ModelScalings) and self._scalings.owner is None
        self._engine = Engine(
            _method(method),
            reference=reference,
            decide=decide,
            sigmas=sigmas,
            training_sigma=TrainingTable(inner) if owner_of(inner, "t_to_sigma") is not None else None,
            coordinate=coordinate or meaning.coordinate(),
            parametrization=meaning.parametrization,
            lowest_sigma=lowest_sigma_of(inner),
            noise=noise,
            group=group,
            notes=("scalings: the model has no get_scalings, eps is assumed",) if assumed else (),
            network=inner,
        )
        self._last = [self._engine]  # whose report is the last one; shared with the wrappers of single runs

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """denoised (B, ...) at noise level sigma, the model's own or a predicted one."""
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._not_compiled)(x, sigma, **extra)  # type: ignore[no-untyped-call]
        run = self._open.here()
        if run is not None:
            return run._answer(x, sigma, extra)
        if self._open:
            self._engine.warn(OUTSIDE)
        return self._answer(x, sigma, extra)

    def _not_compiled(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """What `torch.compile` around this wrapper calls: what is decided at every evaluation is no graph."""
        self._engine.warn(COMPILE_FIRST.format("CachedDenoiser(torch.compile(model), method)"))
        return self.forward(x, sigma, **extra)

    def _answer(self, x: Tensor, sigma: Tensor, extra: dict[str, Any]) -> Tensor:
        """The answer of this very wrapper: of its run, or of the loop that nobody has announced."""
        off, self._last[0] = self._engine.off, self._engine
        if off and not (isinstance(x, Tensor) and isinstance(sigma, Tensor) and x.ndim and x.numel() and sigma.numel()):
            return self.inner_model(x, sigma, **extra)  # inputs that cannot identify an evaluation, e.g. a float sigma
        read = sigma
        if not off and self._continuity is not None:
            read, broken = self._continuity.read(x, sigma)
            if broken:
                self._reset()  # before the branch is named: its turn is the first
        names = self.branches if isinstance(self.branches, tuple) else distinct(self.branches(x, sigma, **extra))
        if x.shape[0] % len(names) and not off:
            raise OptionError(
                f"a batch of {x.shape[0]} does not divide into the {len(names)} branches {', '.join(names)}: "
                "name the branches that come in one call, in their order"
            )
        call = DenoiserCall(self.inner_model, self._scalings, names, x, sigma, extra, self._dtypes, read)
        if not off:
            call.cache_key = (self._changes(names, extra),)
        try:
            answer = self._engine(call)
        except BaseException:
            self._reset()
            raise
        if self._continuity is not None:
            self._continuity.record(x, answer) if self._engine.has_cache else self._continuity.forget()
        return answer

    @property
    def engine(self) -> Engine:
        """The engine of the run in progress here, or of the last one."""
        if self._is_run:
            return self._engine
        run = self._open.here()
        return self._last[0] if run is None else run._engine

    @property
    def report(self) -> Report:
        """What happened in the run in progress, or in the last one. If there are several, each has its own report."""
        return self.engine.report

    @contextlib.contextmanager
    def run(
        self,
        sigmas: Tensor | Iterable[float] | None = None,
        stages: int | None = None,
        on_schedule: bool | None = None,
    ) -> Iterator[CachedDenoiser]:
        """One sampling loop: `with model.run(sigmas) as run: x = sample_euler(run, x, sigmas)`.

        Yields a wrapper for this run alone, with a cache and a report of its own, that any thread or asyncio task may
        call. There may be as many runs at the same time as you like; ranks of a group must begin and call them in the
        same order. `model` itself may be called too, by the thread, task or generator that has begun the run: such a
        call is part of the run, whatever it is for. For another image meanwhile begin another run, or call
        `model.inner_model`, which no cache sees.

        `stages`: the evaluations of one step, 1 or 2, if known; `sample` knows it for k-diffusion's samplers.
        `on_schedule`: every evaluation is at a sigma of the schedule (with two a step, the second at the step's end);
        then sigmas need not be read from an accelerator. None: so if `stages` is 1.
        """
        with self._announced(sigmas, stages, on_schedule) as run:
            yield run

    @contextlib.contextmanager
    def _announced(
        self,
        sigmas: Tensor | Iterable[float] | None,
        stages: int | None,
        on_schedule: bool | None,
        computed: str | None = None,
    ) -> Iterator[CachedDenoiser]:
        if self._is_run:
            raise RuntimeError("this is one run of a CachedDenoiser: begin another one with the CachedDenoiser itself")
        run = self._fork()
        run._engine.announce(sigmas, stages, on_schedule, computed=computed)
        opened = self._open.begin(run, __name__)
        run._engine.runs.slot = opened.slot
        try:
            yield run
        finally:
            self._open.end(opened)
            run._engine.end()

    def _fork(self) -> CachedDenoiser:
        """A wrapper of the same model for one run."""
        run = copy.copy(self)
        run._engine = self._engine.fork()
        run._changes, run._continuity, run._open, run._is_run = ArgumentChanges(), None, OpenRuns(), True
        if isinstance(self.branches, InTurn):
            run.branches = self.branches.fork()
        return run

    def callback(self, also: Callable[[dict[str, Any]], Any] | None = None) -> Callable[[dict[str, Any]], Any]:
        """A callback for k-diffusion's samplers that passes the step on to the clock, then calls `also`."""

        def callback(info: dict[str, Any]) -> Any:
            self.engine.set_step(int(info["i"]))
            return also(info) if also is not None else None

        return callback

    def reset(self) -> None:
        """Forgets the run in progress. Never needed; for hosts that know better."""
        run = self._open.here()
        (self if run is None else run)._reset()

    def _reset(self) -> None:
        self._engine.reset()
        self._reset_turns()
        if self._continuity is not None:
            self._continuity.forget()

    def _reset_turns(self) -> None:
        if isinstance(self.branches, InTurn):
            self.branches.reset()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner_model" or name.startswith("_torchdynamo") or name == "get_compiler_config":
                raise  # torch 2.4 looks for these to see if a model is compiled, and would compile it without the cache
        try:
            return getattr(self.inner_model, name)
        except AttributeError:
            raise AttributeError(f"neither CachedDenoiser nor the model inside it has the attribute {name!r}") from None


def find(model: Any) -> CachedDenoiser:
    """The one `CachedDenoiser` that is `model` or is inside it."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, CachedDenoiser)]
    if len(found) != 1:
        raise OptionError(
            f"{type(model).__name__} holds {len(found)} CachedDenoisers: pass the one to use as sample(..., cache=)"
        )
    return found[0]


def _method(given: Method | str | None) -> Method | None:
    if given is None or isinstance(given, Method):
        return given
    if isinstance(given, str):
        return method(given)
    raise OptionError(f"method={given!r}: accepted are a Method, the name of one, and None for off")
