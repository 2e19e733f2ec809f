"""What a skipped evaluation should return: every predictor at the same calls, beside reuse and fewer steps.

python benchmarks/forecast.py [--samples 64] [--steps 20] [--shift 1] [--methods ...] [--out forecast-output]

On the two shipped networks, guidance 3; about half an hour on two cores. All of `every 2` compute the same evaluations,
and all of `every 3`; only what they return for the others differs. With `--shift` only the flow's network is measured,
on its schedule shifted so, as Stable Diffusion 3's (3) and Flux's are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from stepcache import EasyCache, Forecast, Method, Spectrum, UCache
from stepcache.bench import KDiffusion, Results, bench
from stepcache.bench.results import Row
from stepcache.demo.sampling import sigmas, subject
from stepcache.extend import DMD, FiniteDifference, Lagrange, Reuse, TaylorSeer
from stepcache.samplers.k_diffusion import FlowDenoiser

SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral", "dpmpp_2m_sde", "heun", "dpm_2", "dpmpp_sde")
METHODS: dict[str, Method] = {
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
            "h3": FiniteDifference(2),
            "DMD": DMD(),
        }.items()
    },
    "Forecast(2)": Forecast(2),
    "Forecast(3)": Forecast(3),
}


def shifted(shift: float) -> KDiffusion:
    """The flow's network on another schedule."""
    plain = subject("dit")
    denoiser = FlowDenoiser(plain.model.inner_model, shift)
    return replace(plain, name=f"dit, shift {shift:g}", model=denoiser, sigmas=partial(sigmas, denoiser))


def tables(results: Results, steps: int) -> Iterator[str]:
    """The predictors side by side, the others' caches, and the distance to the limit, in Markdown."""
    cells: dict[str, dict[str, Row]] = {}
    for row in results.rows:
        if row.steps == steps:
            cells.setdefault(f"{row.subject}, {row.sampler}", {})[row.method] = row
    methods = list(next(iter(cells.values())))
    for n in (2, 3):
        predictors = [name for name in methods if name.startswith(f"every {n}, ")]
        names = (name.partition(", ")[2] for name in predictors)
        lines = [[f"every {n}", "calls", "fewer steps", "**Forecast**", "ahead of fewer", "ahead of reuse", *names]]
        for label, found in cells.items():
            ours = found[f"Forecast({n})"]
            gains = ours.fewer.gain, results.ahead(ours, f"every {n}, reuse")
            marks = f"{ours.fewer.scores['PSNR']:.1f}", f"**{ours.scores['PSNR'].text()}**"
            others = (mark(found[name]) for name in predictors)
            lines.append([label, f"{ours.calls:g}", *marks, *(gain.text(sign=True) for gain in gains), *others])
        yield from table(lines)

    published = [name for name in ("UCache", "EasyCache", "Spectrum") if name in methods]
    lines = [["PSNR at calls", *published, *(f"Forecast(2) ahead of {name}" for name in published)]]
    for label, found in cells.items():
        rows = [found[name] for name in published]
        marks = ("never skips" if row.same else f"{mark(row)} at {row.calls:g}" for row in rows)
        gains = ("" if r.same else results.ahead(found["Forecast(2)"], r.method).text(sign=True) for r in rows)
        lines.append([label, *marks, *gains])
    yield from table(lines)

    forecasts = [name for name in methods if name.startswith("Forecast")]
    rivals = (text for name in forecasts for text in (name, "fewer steps", "best other sampler"))
    lines = [["to the limit", "full run", *rivals]]
    for label, found in cells.items():
        if found["full run"].limit:
            lines.append([label, f"{found['full run'].limit.mean:.1f}"])
            for row in (found[name] for name in forecasts):
                other = f"{row.other.limit:.1f} {row.other.sampler}"
                lines[-1] += [f"{row.limit.mean:.1f}", f"{row.fewer.limit:.1f}", other]
    yield from table(lines)


def mark(row: Row) -> str:
    return "same" if row.same else f"{row.scores['PSNR'].mean:.1f}"


def table(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]):
        yield f"| {' | '.join(line)} |"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--shift", type=float)
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("forecast-output"))
    options = parser.parse_args()
    console = Console()
    others = ("euler", "dpmpp_2m", "heun", "lms")
    subjects = [subject(name) for name in ("unet", "dit")] if options.shift is None else [shifted(options.shift)]
    results = bench(
        subjects,
        options.samplers,
        options.steps,
        {name: METHODS[name] for name in options.methods},
        options.samples,
        others=others,
        out=options.out,
        workers=2,
        console=console,
    )
    results.show(console)
    text = "\n".join(line for steps in options.steps for line in tables(results, steps))
    (options.out / "predictors.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
