"""NaN and Inf at any evaluation, in any branch, under any method: what is not finite is never predicted from.

With STEPCACHE_LONG=1 in both branches whether they come in one call or in two; without it, in one of them each."""

from __future__ import annotations

import itertools
import math
import os
import warnings

import pytest
import torch
from soak import METHODS, TWO, Bench, Situation, named
from torch import Tensor
from toys import Toy, level, plain

from stepcache.samplers.k_diffusion import CachedDenoiser

SIGMAS = tuple(10.0 * 0.65**k for k in range(10))
BRANCHES = ("cond", "uncond")


def broken(at: int, where: str, value: float):
    """A network of which one branch is not finite at one evaluation, in one number."""

    def network(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        out = x / (1 + sigma.reshape(-1, 1, 1, 1)) + 0.1 * cond.reshape(-1, 1, 1, 1)
        if math.isclose(float(sigma.max()), SIGMAS[at], rel_tol=1e-6):
            out[cond == (1.0 if where == "cond" else -1.0), ..., -1, -1] = value
        return out

    return Toy(network)


def answers(name: str, batched: bool, network: Toy) -> tuple[dict[str, list[Tensor]], CachedDenoiser]:
    """What a loop whose x stays finite, whatever it is answered, gets for each branch."""
    branches = BRANCHES if batched else named
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CachedDenoiser(network, METHODS[name](), scalings=plain, branches=branches)
        found: dict[str, list[Tensor]] = {branch: [] for branch in BRANCHES}
        one = torch.ones(1)
        with model.run((*SIGMAS, 0.0), 1), torch.no_grad():
            for k, sigma in enumerate(SIGMAS):
                x = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4) * (1 + 0.9**k)
                if batched:
                    both = model(torch.cat([x, x]), level(sigma, 2), cond=torch.cat([one, -one])).chunk(2)
                else:
                    both = model(x, level(sigma), cond=one), model(x, level(sigma), cond=-one)
                for branch, answer in zip(BRANCHES, both, strict=True):
                    found[branch].append(answer)
    return found, model


CASES = [name for name in METHODS if name != "fbcache"]  # Toy has no blocks


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "separate"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_finite_stays_where_it_is(name, batched):
    """Every evaluation in turn, each branch: only the network's own broken answer is passed on."""
    values = itertools.cycle((math.nan, math.inf, -math.inf))
    cases = [*itertools.product(range(len(SIGMAS)), BRANCHES)]
    if "STEPCACHE_LONG" not in os.environ:
        cases = [(at, where) for at, where in cases if (where == BRANCHES[at % 2]) == batched]
    for (at, where), value in zip(cases, values, strict=False):
        network = broken(at, where, value)
        found, model = answers(name, batched, network)
        for branch, given in found.items():
            not_finite = [k for k, answer in enumerate(given) if not torch.isfinite(answer).all()]
            computed = model.report.decisions(branch)[at] == "C"
            expected = [at] if branch == where and computed else []
            assert not_finite == expected, (at, where, value, branch)


@pytest.mark.parametrize("name", METHODS)
def test_a_broken_answer_does_not_outlive_its_run(name):
    """A run in which the network was not finite, and then a sound one, which is the sound one alone."""
    pytest.importorskip("k_diffusion")
    sound = Situation(name, "batched", "euler", (2, 4, 8, 8), torch.float32, 12, 0, 1, "", 0, True)
    alone = Bench().run(sound)
    for fault, at in (("nan", 0), ("inf", 1), ("nan", 4), ("inf", 8)):
        bench = Bench()
        assert sound.sampler not in TWO
        bench.run(Situation(*[*sound.__dict__.values()][:-3], fault, at, True))
        assert bench.run(sound) == alone
