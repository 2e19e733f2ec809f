"""Trials and measurements that Ray spreads: the same as in one process, and faster."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
from mixture import mixture

import stepcache
from stepcache import OptionError
from stepcache.bench import bench
from stepcache.bench.metrics import psnr_of_range
from stepcache.bench.ray_pool import search_path
from stepcache.tuning.team import Job, team
from stepcache.tuning.trial import Trial

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def started():
    """One Ray for all tests, of two workers whatever the machine has."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": search_path()})
    yield
    ray.shutdown()


def tuned(**options):
    return stepcache.tune(mixture(True), **{"calls": 4, "steps": 9, "seeds": 6, "budget": 18, **options})


def test_two_workers_find_the_profile_that_one_finds(tmp_path):
    state = tmp_path / "state.jsonl"
    two, one = tuned(workers=2, state=state), tuned()
    assert two.written() == one.written()
    assert two.measured["cost in full runs"] > 10
    assert tuned(state=state).computed == one.computed  # what the workers have found is in the file


def test_the_bench_has_the_same_figures():
    def scores(**options):
        results = bench(mixture(True), ["euler"], [6], samples=4, batch=2, others=[], **options)
        return [(r["seeds"], r["name"], r["calls"], r["scores"]) for r in results.records]

    assert scores(workers=2, ray=True) == scores()


def test_more_workers_than_there_are_is_said_and_does_not_wait():
    with pytest.raises(OptionError, match="workers=3: Ray has 2 CPUs, and each worker needs one"):
        tuned(workers=3)


def test_what_goes_wrong_in_a_worker_is_raised_as_it_is():
    def broken(images, full, seeds):
        raise OptionError("this metric is broken")

    with pytest.raises(OptionError, match=r"^this metric is broken$"):
        stepcache.tune(replace(mixture(True), metrics={"PSNR": broken}), calls=4, steps=9, seeds=6, workers=2)


class Waits(torch.nn.Module):
    """A network that the process waits for, as if it had a device of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, sigma, **more):
        time.sleep(0.1)
        return self.inner(x, sigma, **more)


@pytest.mark.skipif("STEPCACHE_RAY_SPEED" not in os.environ, reason="a measurement: STEPCACHE_RAY_SPEED=1")
def test_the_speed_up_of_two_workers(capsys):
    """From the moment on that both have started: what they import takes longer than these trials."""
    subject, seeds = replace(mixture(), model=Waits(mixture().model)), range(4)
    full = Trial().run(subject, "euler", 20, seeds).tape
    seconds = []
    for workers in (1, 2):
        with team(workers, subject, "euler", 20, seeds, psnr_of_range, full) as crew:
            list(crew.grown([18] * workers))
            begun = time.perf_counter()
            list(crew.tried([Job((0, 2, 4, 6, 8, 10, 12, 14, n)) for n in (15, 16, 17, 18)]))
            seconds.append(time.perf_counter() - begun)
    with capsys.disabled():
        print(f"four trials: one worker {seconds[0]:.1f} s, two {seconds[1]:.1f} s: {seconds[0] / seconds[1]:.2f}x")
    assert seconds[1] < seconds[0]
