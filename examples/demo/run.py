"""`stepcache demo`: a table and two pictures from the two shipped networks."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import textwrap
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepcache import EasyCache, Forecast, Method, Report, Static, StepMask, UCache
from stepcache.extras import need
from stepcache.samplers.k_diffusion import EVALUATIONS

from . import networks
from .sampling import Sampled, run, setup

SAMPLERS = {"euler": "Euler", "dpmpp_2m": "DPM++ 2M", "euler_ancestral": "Euler a"}
STEPS = (20, 30)
METHODS: dict[str, Method | None] = {
    "full run": None,
    "Forecast": Forecast(),
    "Forecast(3)": Forecast(3),
    "UCache": UCache(),
    "EasyCache": EasyCache(),
    "static mask medium": Static("medium"),
    "UCache, mask fast": UCache(mask=StepMask("fast", "dynamic")),
}
SHOWN = ("euler", 20)
"""The sampler and steps of the contact sheet."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `calls` are per condition. `fewer_*`: the same sampler in as many calls, no cache."""

    network: str
    sampler: str
    steps: int
    method: str
    calls: int
    speedup: float
    psnr: float | None
    fewer_psnr: float | None
    ssim: float | None
    fewer_ssim: float | None
    accuracy: float
    fewer_accuracy: float | None


class Scores:
    """Marks samples: PSNR and SSIM against the full run (scikit-image, data range 2), and the classifier's accuracy."""

    def __init__(self) -> None:
        self._metrics = need("skimage.metrics", "demo")
        self._classifier = networks.load("classifier")

    def psnr(self, images: Tensor, reference: Tensor) -> float:
        """Mean over samples, in dB."""
        return self._mean("peak_signal_noise_ratio", images, reference)

    def ssim(self, images: Tensor, reference: Tensor) -> float:
        return self._mean("structural_similarity", images, reference)

    @torch.no_grad()
    def accuracy(self, images: Tensor) -> float:
        """The share of samples that the classifier takes for the digit they were asked to be."""
        label = torch.arange(len(images)) % networks.CLASSES
        return float((self._classifier(images.clamp(-1, 1)).argmax(1) == label).float().mean())

    def _mean(self, metric: str, images: Tensor, reference: Tensor) -> float:
        score = getattr(self._metrics, metric)
        pairs = zip(images[:, 0].clamp(-1, 1).numpy(), reference[:, 0].clamp(-1, 1).numpy(), strict=True)
        with need("numpy", "demo").errstate(divide="ignore"):
            return float(statistics.mean(float(score(full, ours, data_range=2.0)) for ours, full in pairs))


def demo(out: Path, samples: int = 10, seed: int = 0) -> list[Row]:
    """Runs everything, prints the table and writes table.md, results.json, contact-sheet.png and trace.png to `out`."""
    if samples < 10 or samples % 10:
        raise ValueError(f"--samples {samples}: accepted is a multiple of 10, so that every digit is asked as often")
    console = need("rich.console", "demo").Console()
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(name, sampler, steps) for name in ("unet", "dit") for sampler in SAMPLERS for steps in STEPS]
    blocks = sampled(jobs, METHODS, samples, seed, console)
    rows = [row for block in blocks for row in block.rows]
    sheets = {block.rows[0].network: block.images for block in blocks if block.images}
    trace = next(block.trace for block in blocks if block.trace)
    (out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    publish(rows, console, out / "table.md")
    console.print(
        f"{samples} samples a run, guidance 3. Calls are per condition. PSNR and SSIM are against the full run of the "
        "same steps. Right: taken by the classifier for the digit asked for. In brackets or before the %: the same "
        "sampler without cache, in fewer steps with as many calls."
    )
    contact_sheet(sheets, out / "contact-sheet.png")
    trace.plot(out / "trace.png")
    console.print(f"Written to {out}: contact-sheet.png, trace.png, table.md, results.json")
    return rows


@dataclass(frozen=True)
class Block:
    """What one network, sampler and number of steps gave; images and trace only where the contact sheet shows them."""

    rows: list[Row]
    images: dict[str, Tensor]
    trace: Report | None


def sampled(
    jobs: list[tuple[str, str, int]], methods: dict[str, Method | None], samples: int, seed: int, console: Any
) -> list[Block]:
    """A block for every (network, sampler, steps), two at a time in processes of their own.

    One process with two threads would be as fast on an idle machine. On a busy one its threads wait for each other at
    every operation, and small networks become ten times slower.
    """
    cores = os.cpu_count() or 1
    workers = min(2, cores)
    bar = need("rich.progress", "demo").Progress(console=console)
    context = multiprocessing.get_context("spawn")
    with bar, ProcessPoolExecutor(workers, context, torch.set_num_threads, (max(1, cores // workers),)) as pool:
        futures = [pool.submit(compare, *job, methods, samples, seed) for job in jobs]
        task = bar.add_task("sampling", total=len(jobs))
        for _ in as_completed(futures):
            bar.advance(task)
        return [future.result() for future in futures]


def compare(name: str, sampler: str, steps: int, methods: dict[str, Method | None], samples: int, seed: int) -> Block:
    """Every method, and for each the same sampler without cache in fewer steps, with as many calls as the method made.

    One of the methods is "full run", None, which the others are compared with.
    """
    network, scores = setup(name), Scores()
    run(network, sampler, 2, None, samples, seed)  # the first calls of a process are slower than the rest
    results = {method: run(network, sampler, steps, options, samples, seed) for method, options in methods.items()}
    budgets = sorted({calls(result) for result in results.values()} - {calls(results["full run"])})
    fewer = {budget: run(network, sampler, within(sampler, budget), None, samples, seed) for budget in budgets}
    rows = [row(scores, name, sampler, steps, method, results, fewer) for method in methods]
    if (sampler, steps) != SHOWN or "UCache" not in methods:
        return Block(rows, {}, None)
    images = {method: result.images for method, result in results.items()}
    images["fewer steps"] = fewer.get(calls(results["UCache"]), results["full run"]).images
    return Block(rows, images, results["UCache"].report)


def within(sampler: str, budget: int) -> int:
    """The steps that a sampler makes with so many calls: half as many where each but the last has two."""
    return (budget + 1) // 2 if EVALUATIONS[f"sample_{sampler}"] == 2 else budget


def calls(result: Sampled) -> int:
    """Calls per condition."""
    return result.report.calls // len(result.report.conditions)


def row(
    scores: Scores,
    network: str,
    sampler: str,
    steps: int,
    method: str,
    results: dict[str, Sampled],
    fewer: dict[int, Sampled],
) -> Row:
    full, result = results["full run"], results[method]
    other = fewer.get(calls(result))
    exact = torch.equal(result.images, full.images)
    return Row(
        network,
        SAMPLERS.get(sampler, sampler),
        steps,
        method,
        calls(result),
        full.seconds / result.seconds,
        None if exact else scores.psnr(result.images, full.images),
        None if other is None else scores.psnr(other.images, full.images),
        None if exact else scores.ssim(result.images, full.images),
        None if other is None else scores.ssim(other.images, full.images),
        scores.accuracy(result.images),
        None if other is None else scores.accuracy(other.images),
    )


def table(rows: list[Row], markdown: bool = False) -> Any:
    """The rows, in blocks of one network, sampler and number of steps; in brackets what fewer steps reach."""
    box = need("rich.box", "demo")
    made = need("rich.table", "demo").Table(
        box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    made.add_column("method", no_wrap=True)
    for column in ("calls", "speed", "PSNR (fewer)", "SSIM (fewer)", "right"):
        made.add_column(column, justify="right", no_wrap=True)
    block = None
    for r in rows:
        if block != (block := (r.network, r.sampler, r.steps)):
            made.add_row(f"{'**' if markdown else '[bold]'}{r.network}, {r.sampler}, {r.steps} steps{'**' * markdown}")
        right = f"{r.accuracy:.0%}" if r.fewer_accuracy is None else f"{100 * r.accuracy:.0f}/{r.fewer_accuracy:.0%}"
        pairs = _pair("{:.1f}", r.psnr, r.fewer_psnr), _pair("{:.3f}", r.ssim, r.fewer_ssim)
        made.add_row(r.method, str(r.calls), f"{r.speedup:.2f}x", *pairs, right)
    return made


def publish(rows: list[Row], console: Any, markdown: Path | None = None) -> None:
    """Prints the table, and writes it as Markdown if a path is given."""
    if markdown is not None:
        with markdown.open("w", encoding="utf-8") as file:
            need("rich.console", "demo").Console(file=file, width=250).print(table(rows, markdown=True))
    console.print(table(rows))


def _pair(form: str, ours: float | None, fewer: float | None) -> str:
    return ("same" if ours is None else form.format(ours)) + ("" if fewer is None else f" ({form.format(fewer)})")


def contact_sheet(sheets: dict[str, dict[str, Tensor]], path: Path) -> None:
    """One row a method, one column a digit, the networks side by side."""
    figure = need("matplotlib.figure", "demo").Figure(figsize=(15, 5.4), layout="constrained", facecolor="white")
    for part, (name, methods) in zip(figure.subfigures(1, len(sheets), wspace=0.02), sheets.items(), strict=True):
        sampler, steps = SHOWN
        part.suptitle(f"{name}: {SAMPLERS[sampler]}, {steps} steps, guidance 3", fontsize=12)
        axes = part.subplots(len(methods), 1)
        for axis, (method, images) in zip(axes, methods.items(), strict=True):
            strip = torch.cat(list(images[:10, 0].clamp(-1, 1)), dim=1)
            axis.imshow(strip.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest", aspect="equal")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_ylabel(textwrap.fill(method, 12), rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)
