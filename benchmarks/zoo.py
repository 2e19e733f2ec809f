"""The forecast on the zoo: at half and at a third of the calls, beside everything else that makes as many.

python benchmarks/zoo.py [--split development|test] [--networks ...] [--samplers ...] [--steps 20 30] [--samples 32]

Rivals: fewer steps of the same sampler, the other samplers, reuse, TaylorSeer, HiCache and DMD as predictors at the
forecast's own places, the caches UCache, EasyCache and Spectrum, each turned until it makes as many calls, and the
package hicache-pp itself. A rival may make up to a tenth more calls than the forecast, never fewer; one that cannot is
left out. Under fresh noise only fewer steps and reuse are measured. PSNR is to the full run of the same seeds.

What is measured stands in records.jsonl under `--out`, and a measurement that was broken off goes on there. A change of
the forecast's code makes its own runs new and keeps the rivals'; for a change of a rival's code give another folder.

A sampler without fresh noise costs about 15 full runs, one with it 4. On one core of its own that is an estimated 2.5
to 4 minutes a sample for the test split in 20 steps, and one and a half times that in 30.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import stepcache
from stepcache import EasyCache, Forecast, Method, Spectrum, UCache
from stepcache.bench import KDiffusion, Sampled
from stepcache.bench.run import RECORDS, Store, measured, trait
from stepcache.bench.subjects import NOISY
from stepcache.demo import zoo
from stepcache.extend import DMD, Predictor, Reuse, TaylorSeer, require
from stepcache.samplers import k_diffusion

DETERMINISTIC = ("euler", "dpmpp_2m", "unipc", "heun", "dpm_2")
FRESH = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde")
TWICE = frozenset(["heun", "dpm_2", "dpmpp_sde"])
"""Samplers with two evaluations a step; all of these have one in the last."""

EVERY = {2: "half", 3: "a third"}
OURS, FEWER, OTHER = "Forecast", "fewer steps", "other: "
SLACK = 1.1
"""A rival with more calls than this times the forecast's is none, unless it is one call only."""
MISS = 1.0
"""In dB: this far below the best rival a cell counts as missed."""


def hermite(sigma: float) -> Predictor:
    """HiCache's predictor of order 2, contracted by `sigma`."""
    from stepcache.extend import Hermite

    return Hermite(2, sigma)


PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "reuse": Reuse,
    "TaylorSeer 1": partial(TaylorSeer, 1),
    "TaylorSeer 2": partial(TaylorSeer, 2),
    "HiCache 0.5": partial(hermite, 0.5),
    "HiCache 0.71": partial(hermite, 0.7071),
    "DMD": DMD,
}
"""Rivals at the forecast's places."""

TURNED: dict[str, tuple[Callable[[float], Method], float, float]] = {
    "UCache": (UCache, 0.05, 10.0),
    "EasyCache": (EasyCache, 0.02, 5.0),
    "Spectrum": (lambda flex: Spectrum(flex_window=flex), 0.01, 10.0),
}
"""Rivals with places of their own: what is turned until they make as many calls, from most calls to fewest."""

PACKAGE = {"hicache-pp hermite": "hermite", "hicache-pp dmd": "dmd"}
RIVALS = (*PREDICTORS, *TURNED, *PACKAGE)


@dataclass(frozen=True)
class Unit:
    """What is measured and stored at once: one method on one batch. `every` is 2 or 3."""

    subject: KDiffusion
    sampler: str
    steps: int
    seeds: tuple[int, ...]
    every: int
    method: str

    @property
    def key(self) -> str:
        told = (self.subject.name, self.sampler, self.steps, self.seeds, self.every, self.method)
        code = source() if self.method == OURS else ""
        return hashlib.sha1(json.dumps([*told, code]).encode()).hexdigest()


@cache
def source() -> str:
    """A hash of the package's code: with another one the forecast may be another."""
    apart = ("cli.py", "hicache.py", "magcache.py")
    files = sorted(path for path in Path(stepcache.__file__).parent.glob("*.py") if path.name not in apart)
    files.append(Path(k_diffusion.__file__))
    return hashlib.sha1(b"".join(path.read_bytes() for path in files)).hexdigest()


def measure(unit: Unit) -> list[dict[str, Any]]:
    """The unit's one record: calls for one branch, and PSNR sample by sample; calls are None where it has no run."""
    full = plain(unit.subject, unit.sampler, unit.steps, unit.seeds)
    budget = calls(unit.sampler, unit.steps, unit.every)
    result = sampled(unit, budget)
    metric = next(iter(unit.subject.metrics.values()))
    same = result is not None and result.calls >= full.calls
    return [
        {
            "subject": unit.subject.name,
            "sampler": unit.sampler,
            "steps": unit.steps,
            "seeds": list(unit.seeds),
            "every": unit.every,
            "method": unit.method,
            "budget": budget,
            "calls": None if result is None or same else result.calls,
            "scores": None if result is None or same else metric(result.images, full.images, unit.seeds),
        }
    ]


def sampled(unit: Unit, budget: float) -> Sampled | None:
    """One run of the unit's method with `budget` calls or a few more; None where it has none."""
    subject, sampler, steps, every, name = unit.subject, unit.sampler, unit.steps, unit.every, unit.method
    run = partial(subject.sample, sampler, steps, seeds=unit.seeds)
    if name == OURS:
        return run(Forecast(every))
    if name == FEWER or name.startswith(OTHER):
        own = sampler if name == FEWER else name.removeprefix(OTHER)
        return plain(subject, own, ceil((budget + 1) / 2) if own in TWICE else int(budget), unit.seeds)
    if name in PREDICTORS:
        return run(Forecast(every, predictor=PREDICTORS[name]()))
    if name in PACKAGE:
        evaluations = (2 * steps - 1) if sampler in TWICE else steps
        wrap = partial(HiCachePackage, PACKAGE[name], every, evaluations, budget, subject.guided)
        return replace(subject, guided=wrap).sample(sampler, steps, None, unit.seeds)
    return turned(unit, budget)


def turned(unit: Unit, budget: float) -> Sampled | None:
    """The cache with the fewest calls that are still `budget` or more: found on two samples, then run on all.

    Spectrum's calls do not depend on the network: they are found on one that costs nothing.
    """
    make, low, high = TURNED[unit.method]
    run = partial(unit.subject.sample, unit.sampler, unit.steps)
    tried = partial((still() if unit.method == "Spectrum" else unit.subject).sample, unit.sampler, unit.steps)
    if tried(make(high), unit.seeds[:2]).calls < budget:
        for _ in range(5):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if tried(make(middle), unit.seeds[:2]).calls >= budget else (low, middle)
    else:
        low = high
    for _ in range(4):
        result = run(make(low), unit.seeds)
        if result.calls >= budget:
            return result
        low *= 0.8  # the whole batch decides otherwise than its first two samples
    return None


_PLAIN: dict[tuple[Any, ...], Sampled] = {}


def plain(subject: KDiffusion, sampler: str, steps: int, seeds: tuple[int, ...]) -> Sampled:
    """A run without cache. Those of one subject and its seeds are kept, since units of the same follow each other."""
    if _PLAIN and next(iter(_PLAIN))[:2] != (subject.name, seeds):
        _PLAIN.clear()
    key = (subject.name, seeds, sampler, steps)
    if key not in _PLAIN:
        _PLAIN[key] = subject.sample(sampler, steps, None, seeds)
    return _PLAIN[key]


def still() -> KDiffusion:
    """A subject whose network costs nothing."""
    return KDiffusion("still", lambda x, sigma: 0 * x, (1, 2, 2), partial(zoo.karras, 0.1, 10.0))


@cache
def calls(sampler: str, steps: int, every: int) -> float:
    """The calls of the forecast and of all at its places, which are the same for all networks."""
    return still().sample(sampler, steps, Forecast(every), [0]).calls


class HiCachePackage(nn.Module):
    """hicache-pp around the guided model: the first evaluations are computed, the last, and one of `every`.

    It forecasts the guided eps = (x - denoised) / sigma, of a flow the guided velocity. Its DMD fits one propagator to
    whatever it is given: every sample of a batch gets a state of its own, as if it had been sampled alone. Of its
    schedules with `budget` calls or more it gets the one with the fewest: two or more first evaluations, and one of
    `every` or of one more.
    """

    def __init__(
        self,
        backend: str,
        every: int,
        evaluations: int,
        budget: float,
        guided: Callable[[nn.Module], nn.Module] | None,
        cached: nn.Module,
    ) -> None:
        super().__init__()
        self.inner_model = guided(cached) if guided else cached
        self.package, self.dmd, self.done = require("hicache_pp", "zoo"), backend == "dmd", 0
        options = {"max_order": 2, "end_enhance": evaluations - 1, "backend": backend}
        starts = [
            partial(self.package.hicache_init, evaluations, interval, first_enhance=first, **options)
            for first in range(2, evaluations + 1)
            for interval in (every, every + 1)
        ]
        planned = [self._planned(start, evaluations) for start in starts]
        self.start = starts[planned.index(min(count for count in planned if count >= budget))]
        self.states: list[dict[str, Any]] = []
        owner = cached.inner_model
        self.scalings = (
            owner.get_scalings if isinstance(owner, k_diffusion.FlowDenoiser) else lambda sigma: (1, -sigma, 1)
        )

    def _planned(self, start: Callable[[], dict[str, Any]], evaluations: int) -> int:
        """How many evaluations a schedule computes."""
        state = {**start(), "derivatives": {0: None}}
        decided = []
        for step in range(evaluations):
            state["step"] = step
            decided.append(self.package.hicache_decide(state))
        return decided.count("full")

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        self.states = self.states or [self.start() for _ in range(len(x) if self.dmd else 1)]
        for state in self.states:
            state["step"] = self.done
        full = [self.package.hicache_decide(state) == "full" for state in self.states]
        self.done += 1
        c_skip, c_out, _ = self.scalings(float(sigma.flatten()[0]))
        if not full[0]:
            forecast = self.package.dmd_forecast_state if self.dmd else self.package.hicache_forecast
            return c_skip * x + c_out * torch.cat([forecast(state) for state in self.states])
        denoised = self.inner_model(x, sigma, **extra)
        features = (denoised - c_skip * x) / c_out
        for state, feature in zip(self.states, features.chunk(len(self.states)), strict=True):
            self.package.hicache_update_derivatives(state, feature)
            if self.dmd:
                self.package.dmd_update_snapshots(state, feature)
        return denoised


@dataclass(frozen=True)
class Cell:
    """One network, sampler, number of steps and `every`: of every method its PSNR (mean over samples) and calls."""

    subject: str
    sampler: str
    steps: int
    every: int
    marks: Mapping[str, float]
    calls: Mapping[str, float]

    @property
    def rivals(self) -> dict[str, float]:
        """Everything but the forecast and fewer steps, with calls to match."""
        most = max(SLACK * self.calls[OURS], self.calls[OURS] + 1)
        return {name: v for name, v in self.marks.items() if name not in (OURS, FEWER) and self.calls[name] <= most}

    @property
    def best(self) -> str:
        return max(self.rivals, key=self.rivals.__getitem__)

    @property
    def to_best(self) -> float:
        return self.marks[OURS] - self.rivals[self.best]

    @property
    def to_fewer(self) -> float:
        return self.marks[OURS] - self.marks[FEWER]

    @property
    def missed(self) -> bool:
        return self.to_fewer < 0 or self.to_best < -MISS


def cells(records: Sequence[dict[str, Any]]) -> list[Cell]:
    """The cells whose forecast is measured, in the order of the records. Without a run in one batch: without a mark."""
    found: dict[tuple[str, str, int, int], dict[str, list[dict[str, Any]]]] = {}
    for r in records:
        key = r["subject"], r["sampler"], r["steps"], r["every"]
        found.setdefault(key, {}).setdefault(r["method"], []).append(r)
    made = []
    for key, methods in found.items():
        whole = {name: rs for name, rs in methods.items() if all(r["scores"] for r in rs)}
        marks = {name: statistics.fmean(v for r in rs for v in r["scores"]) for name, rs in whole.items()}
        counts = {name: statistics.fmean(r["calls"] for r in rs) for name, rs in whole.items()}
        made.append(Cell(*key, marks, counts))
    return [cell for cell in made if {OURS, FEWER} <= set(cell.marks) and cell.rivals]


def tables(found: Sequence[Cell]) -> Iterator[str]:
    """One table per question, in Markdown: by network, by sampler, under fresh noise, and what misses."""
    settled, fresh = ([c for c in found if (c.sampler in NOISY) == noisy] for noisy in (False, True))
    for by in ("subject", "sampler"):
        for every, share in EVERY.items():
            lines = [
                [f"calls: {share}", OURS, FEWER, "best rival", "most often", "worst to best rival", "worst to fewer"]
            ]
            for name, group in grouped(settled, by, every):
                best = mean(c.rivals[c.best] for c in group)
                often = Counter(c.best for c in group).most_common(1)[0][0]
                worst = f"{min(c.to_best for c in group):+.1f}", f"{min(c.to_fewer for c in group):+.1f}"
                lines.append([name, *(mean(c.marks[m] for c in group) for m in (OURS, FEWER)), best, often, *worst])
            yield from table(lines)
    for every, share in EVERY.items():
        lines = [[f"fresh noise, calls: {share}", OURS, FEWER, "reuse", "ahead of reuse", "worst cell"]]
        for name, group in grouped(fresh, "subject", every):
            ahead = [c.marks[OURS] - c.marks["reuse"] for c in group]
            marks = (mean(c.marks[m] for c in group) for m in (OURS, FEWER, "reuse"))
            lines.append([name, *marks, f"{statistics.fmean(ahead):+.1f}", f"{min(ahead):+.1f}"])
        yield from table(lines)
    missed = sorted((c for c in found if c.missed), key=lambda c: min(c.to_best + MISS, c.to_fewer))
    yield f"{len(missed)} of {len(found)} cells miss: below fewer steps, or more than {MISS:g} dB below the best rival."
    if len(missed) > 12:
        yield "The 12 that miss most; all of them stand in cells.json."
    yield ""
    lines = [["missed", "calls", OURS, FEWER, "best rival"]]
    for c in missed[:12]:
        best = f"{c.rivals[c.best]:.1f} {c.best} ({c.to_best:+.1f})"
        fewer = f"{c.marks[FEWER]:.1f} ({c.to_fewer:+.1f})"
        lines.append(
            [f"{c.subject}, {c.sampler}, {c.steps}", f"{c.calls[OURS]:g}", f"{c.marks[OURS]:.1f}", fewer, best]
        )
    yield from table(lines)


def grouped(found: Sequence[Cell], by: str, every: int) -> Iterator[tuple[str, list[Cell]]]:
    for name in dict.fromkeys(getattr(c, by) for c in found):
        group = [c for c in found if getattr(c, by) == name and c.every == every]
        if group:
            yield name, group


def mean(values: Iterator[float]) -> str:
    return f"{statistics.fmean(values):.1f}"


def table(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Nothing where there is a heading only."""
    if len(lines) > 1:
        for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]):
            yield f"| {' | '.join(line)} |"
        yield ""


def units(options: argparse.Namespace, subjects: Sequence[KDiffusion]) -> Iterator[Unit]:
    for at in range(0, options.samples, options.batch):
        seeds = tuple(range(at, min(at + options.batch, options.samples)))
        for subject in subjects:
            for sampler in options.samplers:
                others = (OTHER + other for other in DETERMINISTIC if other != sampler)
                names = ("reuse",) if sampler in NOISY else (*others, *options.rivals)
                for steps in options.steps:
                    for every in EVERY:
                        for name in (OURS, FEWER, *names):
                            yield Unit(subject, sampler, steps, seeds, every, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", choices=list(zoo.SPLITS), default="development")
    parser.add_argument("--networks", nargs="+", choices=zoo.NAMES, metavar="NAME", help="instead of a split")
    parser.add_argument("--samplers", nargs="+", default=(*DETERMINISTIC, *FRESH), choices=(*DETERMINISTIC, *FRESH))
    parser.add_argument("--rivals", nargs="+", default=RIVALS, choices=RIVALS, metavar="NAME", help=", ".join(RIVALS))
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="processes; on a CPU one a core")
    parser.add_argument("--out", type=Path, default=Path("zoo-output"))
    options = parser.parse_args()
    subjects = [replace(s, limit=None) for s in zoo.subjects(options.networks or zoo.SPLITS[options.split])]
    store = Store(options.out / RECORDS, {s.name: trait(s, "euler", 0) for s in subjects})
    wanted = list(units(options, subjects))
    missing = [unit for unit in wanted if unit.key not in store]
    with Progress() as bar:
        task = bar.add_task("sampling", total=len(wanted), completed=len(wanted) - len(missing))
        for unit, records in measured(missing, options.workers, measure):
            store.add(unit, records)
            bar.advance(task)
    found = cells([record for unit in wanted for record in store[unit.key]])
    text = "\n".join(tables(found))
    (options.out / "zoo.md").write_text(text, encoding="utf-8")
    (options.out / "cells.json").write_text(json.dumps([vars(c) for c in found], indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
