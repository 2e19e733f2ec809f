"""What a skipped evaluation should return: every predictor at the same calls, beside reuse and fewer steps.

python benchmarks/forecast.py [--samples 60] [--steps 20] [--markdown forecast.md]

The same table as the demo's, on the two shipped networks, guidance 3; about ten minutes on two cores. All of `every 2`
compute the same evaluations, and all of `every 3`; only what they return for the others differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from stepcache import DMD, EasyCache, FiniteDifference, Forecast, Lagrange, Method, Reuse, Spectrum, TaylorSeer, UCache
from stepcache.demo.run import publish, sampled

SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "heun", "dpmpp_sde")
METHODS: dict[str, Method | None] = {
    "full run": None,
    "UCache": UCache(),
    "EasyCache": EasyCache(),
    "Spectrum": Spectrum(),
    **{
        f"every {n}, {name}": Forecast(n, predictor=predictor)
        for n in (2, 3)
        for name, predictor in {
            "reuse": Reuse(),
            "Lagrange 1": Lagrange(1),
            "Lagrange 2": Lagrange(2),
            "TaylorSeer 1": TaylorSeer(1),
            "TaylorSeer 2": TaylorSeer(2),
            "h2": FiniteDifference(1),
            "DMD": DMD(),
        }.items()
    },
    "Forecast(2)": Forecast(2),
    "Forecast(3)": Forecast(3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    jobs = [(name, sampler, options.steps) for name in ("unet", "dit") for sampler in SAMPLERS]
    rows = [row for block in sampled(jobs, METHODS, options.samples, 0, Console()) for row in block.rows]
    publish(rows, Console(), options.markdown)


if __name__ == "__main__":
    main()
