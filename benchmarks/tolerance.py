"""Whether one tolerance is one error: ForecastTolerance on both shipped networks, two samplers, two step counts.

python benchmarks/tolerance.py [--samples 64] [--guidance 3] [--out tolerance-output]

The table of `stepcache bench`, and below it the band of each tolerance: the highest PSNR of any cell less the lowest.
Forecast(2) and Forecast(3) stand beside it. A batch is decided about at once. About ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from stepcache import Forecast
from stepcache.bench import bench
from stepcache.demo import sampling
from stepcache.experimental import ForecastTolerance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=sampling.GUIDANCE)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m"])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--out", type=Path, default=Path("tolerance-output"))
    options = parser.parse_args()
    console = Console()
    methods = {f"tolerance {t:g}": ForecastTolerance(t, options.guidance) for t in options.tolerances}
    results = bench(
        [sampling.subject(name, options.guidance) for name in ("unet", "dit")],
        options.samplers,
        options.steps,
        {**methods, "Forecast(2)": Forecast(2), "Forecast(3)": Forecast(3)},
        options.samples,
        options.seed,
        options.batch,
        others=(),
        out=options.out,
        workers=2,
        console=console,
    )
    results.show(console)
    for name in methods:
        reached = [row.scores["PSNR"].mean for row in results.rows if row.method == name]
        console.print(
            f"{name}: {min(reached):.1f} to {max(reached):.1f} dB, a band of {max(reached) - min(reached):.1f}"
        )


if __name__ == "__main__":
    main()
