"""A service on Ray Serve: a diffusers pipeline a replica, with the cache attached to every call.

python examples/serve_ray.py --tiny --replicas 2  # random weights, offline
curl localhost:8000 -d '{"prompt": "a lighthouse", "method": "forecast", "speed": 3}' -o image.png

A request is JSON: prompt, seed, steps, width, height, guidance, method with options, or speed (1: no cache; 2: Forecast
with half of the calls; 3: a third). Requests that may share a pipeline's call are batched. The answer is a PNG with the
calls in its headers; a wrong request is answered 400 with a sentence, a failed one 500. A request whose client hangs up
ends after the step in progress. Counters for Prometheus: http://localhost:8080, as Ray's own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

try:
    import tiny_diffusers as shared
    import torch
    from diffusers import DiffusionPipeline

    import stepcache
    from stepcache import Method, OptionError, Report
    from stepcache.extend import Always, number
except ImportError as error:
    raise SystemExit(f"{error}. Install what this needs: pip install 'stepcache[ray]'") from error

LIMITS = {"seed": 2**53, "steps": 1000, "width": 4096, "height": 4096, "speed": 100, "fail_at": 1000}
WAIT = 0.02
"""How many seconds a request waits for others that may share its call."""


class Fault(Exception):
    """A request that asked to fail (--faults)."""


@dataclass
class Job:
    """One request, and whether its client has hung up."""

    prompt: str = ""
    seed: int = 0
    steps: int = 20
    width: int = 512
    height: int = 512
    guidance: float = 5.0
    method: str = "forecast"
    options: str = ""
    speed: int | None = None
    fail_at: int | None = None
    cancelled: bool = False

    @classmethod
    def read(cls, text: bytes, faults: bool = False) -> Job:
        """From JSON; OptionError for anything that cannot be painted."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise OptionError(f"the request is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise OptionError("the request must be a JSON object")
        known = {field.name: field.default for field in fields(cls) if field.name != "cancelled"}
        if not faults:
            del known["fail_at"]
        for name, value in given.items():
            if name not in known:
                raise OptionError(f"unknown field {name!r}. Accepted: {', '.join(known)}.")
            if isinstance(known[name], str) and not isinstance(value, str):
                raise OptionError(f"{name}={value!r}: accepted is text")
            if name == "guidance":
                number(name, value, high=100)
            elif not isinstance(known[name], str):
                number(name, value, low=name != "seed", high=LIMITS[name], whole=True)
        if "speed" in given and not given.keys().isdisjoint(("method", "options")):
            raise OptionError("speed is a number of calls with Forecast: give it, or method and options")
        job = cls(**given)
        job.chosen()
        return job

    def chosen(self) -> Method:
        """The method that is asked for."""
        if self.speed is None:
            return stepcache.method(self.method, self.options)
        return stepcache.method("none") if self.speed == 1 else stepcache.Forecast(self.speed)

    def may_join(self, other: Job) -> bool:
        """Whether both can be painted in one call without either depending on the other.

        A method with a criterion decides for the whole batch: such requests are painted alone.
        """
        same = ("steps", "width", "height", "guidance", "method", "options", "speed", "fail_at")
        chosen = self.chosen()
        decides = not (chosen.never_skips or isinstance(chosen.criterion, Always))
        return not decides and all(getattr(self, name) == getattr(other, name) for name in same)


@dataclass
class Painted:
    """An image (H, W, 3) as uint8, or the error in its place; and what its call came to."""

    image: Any = None
    error: Exception | None = None
    report: Report | None = None
    seconds: float = 0.0
    together: int = 1


class Painter:
    """A pipeline, painting one group of requests at a time.

    `cached`: False leaves stepcache out, whatever a request asks for.
    """

    def __init__(self, model: str | None, device: str, dtype: str, cached: bool = True) -> None:
        self.device, self.dtype, self.cached = device, shared.DTYPES[dtype], cached
        self.tiny = model is None
        loaded = (
            shared.sdxl(self.dtype) if self.tiny else DiffusionPipeline.from_pretrained(model, torch_dtype=self.dtype)
        )
        self.pipe = loaded.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        if hasattr(getattr(self.pipe, "vae", None), "enable_slicing"):
            self.pipe.vae.enable_slicing()  # decodes images one by one: less memory, and each as if alone
        self._lock = threading.Lock()

    def paint(self, jobs: Sequence[Job]) -> list[Painted]:
        """Paints requests, those that may share a call together; never raises for one of them."""
        painted: dict[int, Painted] = {}
        left = [*enumerate(jobs)]
        while left:
            (_, first), *others = left
            group = [left[0], *((k, job) for k, job in others if first.may_join(job))]
            left = [(k, job) for k, job in others if not first.may_join(job)]
            with self._lock:
                for (k, _), one in zip(group, self._paint([job for _, job in group]), strict=True):
                    painted[k] = one
        return [painted[k] for k in range(len(jobs))]

    def _paint(self, jobs: list[Job]) -> list[Painted]:
        first, start = jobs[0], time.perf_counter()

        def after_step(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if first.fail_at is not None and step + 1 >= first.fail_at:
                raise Fault(f"the request asked to fail at step {first.fail_at}")
            pipe._interrupt = all(job.cancelled for job in jobs)
            return given

        try:
            if all(job.cancelled for job in jobs):
                raise asyncio.CancelledError
            with stepcache.attach(self.pipe, first.chosen()) if self.cached else contextlib.nullcontext() as cache:
                images = self.pipe(
                    **self._prompts(jobs),
                    num_inference_steps=first.steps,
                    guidance_scale=first.guidance,
                    width=first.width,
                    height=first.height,
                    generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
                    callback_on_step_end=after_step,
                    output_type="np",
                ).images
        except (Exception, asyncio.CancelledError) as error:
            failed = error if isinstance(error, Exception) else RuntimeError("cancelled")
            return [Painted(error=failed, seconds=time.perf_counter() - start, together=len(jobs))] * len(jobs)
        seconds = time.perf_counter() - start
        pixels = (images.clip(0, 1) * 255).round().astype("uint8")
        return [Painted(image, None, cache and cache.report, seconds, len(jobs)) for image in pixels]

    def _prompts(self, jobs: list[Job]) -> dict[str, Any]:
        if not self.tiny:
            return {"prompt": [job.prompt for job in jobs]}
        where = argparse.Namespace(device=self.device, dtype=self.dtype)
        each = [shared.inputs(job.prompt, where, pooled=True, negative=True) for job in jobs]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}


def png(image: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def count(painted: Painted, job: Job, metrics: dict[str, Any]) -> None:
    """Adds a request to the counters. The calls of a shared call are counted once, as its share."""
    tags = {"method": "none" if job.speed == 1 else "forecast" if job.speed else job.method}
    metrics["requests"].inc(tags=tags | {"outcome": "failed" if painted.error else "painted"})
    metrics["seconds"].observe(painted.seconds, tags=tags)
    if painted.report is None:
        return
    for name, calls in (("made", painted.report.calls), ("skipped", painted.report.skipped)):
        if calls:
            metrics[name].inc(calls / painted.together, tags=tags)
    errors = [event.error_share for event in painted.report.events if event.error_share is not None]
    if errors:
        metrics["error"].observe(sum(errors) / len(errors), tags=tags)


def service(options: argparse.Namespace) -> Any:
    """The application for `serve.run`."""
    from ray import serve
    from ray.util.metrics import Counter, Histogram
    from starlette.requests import Request
    from starlette.responses import Response

    # malloc keeps for each thread what its largest request needed: so two arenas, and one thread that paints.
    actor = {"num_cpus": 0.5, "runtime_env": {"env_vars": {"MALLOC_ARENA_MAX": "2"}}}

    @serve.deployment(num_replicas=options.replicas, max_ongoing_requests=64, ray_actor_options=actor)
    class Service:
        def __init__(self) -> None:
            torch.set_num_threads(options.threads)
            model = None if options.tiny else options.model
            self.painter = Painter(model, options.device, options.dtype, not options.no_cache)
            self.thread = ThreadPoolExecutor(1)
            tags = ("method",)
            seconds, shares = [0.03, 0.1, 0.3, 1, 3, 10, 30, 100], [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1]
            self.metrics = {
                "requests": Counter("stepcache_requests", "Requests", tag_keys=("method", "outcome")),
                "made": Counter("stepcache_calls_made", "Calls of the network, one a branch and image", tag_keys=tags),
                "skipped": Counter("stepcache_calls_skipped", "Calls that were answered without it", tag_keys=tags),
                "seconds": Histogram("stepcache_seconds", "Seconds of painting", seconds, tag_keys=tags),
                "error": Histogram("stepcache_prediction_error", "Mean share of the output", shares, tag_keys=tags),
            }

        @serve.batch(max_batch_size=options.batch, batch_wait_timeout_s=WAIT)
        async def together(self, jobs: list[Job]) -> list[Painted]:
            return await asyncio.get_running_loop().run_in_executor(self.thread, self.painter.paint, jobs)

        async def __call__(self, request: Request) -> Response:
            try:
                job = Job.read(await request.body(), options.faults)
            except OptionError as refusal:
                return Response(str(refusal), 400)
            try:
                painted = await self.together(job)
            except asyncio.CancelledError:
                job.cancelled = True
                raise
            count(painted, job, self.metrics)
            if painted.error is not None:
                return Response(f"{type(painted.error).__name__}: {painted.error}", 500)
            headers = {"batch": str(painted.together)}
            if (report := painted.report) is not None:
                calls = {"calls-made": report.calls, "calls-skipped": report.skipped}
                headers |= {name: str(value / painted.together) for name, value in calls.items()}
            return Response(png(painted.image), headers=headers, media_type="image/png")

    return Service.bind()


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0", help="hub id or folder")
    parser.add_argument("--tiny", action="store_true", help="instead a miniature with random weights, built offline")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", choices=shared.DTYPES, default="float32", help="of the networks (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a replica on the CPU (%(default)s)")
    parser.add_argument(
        "--batch", type=int, default=4, help="requests that may share a call; 1: bit for bit as if alone (%(default)s)"
    )
    parser.add_argument("--no-cache", action="store_true", help="leave stepcache out, to compare")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, default=8080)
    parser.add_argument("--faults", action="store_true", help="accept fail_at, the step at which a request fails")
    return parser.parse_args(line)


def start(options: argparse.Namespace) -> Callable[[], None]:
    """Starts Ray and the service; returns what ends both."""
    import ray
    from ray import serve

    ray.init(_metrics_export_port=options.metrics_port, include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(service(options), name="stepcache")

    def end() -> None:
        serve.shutdown()
        ray.shutdown()

    return end


def main() -> None:
    options = arguments()
    end = start(options)
    print(f"http://127.0.0.1:{options.port}; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        end()


if __name__ == "__main__":
    main()
