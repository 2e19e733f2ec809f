"""What a profile is worth where it was not made: other classes, guidance, numbers of steps, samplers and seeds.

python benchmarks/transfer.py [--records tune-output/records.jsonl] [--networks unet@3 dit@3] [--calls 8]

Reads the profiles that benchmarks/tune.py has found in 20 steps, and runs each elsewhere, on seeds of its own. Beside
it: fewer steps, and Forecast at the interval that comes nearest to its calls, with as many or more.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from rich.console import Console

from stepcache import Forecast, Method, method
from stepcache.bench import KDiffusion
from stepcache.demo import zoo
from stepcache.extend import Profile

CALIBRATED = range(8)
"""Classes that benchmarks/tune.py calibrates on; digits have ten, and a seed's last figure is its class."""


def places(network: str, sampler: str, seeds: int) -> Iterator[tuple[str, str, str, int, list[int]]]:
    """What changes, and with it network, sampler, steps and seeds."""
    fresh = range(2000, 3000)
    known = [seed for seed in fresh if seed % 10 in CALIBRATED][:seeds]
    yield "nothing", network, sampler, 20, known
    if network not in zoo.galaxy.FILES:
        yield "classes", network, sampler, 20, [seed for seed in fresh if seed % 10 not in CALIBRATED][:seeds]
        plain = network.partition("@")[0]
        for other in (f"{plain}@{scale:g}" for scale in zoo.GUIDANCES):
            if other in zoo.NAMES and other != network:
                yield f"guidance {other.partition('@')[2]}", other, sampler, 20, known
    for steps in (15, 25, 30, 40):
        yield f"{steps} steps", network, sampler, steps, known
    yield "sampler", network, "dpmpp_2m" if sampler == "euler" else "euler", 20, known


def forecast(subject: KDiffusion, sampler: str, steps: int, calls: int, seed: int) -> tuple[int, Method]:
    """Forecast with as many calls or a few more."""
    for interval in range(10, 1, -1):
        chosen = Forecast(interval, min_evaluations=0)
        made = subject.sample(sampler, steps, chosen, [seed]).calls
        if made >= calls:
            return round(made), chosen
    return round(made), chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("tune-output/records.jsonl"))
    parser.add_argument("--networks", nargs="+", default=["unet@3", "dit@3", "hsc32"])
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=16)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # that the model is another is what is measured
    console = Console(width=120)
    console.print(
        "| network | changed | calls | profile | Forecast | fewer steps |\n|---|---|---|---|---|---|", markup=False
    )
    for line in options.records.read_text().splitlines():
        record = json.loads(line)
        wanted = (options.sampler, 20, options.calls)
        if record["network"] not in options.networks or (record["sampler"], record["steps"], record["calls"]) != wanted:
            continue
        profile = Profile.read(json.dumps(record["profile"]))
        for changed, network, sampler, steps, seeds in places(record["network"], options.sampler, options.seeds):
            subject = zoo.subject(network)
            calls = profile.scaled(steps).calls
            made, rival = forecast(subject, sampler, steps, calls, seeds[0])
            full = subject.sample(sampler, steps, None, seeds).images
            runs = [(steps, method("profile", path=profile)), (steps, rival), (calls, None)]
            scores = [
                fmean(zoo.psnr_of_range(subject.sample(sampler, count, how, seeds).images, full, seeds))
                for count, how in runs
            ]
            texts = [f"**{scores[0]:.1f}**", f"{scores[1]:.1f} ({made})", f"{scores[2]:.1f}"]
            console.print(f"| {record['network']} | {changed} | {calls} | {' | '.join(texts)} |", markup=False)


if __name__ == "__main__":
    main()
