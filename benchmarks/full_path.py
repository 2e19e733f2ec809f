"""What the wrapper costs if nothing is skipped: miniature pipelines of diffusers with it, over the same without.

python benchmarks/full_path.py [--repeats 15] [--steps 20]

The networks take a few milliseconds a call, so that bookkeeping shows as nowhere else. `gated` is a method whose gate
computes everything, `decided` one whose criterion is asked each time and computes, `off` no method. Runs with and
without take turns; the median of their ratios is shown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tiny_diffusers

import stepcache
from stepcache import Forecast, Off, UCache

METHODS = {
    "off": Off(),
    "Forecast, gated": Forecast(warmup=10_000),
    "UCache, gated": UCache(1e-30, start=0.0, end=1.0, warmup=10_000),
    "UCache, decided": UCache(1e-30, start=0.0, end=1.0),
}
PIPELINES = ("sdxl", "flux", "wan")


def generate(pipe, name: str, steps: int) -> float:
    """Seconds of one run."""
    options = argparse.Namespace(dtype=torch.float32, device="cpu", guidance=5.0, seed=0)
    prompt = tiny_diffusers.inputs("a lighthouse", options, pooled=name != "wan", negative=name != "flux")
    frames = {"num_frames": 5} if name == "wan" else {}
    begun = time.perf_counter()
    pipe(**prompt, num_inference_steps=steps, width=32, height=32, output_type="latent", **frames)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    table = Table("pipeline", "ms a step", *METHODS)
    for name in PIPELINES:
        pipe = getattr(tiny_diffusers, name)(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        generate(pipe, name, options.steps)
        ratios = {title: [] for title in METHODS}
        plain = []
        for _ in track(range(options.repeats), description=name):
            for title, method in METHODS.items():
                without = generate(pipe, name, options.steps)
                with stepcache.attach(pipe, method):
                    ratios[title].append(generate(pipe, name, options.steps) / without)
                plain.append(without)
        cells = (f"{statistics.median(ratios[title]):.2f}x" for title in METHODS)
        table.add_row(name, f"{1e3 * statistics.median(plain) / options.steps:.1f}", *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
