"""`stepcache compare`: methods beside the full run and beside fewer steps, image by image, for a page to look at.

from stepcache.bench import compare

compare(subject, {"Forecast": Forecast(), "UCache": UCache()}, "euler", 20, seeds=[0, 1]).save("compare.html")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from stepcache import Forecast, Method, UCache
from stepcache.masks import LONGEST
from stepcache.options import OptionError, number

from .page import Comparison, Entry, Shot
from .run import spacing, within
from .subjects import Subject

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
    run = _Runs(subject, sampler, repeats)
    entries: dict[str, list[tuple[Shot, Shot | None]]] = {name: [] for name in methods}
    full = []
    for seed in seeds:
        whole = run.shot(seed, steps, None)
        full.append(whole)
        for name, method in methods.items():
            shot = run.shot(seed, steps, method, whole)
            budget = within(run.spacing, shot.calls) if shot.calls < whole.calls else None
            entries[name].append((shot, None if budget is None else run.shot(seed, budget, None, whole)))
    return Comparison(
        subject.name,
        sampler,
        steps,
        next(iter(subject.metrics)),
        tuple(captions(seed) for seed in seeds),
        tuple(full),
        tuple(Entry(name, *zip(*pairs, strict=True)) for name, pairs in entries.items()),
    )


class _Runs:
    """A subject's runs with one sampler; those without a cache are kept, since methods share their rivals."""

    def __init__(self, subject: Subject, sampler: str, repeats: int) -> None:
        self.subject, self.sampler, self.repeats = subject, sampler, repeats
        self._known: dict[tuple[int, int], Shot] = {}

    @cached_property
    def spacing(self) -> tuple[float, float]:
        return spacing(self.subject, self.sampler, 0)

    def shot(self, seed: int, steps: int, method: Method | None, full: Shot | None = None) -> Shot:
        """One image, marked against the full run's."""
        if method is None and (seed, steps) in self._known:
            return self._known[seed, steps]
        if not self._known:
            self.subject.sample(self.sampler, 2, None, [seed])  # the first calls of a process are slower than the rest
        runs = [self.subject.sample(self.sampler, steps, method, [seed]) for _ in range(self.repeats)]
        images, (metric, *_) = runs[0].images, self.subject.metrics.values()
        if images.ndim not in (4, 5) or images.shape[-3] not in (1, 3):
            raise OptionError(
                f"{self.subject.name}: its samples have the shape {tuple(images.shape)}; accepted are images "
                "(1, C, H, W) and videos (1, F, C, H, W) of 1 or 3 channels. Latents need decode="
            )
        score = metric(images, images if full is None else full.image[None], [seed])[0]
        seconds = min(run.seconds for run in runs)
        shot = Shot(images[0], steps, runs[0].calls, seconds, float(score), runs[0].report)
        if method is None:
            self._known[seed, steps] = shot
        return shot
