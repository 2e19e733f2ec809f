"""Whether one tolerance is one error: Forecast(tolerance=) on both shipped networks, two samplers, two step counts.

python benchmarks/tolerance.py [--samples 64] [--guidance 3] [--store tolerance.jsonl] [--markdown tolerance.md]

PSNR in dB to the full run of the same seed, mean over the samples, with the calls made. Beside every tolerance stand
Forecast(2), Forecast(3) and as many plain steps as calls. About ten minutes on two idle cores. What is in
`--store` already is not computed again, so that a run may be interrupted, or split over processes (`--networks dit`).
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from stepcache import Forecast, Method
from stepcache.demo import sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=sampling.GUIDANCE)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--networks", nargs="+", default=["unet", "dit"])
    parser.add_argument("--samplers", nargs="+", default=["euler", "dpmpp_2m"])
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--alone", action="store_true", help="without Forecast(2), Forecast(3) and fewer steps")
    parser.add_argument("--store", type=Path, default=Path("tolerance.jsonl"))
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()

    rows = [json.loads(line) for line in options.store.read_text().splitlines()] if options.store.exists() else []
    for cell in product(options.networks, options.samplers, options.steps):
        key = [*cell, options.guidance, options.samples, options.seed]
        if not any(row["key"] == key for row in rows):
            rows.append({"key": key, "reached": measure(*cell, options)})
            with options.store.open("a") as store:
                store.write(json.dumps(rows[-1]) + "\n")
    text = table([row for row in rows if row["key"][3:] == [options.guidance, options.samples, options.seed]])
    Console().print(text, markup=False, soft_wrap=True)
    if options.markdown:
        options.markdown.write_text(text + "\n")


def measure(network: str, sampler: str, steps: int, options: argparse.Namespace) -> dict[str, tuple[float, int]]:
    """(PSNR, calls) of every method."""
    ready = sampling.setup(network)

    def images(count: int, method: Method | None) -> sampling.Sampled:
        return sampling.run(ready, sampler, count, method, options.samples, options.seed, options.guidance)

    full = images(steps, None).images.clamp(-1, 1)

    def reached(count: int, method: Method | None) -> tuple[float, int]:
        result = images(count, method)
        error = (result.images.clamp(-1, 1) - full).square().flatten(1).mean(1).clamp(min=1e-12)
        return round(float((10 * torch.log10(4 / error)).mean()), 2), result.report.fates("cond").count("C")

    found = {f"{tolerance:g}": reached(steps, Forecast(tolerance=tolerance)) for tolerance in options.tolerances}
    if not options.alone:
        found |= {f"Forecast({n})": reached(steps, Forecast(n)) for n in (2, 3)}
        fewer = {calls: reached(calls, None) for calls in sorted({calls for _, calls in found.values()})}
        found |= {f"{calls} steps": one for calls, one in fewer.items()}
    return found


def table(rows: list[dict]) -> str:
    """A row a cell, in brackets as many plain steps as calls; and below it the band of each tolerance."""
    names = [name for name in rows[0]["reached"] if not name.endswith("steps")]

    def entry(found: dict[str, list[float]], name: str) -> str:
        psnr, calls = found[name]
        fewer = found.get(f"{calls} steps")
        return f"{psnr:.1f} at {calls}" + (f" ({fewer[0]:.1f})" if fewer else "")

    lines = ["| PSNR at calls | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        network, sampler, steps, *_ = row["key"]
        cells = " | ".join(entry(row["reached"], name) for name in names)
        lines.append(f"| {network}, {sampler}, {steps} steps | {cells} |")
    bands = []
    for name in names:
        psnr = [row["reached"][name][0] for row in rows]
        bands.append(f"{max(psnr) - min(psnr):.1f}")
    return "\n".join([*lines, "| **band** | " + " | ".join(bands) + " |"])


if __name__ == "__main__":
    main()
