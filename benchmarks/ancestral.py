"""What to set for samplers that add fresh noise: UCache with and without reset, and masks.

python benchmarks/ancestral.py [--samples 64] [--out ancestral-output]

On the two shipped networks, 20 steps, guidance 3; about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from rich.console import Console

from stepcache import EasyCache, Method, Static, UCache
from stepcache.bench import bench
from stepcache.demo.sampling import subject

SAMPLERS = ("euler_ancestral", "dpmpp_2m_sde")


def methods() -> dict[str, Method]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reset=0 with decay=1 is what is to be measured
        frozen = {f"reset=0, {t:g}": UCache(t, reset=False) for t in (1.0, 3.0)}
    decaying = {
        f"reset=0 decay {d:g}, {t:g}": UCache(t, reset=False, decay=d) for d in (0.9, 0.5) for t in (1.0, 2.0, 3.0)
    }
    return {
        **{f"reset=1, {t:g}": UCache(t) for t in (0.5, 1.0, 1.5, 2.0)},
        **frozen,
        **decaying,
        "EasyCache 1": EasyCache(1.0),
        **{f"static mask {name}": Static(name) for name in ("slow", "medium")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("ancestral-output"))
    options = parser.parse_args()
    console = Console()
    subjects = [subject(name) for name in ("unet", "dit")]
    results = bench(subjects, SAMPLERS, [20], methods(), options.samples, out=options.out, workers=2, console=console)
    results.show(console)


if __name__ == "__main__":
    main()
