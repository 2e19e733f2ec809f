"""k-diffusion, and every host that keeps its convention `denoised = model(x, sigma, **extra)`.

The package k-diffusion itself is needed only to look up a sampler by name.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stepcache import Method, OptionError, Report, method
from stepcache.extend import Call, Engine, require, unknown, wide, widened

from .arguments import ArgumentChanges
from .batching import CannotSplit, batch_of, cut_rows, rows_of, rows_of_samples, samples_of
from .branches import InTurn, distinct
from .compiled import COMPILE_FIRST
from .continuity import Continuity
from .open_runs import OUTSIDE, OpenRuns
from .parametrization import SCALINGS, Scalings, ScalingsAsFloats, eps_scalings

BranchNames = Sequence[str] | Callable[..., str | Sequence[str]] | None

EVALUATIONS = {
    "sample_euler": 1,
    "sample_euler_ancestral": 1,
    "sample_lms": 1,
    "sample_dpmpp_2m": 1,
    "sample_dpmpp_2m_sde": 1,
    "sample_dpmpp_3m_sde": 1,
    "sample_unipc": 1,
    "sample_heun": 2,
    "sample_dpm_2": 2,
    "sample_dpm_2_ancestral": 2,
    "sample_dpmpp_2s_ancestral": 2,
    "sample_dpmpp_sde": 2,
}
"""Evaluations of one step in those samplers of k-diffusion 0.1.1 that take a schedule; the last step has one."""

NEGATIVE_ONLY_SAMPLERS = frozenset({"sample_euler_ancestral", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"})
"""Samplers with which ComfyUI's nodes and the web UIs' panel skip the negative prompt only, if nothing else is chosen.

They add noise at every evaluation. With whole steps Forecast is not always better there than fewer steps, and with the
negative prompt only it is. The figures are in docs/webui.md.
"""

ADAPTIVE = ("sample_dpm_adaptive",)
"""Samplers that measure their error on the model's answers: on predicted answers that estimate would mean nothing."""


class FlowDenoiser(nn.Module):
    """A rectified-flow network as a k-diffusion model, right under every sampler of k-diffusion.

    The network gives v(x_t, t) = noise - x0 at x_t = (1 - t) x0 + t noise. k-diffusion's samplers move x = x0 + sigma
    noise, which is x_t / (1 - t) at sigma = t / (1 - t), so

        denoised = x / (1 + sigma) - sigma / (1 + sigma) v(x / (1 + sigma), sigma / (1 + sigma))

    `shift` is the timestep shift of the training timetable (`t_to_sigma`); 3 in Stable Diffusion 3, 1 without.
    """

    def __init__(self, inner_model: Callable[..., Tensor], shift: float = 1.0) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.shift = shift

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma at timestep t in [0, 999]: 1,000 equal steps of flow time, then shifted."""
        t = (t.float() + 1) / 1000
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return t / (1 - t).clamp(min=1e-6)

    def get_sigmas(self, n: int, start: float = 0.99) -> Tensor:
        """n steps, equal in flow time from `start` before the shift, then shifted, then 0."""
        t = torch.linspace(1, 0, n + 1)[:-1] * start
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return torch.cat([t / (1 - t), t.new_zeros(1)])

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        c_skip, c_out, c_in = (_spread(c, x) for c in self.get_scalings(sigma))
        return x * c_skip + c_out * self.inner_model(x * c_in, self.sigma_to_t(sigma), **extra)


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
        self._scalings = _scalings(inner, scalings)
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
            training_sigma=TrainingTable(inner) if _owner(inner, "t_to_sigma") is not None else None,
            coordinate=coordinate or meaning.coordinate(),
            parametrization=meaning.parametrization,
            lowest_sigma=_lowest_sigma(inner),
            noise=noise,
            group=group,
            notes=("scalings: the model has no get_scalings, eps is assumed",) if assumed else (),
            network=inner,
        )
        self._last = [self._engine]  # whose report is the last one; shared with the wrappers of single runs

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """denoised (B, ...) at noise level sigma, the model's own or a predicted one."""
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._not_compiled)(x, sigma, **extra)
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
        names = self.branches if isinstance(self.branches, tuple) else distinct(self.branches(x, sigma, **extra))
        if x.shape[0] % len(names) and not off:
            raise OptionError(
                f"a batch of {x.shape[0]} does not divide into the {len(names)} branches {', '.join(names)}: "
                "name the branches that come in one call, in their order"
            )
        call = DenoiserCall(self.inner_model, self._scalings, names, x, sigma, extra, self._dtypes)
        if not off:
            call.cache_key = (self._changes(names, extra),)
            if self._continuity is not None and self._continuity.broken(x):
                self._reset()
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
        call. There may be as many runs at the same time as you like. `model` itself may be called too, by the thread,
        task or generator that has begun the run.

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
            if name == "inner_model":
                raise
        try:
            return getattr(self.inner_model, name)
        except AttributeError:
            raise AttributeError(f"neither CachedDenoiser nor the model inside it has the attribute {name!r}") from None


def sample(
    sampler: str | Callable[..., Tensor],
    model: Callable[..., Tensor],
    x: Tensor,
    *args: Any,
    cache: CachedDenoiser | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    **keywords: Any,
) -> Tensor:
    """Runs one of k-diffusion's samplers with the schedule known: `sample("euler", model, x, sigmas)`.

    Args:
        sampler: a sampler function, or the name of one in k-diffusion, with or without "sample_".
        model: what the sampler calls: a `CachedDenoiser`, or something with one inside.
        x, *args, **keywords: as the sampler takes them (`sigmas`, `extra_args`, ...).
        cache: the `CachedDenoiser`, where it is inside `model` and cannot be found among its submodules.
        callback: your own; it is called as usual.
    """
    if isinstance(sampler, str):
        sampler = _sampler(sampler)
    cache = cache or find(model)
    signature = inspect.signature(sampler)
    kinds = {p.kind for p in signature.parameters.values()}
    if "callback" in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        keywords["callback"] = cache.callback(callback)
    elif callback is not None:
        raise OptionError(f"callback: {getattr(sampler, '__name__', sampler)!r} takes no callback")
    arguments = signature.bind(model, x, *args, **keywords)
    name = getattr(sampler, "__name__", "")
    stages = EVALUATIONS.get(name)
    on_schedule = (stages == 1 or name == "sample_heun") and not arguments.arguments.get("s_churn")
    computed = "the sampler measures its error on it" if name in ADAPTIVE else None
    with cache._announced(arguments.arguments.get("sigmas"), stages, on_schedule, computed):
        return sampler(*arguments.args, **arguments.kwargs)


def find(model: Any) -> CachedDenoiser:
    """The one `CachedDenoiser` that is `model` or is inside it."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, CachedDenoiser)]
    if len(found) != 1:
        raise OptionError(
            f"{type(model).__name__} holds {len(found)} CachedDenoisers: pass the one to use as sample(..., cache=)"
        )
    return found[0]


class DenoiserCall(Call):
    """One call of a k-diffusion model, translated to network space."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        scalings: Scalings,
        names: tuple[str, ...],
        x: Tensor,
        sigma: Tensor,
        extra: dict[str, Any],
        dtypes: dict[torch.dtype, torch.dtype] | None = None,
    ) -> None:
        self.model, self.names, self.latent, self.sigma, self.keywords = model, names, x, sigma, extra
        self._scalings = scalings
        self._known_factors: tuple[Tensor | None, Tensor, Tensor] | None = None
        self._dtypes = {} if dtypes is None else dtypes  # of the latents' dtype that of the model's last answer
        leaves = tree_leaves((x, extra)) if torch.is_grad_enabled() else ()
        self.requires_grad = any(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))

    def _factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """c_skip, c_out and c_in, as factors for x."""
        if self._known_factors is None:
            x = self.latent
            c_skip, c_out, c_in = self._scalings(self.sigma.to(x.device, wide(x.dtype)))
            self._known_factors = None if c_skip is None else _spread(c_skip, x), _spread(c_out, x), _spread(c_in, x)
        return self._known_factors

    @torch.no_grad()
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.latent * self._factors()[2]).chunk(len(self.names))

    def run_model(self) -> Tensor:
        return self.model(self.latent, self.sigma, **self.keywords)

    @torch.no_grad()
    def outputs(self, answer: Tensor) -> tuple[Tensor, ...]:
        self._dtypes[self.latent.dtype] = answer.dtype
        c_skip, c_out, _ = self._factors()
        skipped = self.latent if c_skip is None else self.latent * c_skip
        return (widened(answer) - skipped).div_(c_out).chunk(len(self.names))

    @torch.no_grad()
    def rebuild(self, outputs: tuple[Tensor, ...]) -> Tensor:
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        c_skip, c_out, _ = self._factors()
        skipped = self.latent if c_skip is None else self.latent * c_skip
        dtype = self._dtypes.get(self.latent.dtype, self.latent.dtype)
        return torch.addcmul(skipped, out, c_out).to(dtype)

    def rounded(self, name: str, output: Tensor) -> Tensor:
        dtype = self._dtypes.get(self.latent.dtype, self.latent.dtype)
        return output if dtype != torch.float16 else self._in_half_precision(name, output, dtype)

    @torch.no_grad()
    def _in_half_precision(self, name: str, output: Tensor, dtype: torch.dtype) -> Tensor:
        kept = rows_of(self.names, name, len(self.latent))
        c_skip, c_out, _ = self._factors()
        c_skip, c_out = None if c_skip is None else _of_rows(c_skip, kept), _of_rows(c_out, kept)
        x = self.latent[kept]
        return torch.addcmul(x if c_skip is None else x * c_skip, output, c_out).to(dtype)

    def part(self, name: str) -> DenoiserCall | None:
        """The call for one branch; None if it is not certain that the rows are those of branches.

        Branches of one evaluation have the same x: rows that differ are images of a batch, without guidance.
        """
        rows = len(self.latent)
        kept = rows_of(self.names, name, rows)
        first, *others = self.latent.chunk(len(self.names))
        if not all(torch.equal(first, other) for other in others):
            self.notes = (*self.notes, "the rows of the batch are not the same latents: they are no branches")
            return None
        sigma = self.sigma[kept] if self.sigma.ndim and len(self.sigma) == rows else self.sigma
        try:
            extra = cut_rows(self.keywords, rows, kept)
        except CannotSplit as error:
            self.indivisible, self.notes = True, (*self.notes, f"{error}: it may belong to all rows or to some")
            return None
        x = self.latent[kept]
        return DenoiserCall(self.model, self._scalings, (name,), x, sigma, extra, self._dtypes)

    def of_samples(self, samples: Sequence[int]) -> DenoiserCall | None:
        rows = len(self.latent)
        kept = rows_of_samples(len(self.names), rows, samples)
        sigma = self.sigma[kept] if self.sigma.ndim and len(self.sigma) == rows else self.sigma
        try:
            extra = cut_rows(self.keywords, rows, kept, shared=True)
        except CannotSplit:
            return None
        return DenoiserCall(self.model, self._scalings, self.names, self.latent[kept], sigma, extra, self._dtypes)

    def split(self, answer: Tensor) -> list[Tensor]:
        return samples_of(answer, len(self.names))

    def join(self, answers: Sequence[Tensor]) -> Tensor:
        return batch_of(answers)


def _of_rows(c: Tensor, kept: slice) -> Tensor:
    return c if len(c) == 1 else c[kept]


def _spread(c: Tensor, x: Tensor) -> Tensor:
    """A number per row, (B,) or (), as a factor for x (B, ...)."""
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim)) if c.ndim else c.reshape((1,) * x.ndim)


def _method(given: Method | str | None) -> Method | None:
    if given is None or isinstance(given, Method):
        return given
    if isinstance(given, str):
        return method(given)
    raise OptionError(f"method={given!r}: accepted are a Method, the name of one, and None for off")


def _owner(model: Any, attribute: str) -> Any:
    """The model that has the attribute: this one, one inside it, or the only one among its modules; None without."""
    inside = model
    while inside is not None:
        if getattr(inside, attribute, None) is not None:
            return inside
        inside = getattr(inside, "inner_model", None)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    owners = [module for module in modules if getattr(module, attribute, None) is not None]
    return owners[0] if len(owners) == 1 else None


class ModelScalings:
    """The scalings of a model, or of the one inside it, by its own `get_scalings`; eps where none has that."""

    def __init__(self, model: Any) -> None:
        self.owner = _owner(model, "get_scalings")

    def __call__(self, sigma: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        if self.owner is None:
            return eps_scalings(sigma)
        found = self.owner.get_scalings(sigma)
        return found if len(found) == 3 else (None, *found)


class TrainingTable:
    """Share of the training timetable (0 = most noise) -> sigma, by the model's own `t_to_sigma`.

    Discrete schedules have timesteps 0 to T - 1, with T the length of their table `sigmas` (1,000 without one);
    continuous ones (VDenoiser) 0 to 1.
    """

    def __init__(self, model: Any) -> None:
        self.owner = _owner(model, "t_to_sigma")

    @torch.no_grad()
    def __call__(self, share: float) -> float:
        table = getattr(self.owner, "sigmas", None)
        discrete = table is not None or hasattr(self.owner, "get_sigmas")
        last = (1000 if table is None else len(table)) - 1 if discrete else 1.0
        t = (1 - torch.tensor(share, dtype=torch.float32)) * last
        return float(self.owner.t_to_sigma(t if table is None else t.to(table.device)))


def _scalings(model: Any, given: str | Scalings | None) -> Scalings:
    if given is None:
        return ModelScalings(model)
    if callable(given):
        return given
    if given not in SCALINGS:
        raise unknown("scalings", str(given), SCALINGS)
    return SCALINGS[given]


def _lowest_sigma(model: Any) -> float:
    owner = _owner(model, "sigma_min")
    return 0.0 if owner is None else float(owner.sigma_min)


def _sampler(name: str) -> Callable[..., Tensor]:
    sampling = require("k_diffusion.sampling", "k-diffusion")
    full = name if name.startswith("sample_") else f"sample_{name}"
    if not hasattr(sampling, full):
        raise unknown("sampler", name, [known[7:] for known in dir(sampling) if known.startswith("sample_")])
    return getattr(sampling, full)
