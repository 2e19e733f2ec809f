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
from stepcache.bench.ray_pool import search_path

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


@pytest.mark.skipif("STEPCACHE_RAY_SPEED" not in os.environ, reason="a measurement: STEPCACHE_RAY_SPEED=1")
@pytest.mark.parametrize("where", ["on the CPU", "elsewhere"])
def test_the_speed_up_of_two_workers(where, capsys):
    """Of a network that the CPU runs, and of one that the process waits for, as if it had a device of its own."""
    from stepcache.demo import zoo

    class Waits(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, sigma, **more):
            time.sleep(0.1)
            return self.inner(x, sigma, **more)

    torch.set_num_threads(1)
    subject = zoo.subject("hsc32") if where == "on the CPU" else mixture()
    if where == "elsewhere":
        subject = replace(subject, model=Waits(subject.model))
    seconds, found = [], []
    for workers in (1, 2):
        begun = time.perf_counter()
        found.append(stepcache.tune(subject, calls=8, seeds=16, workers=workers))
        seconds.append(time.perf_counter() - begun)
    with capsys.disabled():
        print(f"{where}: one worker {seconds[0]:.0f} s, two {seconds[1]:.0f} s: {seconds[0] / seconds[1]:.2f}x")
    assert found[0].written() == found[1].written()
    assert seconds[1] < seconds[0] or where == "on the CPU"
