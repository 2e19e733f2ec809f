"""What a skipped evaluation should return: every predictor at the same calls, beside reuse and fewer steps.

python benchmarks/forecast.py [--samples 64] [--steps 20] [--shift 1] [--methods ...] [--out forecast-output]

On the two shipped networks, guidance 3; about half an hour on two cores. All of `every 2` compute the same evaluations,
and all of `every 3`; only what they return for the others differs. With `--shift` only the flow's network is measured,
on its schedule shifted so, as Stable Diffusion 3's (3) and Flux's are.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from stepcache import DMD, EasyCache, FiniteDifference, Forecast, Lagrange, Method, Reuse, Spectrum, TaylorSeer, UCache
from stepcache.bench import KDiffusion, bench
from stepcache.demo.sampling import sigmas, subject
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


if __name__ == "__main__":
    main()
