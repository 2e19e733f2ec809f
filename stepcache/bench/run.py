"""The measurement: for every subject, sampler, number of steps and batch of seeds, all methods and their rivals."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepcache import EasyCache, Forecast, Method, Spectrum, Static, UCache
from stepcache._optional import require
from stepcache.options import OptionError

from .ray_pool import ray_pool
from .results import Results
from .subjects import Sampled, Subject

METHODS: dict[str, Method] = {
    "Forecast": Forecast(),
    "Forecast(3)": Forecast(3),
    "UCache": UCache(),
    "EasyCache": EasyCache(),
    "Spectrum": Spectrum(),
    "static mask medium": Static("medium"),
}
FULL = "full run"
RECORDS, TABLE, NUMBERS, PLOT = "records.jsonl", "table.md", "results.json", "pareto.png"
"""What `bench` writes into its folder."""


@dataclass(frozen=True)
class Unit:
    """What is measured at once, and stored at once: one batch of seeds."""

    subject: Subject
    sampler: str
    steps: int
    seeds: tuple[int, ...]
    methods: Mapping[str, Method]
    others: tuple[str, ...]
    spacings: Mapping[str, tuple[float, float]]

    @property
    def key(self) -> str:
        """Of everything that the numbers depend on, but the model's weights."""
        methods = {name: repr(method) for name, method in self.methods.items()}
        subject = self.subject
        told = (subject.name, self.sampler, self.steps, self.seeds, methods, self.others, [*subject.metrics])
        settings = {name: repr(value) for name, value in subject.settings.items()}
        return hashlib.sha1(json.dumps([*told, subject.limit, settings]).encode()).hexdigest()


def bench(
    subjects: Subject | Iterable[Subject],
    samplers: Sequence[str] = ("euler", "dpmpp_2m", "euler_ancestral"),
    steps: Sequence[int] = (20,),
    methods: Mapping[str, Method] | None = None,
    samples: int = 64,
    seed: int = 0,
    batch: int = 16,
    others: Sequence[str] | None = None,
    out: str | Path | None = None,
    workers: int = 1,
    console: Any = None,
    ray: bool = False,
) -> Results:
    """Every method beside the full run, fewer steps of the same sampler and the best other sampler, on paired seeds.

    Args:
        subjects: what is sampled; see `stepcache.bench.subjects`.
        samplers, steps: which runs.
        methods: by the name they have in the table; `METHODS` by default.
        samples: seeds `seed`, `seed + 1`, ...; the same for everything that is compared.
        batch: so many are sampled at once, and decided about at once. Speed is the median over batches of the ratio of
            seconds within one batch.
        others: the other samplers that are tried, without cache, with as many calls as a method; `samplers` by default.
        out: a folder for the records, the table, the numbers and the plot. A measurement that was broken off goes on
            where it was; more samples, samplers or steps use what is there. None: nothing is written.
        workers: processes; the subject must then be picklable. On a CPU two processes of one thread disturb each other
            less than one of two threads.
        ray: Ray (the extra `ray`) starts them: a GPU each if the subject's `device` is one, and on every machine of the
            cluster that RAY_ADDRESS names.
        console: of `rich`, to show the progress on.

    Raises OptionError for a number under 1, methods called "full run", and a folder whose records another model made.
    """
    subjects = list(subjects) if isinstance(subjects, Iterable) else [subjects]
    methods = dict(METHODS if methods is None else methods)
    for name, value in {"samples": samples, "batch": batch, "workers": workers, "steps": min(steps, default=0)}.items():
        if value < 1:
            raise OptionError(f"{name}={value}: accepted is 1 or more")
    if FULL in methods:
        raise OptionError(f"methods: {FULL!r} is there anyway, and is what the others are compared with")
    chunks = [tuple(range(at, min(at + batch, seed + samples))) for at in range(seed, seed + samples, batch)]
    others = tuple(samplers if others is None else others)
    _LIMITS.clear()
    units = []
    for subject in subjects:
        spacings = {sampler: spacing(subject, sampler, seed) for sampler in {*samplers, *others}}
        units += [
            Unit(subject, sampler, count, chunk, methods, tuple(o for o in others if o != sampler), spacings)
            for chunk in chunks
            for sampler in samplers
            for count in steps
        ]
    store = Store(None if out is None else Path(out) / RECORDS, {s.name: trait(s, samplers[0], seed) for s in subjects})
    missing = [unit for unit in units if unit.key not in store]
    with require("rich.progress", "bench").Progress(console=console, disable=console is None) as bar:
        task = bar.add_task("sampling", total=len(units), completed=len(units) - len(missing))
        for unit, records in measured(missing, workers, ray=ray):
            store.add(unit, records)
            bar.advance(task)
    results = Results([record for unit in units for record in store[unit.key]])
    if out is not None:
        (Path(out) / TABLE).write_text(results.markdown(), encoding="utf-8")
        results.to_json(Path(out) / NUMBERS)
        results.plot(Path(out) / PLOT)
    return results


def trait(subject: Subject, sampler: str, seed: int) -> list[float]:
    """Eight numbers by which a model is told from another of the same name."""
    flat = subject.sample(sampler, 2, None, [seed]).images.flatten()
    return [round(float(value), 4) for value in flat[:: max(1, len(flat) // 8)][:8]]


class Store:
    """Records by unit, kept in a file of one line a unit if a path is given."""

    def __init__(self, path: Path | None, traits: Mapping[str, list[float]]) -> None:
        self._path, self._traits = path, traits
        self._units: dict[str, list[dict[str, Any]]] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):  # broken off while writing: what follows must not join that line
            path.write_text(text + "\n", encoding="utf-8")
        for line in text.splitlines():
            try:
                unit = json.loads(line)
            except json.JSONDecodeError:
                continue
            mine = traits.get(unit["subject"])
            if mine and any(abs(a - b) > 0.02 for a, b in zip(mine, unit["trait"], strict=True)):
                raise OptionError(
                    f"out={str(path.parent)!r}: its records of {unit['subject']!r} were made by another model; give "
                    "another folder or another name"
                )
            self._units[unit["key"]] = unit["records"]

    def __contains__(self, key: str) -> bool:
        return key in self._units

    def __getitem__(self, key: str) -> list[dict[str, Any]]:
        return self._units[key]

    def add(self, unit: Unit, records: list[dict[str, Any]]) -> None:
        self._units[unit.key] = records
        if self._path is not None:
            name = unit.subject.name
            line = {"key": unit.key, "subject": name, "trait": self._traits[name], "records": records}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def measured(
    units: Iterable[Any],
    workers: int,
    measure: Callable[[Any], list[dict[str, Any]]] | None = None,
    ray: bool = False,
) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Units with their records, as they are done. `measure` makes a unit's records, None: `compared`."""
    measure = measure or compared
    if ray:
        units = list(units)
        devices = {str(getattr(unit.subject, "device", "cpu")) for unit in units}
        with ray_pool(_Measuring, workers, max(devices, default="cpu"), measure) as pool:
            for number, records in pool.map_unordered(
                lambda actor, task: actor.records.remote(*task), list(enumerate(units))
            ):
                yield units[number], records
        return
    if workers == 1:
        for unit in units:
            yield unit, measure(unit)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
        futures = {pool.submit(measure, unit): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()


class _Measuring:
    """Ray's worker."""

    def __init__(self, measure: Callable[[Any], list[dict[str, Any]]]) -> None:
        self._measure = measure

    def records(self, number: int, unit: Any) -> tuple[int, list[dict[str, Any]]]:
        return number, self._measure(unit)


def compared(unit: Unit) -> list[dict[str, Any]]:
    """One batch: the full run, every method, and at the calls that each made fewer steps and the other samplers.

    A record holds who made it (`role`: full, method, fewer, other), calls per branch, seconds, and a number a sample
    for every metric, against the full run; in `limit` the first metric against the subject's limit.
    """
    subject, seeds = unit.subject, unit.seeds
    subject.sample(unit.sampler, 2, None, seeds)  # the first calls of a process are slower than the rest
    full = subject.sample(unit.sampler, unit.steps, None, seeds)
    limit = None
    if subject.limit is not None and unit.sampler not in subject.noisy:
        limit = exact(subject, subject.limit, seeds)

    def record(role: str, name: str, sampler: str, steps: int, result: Sampled, budget: float) -> dict[str, Any]:
        first = next(iter(subject.metrics.values()))
        return {
            "subject": subject.name,
            "sampler": unit.sampler,
            "steps": unit.steps,
            "seeds": list(seeds),
            "role": role,
            "name": name,
            "own_sampler": sampler,
            "own_steps": steps,
            "budget": budget,
            "calls": result.calls,
            "seconds": result.seconds,
            "same": torch.equal(result.images, full.images),
            "scores": {
                name: [float(v) for v in metric(result.images, full.images, seeds)]
                for name, metric in subject.metrics.items()
            },
            "limit": None if limit is None else [float(v) for v in first(result.images, limit, seeds)],
        }

    records = [record("full", FULL, unit.sampler, unit.steps, full, full.calls)]
    for name, method in unit.methods.items():
        result = subject.sample(unit.sampler, unit.steps, method, seeds)
        records.append(record("method", name, unit.sampler, unit.steps, result, result.calls))
    for budget in sorted({r["calls"] for r in records} - {full.calls}):
        for sampler in (unit.sampler, *unit.others):
            count = within(unit.spacings[sampler], budget)
            if count is not None:
                role = "fewer" if sampler == unit.sampler else "other"
                records.append(record(role, role, sampler, count, subject.sample(sampler, count, None, seeds), budget))
    return records


def spacing(subject: Subject, sampler: str, seed: int) -> tuple[float, float]:
    """The calls that a sampler makes in two steps, and how many more in each further step."""
    two, three = (subject.sample(sampler, steps, None, [seed]).calls for steps in (2, 3))
    return two, max(1, three - two)


def within(spacing: tuple[float, float], budget: float) -> int | None:
    """The most steps that a sampler makes with so many calls; None if it cannot make any."""
    at_two, more = spacing
    steps = 2 + int((budget - at_two) // more)
    return steps if steps >= 1 else None


_LIMITS: dict[tuple[Any, ...], Tensor] = {}


def exact(subject: Subject, limit: tuple[str, int], seeds: tuple[int, ...]) -> Tensor:
    """The images of the subject's limit; the last one made is kept, since units of the same seeds follow each other."""
    key = (subject.name, limit, seeds)
    if key not in _LIMITS:
        _LIMITS.clear()
        _LIMITS[key] = subject.sample(*limit, None, seeds).images
    return _LIMITS[key]
