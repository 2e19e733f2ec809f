"""The held-out seeds: what a search reaches on them, and the rivals beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from stepcache import __version__
from stepcache.methods import Method, method
from stepcache.profile import Profile

from .choice import Found
from .study import Study
from .tape import Tape
from .team import Run


class HeldOut:
    """Measures on seeds that the study has not seen. `metric` is the name of the search's metric."""

    def __init__(self, study: Study, seeds: Sequence[int], metric: str) -> None:
        self.study, self.seeds, self.metric = study, list(seeds), metric
        self._fewer: dict[int, float] = {}

    @cached_property
    def full(self) -> Tensor:
        """The images of the full run."""
        return self._sampled([self.run()])[0][0]

    def run(self, method: Method | None = None, steps: int | None = None, sampler: str | None = None) -> Run:
        """A run of the held-out seeds; by default the full one."""
        return Run(sampler or self.study.sampler, steps or self.study.steps, method, self.seeds)

    def _sampled(self, runs: Sequence[Run]) -> list[tuple[Tensor, float]]:
        """Images, and calls for one branch."""
        found = []
        for images, calls in self.study.team.sampled(runs):
            self.study.spend(calls * len(self.seeds) / len(self.study.seeds))
            found.append((images, calls))
        return found

    def scores(self, runs: Sequence[Run]) -> list[tuple[list[float], float]]:
        """Of each run the metric of every sample against the full run, and the calls of one branch."""
        metric, full = self.study.metric, self.full
        return [
            ([float(value) for value in metric(images, full, self.seeds)], calls)
            for images, calls in self._sampled(runs)
        ]

    def fewer_steps(self, calls: int) -> float:
        """The mean for a run of as many calls without a cache."""
        twice = self.study.full.evaluations > self.study.steps
        steps = (calls + 1) // 2 if twice else calls
        if steps not in self._fewer:
            self._fewer[steps] = fmean(self.scores([self.run(steps=steps)])[0][0])
        return self._fewer[steps]

    def profile(self, found: Found) -> Profile:
        """The profile and its figures, of what is best on the held-out seeds.

        That is: what was found with its learned weights, without them, or even places with one rule.
        """
        study, calls = self.study, len(found.places)
        rule, tried = study.best_rule(calls), {}
        if found.choice.rule is None:
            tried["learned_weights"] = found.places, found.predictions
            tried["orders_alone"] = found.places, study.orders_alone(found.places)
        if rule is not None:
            tried["even_places"] = rule.places, rule.predictions
        profiles = {name: (self._digits(places), how) for name, (places, how) in tried.items()}
        runs = [self.run(method("profile", path=Profile(*one))) for one in profiles.values()]
        scores = dict(zip(profiles, (scores for scores, _ in self.scores(runs)), strict=True))
        best = max(scores, key=lambda name: fmean(scores[name]))
        known = rule if rule is not None and best == "even_places" else found
        measured = {
            "metric": self.metric,
            "calibration": record(mean=known.mean, seeds=list(study.seeds)),
            "held out": record(
                mean=fmean(scores[best]),
                worst=min(scores[best]),
                **{name: fmean(values) for name, values in scores.items()},
                fewer_steps=self.fewer_steps(calls),
                seeds=self.seeds,
            ),
            "cost in full runs": round(study.spent, 1),
        }
        return Profile(*profiles[best], **made_on(study.full, study.sampler), measured=measured)

    def _digits(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(n in places) for n in range(self.study.full.evaluations))


def made_on(full: Tape, sampler: str) -> dict[str, Any]:
    """What a file says of the full run that it was made on."""
    return {
        "schedule": full.schedule,
        "sampler": sampler,
        "guidance": {name: round(weight, 3) for name, weight in full.guidance.items()},
        "model": full.model,
        "versions": {"stepcache": __version__, "torch": torch.__version__},
    }


def record(**figures: Any) -> dict[str, Any]:
    """Figures as a profile has them, with two decimals."""
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}
