"""A published method for a target: the number that it is turned by, and MagCache's ratios, found on your model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stepcache.bench.metrics import Metric
from stepcache.bench.subjects import Subject
from stepcache.criteria.magcache import calibration
from stepcache.methods import Method, main_number, method
from stepcache.options import OptionError, shown
from stepcache.settings import Settings, Value

from .held_out import made_on, record
from .tape import Tape
from .trial import Trial

LOWEST, HIGHEST = 1e-4, 1e2
"""The thresholds that are tried lie between these."""

TRIES = 12
"""So many halvings of the interval: the last one is 1.003 wide."""

RATIOS = "ratios"


@dataclass(frozen=True)
class Tried:
    """One value on the calibration seeds: calls for one branch, and the mean of the metric."""

    value: Value
    calls: float
    mean: float


class Published:
    """Tries values of a method's main number on the calibration seeds, and measures the best on the held-out ones.

    Args:
        text: the method's name, with options as text: "magcache:max_skip_steps=6".
        subject, sampler, steps: what is sampled.
        seeds, held_out: to calibrate on, and to measure on.
        metric: by name.
    """

    def __init__(
        self,
        text: str,
        subject: Subject,
        sampler: str,
        steps: int,
        seeds: Sequence[int],
        held_out: Sequence[int],
        metric: str,
        say: Callable[[str, float], None] = lambda sentence, spent: None,
    ) -> None:
        self.text, self.subject, self.sampler, self.steps = text, subject, sampler, steps
        self.seeds, self.held_out, self.metric, self.say = list(seeds), list(held_out), metric, say
        self._fixed: dict[str, Value] = {}
        self._spent = 1.0  # the full run
        if text.partition(":")[0] == "magcache":
            ratios = subject.sample(sampler, steps, method(text, calibrate=True), self.seeds)
            self._fixed[RATIOS] = calibration(ratios.report)
            self._spent += 1
        known = main_number(text.partition(":")[0]) if self.made(None) else None
        if known is None:
            raise OptionError(f"method={shown(text)}: it has no number that a target could be reached by")
        self.knob, default = known
        self.whole = isinstance(default, int)
        self.full: Tape = Trial().run(subject, sampler, steps, self.seeds).tape
        self.tried: dict[Value, Tried] = {}

    def made(self, value: Value | None) -> Method:
        """The method with this value; None: with its default."""
        found = {} if value is None else {self.knob: value}
        return method(self.text, **self._fixed, **found)

    def score(self, value: Value) -> Tried:
        """What a value reaches on the calibration seeds."""
        if value not in self.tried:
            result = self.subject.sample(self.sampler, self.steps, self.made(value), self.seeds)
            scores = self._metric(result.images, self.full.images, self.seeds)
            self.tried[value] = Tried(value, result.calls, fmean(map(float, scores)))
            self.say(f"{self.knob}={value:g}: {result.calls:g} calls, {self.tried[value].mean:.2f}", len(self.tried))
        return self.tried[value]

    @property
    def _metric(self) -> Metric:
        return self.subject.metrics[self.metric]

    def search(
        self,
        enough: Callable[[Tried], bool],
        better: Callable[[Tried], float],
        missed: Callable[[Iterable[Tried]], str],
    ) -> Tried:
        """The best value by `better` of those that are `enough`; if there is none, OptionError with what was `missed`.

        A whole number is tried from 1 to the number of evaluations. Any other is halved in, in its logarithm, between
        values that are enough and values that are not, as if calls fell with it.
        """
        if self.whole:
            for value in range(1, self.full.evaluations + 1):
                self.score(value)
        else:
            ends = [self.score(LOWEST), self.score(HIGHEST)]
            low, high = math.log(LOWEST), math.log(HIGHEST)
            for _ in range(TRIES if enough(ends[0]) != enough(ends[1]) else 0):
                middle = float(f"{math.exp((low + high) / 2):.3g}")
                same = enough(self.score(middle)) == enough(ends[0])
                low, high = (math.log(middle), high) if same else (low, math.log(middle))
        known = [one for one in self.tried.values() if enough(one)]
        if not known:
            raise OptionError(f"method={shown(self.text)}: {missed(self.tried.values())}. Other options may reach it")
        return max(known, key=better)

    def for_calls(self, calls: int) -> Tried:
        """The best with so many calls or fewer."""

        def missed(tried: Iterable[Tried]) -> str:
            fewest = min(t.calls for t in tried)
            return f"{calls} calls are not reached: with every {self.knob} it makes {fewest:g} or more"

        return self.search(lambda tried: tried.calls <= calls, lambda tried: tried.mean, missed)

    def for_mean(self, goal: float) -> Tried:
        """The fewest calls that reach this mean."""

        def missed(tried: Iterable[Tried]) -> str:
            return f"{goal:g} is not reached: its best {self.knob} reaches {max(t.mean for t in tried):.1f}"

        return self.search(lambda tried: tried.mean >= goal, lambda tried: -tried.calls, missed)

    def settings(self, chosen: Tried) -> Settings:
        """The file, with figures on the held-out seeds."""

        def sampled(how: Method | None, steps: int = self.steps) -> Any:
            return self.subject.sample(self.sampler, steps, how, self.held_out)

        full, result = sampled(None), sampled(self.made(chosen.value))
        scores = [float(value) for value in self._metric(result.images, full.images, self.held_out)]
        fewer = max(1, round(result.calls * self.steps / self.full.evaluations))
        plain = self._metric(sampled(None, fewer).images, full.images, self.held_out)
        measured = {
            "metric": self.metric,
            "calibration": record(mean=chosen.mean, calls=chosen.calls, seeds=self.seeds),
            "held out": record(
                mean=fmean(scores),
                worst=min(scores),
                calls=result.calls,
                fewer_steps=fmean(map(float, plain)),
                seeds=self.held_out,
            ),
            "cost in full runs": round(
                self._spent + sum(t.calls for t in self.tried.values()) / self.full.evaluations, 1
            ),
        }
        return Settings(
            self.text,
            {**self._fixed, self.knob: chosen.value},
            self.full.evaluations,
            **made_on(self.full, self.sampler),
            measured=measured,
        )
