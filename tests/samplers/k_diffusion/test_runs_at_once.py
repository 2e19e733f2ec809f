"""Several runs of one wrapper at the same time: in threads, in asyncio tasks, in generators of one thread.

The fuzz test of 2,000 runs: STEPCACHE_LONG=1 pytest tests/samplers/k_diffusion/test_runs_at_once.py
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import os
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from stepcache import Forecast, Method, UCache
from stepcache.samplers.k_diffusion import CachedDenoiser, InTurn, sample

SIGMAS = torch.tensor([14.0, 9.0, 6.0, 4.0, 3.0, 2.2, 1.6, 1.2, 0.8, 0.5, 0.2, 0.0])
METHOD = UCache(1.5, start=0)


def network(x: Tensor, sigma: Tensor) -> Tensor:
    return x - sigma.view(-1, 1, 1, 1) * torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt())


def start(seed: int) -> Tensor:
    return float(SIGMAS[0]) * torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def loop(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Euler, which yields before every evaluation."""
    for sigma, following in itertools.pairwise(sigmas):
        yield x
        x = x + (x - model(x, sigma.expand(len(x)))) / sigma * (following - sigma)
    yield x


def last(steps: Iterator[Tensor]) -> Tensor:
    *_, image = steps
    return image


def announced(model: CachedDenoiser, x: Tensor, by_handle: bool) -> Iterator[Tensor]:
    with model.run(SIGMAS) as run:
        yield from loop(run if by_handle else model, x, SIGMAS)


def alone(seed: int) -> tuple[Tensor, str]:
    model = CachedDenoiser(network, METHOD, scalings="eps")
    return last(announced(model, start(seed), False)), model.report.decisions("guided")


@pytest.mark.parametrize("by_handle", [True, False], ids=["by what run() gives", "by the wrapper"])
def test_generators_in_one_thread_have_a_run_each(by_handle):
    model = CachedDenoiser(network, METHOD, scalings="eps")
    *_, images = zip(*(announced(model, start(seed), by_handle) for seed in range(3)), strict=True)
    for seed, image in enumerate(images):
        expected, decisions = alone(seed)
        assert torch.equal(image, expected)
        assert "S" in decisions


def test_every_run_has_a_report_of_its_own():
    model = CachedDenoiser(network, METHOD, scalings="eps")
    with model.run(SIGMAS) as one, model.run(SIGMAS) as two:
        for _ in zip(loop(one, start(0), SIGMAS), loop(two, start(1), SIGMAS), strict=True):
            pass
    assert [run.report.decisions("guided") for run in (one, two)] == [alone(0)[1], alone(1)[1]]
    assert (one.report.run, two.report.run) == (0, 1)
    assert model.report is two.report


def test_tasks_have_a_run_each_even_if_a_pool_of_threads_runs_the_model():
    model = CachedDenoiser(network, METHOD, scalings="eps")

    async def one(seed: int, where: str) -> Tensor:
        with model.run(SIGMAS) as run:
            steps = loop(model if where == "task" else run, start(seed), SIGMAS)
            for _ in SIGMAS:
                image = next(steps) if where == "task" else await asyncio.to_thread(next, steps)
                await asyncio.sleep(0)
        return image

    async def all_of_them() -> list[Tensor]:
        return await asyncio.gather(*(one(seed, "task" if seed % 2 else "thread") for seed in range(4)))

    for seed, image in enumerate(asyncio.run(all_of_them())):
        assert torch.equal(image, alone(seed)[0])


def test_threads_have_a_run_each():
    model = CachedDenoiser(network, METHOD, scalings="eps")

    def one(seed: int) -> tuple[Tensor, str]:
        image = last(announced(model, start(seed), seed % 2 == 0))
        return image, model.report.decisions("guided")

    with ThreadPoolExecutor(3) as pool:
        for seed, (image, _) in enumerate(pool.map(one, range(6))):
            assert torch.equal(image, alone(seed)[0])


def test_branches_in_turn_have_turns_of_their_own_in_every_run():
    """cond of one run comes from another thread than its uncond, and between them the other run's cond."""
    named = lambda x, sigma, name: torch.full_like(x, float(name == "cond"))  # noqa: E731
    model = CachedDenoiser(named, None, branches=InTurn("cond", "uncond"), scalings="denoised")
    with model.run(SIGMAS) as one, model.run(SIGMAS) as two, ThreadPoolExecutor(2) as pool:
        for sigma in SIGMAS[:-1]:
            for name in ("cond", "uncond"):
                for run in (one, two):
                    x = start(0) * sigma
                    assert pool.submit(run, x, sigma.expand(1), name=name).result().eq(float(name == "cond")).all()
    assert one.report.branches == two.report.branches == ["cond", "uncond"]


def test_a_run_begun_inside_another_is_the_one_that_is_called():
    model = CachedDenoiser(network, METHOD, scalings="eps")
    inner: list[Tensor] = []

    def preview(info) -> None:
        if info["i"] == 4:
            inner.append(last(announced(model, start(1), False)))

    def euler(model, x, sigmas, callback=None):
        images = [(image, callback({"i": k})) for k, image in enumerate(loop(model, x, sigmas))]
        return images[-1][0]

    image = sample(euler, model, start(0), SIGMAS, callback=preview)
    assert torch.equal(image, alone(0)[0])
    assert torch.equal(inner[0], alone(1)[0])


@pytest.mark.parametrize("by_wrapper", [True, False], ids=["the wrapper", "the inner model"])
def test_a_call_of_the_wrapper_inside_a_run_is_part_of_it_and_one_of_the_inner_model_is_not(by_wrapper):
    """Of another latent, at the sigma that the run comes to next."""
    model = CachedDenoiser(network, Method(), scalings="eps")
    with model.run(SIGMAS) as run:
        undisturbed = last(loop(run, start(0), SIGMAS))
    expected, sigma = run.report.decisions("guided"), SIGMAS[4].expand(1)
    assert expected[4] == "S"
    with model.run(SIGMAS) as run:
        images = []
        for image in loop(run, start(0), SIGMAS):
            if len(images) == 4:
                answer = (model if by_wrapper else model.inner_model)(start(1), sigma)
            images.append(image)
    assert torch.equal(answer, network(start(1), sigma)) != by_wrapper
    assert torch.equal(images[-1], undisturbed) or by_wrapper
    assert run.report.evaluations == len(expected) + by_wrapper


def test_a_loop_of_the_wrapper_inside_a_run_is_a_run_of_its_own_and_the_other_begins_anew():
    """On the run's own schedule; neither is answered from the other's cache."""
    model = CachedDenoiser(network, Method(warmup=1), scalings="eps")
    with model.run(SIGMAS, 1) as run:
        for k, _ in enumerate(loop(run, start(0), SIGMAS)):
            if k == 4:
                image = last(loop(model, start(1), SIGMAS))
                assert model.report.decisions("guided") == "C" + "S" * (len(SIGMAS) - 2)
    assert run.report.decisions("guided")[0] == "C"
    with model.run(SIGMAS, 1) as run:
        assert torch.equal(image, last(loop(run, start(1), SIGMAS)))


def test_a_call_that_may_belong_to_several_runs_is_an_error():
    model = CachedDenoiser(network, METHOD, scalings="eps")

    def begin() -> contextlib.AbstractContextManager[CachedDenoiser]:
        opened = model.run(SIGMAS)
        opened.__enter__()
        return opened

    first = begin()
    model(start(0), SIGMAS[0].expand(1))
    second = begin()
    with pytest.raises(
        RuntimeError, match=r"^2 runs of this wrapper are in progress in one thread, .* call what run\(\)"
    ):
        model(start(0), SIGMAS[1].expand(1))
    second.__exit__(None, None, None)
    model(start(0) * SIGMAS[1] / SIGMAS[0], SIGMAS[1].expand(1))
    assert model.report.evaluations == 2
    first.__exit__(None, None, None)


def test_a_call_from_outside_of_the_run_in_progress_is_not_part_of_it():
    """It says so, because it may be a mistake. What a context manager begins is part of the block."""
    model = CachedDenoiser(network, Method(), scalings="eps")
    waiting = announced(model, start(0), True)
    next(waiting), next(waiting)
    for call in (model, lambda *args: ThreadPoolExecutor(1).submit(model, *args).result()):
        with pytest.warns(UserWarning, match="it was begun in another thread, asyncio task or generator"):
            assert torch.equal(call(start(1), SIGMAS[1].expand(1)), network(start(1), SIGMAS[1].expand(1)))
        model._engine._warned.clear()
    last(waiting)

    @contextlib.contextmanager
    def session():
        with model.run(SIGMAS):
            yield

    with session():
        last(loop(model, start(0), SIGMAS))
        assert model.report.decisions("guided") == "C" + "S" * (len(SIGMAS) - 2)


def test_a_run_of_a_run_is_an_error_and_copies_have_no_runs():
    model = CachedDenoiser(torch.nn.Identity(), METHOD, scalings="eps")
    with model.run(SIGMAS) as run:
        with pytest.raises(RuntimeError, match="this is one run of a CachedDenoiser"), run.run(SIGMAS):
            pass
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not other._open
    assert not model._open


# Loops that nobody has announced.


@pytest.mark.parametrize("stages", [1, 2])
def test_an_unannounced_loop_does_not_end_under_a_sampler_s_own_noise(stages):
    """Full ancestral noise, one or two evaluations a step."""
    model = CachedDenoiser(network, Method(warmup=1), scalings="eps", sigmas=SIGMAS)
    noise = torch.Generator().manual_seed(0)
    x = 14 * torch.randn(1, 4, 32, 32, generator=noise)
    for sigma, following in itertools.pairwise(SIGMAS):
        denoised = model(x, sigma.expand(1))
        if stages == 2 and following > 0:
            middle = (sigma * following).sqrt()
            denoised = model(x + (x - denoised) / sigma * (middle - sigma), middle.expand(1))
        up = (following**2 * (sigma**2 - following**2) / sigma**2).sqrt()
        x = denoised + (x - denoised) / sigma * (following**2 - up**2).sqrt()
        x = x + up * torch.randn(x.shape, generator=noise)
    assert model.report.evaluations == stages * (len(SIGMAS) - 2) + 1


def test_unannounced_loops_that_alternate_in_one_thread_are_computed():
    model = CachedDenoiser(network, Method(), scalings="eps")
    *_, images = zip(*(loop(model, start(seed), SIGMAS) for seed in range(2)), strict=True)
    for seed, image in enumerate(images):
        assert torch.equal(image, last(loop(network, start(seed), SIGMAS)))


# The fuzz test: whoever is answered from a cache is answered from its own.

PLACES = 32


class Marking:
    """The network's noise has 1 at place `run` of its first row, and every run's latents begin with 0 there.

    So an answer, computed or predicted, shows from whose evaluations it was made. The run is no argument, by which the
    cache might know it.
    """

    run = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        out = torch.tanh(x / (1 + level**2).sqrt())
        out[:, 0, 0] = 0
        out[:, 0, 0, self.run] = 1.0
        return x - level * out


def fuzzed(seed: int) -> tuple[int, int]:
    """A wrapper with 2 to 5 runs at once, begun and called in all ways: the runs, and the skipped evaluations."""
    rng = random.Random(seed)
    method = rng.choice([Method(), UCache(1e9, start=0.0), Forecast(min_evaluations=0, interval=2)])
    marking = Marking()
    model = CachedDenoiser(marking, method, scalings="eps", sigmas=SIGMAS if rng.random() < 0.3 else None)
    noise = torch.Generator().manual_seed(seed)
    count = rng.randint(2, 5)
    skipped = 0

    def steps(k: int) -> Iterator[None]:
        nonlocal skipped
        begin, end = sorted(rng.sample(range(len(SIGMAS)), 2))
        sigmas = SIGMAS[: end + 1] if rng.random() < 0.6 else SIGMAS[begin:]
        way = rng.choice(("run", "wrapper", "bare") if len(sigmas) > 1 else ("bare",))
        broken_off = rng.randrange(len(sigmas)) if rng.random() < 0.2 else len(sigmas)
        eta = rng.choice([0.0, 0.0, 1.0])
        x = float(sigmas[0]) * torch.randn(1, 2, 32, 32, generator=noise)
        x[:, 0, 0] = 0
        with model.run(sigmas, rng.choice([None, 1])) if way != "bare" else contextlib.nullcontext(model) as run:
            call = run if way == "run" else model
            for n, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
                yield
                if n == broken_off:
                    return
                marking.run, before = k, run.report.skipped
                denoised = call(x, sigma.expand(1))
                out = ((x - denoised) / sigma)[0, 0, 0]
                foreign = [j for j in range(PLACES) if j != k and abs(float(out[j])) > 1e-3]
                assert not foreign, f"seed {seed}: run {k} ({way}) was answered from {foreign} in evaluation {n}"
                skipped += run.report.skipped > before
                up = (following**2 * (sigma**2 - following**2) / sigma**2).sqrt() if eta else 0.0
                x = denoised + (x - denoised) / sigma * (following**2 - up**2) ** 0.5
                fresh = torch.randn(x.shape, generator=noise)
                fresh[:, 0, 0] = 0
                x = x + up * fresh
                x[:, 0, 0, :k] = x[:, 0, 0, k + 1 :] = 0
        yield

    drive = rng.choice([in_one_thread, in_tasks, in_threads, by_one_executor])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drive([steps(k) for k in range(count)], rng)
    return count, skipped


def in_one_thread(runs: list[Iterator[None]], rng: random.Random) -> None:
    while runs:
        run = rng.choice(runs)
        for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
            if next(run, False) is False:
                runs.remove(run)
                break


def in_tasks(runs: list[Iterator[None]], rng: random.Random) -> None:
    async def one(run: Iterator[None]) -> None:
        for _ in run:
            for _ in range(rng.choice([0, 1, 1, 2])):
                await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, runs))

    asyncio.run(all_of_them())


def in_threads(runs: list[Iterator[None]], rng: random.Random) -> None:
    """A thread for each run, of a pool in which threads are used again; their calls alternate at random."""
    pools = [ThreadPoolExecutor(1) for _ in range(rng.randint(1, len(runs)))]
    of = {id(run): rng.choice(pools) for run in runs}
    while runs:
        run = rng.choice(runs)
        if of[id(run)].submit(next, run, False).result() is False:
            runs.remove(run)
    for pool in pools:
        pool.shutdown()


def by_one_executor(runs: list[Iterator[None]], rng: random.Random) -> None:
    with ThreadPoolExecutor(1) as pool:

        async def one(run: Iterator[None]) -> None:
            while await asyncio.get_running_loop().run_in_executor(pool, next, run, False) is not False:
                await asyncio.sleep(0)

        async def all_of_them() -> None:
            await asyncio.gather(*map(one, runs))

        asyncio.run(all_of_them())


def test_no_answer_comes_from_another_run():
    runs = skipped = seed = 0
    wanted = 2000 if "STEPCACHE_LONG" in os.environ else 60
    while runs < wanted:
        count, skips = fuzzed(seed)
        runs, skipped, seed = runs + count, skipped + skips, seed + 1
    print(f"{runs} runs, {skipped} skipped evaluations, none from another run")
    assert skipped > runs
