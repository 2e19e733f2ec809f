"""`stepcache demo`: a table and pictures from the two shipped networks."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import torch
from torch import Tensor

from stepcache import EasyCache, Forecast, Method, Report, Static, StepMask, UCache
from stepcache.bench import Results, Subject, bench
from stepcache.extras import need

from .sampling import subject

SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral")
STEPS = (20, 30)
OTHERS = ("euler", "dpmpp_2m", "heun")
METHODS: dict[str, Method] = {
    "Forecast": Forecast(),
    "Forecast(3)": Forecast(3),
    "UCache": UCache(),
    "EasyCache": EasyCache(),
    "static mask medium": Static("medium"),
    "UCache, mask fast": UCache(mask=StepMask("fast", "dynamic")),
}
SHOWN = ("euler", 20)
"""The sampler and steps of the contact sheet."""


def demo(out: Path, samples: int = 10, seed: int = 0) -> Results:
    """Runs everything, prints the table and writes what `bench` writes, contact-sheet.png and trace.png to `out`."""
    if samples < 10 or samples % 10:
        raise ValueError(f"--samples {samples}: accepted is a multiple of 10, so that every digit is asked as often")
    console = need("rich.console", "demo").Console()
    subjects = [subject(name) for name in ("unet", "dit")]
    workers = min(2, os.cpu_count() or 1)
    results = bench(subjects, SAMPLERS, STEPS, METHODS, samples, seed, 10, OTHERS, out, workers, console)
    results.show(console)
    console.print(
        f"{samples} samples a run, guidance 3. Calls are for one condition. Marks are means against the full run of "
        "as many steps, with a 95 % interval. Fewer steps: the same sampler without cache in as many calls, and how "
        "far the method is ahead of it, sample by sample. To the limit: against DPM++ 2M in 200 steps; best other: "
        "the sampler that is nearest to that with as many calls (under Euler a, to the full run). In brackets: fewer "
        "steps. Right: the classifier takes it for the digit asked for."
    )
    sheets, trace = {}, None
    for network in subjects:
        sheets[network.name], trace = strips(network, seed)
    contact_sheet(sheets, out / "contact-sheet.png")
    trace.plot(out / "trace.png")
    console.print(f"Written to {out}: contact-sheet.png, trace.png, table.md, results.json, pareto.png")
    return results


def strips(network: Subject, seed: int) -> tuple[dict[str, Tensor], Report]:
    """Ten digits of every method and of fewer steps, with as many calls as UCache made; and UCache's report."""
    seeds = range(seed, seed + 10)
    runs = {name: network.sample(*SHOWN, method, seeds) for name, method in {"full run": None, **METHODS}.items()}
    images = {name: result.images for name, result in runs.items()}
    fewer = network.sample(SHOWN[0], round(runs["UCache"].calls), None, seeds)
    return {**images, "fewer steps": fewer.images}, runs["UCache"].report


def contact_sheet(sheets: dict[str, dict[str, Tensor]], path: Path) -> None:
    """One row a method, one column a digit, the networks side by side."""
    figure = need("matplotlib.figure", "demo").Figure(figsize=(15, 5.4), layout="constrained", facecolor="white")
    for part, (name, methods) in zip(figure.subfigures(1, len(sheets), wspace=0.02), sheets.items(), strict=True):
        sampler, steps = SHOWN
        part.suptitle(f"{name}: {sampler}, {steps} steps, guidance 3", fontsize=12)
        axes = part.subplots(len(methods), 1)
        for axis, (method, images) in zip(axes, methods.items(), strict=True):
            strip = torch.cat(list(images[:10, 0].clamp(-1, 1)), dim=1)
            axis.imshow(strip.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest", aspect="equal")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_ylabel(textwrap.fill(method, 12), rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)
