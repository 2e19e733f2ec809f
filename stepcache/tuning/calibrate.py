"""`tune`: from a target to a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from stepcache import __version__
from stepcache.bench.subjects import Subject
from stepcache.fingerprint import Fingerprint
from stepcache.masks import LONGEST
from stepcache.methods import method
from stepcache.options import OptionError, number, shown, unknown
from stepcache.profile import Prediction, Profile

from .notebook import Notebook
from .progress import progress
from .search import Found, Search
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
    budget: float | None = None,
    state: str | None = None,
    console: Any = None,
) -> Profile:
    """Finds where to compute and how to predict the rest, for one model, sampler and number of steps.

    Exactly one target is given: `calls`, `speedup` or `psnr`.

    Args:
        subject: what is sampled, as for `stepcache.bench`: a k-diffusion model, a diffusers pipeline, or your own.
        calls: network calls of a run, for each branch of guidance.
        speedup: how many times fewer calls than evaluations: 3 is a third of them, or fewer.
        psnr: what the metric must reach, in the mean over calibration seeds; then as few calls as that needs.
        sampler, steps: which runs; the sampler by the subject's name for it.
        seeds: how many, or which. The first half calibrates, in one batch; the other half is held out, and only
            measured.
        metric: one of the subject's, by name; its first by default. It decides, and `psnr` is in its unit.
        budget: the most calls that the calibration batch may cost, in full runs. Default 2.8 for each step.
        state: a file for what was found so far; with it a search that was stopped goes on where it was.
        console: of `rich`, to show the progress on.

    Returns a `Profile`; `.save("name.json")` writes it, and `stepcache.load_profile("name.json")` is the method that
    replays it. Raises `OptionError` for a target that cannot be, and for seeds that do not make two halves.

    Example:
        >>> import torch
        >>> from stepcache.bench import KDiffusion
        >>> from stepcache.tuning import tune
        >>> model = lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2)
        >>> subject = KDiffusion("gauss", model, (1, 8, 8), lambda n: torch.linspace(n, 0, n + 1))
        >>> tune(subject, calls=4, steps=8, seeds=4).calls
        4
    """
    halves = _halves(seeds)
    number("steps", steps, low=2, high=LONGEST, whole=True)
    if sum(target is not None for target in (calls, speedup, psnr)) != 1:
        raise OptionError("give one target: calls=, speedup= or psnr=")
    name = next(iter(subject.metrics)) if metric is None else metric
    if name not in subject.metrics:
        raise unknown("metric", name, subject.metrics)
    limit = number("budget", BUDGET * steps if budget is None else budget, low=LEAST + steps / 2)
    settings = {key: repr(value) for key, value in subject.settings.items()}
    told = {"subject": subject.name, "sampler": sampler, "steps": steps, "seeds": halves, "metric": name}
    notebook = Notebook(state, {**told, "settings": settings})
    with progress(console, limit) as say:
        search = Search(subject, sampler, steps, halves[0], subject.metrics[name], limit, notebook, say)
        return checked(search, _found(search, calls, speedup, psnr), halves[1], name)


def _halves(seeds: int | Sequence[int]) -> tuple[list[int], list[int]]:
    """Seeds to calibrate on and seeds held out."""
    chosen = list(range(number("seeds", seeds, low=2, whole=True)) if isinstance(seeds, int) else seeds)
    if len(chosen) < 2 or len({*chosen}) != len(chosen):
        raise OptionError(f"seeds={shown(seeds)}: accepted are two or more different ones, for two halves")
    half = (len(chosen) + 1) // 2
    return chosen[:half], chosen[half:]


def _found(search: Search, calls: int | None, speedup: float | None, psnr: float | None) -> Found:
    count = search.full.evaluations
    if psnr is not None:
        return _reached(search, number("psnr", psnr))
    if speedup is not None:
        calls = max(1, int(count / number("speedup", speedup, low=1.0, high=count)))
    many = number("calls", calls, low=1, high=count, whole=True)
    return search.climb(search.placement.best(many)[many])


def _reached(search: Search, goal: float) -> Found:
    """As few calls as reach the goal: by bisection on the places of least cost, then fewer as long as trials get there.

    A quarter of what is left of the budget is spent on each smaller number of calls.
    """
    count = search.full.evaluations
    places = search.placement.best(count)
    low, high = 1, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if search.score(places[middle]).mean >= goal else (middle + 1, high)
    best = search.score(places[low])
    for calls in range(low - 1, 0, -1):
        found = search.climb(places[calls], (search.budget - search.spent) / 4, goal)
        if found.mean < goal:
            break
        best = found
    return search.climb(best.places)


def checked(search: Search, found: Found, held_out: Sequence[int], metric: str) -> Profile:
    """The profile, with learned weights if the held-out seeds gain by them, and its figures."""
    count, calls = search.full.evaluations, len(found.places)
    digits = tuple(int(n in found.places) for n in range(count))
    plain = search.run(Trial(search.full, found.places, learn=False)).chosen
    full = search.sample(search.steps, None, held_out)

    def scores(chosen: Mapping[int, Prediction] | None) -> list[float]:
        """Of the predictions, or of a run of as many steps as there are calls."""
        replay = None if chosen is None else method("profile", path=Profile(digits, chosen))
        images = search.sample(calls if chosen is None else search.steps, replay, held_out)
        return [float(value) for value in search.metric(images, full, held_out)]

    learned, simple = scores(found.predictions), scores(plain)
    keep = fmean(learned) > fmean(simple)
    values = learned if keep else simple
    return Profile(
        digits,
        found.predictions if keep else plain,
        search.full.schedule,
        search.sampler,
        {name: round(weight, 3) for name, weight in search.full.guidance.items()},
        None if search.full.network is None else Fingerprint.of(search.full.network),
        {
            "metric": metric,
            "calibration": record(mean=found.mean, seeds=list(search.seeds)),
            "held out": record(
                mean=fmean(values),
                worst=min(values),
                learned_weights=fmean(learned),
                orders_alone=fmean(simple),
                fewer_steps=fmean(scores(None)),
                seeds=list(held_out),
            ),
            "cost in full runs": round(search.spent, 1),
        },
        {"stepcache": __version__, "torch": torch.__version__},
    )


def record(**figures: Any) -> dict[str, Any]:
    """Figures as a profile has them, with two decimals."""
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}
