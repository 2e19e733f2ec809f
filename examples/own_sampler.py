"""A sampling loop of your own, cached: a flow network v = net(x, t), Euler steps by hand.

python examples/own_sampler.py --method forecast --options interval=3 --steps 20

`FlowCall` is all that a host has to write. The network here is the demo's, of emoji; yours takes its place.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import torch

from stepcache import METHODS, method
from stepcache.demo import networks
from stepcache.extend import Call, Engine, Parametrization


class FlowCall(Call):
    """One evaluation of v = net(x, t). Its input and output are the network's own, so that nothing is scaled."""

    names = ("v",)

    def __init__(self, net, x, t):
        self.net, self.latent, self.sigma = net, x, t

    def inputs(self):
        return (self.latent.clone(),)

    def run_model(self):
        return self.net(self.latent, self.sigma)

    def outputs(self, answer):
        return (answer.clone(),)

    def rebuild(self, outputs):
        return outputs[0]


@torch.no_grad()
def sample(net, x, times, engine=None):
    """Euler from t = 1 to 0: dx/dt = v."""
    if engine is not None:
        engine.announce(times, stages=1)
    for t, following in pairwise(times):
        v = net(x, t) if engine is None else engine(FlowCall(net, x, t))
        x = x + (following - t) * v
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="forecast", choices=[*METHODS], help="(default %(default)s)")
    parser.add_argument("--options", default="", help='the method\'s options, as in "interval=3"')
    parser.add_argument("--steps", type=int, default=20, help="default %(default)s")
    options = parser.parse_args()
    try:
        chosen = method(options.method, options.options)
    except ValueError as error:
        raise SystemExit(f"--method or --options: {error}") from error
    network, labels = networks.load("emoji"), torch.arange(8)
    x, times = torch.randn(8, 3, networks.EMOJI_SIZE, networks.EMOJI_SIZE), torch.linspace(1, 0, options.steps + 1)

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(x, t.expand(len(x)), label=labels)

    begun = time.perf_counter()
    full = sample(net, x, times)
    full_time = time.perf_counter() - begun
    engine = Engine(chosen, parametrization=Parametrization.flow)
    begun = time.perf_counter()
    cached = sample(net, x, times, engine)
    print(engine.report)
    peak = full.amax() - full.amin()
    print(
        f"{full_time / (time.perf_counter() - begun):.2f}x as fast, PSNR to the full run "
        f"{20 * torch.log10(peak / (cached - full).square().mean().sqrt()):.1f} dB"
    )


if __name__ == "__main__":
    main()
