"""Who runs the trials: this process, or workers that Ray has started."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from stepcache._optional import require
from stepcache.bench.metrics import Metric
from stepcache.bench.ray_pool import ray_pool
from stepcache.bench.subjects import Subject
from stepcache.methods import Method
from stepcache.options import number
from stepcache.profile import Prediction

from .tape import Tape
from .trial import Recording, Trial


class Job(NamedTuple):
    """A trial to run; see `Trial`. `prefix` is a recording, as `Team.tried` has returned it."""

    places: Collection[int]
    learn: bool = True
    prefix: Any = None
    since: int = 0
    rule: tuple[int, float] | None = None
    returns: Mapping[int, float] | None = None


class Run(NamedTuple):
    """A run to sample."""

    sampler: str
    steps: int
    method: Method | None
    seeds: Sequence[int]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        chosen: how the skipped evaluations were predicted.
        scores: the metric of each calibration seed.
        calls: made for one branch.
    """

    chosen: dict[int, Prediction]
    scores: list[float]
    calls: float


class Worker:
    """Runs trials and samples, one after the other.

    Args:
        subject, sampler, steps: which runs.
        seeds: those of the calibration.
        metric: of images against those of the full run.
        full: the tape of the full run.
    """

    def __init__(
        self, subject: Subject, sampler: str, steps: int, seeds: Sequence[int], metric: Metric, full: Tape
    ) -> None:
        self.subject, self.sampler, self.steps, self.seeds = subject, sampler, steps, seeds
        self.metric, self.full = metric, full

    def tried(
        self,
        places: Collection[int],
        learn: bool,
        prefix: Recording | None,
        since: int,
        rule: tuple[int, float] | None,
        returns: Mapping[int, float] | None,
    ) -> tuple[Outcome, Any]:
        """A trial: what came of it, and its recording, for trials that begin alike."""
        trial = Trial(self.full, places, learn, prefix, since, rule, returns)
        trial.run(self.subject, self.sampler, self.steps, self.seeds)
        scores = [float(score) for score in self.metric(trial.tape.images, self.full.images, self.seeds)]
        return Outcome(trial.chosen, scores, trial.tape.calls), self._kept(trial)

    def _kept(self, trial: Trial) -> Any:
        return Recording(trial.tape, trial.chosen)

    def grown(self, n: int) -> tuple[float | None, float]:
        """What becomes, until the end, of an error made at evaluation n; None if none was made. And its calls."""
        count = self.full.evaluations
        trial = Trial(self.full, {*range(count)} - {n}, False, Recording(self.full, {}), n)
        tape = trial.run(self.subject, self.sampler, self.steps, self.seeds).tape
        tape.guidance, tape.scaled = self.full.guidance, self.full.scaled
        made, left = ((tape.latent(at) - self.full.latent(at)).flatten(1).norm(dim=1) for at in (n + 1, count))
        known = bool((made > 0).all() and (left > 0).all())
        return float((left / made).log().mean().exp()) if known else None, tape.calls

    def sampled(self, sampler: str, steps: int, method: Method | None, seeds: Sequence[int]) -> tuple[Tensor, float]:
        """Images, and calls for one branch."""
        result = self.subject.sample(sampler, steps, method, seeds)
        return result.images, result.calls


class _Actor(Worker):
    """A worker in a process of its own. Recordings stay where they are until another trial begins with them."""

    def _kept(self, trial: Trial) -> Any:
        return require("ray", "ray").put(super()._kept(trial))


class Team:
    """Does what is independent of each other. What came of each follows in the order asked for, once it is done."""

    def __init__(self, each: Callable[[str, Sequence[tuple[Any, ...]]], Iterable[Any]]) -> None:
        self._each = each

    def tried(self, jobs: Sequence[Job]) -> Iterable[tuple[Outcome, Any]]:
        return self._each("tried", jobs)

    def grown(self, evaluations: Sequence[int]) -> Iterable[tuple[float | None, float]]:
        return self._each("grown", [(n,) for n in evaluations])

    def sampled(self, runs: Sequence[Run]) -> Iterable[tuple[Tensor, float]]:
        return self._each("sampled", runs)


@contextmanager
def team(
    workers: int, subject: Subject, sampler: str, steps: int, seeds: Sequence[int], metric: Metric, full: Tape
) -> Iterator[Team]:
    """One worker is this process itself; more are Ray's."""
    settings = subject, sampler, steps, seeds, metric, full
    if number("workers", workers, low=1, whole=True) == 1:
        worker = Worker(*settings)
        yield Team(lambda name, tasks: (getattr(worker, name)(*task) for task in tasks))
        return
    with ray_pool(_Actor, workers, getattr(subject, "device", "cpu"), *settings) as pool:
        yield Team(lambda name, tasks: pool.map(lambda actor, task: getattr(actor, name).remote(*task), tasks))
