"""Runs of many kinds through the same few wrappers, in random order, each compared with the same run made alone.

A run is data (`Situation`): its size, sampler, steps, guidance, and what goes wrong in it. `Bench` has one long-lived
wrapper a method and arrangement of guidance; alone, a run gets a new one."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stepcache import (
    EasyCache,
    FBCache,
    Forecast,
    HiCache,
    Method,
    SeaCache,
    Spectrum,
    Static,
    StepMask,
    TaylorSeerCache,
    UCache,
)
from stepcache.samplers.k_diffusion import CachedDenoiser, InTurn, sample


class Fails(Exception):
    """What the network, or the user's callback, raises."""


class Network(nn.Module):
    """A denoiser with two blocks, no two branches of it alike; it breaks when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(k) for k in range(3))
        self.calls, self.fault, self.at = 0, "", -1

    def breaks(self, fault: str, at: int) -> None:
        self.calls, self.fault, self.at = 0, fault, at

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor, **extra: Any) -> Tensor:
        self.calls += 1
        now = self.calls - 1 == self.at
        if now and self.fault == "raises":
            raise Fails
        if now and self.fault == "interrupt":
            raise KeyboardInterrupt
        sigma = sigma.reshape(-1, 1, 1, 1)
        hidden = (x / (1 + sigma**2).sqrt() + cond.reshape(-1, 1, 1, 1)).to(x.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        if now and self.fault in ("nan", "inf"):
            hidden = hidden.clone()
            hidden[-1, ..., 0] = float(self.fault)
        return (x / (1 + sigma**2) + hidden * sigma / (1 + sigma**2).sqrt()).to(x.dtype)


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(x * (1 + 0.3 * self.number)) / 4


class Guided(nn.Module):
    """Guidance as samplers see it: around the cache or with the cache inside, in one call or in two."""

    def __init__(self, inner: nn.Module, separate: bool) -> None:
        super().__init__()
        self.inner, self.separate = inner, separate
        self.scale = 3.0

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        one = torch.ones(len(x))
        if self.separate:
            cond, uncond = self.inner(x, sigma, cond=one), self.inner(x, sigma, cond=-one)
        else:
            both = self.inner(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([-one, one]))
            uncond, cond = both.chunk(2)
        return uncond + self.scale * (cond - uncond)


METHODS: dict[str, Callable[[], Method]] = {
    "forecast": partial(Forecast, min_evaluations=0),
    "forecast3": partial(Forecast, 3),
    "uncond": partial(Forecast, 2, skip="uncond"),
    "ucache": partial(UCache, 0.6),
    "easycache": partial(EasyCache, 0.3, start=0.1, window="steps"),
    "static": partial(Static, "fast"),
    "spectrum": Spectrum,
    "taylorseer": partial(TaylorSeerCache, 2),
    "hicache": HiCache,
    "seacache": SeaCache,
    "fbcache": partial(FBCache, 0.3),
    "masked": partial(UCache, 0.6, mask=StepMask("medium"), max_consecutive=2, warmup=1),
}
ARRANGEMENTS = ("around", "batched", "separate", "each")
ONE = ("euler", "euler_ancestral", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde")
TWO = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
FAULTS = ("", "", "", "raises", "interrupt", "nan", "inf", "callback", "left", "leaves")
SHAPES = ((1, 4, 8, 8), (2, 4, 8, 8), (1, 4, 8, 12), (3, 1, 6, 6), (1, 16, 4, 4))


@dataclass(frozen=True)
class Situation:
    """One run.

    Attributes:
        fault: "raises", "interrupt", "nan" and "inf" happen in the network, "callback" raises in the user's callback,
            "left" is a generator that is closed, "leaves" one that nobody closes. Empty: nothing.
        at: the network call, or the step, at which it happens.
        begin: the step at which the run begins (img2img).
        announced: through `sample`, which announces the schedule; else the sampler is called without a word.
    """

    method: str
    arrangement: str
    sampler: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    steps: int
    begin: int
    seed: int
    fault: str
    at: int
    announced: bool


def situations(count: int, seed: int) -> Iterator[Situation]:
    draw = random.Random(seed)
    for number in range(count):
        steps = draw.choice((1, 2, 3, 5, 8, 12, 20))
        arrangement = draw.choice(ARRANGEMENTS)
        method = draw.choice([m for m in METHODS if not (arrangement == "each" and m in ("uncond", "fbcache"))])
        yield Situation(
            method,
            arrangement,
            draw.choice(ONE + TWO),
            draw.choice(SHAPES),
            draw.choice((torch.float32, torch.float32, torch.float16, torch.float64)),
            steps,
            draw.randrange(steps) if draw.random() < 0.3 else 0,
            number,
            draw.choice(FAULTS),
            draw.randrange(2 * steps),
            draw.random() < 0.7,
        )


def wrapper(network: Network, situation: Situation) -> tuple[CachedDenoiser, Guided]:
    made, how = METHODS[situation.method](), situation.arrangement
    if how == "around":
        guided = Guided(network, separate=False)
        cache = CachedDenoiser(guided, made, scalings="eps")
        return cache, guided
    branches: Any = ("uncond", "cond") if how == "batched" else InTurn("cond", "uncond")
    if how != "batched" and situation.sampler in TWO:
        branches = named
    cache = CachedDenoiser(network, made, branches=branches, decide="each" if how == "each" else "batch")
    return cache, Guided(cache, separate=how != "batched")


def named(x: Tensor, sigma: Tensor, cond: Tensor) -> str:
    return "cond" if cond[0] > 0 else "uncond"


@dataclass
class Outcome:
    """What a run came to: every x that the sampler had, its end, and what the report says of each branch."""

    path: list[Tensor] = field(default_factory=list)
    end: str = ""
    decisions: str = ""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Outcome)
            and (self.end, self.decisions, len(self.path)) == (other.end, other.decisions, len(other.path))
            and all(map(alike, self.path, other.path))
        )


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether they are the same bit for bit; NaN is NaN."""
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


class Bench:
    """Wrappers that outlive their runs, around one network."""

    def __init__(self) -> None:
        self.network = Network()
        self.wrappers: dict[tuple[str, str, bool], tuple[CachedDenoiser, Guided]] = {}
        self.left: list[Iterator[None]] = []

    def run(self, situation: Situation) -> Outcome:
        cache, guided = self.wrapper(situation)
        model = cache if situation.arrangement == "around" else guided
        outcome = Outcome()
        self.network.breaks(situation.fault, situation.at)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._end(cache, model, situation, outcome)
        report = cache.report
        outcome.decisions = " ".join(
            f"{branch}:{report.decisions(branch)}" for branch in sorted({event.branch for event in report.events})
        )
        return outcome

    def kept(self, situation: Situation) -> int:
        """How many computed evaluations the wrapper holds of the run."""
        return kept(self.wrapper(situation)[0])

    def wrapper(self, situation: Situation) -> tuple[CachedDenoiser, Guided]:
        key = (situation.method, situation.arrangement, situation.sampler in TWO)
        if key not in self.wrappers:
            self.wrappers[key] = wrapper(self.network, situation)
        return self.wrappers[key]

    def _end(self, cache: CachedDenoiser, model: nn.Module, situation: Situation, outcome: Outcome) -> None:
        """Goes through the loop to its end, whatever that is."""
        try:
            loop = self._loop(cache, model, situation, outcome)
            if situation.fault in ("left", "leaves"):
                for step, _ in enumerate(loop):
                    if step == situation.at:
                        break
                if situation.fault == "left":
                    loop.close()
                outcome.end = "left"
            else:
                for _ in loop:
                    pass
                outcome.end = "done"
        except (Fails, KeyboardInterrupt, UnboundLocalError) as error:  # the last is dpmpp_2m_sde's own, with one step
            outcome.end = type(error).__name__

    def _loop(self, cache: CachedDenoiser, model: nn.Module, situation: Situation, outcome: Outcome) -> Iterator[None]:
        """The sampling loop as a generator of its steps; k-diffusion's samplers run in one piece."""
        sigmas = torch.cat([torch.logspace(1.1, -1.2, situation.steps), torch.zeros(1)])[situation.begin :]
        generator = torch.Generator().manual_seed(situation.seed)
        x = torch.randn(situation.shape, generator=generator).to(situation.dtype) * sigmas[0].to(situation.dtype)

        def callback(info: dict[str, Any]) -> None:
            outcome.path.append(info["x"].clone())
            if situation.fault == "callback" and info["i"] == situation.at:
                raise Fails

        if situation.fault in ("left", "leaves"):
            yield from euler(cache, model, x, sigmas, situation.announced, outcome)
            return
        torch.manual_seed(situation.seed)
        with torch.no_grad():
            keywords = {"disable": True, "callback": callback}
            if situation.sampler.endswith("sde"):
                keywords["noise_sampler"] = lambda sigma, following: torch.randn_like(x)
            if situation.announced:
                x = sample(situation.sampler, model, x, sigmas, cache=cache, **keywords)
            else:
                import k_diffusion

                x = getattr(k_diffusion.sampling, f"sample_{situation.sampler}")(model, x, sigmas, **keywords)
        outcome.path.append(x)
        yield


def euler(
    cache: CachedDenoiser, model: nn.Module, x: Tensor, sigmas: Tensor, announced: bool, outcome: Outcome
) -> Iterator[None]:
    """A loop that can be left at any step."""
    with cache.run(sigmas, 1) if announced else contextlib.nullcontext():
        for sigma, following in pairwise(sigmas):
            with torch.no_grad():
                denoised = model(x, sigma.expand(len(x)))
                x = x + (x - denoised) / sigma * (following - sigma)
            outcome.path.append(x.clone())
            yield


def kept(cache: CachedDenoiser) -> int:
    """How many computed evaluations a wrapper holds of a run."""
    run = cache.engine.runs.current
    return 0 if run is None else sum(map(len, run.caches.values()))
