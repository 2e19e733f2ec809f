"""What a narrower dtype of the cache costs, in dB.

python benchmarks/storage.py [--samples 32] [--networks unet dit colour]

PSNR to the full run with the cache in float32, and the difference to it in bfloat16 and float16, with the lowest of
all samples beside the mean. 20 steps, guidance 3; some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics

from stepcache import Forecast, HiCache, Method, Static, UCache
from stepcache.bench.metrics import psnr
from stepcache.demo.named import subject
from stepcache.extend import Lagrange

METHODS: dict[str, Method] = {
    "forecast": Forecast(),
    "forecast, interval 3": Forecast(3),
    "ucache 0.5": UCache(0.5),
    "hicache": HiCache(),
    "fast mask, order 3": Static("fast", predictor=Lagrange(3)),
}
SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral")
STEPS, BATCH = 20, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--networks", nargs="+", default=["unet", "dit", "colour"])
    options = parser.parse_args()
    print("| network | sampler | method | float32 | bfloat16 | float16 |\n|---|---|---|---|---|---|")
    for name in options.networks:
        network = subject(name)
        batches = [range(first, min(first + BATCH, options.samples)) for first in range(0, options.samples, BATCH)]
        for sampler in SAMPLERS:
            full = [network.sample(sampler, STEPS, None, list(seeds)).images for seeds in batches]
            for label, method in METHODS.items():
                found: dict[str, list[float]] = {}
                for dtype in ("float32", "bfloat16", "float16"):
                    found[dtype] = []
                    for seeds, reference in zip(batches, full, strict=True):
                        made = network.sample(sampler, STEPS, method.replace(dtype=dtype), list(seeds)).images
                        found[dtype] += psnr(made, reference, list(seeds))
                cells = [f"{statistics.mean(found['float32']):.2f}"]
                for dtype in ("bfloat16", "float16"):
                    lost = [a - b for a, b in zip(found[dtype], found["float32"], strict=True)]
                    cells.append(f"{statistics.mean(lost):+.3f} ({min(lost):+.3f})")
                print(f"| {name} | {sampler} | {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
