"""The demo's table through diffusers: both trained networks, every scheduler of the demo's pipelines, 20 steps.

python benchmarks/diffusers_quality.py [--samples 40] [--markdown diffusers.md]

Speed is that of one run each, on one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from stepcache import Method, Off
from stepcache.demo import pipelines
from stepcache.demo.run import METHODS, Row, Scores, publish, row
from stepcache.demo.sampling import Sampled
from stepcache.samplers.diffusers import attach

STEPS = 20


def sampled(pipe: pipelines.DigitsPipeline, steps: int, method: Method | None, samples: int) -> Sampled:
    labels = torch.arange(samples) % 10
    with attach(pipe, method or Off()) as cache:
        begun = time.perf_counter()
        images = pipe(labels, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        return Sampled(images, time.perf_counter() - begun, cache.report)


def block(network: str, scheduler: str, samples: int, scores: Scores) -> list[Row]:
    pipe = pipelines.pipeline(network, scheduler)
    sampled(pipe, 2, None, samples)
    results = {name: sampled(pipe, STEPS, method, samples) for name, method in METHODS.items()}
    budgets = sorted({r.report.calls // len(r.report.conditions) for r in results.values()} - {STEPS})
    fewer = {budget: sampled(pipe, budget, None, samples) for budget in budgets}
    return [row(scores, network, scheduler, STEPS, name, results, fewer) for name in METHODS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [(network, name) for network, schedulers in pipelines.SCHEDULERS.items() for name in schedulers]
    scores = Scores()
    rows = [made for job in track(jobs) for made in block(*job, options.samples, scores)]
    publish(rows, Console(), options.markdown)


if __name__ == "__main__":
    main()
