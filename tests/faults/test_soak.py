"""Runs of mixed sizes, samplers, methods and faults, in random order through the same wrappers: each is the run alone.

    STEPCACHE_SOAK=1000 pytest -n 0 tests/faults/test_soak.py

makes that many runs, four in five of them with k-diffusion's samplers, the others with diffusers; without the variable
40 and 10."""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from soak import METHODS, Bench, Fails, alike, situations
from tiny_pipelines import PIPELINES, SD_BETAS, image, sched

from stepcache import Report
from stepcache.samplers.diffusers import attach

COUNT = int(os.environ.get("STEPCACHE_SOAK", "50"))


def test_a_run_among_others_is_the_run_alone():
    pytest.importorskip("k_diffusion")
    bench, different, ends = Bench(), [], set()
    for situation in situations(COUNT * 4 // 5, seed=11):
        among, alone = bench.run(situation), Bench().run(situation)
        ends.add(alone.end)
        if among != alone:
            different.append((situation, among.decisions, alone.decisions))
        assert bench.kept(situation) == 0 or not situation.announced, situation
    assert different == []
    assert ends >= {"done", "left", "Fails", "KeyboardInterrupt"}


@pytest.mark.usefixtures("few_objects")
def test_runs_leave_no_tensors_behind():
    """The same runs over and over; those of the first time begin with nothing known, and may end with less."""
    pytest.importorskip("k_diffusion")
    bench, same = Bench(), list(situations(25, seed=12))
    alive = []
    for _ in range(3):
        for situation in same:
            bench.run(situation)
        gc.collect()
        alive.append(sum(type(one) is torch.Tensor for one in gc.get_objects()))
    assert alive[2] <= alive[1]


@dataclass(frozen=True)
class Request:
    """One call of a pipeline.

    Attributes:
        fault: "raises" happens in the denoiser, "callback" and "interrupted" in the user's callback. Empty: nothing.
        at: the call of the denoiser, or the step, at which it happens.
    """

    pipeline: str
    method: str
    scheduler: str
    steps: int
    size: int
    guidance: float
    seed: int
    fault: str
    at: int


def requests(count: int, seed: int) -> Iterator[Request]:
    draw = random.Random(seed)
    for number in range(count):
        steps = draw.choice((1, 2, 3, 6, 10, 14))
        yield Request(
            draw.choice(("sd", "sd-img2img", "sdxl")),
            draw.choice([name for name in METHODS if name != "fbcache"]),
            draw.choice(("DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "HeunDiscrete")),
            steps,
            draw.choice((16, 24)),
            draw.choice((1.0, 5.0)),
            number,
            draw.choice(("", "", "", "raises", "callback", "interrupted")),
            draw.randrange(steps),
        )


class Service:
    """Pipelines with the cache attached for good, one for each method."""

    def __init__(self) -> None:
        self.attached: dict[tuple[str, str], tuple[Any, Any, Any]] = {}

    def pipe(self, request: Request) -> tuple[Any, Any]:
        key = request.pipeline, request.method
        if key not in self.attached:
            pipe = PIPELINES[request.pipeline].build()
            pipe.set_progress_bar_config(disable=True)
            block = attach(pipe, METHODS[request.method]())
            self.attached[key] = pipe, block.__enter__(), block
        return self.attached[key][:2]

    def run(self, request: Request) -> tuple[Any, str, str]:
        """The latents, how the run ended, and the report's decisions."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._run(request)

    def _run(self, request: Request) -> tuple[Any, str, str]:
        pipe, cache = self.pipe(request)
        pipe.scheduler = sched(request.scheduler, **SD_BETAS)
        options = PIPELINES[request.pipeline].call(pipe)
        if "image" in options:
            options["image"] = image(size=request.size)
        else:
            options |= {"height": request.size, "width": request.size}
        options |= {"num_inference_steps": request.steps, "guidance_scale": request.guidance, "output_type": "latent"}
        options |= {"generator": torch.Generator().manual_seed(request.seed), "callback_on_step_end": fault(request)}
        calls: list[int] = []
        at = request.at if request.fault == "raises" else -1
        hook = pipe.unet.register_forward_pre_hook(partial(fail, calls, at))
        try:
            found, end = torch.as_tensor(pipe(**options)[0]), "done"
        except Fails:
            found, end = torch.zeros(1), "Fails"
        except (ValueError, IndexError) as error:  # of a scheduler with so few steps, or an image without any left
            found, end = torch.zeros(1), type(error).__name__
        finally:
            hook.remove()
        report = cache.report if calls else Report("")  # a run without a call has none of its own
        return found, end, " ".join(report.decisions(name) for name in sorted({one.branch for one in report.events}))


def fail(calls: list[int], at: int, *_: Any) -> None:
    calls.append(1)
    if len(calls) == at + 1:
        raise Fails


def fault(request: Request) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == request.at and request.fault == "callback":
            raise Fails
        if step == request.at and request.fault == "interrupted":
            pipe._interrupt = True
        return given

    return callback


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pipelines_run_among_others_is_the_run_alone():
    pytest.importorskip("diffusers")
    service, different, ends = Service(), [], set()
    for request in requests(-(-COUNT // 5), seed=13):
        (among, *first), (alone, *second) = service.run(request), Service().run(request)
        ends.add(second[0])
        if first != second or not alike(among, alone):
            different.append((request, first, second))
    assert different == []
    assert ends >= {"done", "Fails"}
