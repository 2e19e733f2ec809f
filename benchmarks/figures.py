"""The pictures of docs/how-it-works.md, from the shipped network that draws emoji.

python benchmarks/figures.py [--out docs] [--steps 20]

Writes trajectory.png, forecast.png and trace.png: one image under Euler, guidance 3. It takes half a minute on two CPU
cores.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepcache import Forecast, Method, Report, UCache
from stepcache.bench.metrics import psnr_of_range
from stepcache.demo import zoo
from stepcache.extend import require
from stepcache.samplers.k_diffusion import CachedDenoiser, sample

SEED = 5
FULL, OURS, OTHER = "0.6", "C0", "C1"


@dataclass
class Walk:
    """One run, step by step, in the flow's own space (1 - t) image + t noise.

    Attributes:
        latents: (steps + 1, ...), the last one is the image.
        inputs, outputs: of the network with guidance, (steps, ...); an output may be a prediction.
        truths: what the network answers to the same inputs.
        report: of the run.
    """

    latents: Tensor
    inputs: Tensor
    outputs: Tensor
    truths: Tensor
    report: Report

    @property
    def computed(self) -> list[bool]:
        return [decision == "C" for decision in self.report.decisions(self.report.branches[0])]


@torch.no_grad()
def walk(method: Method | None, steps: int) -> Walk:
    """Samples one image under Euler and keeps what the sampler asks and is answered."""
    subject = zoo.subject("colour")
    model, sigmas, seen = subject.guided(subject.model), subject.sigmas(steps), []
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(1, *subject.shape, generator=generator) * sigmas[0]
    extra = subject.extra_args([SEED])
    cached = CachedDenoiser(model, method, scalings=subject.model.get_scalings)

    def keep(info: dict[str, Any]) -> None:
        seen.append((info["x"].clone(), info["sigma"], info["denoised"].clone()))

    last = sample("euler", cached, start, sigmas, extra_args=extra, callback=keep, disable=True)
    pairs = [(x, sigma, denoised, model(x, sigma[None], **extra)) for x, sigma, denoised in seen]
    inputs = torch.cat([x / (1 + sigma) for x, sigma, _, _ in pairs])
    return Walk(
        torch.cat([inputs, last]),
        inputs,
        torch.cat([_velocity(x, sigma, denoised) for x, sigma, denoised, _ in pairs]),
        torch.cat([_velocity(x, sigma, truth) for x, sigma, _, truth in pairs]),
        cached.report,
    )


def _velocity(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The flow's v = noise - image, of which denoised = x / (1 + sigma) - sigma / (1 + sigma) v."""
    return (x - (1 + sigma) * denoised) / sigma


def trajectory(path: Path, full: Walk, runs: dict[str, Walk]) -> None:
    """The runs on the two axes along which the full run moves most, and the place at which they end."""
    figure = require("matplotlib.figure", "demo").Figure(figsize=(9, 4.4), layout="constrained")
    whole, end = figure.subplots(1, 2, width_ratios=(1.7, 1))
    middle = full.latents.flatten(1).mean(0)
    axes = torch.linalg.svd(full.latents.flatten(1) - middle, full_matrices=False).Vh[:2]
    for name, run in {"full run": full, **runs}.items():
        points = (run.latents.flatten(1) - middle) @ axes.T
        color = {"full run": FULL, "Forecast": OURS}.get(name, OTHER)
        label = f"{name}, {sum(run.computed)} calls"
        if run is not full:
            label += f", {psnr_of_range(run.latents[-1:], full.latents[-1:], [SEED])[0]:.1f} dB"
        for panel in (whole, end):
            panel.plot(*points.T, color=color, linewidth=1, zorder=1, label=label)
            made = torch.tensor(run.computed)
            style = {"color": color, "linewidths": 1.2, "s": 26}
            panel.scatter(*points[:-1][made].T, **style, zorder=3)
            panel.scatter(*points[:-1][~made].T, **{**style, "color": "white"}, edgecolors=color, zorder=2)
            panel.scatter(*points[-1], marker="*", s=140, color=color, zorder=4)
    ends = torch.stack([(run.latents[-1].flatten() - middle) @ axes.T for run in (full, *runs.values())])
    centre, reach = ends.mean(0), 2.0 * float((ends - ends.mean(0)).abs().max())
    limits = [(middle - reach, middle + reach) for middle in centre.tolist()]
    end.set(xlim=limits[0], ylim=limits[1], title="the end, enlarged")
    whole.set(xlabel="first axis", ylabel="second axis", title="from noise (left) to the image (star)")
    whole.annotate("filled: the model ran\nhollow: predicted", (0.5, 0.1), xycoords="axes fraction", ha="center")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


def forecast(path: Path, run: Walk) -> None:
    """One number of the network's output: the truth, the forecast, and reuse of the residual."""
    figure = require("matplotlib.figure", "demo").Figure(figsize=(9, 3.8), layout="constrained")
    panel = figure.subplots()
    truths, outputs, inputs = (values.flatten(1) for values in (run.truths, run.outputs, run.inputs))
    which = int((truths[2:] - truths[2:].mean(0)).square().mean(0).argmax())
    truth, output, x = truths[:, which], outputs[:, which], inputs[:, which]
    made = [step for step, computed in enumerate(run.computed) if computed]
    skipped = [step for step, computed in enumerate(run.computed) if not computed]
    last = {step: max(earlier for earlier in made if earlier < step) for step in skipped}
    reuse = [float(x[step] + truth[last[step]] - x[last[step]]) for step in skipped]
    panel.plot(truth, color=FULL, linewidth=1.5, label="the model's output", zorder=1)
    panel.plot(made, truth[made], "o", color=OURS, label="computed")
    panel.plot(skipped, output[skipped], "o", markerfacecolor="white", color=OURS, label="Forecast")
    panel.plot(skipped, reuse, "x", color=OTHER, label="reuse of the residual")
    panel.set(xlabel="step", ylabel="one value of the output")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="default %(default)s")
    options = parser.parse_args()
    out, steps = options.out, options.steps
    out.mkdir(parents=True, exist_ok=True)
    full, ours, other = walk(None, steps), walk(Forecast(), steps), walk(UCache(), steps)
    trajectory(out / "trajectory.png", full, {"Forecast": ours, "UCache": other})
    forecast(out / "forecast.png", ours)
    other.report.plot(out / "trace.png")
    for name, run in (("full run", full), ("Forecast", ours), ("UCache", other)):
        print(f"{name}\n{run.report}\n")


if __name__ == "__main__":
    main()
