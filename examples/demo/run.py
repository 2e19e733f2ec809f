"""`stepcache demo`: a table and pictures from three shipped networks."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepcache import EasyCache, Forecast, Method, Static, StepMask, UCache
from stepcache.bench import Results, Sampled, Subject, bench
from stepcache.extend import require

from . import networks, zoo
from .sampling import GUIDANCE, subject

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
ON_SHEET = ("Forecast", "Forecast(3)", "UCache", "EasyCache")
GAIN = 10
"""Differences on the contact sheet are so many times as bright as they are."""


def demo(out: Path, samples: int = 10, seed: int = 0) -> Results:
    """Runs everything, prints the table and writes what `bench` writes, contact-sheet.png and trace.png to `out`."""
    if samples < 10 or samples % 10:
        raise ValueError(f"--samples {samples}: accepted is a multiple of 10, so that every class is asked as often")
    console = require("rich.console", "demo").Console()
    subjects = [subject(name) for name in ("unet", "dit")]
    workers = min(2, os.cpu_count() or 1)
    results = bench(subjects, SAMPLERS, STEPS, METHODS, samples, seed, 10, OTHERS, out, workers, console)
    results.show(console)
    console.print(
        f"{samples} samples a run, guidance 3. Calls are for one branch. Marks are means against the full run of "
        "as many steps, with a 95 % interval. Fewer steps: the same sampler without cache in as many calls, and how "
        "far the method is ahead of it, sample by sample. To the limit: against DPM++ 2M in 200 steps; best other: "
        "the sampler that is nearest to that with as many calls (under Euler a, to the full run). In brackets: fewer "
        "steps. Right: the classifier takes it for the digit asked for. Below: the colour network."
    )
    colour, seeds = replace(zoo.subject("colour"), limit=None), range(seed, seed + 10)
    sampler, steps = SHOWN
    bench(colour, [sampler], [steps], METHODS, samples, seed, 10, OTHERS, out / "colour", 1, console).show(console)
    rows = sheet_rows(colour, seeds)
    contact_sheet(colour, rows, seeds, out / "contact-sheet.png")
    dict(rows)["UCache"].report.plot(out / "trace.png")
    console.print(f"Written to {out}: contact-sheet.png, trace.png, table.md, results.json, pareto.png; and colour/")
    return results


def sheet_rows(network: Subject, seeds: Sequence[int]) -> list[tuple[str, Sampled]]:
    """The full run, the methods, and without cache as few steps as the first two methods made calls."""
    made = [(name, network.sample(*SHOWN, METHODS[name], seeds)) for name in ON_SHEET]
    fewer = [("fewer steps", network.sample(SHOWN[0], round(run.calls), None, seeds)) for _, run in made[:2]]
    return [("full run", network.sample(*SHOWN, None, seeds)), *made, *fewer]


def contact_sheet(network: Subject, rows: Sequence[tuple[str, Sampled]], seeds: Sequence[int], path: Path) -> None:
    """One row a method, one column a class: samples, and beside them how far they are from the first row's."""
    full = rows[0][1].images
    figure = require("matplotlib.figure", "demo").Figure(figsize=(16, 0.72 * len(rows) + 0.8), facecolor="white")
    top = 1 - 0.72 / figure.get_figheight()
    place = {"left": 0.128, "right": 0.996, "top": top, "bottom": 0.012, "wspace": 0.018, "hspace": 0.07}
    axes = figure.subplots(len(rows), 2, gridspec_kw=place)
    for (name, run), (left, right) in zip(rows, axes, strict=True):
        first = run is rows[0][1]
        marks = network.metrics["PSNR"](run.images, full, seeds)
        note = f"{run.calls:g} calls" + ("" if first else f", {sum(marks) / len(marks):.1f} dB")
        weight = "bold" if name.startswith("Forecast") else "normal"
        left.text(-0.015, 0.68, name, fontsize=15, weight=weight, ha="right", va="center", transform=left.transAxes)
        left.text(-0.015, 0.28, note, fontsize=13, color="0.3", ha="right", va="center", transform=left.transAxes)
        _show(left, (run.images.clamp(-1, 1) + 1) / 2)
        if first:
            right.text(
                0.5, 0.5, "black: as the full run", fontsize=15, ha="center", va="center", transform=right.transAxes
            )
            right.set_axis_off()
        else:
            _show(right, (run.images.clamp(-1, 1) - full.clamp(-1, 1)).abs() / 2 * GAIN)
    classes = [networks.EMOJI_CLASSES[seed % len(networks.EMOJI_CLASSES)] for seed in seeds]
    wide = networks.EMOJI_SIZE
    axes[0, 0].xaxis.tick_top()
    axes[0, 0].set_xticks([wide * (i + 0.5) for i in range(len(classes))], classes, fontsize=12, color="0.3")
    axes[0, 0].tick_params(length=0, pad=3)
    axes[0, 0].set_title("{}, {} steps, guidance {:g}".format(*SHOWN, GUIDANCE), fontsize=15, pad=6)
    axes[0, 1].set_title(f"difference from the full run \u00d7 {GAIN}", fontsize=15)
    _save(figure, path)


def _show(axis: Any, images: Tensor) -> None:
    strip = torch.cat(list(images.clamp(0, 1)), dim=2).permute(1, 2, 0)
    axis.imshow(strip.numpy(), interpolation="lanczos", aspect="auto", extent=(0, strip.shape[1], 0, strip.shape[0]))
    axis.set(xticks=[], yticks=[])
    axis.set_frame_on(False)


def _save(figure: Any, path: Path) -> None:
    """In 256 colours: a third of the size, and nobody sees it."""
    image, drawn = require("PIL.Image", "demo"), io.BytesIO()
    figure.savefig(drawn, dpi=90)
    image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)
