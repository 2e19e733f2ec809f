"""What is measured: a model that can be sampled by name of sampler, number of steps, method and seeds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from stepcache._optional import require
from stepcache.methods import Method
from stepcache.methods.off import Off
from stepcache.options import OptionError, unknown
from stepcache.report import Report

from .metrics import METRICS, Metric
from .unipc import sample_unipc


@dataclass(frozen=True)
class Sampled:
    """One batch: images (B, C, H, W) or (B, F, C, H, W) in [-1, 1] on the CPU, seconds it took, and its report."""

    images: Tensor
    seconds: float
    report: Report

    @property
    def calls(self) -> float:
        """Calls made for one branch, in the mean over branches."""
        return self.report.calls / max(1, len(self.report.branches))


class Subject(Protocol):
    """Anything with these can be measured.

    Attributes:
        name: how tables and records call it.
        metrics: how its samples are marked, by name; the first is plotted, and decides which other sampler is best.
        limit: a sampler and steps whose images are taken for the exact solution, or None.
        noisy: the samplers that add fresh noise, which have no such limit.
        settings: of the cache, beside the method; records that were made with others are not taken for these.
    """

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> Mapping[str, Metric]: ...

    @property
    def limit(self) -> tuple[str, int] | None: ...

    @property
    def noisy(self) -> frozenset[str]: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def sample(self, sampler: str, steps: int, method: Method | None, seeds: Sequence[int]) -> Sampled:
        """A batch, one sample a seed. The same seeds must give the same noise, whatever the method; None: no cache."""
        ...


NOISY = frozenset(
    ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "restart"]
)
"""k-diffusion's samplers that add fresh noise by default."""


@dataclass
class KDiffusion:
    """A k-diffusion denoiser under k-diffusion's samplers, and "unipc", which is `stepcache.bench.unipc`'s.

    Args:
        name: how tables and records call it; a model of the same name in the same folder must be the same model.
        model: `model(x, sigma, **extra_args)` gives denoised.
        shape: of one latent, without the batch.
        sigmas: of a number of steps the schedule, one longer, ending in 0.
        guided: builds the guidance wrapper around the cached model. None: the sampler calls the cached model.
        extra_args: of the seeds of a batch the sampler's `extra_args`, None: none.
        decode: of latents the images in [-1, 1], None: they are images.
        cached: further options of `CachedDenoiser`, as `branches=("uncond", "cond")`.
        metrics, limit, noisy: see `Subject`.
        device, dtype: of the latents.
    """

    name: str
    model: Any
    shape: tuple[int, ...]
    sigmas: Callable[[int], Tensor]
    guided: Callable[[Any], Any] | None = None
    extra_args: Callable[[Sequence[int]], dict[str, Any]] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    cached: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)
    limit: tuple[str, int] | None = ("dpmpp_2m", 200)
    noisy: frozenset[str] = NOISY
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.cached

    @torch.no_grad()
    def sample(self, sampler: str, steps: int, method: Method | None, seeds: Sequence[int]) -> Sampled:
        """Every seed has a start noise of its own; the sampler's fresh noise is seeded by the first of the batch."""
        from stepcache.samplers.k_diffusion import CachedDenoiser, sample

        function = sample_unipc if sampler == "unipc" else _sampler(sampler)
        sigmas = self.sigmas(steps).to(self.device)
        start = torch.stack([_noise(self.shape, seed) for seed in seeds]).to(self.device, self.dtype) * sigmas[0]
        extra_args = self.extra_args(seeds) if self.extra_args else {}
        cached = CachedDenoiser(self.model, method, **self.cached)
        guided = self.guided(cached) if self.guided else cached
        torch.manual_seed(seeds[0])
        with _timed(self.device) as clock:
            latents = sample(function, guided, start, sigmas, extra_args=extra_args, disable=True)
        images = self.decode(latents) if self.decode else latents
        return Sampled(images.float().cpu(), clock.seconds, cached.report)


@dataclass
class Pipeline:
    """A diffusers pipeline under its schedulers.

    Args:
        name: how tables and records call it; a pipeline of the same name in the same folder must be the same.
        pipe: the pipeline.
        schedulers: samplers by name, what makes a new scheduler. The pipeline's own one if empty.
        call: `call(pipe, steps, seeds)` gives images in [-1, 1]. By default `pipe` is called with `arguments`,
            `num_inference_steps`, `output_type="pt"`, a generator a seed and, for several seeds, as many images.
        arguments: of that call: prompt, guidance_scale, ...
        attach: further options of `stepcache.attach`.
        metrics, limit, noisy: see `Subject`; `limit` and `noisy` name schedulers.
        device: of the generators.
    """

    name: str
    pipe: Any
    schedulers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    call: Callable[[Any, int, Sequence[int]], Tensor] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    attach: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)
    limit: tuple[str, int] | None = None
    noisy: frozenset[str] = frozenset()
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not self.schedulers:
            own = self.pipe.scheduler
            self.schedulers = {type(own).__name__: lambda: type(own).from_config(own.config)}

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.attach

    @torch.no_grad()
    def sample(self, sampler: str, steps: int, method: Method | None, seeds: Sequence[int]) -> Sampled:
        """Every seed has a generator of its own. The pipeline's scheduler is put back afterwards."""
        from stepcache import attach

        if sampler not in self.schedulers:
            raise unknown("scheduler", sampler, self.schedulers)
        before = self.pipe.scheduler
        self.pipe.scheduler = self.schedulers[sampler]()
        try:
            with attach(self.pipe, method or Off(), **self.attach) as cache, _timed(self.device) as clock:
                images = (self.call or self._call)(self.pipe, steps, seeds)
        finally:
            self.pipe.scheduler = before
        return Sampled(images.float().cpu(), clock.seconds, cache.report)

    def _call(self, pipe: Any, steps: int, seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        many = {"num_images_per_prompt", "num_videos_per_prompt"} & set(inspect.signature(pipe.__call__).parameters)
        number = {many.pop(): len(seeds)} if many and len(seeds) > 1 else {}
        keywords = {**self.arguments, **number, "num_inference_steps": steps, "output_type": "pt"}
        images = pipe(generator=generators, **keywords)[0]
        if not isinstance(images, Tensor):
            images = torch.stack(list(images))
        return images * 2 - 1


def _sampler(name: str) -> Callable[..., Tensor]:
    function = getattr(require("k_diffusion.sampling", "bench"), f"sample_{name}", None)
    if function is None or "sigmas" not in inspect.signature(function).parameters:
        raise OptionError(
            f"sampler={name!r}: accepted is 'unipc', and one of k-diffusion's that takes sigmas, as 'euler'"
        )
    return function


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class _Clock:
    seconds: float = 0.0


@contextmanager
def _timed(device: torch.device | str) -> Iterator[_Clock]:
    """Seconds from beginning to end, with all work of the device done at both."""
    wait = getattr(getattr(torch, torch.device(device).type, None), "synchronize", lambda: None)
    wait()
    clock, begun = _Clock(), time.perf_counter()
    yield clock
    wait()
    clock.seconds = time.perf_counter() - begun
