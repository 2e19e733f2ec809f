"""`tune`: from a target to a profile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stepcache.bench.subjects import Subject
from stepcache.masks import LONGEST
from stepcache.options import OptionError, number, shown, unknown
from stepcache.profile import Profile
from stepcache.settings import Settings

from .choice import Choice, Found
from .held_out import HeldOut
from .notebook import Notebook
from .progress import progress
from .published import TRIES, Published
from .search import Search
from .study import Study
from .team import team
from .trial import Trial

BUDGET = 2.8
"""Full runs that a search may cost, for each step of the run: 56 for 20 steps, 140 for 50."""

LEAST = 7.0
"""Full runs that the smallest search costs beside the growth of errors, which takes half as many as there are steps."""


def tune(
    subject: Subject,
    *,
    calls: int | None = None,
    speedup: float | None = None,
    psnr: float | None = None,
    sampler: str = "euler",
    steps: int = 20,
    seeds: int | Sequence[int] = 20,
    metric: str | None = None,
    method: str = "profile",
    budget: float | None = None,
    state: str | os.PathLike[str] | None = None,
    workers: int = 1,
    console: Any = None,
) -> Profile | Settings:
    """Finds where to compute and how to predict the rest, for one model, sampler and number of steps.

    Exactly one target is given: `calls`, `speedup` or `psnr`.

    Args:
        subject: what is sampled, as for `stepcache.bench`: a k-diffusion model, a diffusers pipeline, or your own.
        calls: network calls of a run, for each branch of guidance.
        speedup: how many times fewer calls than evaluations: 3 is a third of them, or fewer.
        psnr: the mean that the metric must reach on the calibration seeds, with as few calls as possible.
        sampler, steps: which runs; the sampler by the subject's name for it.
        seeds: how many, or which. The first half calibrates, in one batch; the other half is held out, and only
            measured.
        metric: one of the subject's, by name; its first by default. It decides, and `psnr` is in its unit.
        method: "profile" (default): all of this is searched. Else a published method, with options as text if need be
            ("magcache:max_skip_steps=6"): only the number that it is turned by is searched, and MagCache's ratios are
            measured. That takes 15 runs of the calibration seeds at most, or one for each whole number.
        budget: the most calls that the calibration batch may cost, in full runs. Default 2.8 for each step.
        state: a file for what was found so far; with it a search that was stopped goes on where it was.
        workers: more than one: so many processes share the trials, started by Ray (the extra `ray`), a GPU each if the
            subject's `device` is one. On more than one machine, start Ray's cluster and set RAY_ADDRESS. The subject
            must be picklable. 8 trials at a time are independent of each other; the profile is that of one worker.
        console: of `rich`, to show the progress on.

    Returns a `Profile`, or `Settings` for a published method; `.save("name.json")` writes it, and
    `stepcache.load_profile("name.json")` is the method that replays it. Raises `OptionError` if the target is out of
    range or cannot be reached, or if there are fewer than two different seeds.

    Example:
        >>> import torch
        >>> from stepcache.bench import KDiffusion
        >>> from stepcache.tuning import tune
        >>> model = lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2)
        >>> subject = KDiffusion("gauss", model, (1, 8, 8), lambda n: torch.linspace(n, 0, n + 1))
        >>> tune(subject, calls=4, steps=8, seeds=4).calls
        4
    """
    if sum(target is not None for target in (calls, speedup, psnr)) != 1:
        raise OptionError("give one target: calls=, speedup= or psnr=")
    steps = number_of_steps(steps)
    if method != "profile":
        for option, value, default in (("budget", budget, None), ("state", state, None), ("workers", workers, 1)):
            if value != default:
                raise OptionError(f"{option}={shown(value)} with method={shown(method)}: it is for profiles alone")
        return _published(subject, method, calls, speedup, psnr, sampler, steps, seeds, metric, console)
    limit = number("budget", BUDGET * steps if budget is None else budget, low=LEAST + steps / 2)
    with (
        progress(console, limit) as say,
        prepared(subject, sampler, steps, seeds, metric, limit, state, workers, say) as (search, held_out),
    ):
        return held_out.profile(_found(search, calls, speedup, psnr))


@contextmanager
def prepared(
    subject: Subject,
    sampler: str,
    steps: int,
    seeds: int | Sequence[int],
    metric: str | None,
    budget: float,
    state: str | os.PathLike[str] | None,
    workers: int,
    say: Callable[[str, float], None],
) -> Iterator[tuple[Search, HeldOut]]:
    """A search with its full run and the growth of errors, and the other half of the seeds."""
    halves, name = _halves(seeds), _metric(subject, metric)
    settings = {key: repr(value) for key, value in subject.settings.items()}
    told = {"subject": subject.name, "sampler": sampler, "steps": steps, "seeds": halves, "metric": name}
    notebook = Notebook(state, {**told, "settings": settings})
    number("workers", workers, low=1, whole=True)
    seeds, sought = halves[0], subject.metrics[name]
    full = Trial().run(subject, sampler, steps, seeds).tape
    with team(workers, subject, sampler, steps, seeds, sought, full) as crew:
        study = Study(crew, full, sampler, steps, seeds, sought, notebook, say)
        yield Search(study, budget), HeldOut(study, halves[1], name)


def _published(
    subject: Subject,
    method: str,
    calls: int | None,
    speedup: float | None,
    psnr: float | None,
    sampler: str,
    steps: int,
    seeds: int | Sequence[int],
    metric: str | None,
    console: Any,
) -> Settings:
    """A published method for the target."""
    with progress(console, TRIES + 2) as say:
        tries = Published(method, subject, sampler, steps, *_halves(seeds), _metric(subject, metric), say)
        if psnr is not None:
            return tries.settings(tries.for_mean(number("psnr", psnr)))
        return tries.settings(tries.for_calls(_calls(tries.full.evaluations, calls, speedup)))


def _metric(subject: Subject, metric: str | None) -> str:
    """The name of the metric that decides."""
    name = next(iter(subject.metrics)) if metric is None else metric
    if name not in subject.metrics:
        raise unknown("metric", name, subject.metrics)
    return name


def number_of_steps(steps: int) -> int:
    return number("steps", steps, low=2, high=LONGEST, whole=True)


def _halves(seeds: int | Sequence[int]) -> tuple[list[int], list[int]]:
    """Seeds to calibrate on and seeds held out."""
    chosen = list(range(number("seeds", seeds, low=2, whole=True)) if isinstance(seeds, int) else seeds)
    if len(chosen) < 2 or len({*chosen}) != len(chosen):
        raise OptionError(f"seeds={shown(seeds)}: accepted are two or more different ones, for two halves")
    half = (len(chosen) + 1) // 2
    return chosen[:half], chosen[half:]


def _found(search: Search, calls: int | None, speedup: float | None, psnr: float | None) -> Found:
    if psnr is not None:
        return _reached(search, number("psnr", psnr))
    return search.climb(search.starts(_calls(search.study.full.evaluations, calls, speedup)))


def _calls(count: int, calls: int | None, speedup: float | None) -> int:
    """The target in calls, of a run of so many evaluations."""
    if speedup is not None:
        calls = max(1, int(count / number("speedup", speedup, low=1.0, high=count)))
    return number("calls", calls, low=1, high=count, whole=True)


def _reached(search: Search, goal: float) -> Found:
    """As few calls as reach the goal: by bisection on the places of least cost, then fewer as long as trials get there.

    A quarter of what is left of the budget is spent on each smaller number of calls.
    """
    study = search.study
    count = study.full.evaluations
    places = study.placement.best(count)
    low, high = 1, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if study.score(Choice(places[middle])).mean >= goal else (middle + 1, high)
    best = study.score(Choice(places[low]))
    for calls in range(low - 1, 0, -1):
        found = search.climb(search.starts(calls), (search.budget - study.spent) / 4, goal)
        if found.mean < goal:
            break
        best = found
    return search.climb([best.choice, *search.starts(len(best.places))])
