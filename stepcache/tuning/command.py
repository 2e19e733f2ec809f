"""`stepcache tune` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stepcache._optional import require
from stepcache.calibrated import Calibrated
from stepcache.options import OptionError
from stepcache.profile import Profile

from .calibrate import BUDGET, tune
from .frontier import frontier


def add(parser: argparse.ArgumentParser, network: str, guidance: str) -> None:
    """The command's options; the help texts of --network and --guidance are those of the other commands."""
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--calls", type=int, help="network calls of a run")
    target.add_argument("--speedup", type=float, help="how many times faster, e.g. 3: evaluations over calls")
    target.add_argument("--psnr", type=float, help="what the metric must reach, e.g. 45, with as few calls as possible")
    target.add_argument("--frontier", action="store_true", help="the best of every number of calls, beside its rivals")
    parser.add_argument("--network", required=True, metavar="NAME", help=network)
    parser.add_argument("--guidance", type=float, help=guidance)
    parser.add_argument("--sampler", default="euler", help="(default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(default %(default)s)")
    parser.add_argument("--samples", type=int, default=20, help="seeds: half to calibrate, half held out (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default %(default)s)")
    parser.add_argument("--metric", help="a metric of the subject's (default its first)")
    parser.add_argument(
        "--method",
        default="profile",
        metavar="NAME[:OPTIONS]",
        help="a published method, of which only the main number is searched: magcache, easycache, ... (%(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        help=f"most full runs (default {BUDGET} a step; with --frontier 0.5 a step, for each number of calls)",
    )
    parser.add_argument("--state", type=Path, help="a file to resume from (default: none is kept)")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the trials, by Ray (%(default)s)")
    parser.add_argument("--other", nargs="*", default=[], help="other samplers as rivals, with --frontier")
    parser.add_argument("--out", type=Path, help="the profile (profile.json); with --frontier a folder (frontier)")


def run(options: argparse.Namespace, subject: Any) -> None:
    """Calibrates, writes the profile, and says what it reaches."""
    console = require("rich.console", "bench").Console()
    out = options.out or Path("frontier" if options.frontier else "profile.json")
    (out if options.frontier else out.parent).mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {
        "sampler": options.sampler,
        "steps": options.steps,
        "seeds": range(options.seed, options.seed + options.samples),
        "metric": options.metric,
        "budget": options.budget,
        "state": options.state,
        "workers": options.workers,
        "console": console,
    }
    if options.frontier:
        if options.method != "profile":
            raise OptionError(f"method={options.method!r} with --frontier: it is of profiles alone")
        curve = frontier(subject, others=options.other, **common)
        curve.save(out)
        console.print(curve.table(), markup=False)
        console.print(f"Written to {out}: a profile a number of calls, table.md, points.json, frontier.png")
        return
    target = {"calls": options.calls, "speedup": options.speedup, "psnr": options.psnr}
    found = tune(subject, method=options.method, **target, **common)
    found.save(out)
    console.print(summary(found))
    console.print(f"Written to {out}. Use it: stepcache.load_profile({str(out)!r})")


def summary(found: Calibrated) -> Any:
    """A table of what a calibration reaches."""
    held, calibration = found.measured["held out"], found.measured["calibration"]
    calls = found.calls if isinstance(found, Profile) else held["calls"]
    table = require("rich.table", "bench").Table(title=f"{calls:g} calls of {found.evaluations}")
    for column in (found.measured["metric"], "mean", "worst"):
        table.add_column(column)
    table.add_row("calibration seeds", f"{calibration['mean']:.2f}", "")
    table.add_row("held-out seeds", f"{held['mean']:.2f}", f"{held['worst']:.2f}")
    for name in ("learned weights", "orders alone", "even places", "fewer steps"):
        if (value := held.get(name.replace(" ", "_"))) is not None:
            table.add_row(f"  {name}", f"{value:.2f}", "")
    chosen = f"computed: {''.join(map(str, found.computed))}; " if isinstance(found, Profile) else ""
    table.caption = f"{chosen}cost {found.measured['cost in full runs']} full runs"
    return table
