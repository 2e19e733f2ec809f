"""What is skipped at three quarters of the calls: whole evaluations, or every second time all branches but one.

python benchmarks/followers.py [--samples 64] [--steps 20] [--out followers-output]

On the two shipped networks, guidance 3; about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from stepcache import Forecast, Method, Static, UCache
from stepcache.bench import bench
from stepcache.demo.sampling import subject
from stepcache.extend import AdaptiveOrder

SAMPLERS = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "euler", "dpmpp_2m")


def methods(steps: int) -> dict[str, Method]:
    quarter = [1, 1, 1, 0] * (-(-steps // 4))
    return {
        "Forecast, followers": Forecast(skip="uncond"),
        "AdaptiveOrder, followers": Forecast(skip="uncond", predictor=AdaptiveOrder()),
        "reuse, 3 of 4": Static(quarter[:steps]),
        "AdaptiveOrder, 3 of 4": Static(quarter[:steps], predictor=AdaptiveOrder()),
        "UCache 0.75": UCache(0.75),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("followers-output"))
    options = parser.parse_args()
    console = Console()
    results = bench(
        [subject(name) for name in ("unet", "dit")],
        SAMPLERS,
        [options.steps],
        methods(options.steps),
        options.samples,
        others=("euler", "dpmpp_2m", "heun"),
        out=options.out,
        workers=2,
        console=console,
    )
    results.show(console)


if __name__ == "__main__":
    main()
