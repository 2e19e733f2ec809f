"""The demo's table through diffusers: both trained networks, every scheduler of the demo's pipelines, 20 steps.

python benchmarks/diffusers_quality.py [--samples 64] [--out diffusers-output]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from stepcache.bench import bench
from stepcache.demo import pipelines
from stepcache.demo.run import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("diffusers-output"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    for network, schedulers in pipelines.SCHEDULERS.items():
        subject, out = pipelines.measured(network), options.out / network
        bench(subject, list(schedulers), [20], METHODS, options.samples, out=out, console=console).show(console)


if __name__ == "__main__":
    main()
