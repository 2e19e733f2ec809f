"""`stepcache compare`: methods beside the full run and beside fewer steps, image by image, for a page to look at.

from stepcache.bench import compare

compare(subject, {"Forecast": Forecast(), "UCache": UCache()}, "euler", 20, seeds=[0, 1]).save("compare.html")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from stepcache import Forecast, Method, UCache
from stepcache.masks import LONGEST
from stepcache.options import OptionError, number

from .page import Comparison, Entry, Shot
from .run import spacing, within
from .subjects import Sampled, Subject

SHOWN: dict[str, Method] = {"Forecast 2x": Forecast(2), "Forecast 3x": Forecast(3), "UCache": UCache()}
"""The methods of a comparison that names none."""


def compare(
    subject: Subject,
    methods: Mapping[str, Method] | None = None,
    sampler: str = "euler",
    steps: int = 20,
    seeds: Sequence[int] = (0,),
    captions: Callable[[int], str] = "seed {}".format,
    repeats: int = 1,
) -> Comparison:
    """Samples every seed by itself: the full run, each method, and fewer steps with as many calls as the method made.

    Args:
        subject: what is sampled; see `stepcache.bench.subjects`.
        methods: by the name they have on the page; `SHOWN` by default.
        sampler, steps: which run.
        seeds: one image each.
        captions: what the page calls a seed's image.
        repeats: every run is made so many times; seconds are those of the fastest.

    Raises OptionError if there is no seed, a number is out of range, or the samples are no images.
    """
    methods = SHOWN if methods is None else methods
    steps = number("steps", steps, low=1, high=LONGEST, whole=True)
    repeats = number("repeats", repeats, low=1, high=1000, whole=True)
    if not seeds:
        raise OptionError("seeds: accepted is one or more")
    runs = _Runs(subject, sampler, methods)
    pairs: dict[str, list[tuple[Key, Key | None]]] = {name: [] for name in methods}
    for seed in seeds:
        whole = runs.make((seed, steps, None))
        for name, made in pairs.items():
            cached = runs.make((seed, steps, name))
            budget = within(runs.spacing, cached.calls) if cached.calls < whole.calls else None
            made.append(((seed, steps, name), None if budget is None else (seed, budget, None)))
            if budget is not None:
                runs.make((seed, budget, None))
    runs.repeat(repeats - 1)
    return Comparison(
        subject.name,
        sampler,
        steps,
        next(iter(subject.metrics)),
        tuple(captions(seed) for seed in seeds),
        tuple(runs.shots[seed, steps, None] for seed in seeds),
        tuple(
            Entry(
                name,
                tuple(runs.shots[key] for key, _ in made),
                tuple(None if fewer is None else runs.shots[fewer] for _, fewer in made),
            )
            for name, made in pairs.items()
        ),
    )


Key = tuple[int, int, str | None]
"""A run: its seed, its steps, and the name of its method, None for none."""


class _Runs:
    """A subject's runs with one sampler, each made once: methods share the full run and rivals of as many steps."""

    def __init__(self, subject: Subject, sampler: str, methods: Mapping[str, Method]) -> None:
        self.subject, self.sampler, self.methods = subject, sampler, methods
        self.shots: dict[Key, Shot] = {}
        self._full: dict[int, Tensor] = {}

    @cached_property
    def spacing(self) -> tuple[float, float]:
        return spacing(self.subject, self.sampler, 0)

    def make(self, key: Key) -> Shot:
        """One image, marked against the first that was made of its seed, the full run's."""
        if key in self.shots:
            return self.shots[key]
        if not self.shots:
            self.subject.sample(
                self.sampler, 2, None, [key[0]]
            )  # the first calls of a process are slower than the rest
        made = self._sample(key)
        if made.images.ndim not in (4, 5) or made.images.shape[-3] not in (1, 3):
            raise OptionError(
                f"{self.subject.name}: its samples have the shape {tuple(made.images.shape)}; accepted are images "
                "(1, C, H, W) and videos (1, F, C, H, W) of 1 or 3 channels. Latents need decode="
            )
        full = self._full.setdefault(key[0], made.images)
        metric = next(iter(self.subject.metrics.values()))
        score = float(metric(made.images, full, [key[0]])[0])
        self.shots[key] = Shot(made.images[0], key[1], made.calls, made.seconds, score, made.report)
        return self.shots[key]

    def repeat(self, times: int) -> None:
        """Makes all runs again, in turn, so that other work of the machine slows all alike; keeps the least seconds."""
        for _ in range(times):
            for key, shot in self.shots.items():
                self.shots[key] = replace(shot, seconds=min(shot.seconds, self._sample(key).seconds))

    def _sample(self, key: Key) -> Sampled:
        seed, steps, name = key
        return self.subject.sample(self.sampler, steps, None if name is None else self.methods[name], [seed])
