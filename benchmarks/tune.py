"""Profiles on the zoo, on seeds that the search has not seen.

python benchmarks/tune.py [--split development|test] [--networks ...] [--samplers ...] [--steps 20] [--calls 5 8 11]

For every network and sampler one recorded run and one measurement of the growth of errors, then a search for each
number of calls. Profiles and rivals are then measured on 64 further seeds. Rivals, each with as many calls or fewer:
Forecast, even places with the best of orders 0 to 2 and shares 0 and 1/4 (chosen on those very seeds), and fewer steps
of the same sampler. What is measured is appended to records.jsonl under `--out`, and cells that are there are not
measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track

from stepcache import Forecast, Method, method
from stepcache.demo import zoo
from stepcache.extend import Prediction, Profile
from stepcache.tuning import frontier
from stepcache.tuning.placement import even

EVEN, FEWER = "even places", "fewer steps"


def at_places(places: frozenset[int], evaluations: int, order: int, share: float) -> Method:
    """One order and share everywhere."""
    digits = tuple(int(n in places) for n in range(evaluations))
    skipped = {n: Prediction(order, share) for n in range(evaluations) if n not in places}
    return method("profile", path=Profile(digits, skipped))


def searched(network: str, sampler: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record a number of calls."""
    found = frontier(
        zoo.subject(network),
        sampler=sampler,
        steps=options.steps,
        seeds=[*range(options.calibrate), *range(1000, 1000 + options.calibrate)],
        calls=options.calls,
        rivals={},
        budget=options.budget,
    )
    return [
        {
            "network": network,
            "sampler": sampler,
            "steps": options.steps,
            "calls": profile.calls,
            "calibration": profile.measured["calibration"]["mean"],
            "cost": profile.measured["cost in full runs"],
            "profile": profile.written(),
        }
        for profile in found.profiles
    ]


def measured(record: dict[str, Any], seeds: list[int], equal: int | None = None) -> dict[str, Any]:
    """The record with what profile and rivals reach on these seeds. `equal`: steps of one more run without a cache."""
    subject = zoo.subject(record["network"])
    sampler, steps, calls = record["sampler"], record["steps"], record["calls"]
    full = subject.sample(sampler, steps, None, seeds).images

    def reached(how: Method | None, count: int = steps) -> float:
        return fmean(map(float, zoo.psnr_of_range(subject.sample(sampler, count, how, seeds).images, full, seeds)))

    def best(methods: Iterable[Method]) -> float | None:
        affordable = [one for one in methods if subject.sample(sampler, steps, one, seeds[:1]).calls <= calls]
        return max(map(reached, affordable), default=None)

    tuned = method("profile", path=Profile.read(json.dumps(record["profile"])))
    evens = (
        at_places(frozenset(even(steps, calls, start)), steps, order, share)
        for start in (1, 2)
        for order in (0, 1, 2)
        for share in (0.0, 0.25)
    )
    plain = {count: reached(None, count) for count in sorted({calls, equal or calls})}
    return record | {
        "seeds": len(seeds),
        "mean": reached(tuned),
        "Forecast": best(Forecast(interval, min_evaluations=0) for interval in range(2, 11)),
        EVEN: best(evens),
        FEWER: plain[calls],
        "without a cache": plain,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row a cell, and the mean gain over each rival."""
    lines = ["| network, sampler | calls | tuned | Forecast | even places | fewer steps | cost |", "|---" * 7 + "|"]
    for one in sorted(records, key=lambda r: (r["steps"], r["calls"], r["sampler"])):
        texts = ["" if one[name] is None else f"{one[name]:.1f}" for name in ("Forecast", EVEN, FEWER)]
        head = f"{one['network']}, {one['sampler']} | {one['calls']} of {one['steps']} | **{one['mean']:.1f}**"
        lines.append(f"| {head} | {' | '.join(texts)} | {one['cost']:.0f} |")
    for steps, calls in sorted({(one["steps"], one["calls"]) for one in records}):
        cells = [one for one in records if (one["steps"], one["calls"]) == (steps, calls)]
        gains = {}
        for name in ("Forecast", EVEN, FEWER):
            known = [one["mean"] - one[name] for one in cells if one[name] is not None]
            gains[name] = f"{fmean(known):+.1f} over {name} (worst {min(known):+.1f})" if known else f"no {name}"
        lines.append(f"\n{calls} of {steps}, {len(cells)} cells: {', '.join(gains.values())}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=sorted(zoo.SPLITS), default="development")
    parser.add_argument("--networks", nargs="+", metavar="NAME")
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calls", nargs="+", type=int, default=[5, 8, 11])
    parser.add_argument(
        "--calibrate", type=int, default=8, help="seeds to calibrate on; a profile chooses on as many others"
    )
    parser.add_argument("--seeds", type=int, default=64, help="seeds to measure on")
    parser.add_argument("--equal", type=int, help="steps of one more run without a cache, recorded beside the others")
    parser.add_argument("--budget", type=float, default=22, help="full runs for the trials of one number of calls")
    parser.add_argument("--out", type=Path, default=Path("tune-output"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(one["network"], one["sampler"], one["steps"]) for one in records}
    networks = options.networks or zoo.SPLITS[options.split]
    cells = [(network, sampler) for network in networks for sampler in options.samplers]
    for network, sampler in track([cell for cell in cells if (*cell, options.steps) not in known]):
        seeds = [*range(3000, 3000 + options.seeds)]
        new = [measured(one, seeds, options.equal) for one in searched(network, sampler, options)]
        records += new
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in new)
    (options.out / "tune.md").write_text(table(records), encoding="utf-8")
    Console().print(table(records), markup=False)


if __name__ == "__main__":
    main()
