"""Time, kernels, transfers and memory of caches on large networks with random weights: one network a call.

python benchmarks/gpu.py sdxl --out gpu-output [--tiny --device cpu] [--seconds 120]

`benchmarks/gpu.sh` calls it for each network and makes one table of all. A row is written as soon as it is measured;
what there was no time for, or what failed, is a row too and says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from gpu_networks import Network, network
from torch import nn
from torch.profiler import ProfilerActivity, profile

import stepcache
from stepcache import Forecast

WARM_UP = 2
"""Steps of the run before the measured one; a cache inside has a whole run, for it compiles more than one path."""


@dataclass
class Row:
    """One measurement. Times are medians over the steps of one run, with a synchronisation at the end of each."""

    network: str
    method: str
    compiled: bool
    device: str
    dtype: str
    parameters: int
    steps: int
    computed: int | None = None
    seconds: float | None = None
    computed_ms: float | None = None
    skipped_ms: float | None = None
    speedup: float | None = None  # over the full run, compiled over compiled
    ideal: float | None = None  # steps / computed steps
    computed_kernels: int | None = None  # in one step, scheduler included
    skipped_kernels: int | None = None
    computed_transfers: int | None = None  # device to host
    skipped_transfers: int | None = None
    peak_gib: float | None = None  # beyond what was allocated before the run
    note: str = ""


@dataclass(frozen=True)
class Variant:
    """A cache: `outside` is a method of stepcache, `inside` puts another library's cache into the network."""

    name: str
    outside: stepcache.Method | None = None
    inside: Callable[[Any, nn.Module, int], None] | None = None


def first_block(pipe: Any, net: nn.Module, steps: int) -> None:
    from diffusers import hooks

    hooks.apply_first_block_cache(net, hooks.FirstBlockCacheConfig(threshold=1e9))


def taylorseer(pipe: Any, net: nn.Module, steps: int) -> None:
    """What attention and feed-forward add in every block, as in the paper; its default names miss Wan's attention."""
    _taylorseer(net, cache_identifiers=[r"(single_)?(transformer_)?blocks\.\d+\.(attn\d?|ff|ff_context|ffn)"])


def taylorseer_lite(pipe: Any, net: nn.Module, steps: int) -> None:
    """Blocks are left out, and only the last layer is continued."""
    _taylorseer(net, use_lite_mode=True)


def _taylorseer(net: nn.Module, **options: Any) -> None:
    from diffusers import hooks

    config = hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=3, **options)
    hooks.apply_taylorseer_cache(net, config)


def dbcache(pipe: Any, net: nn.Module, steps: int) -> None:
    import cache_dit

    mask = [int(step < 2 or step % 2 == 0 or step == steps - 1) for step in range(steps)]
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        num_inference_steps=steps,
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=cache_dit.TaylorSeerCalibratorConfig())


VARIANTS = (
    Variant("full run"),
    Variant("Forecast", Forecast()),
    Variant("Forecast(3)", Forecast(3)),
    Variant("diffusers FirstBlockCache, all it can skip", inside=first_block),
    Variant("diffusers TaylorSeer", inside=taylorseer),
    Variant("diffusers TaylorSeer, lite", inside=taylorseer_lite),
    Variant("cache-dit DBCache+TaylorSeer", inside=dbcache),
)
"""FirstBlockCache's threshold decides nothing on random weights: it skips whatever it may, which shows its ceiling."""


@dataclass
class Watch:
    """What one run did: `ended` is the pipeline's callback at the end of each step."""

    device: torch.device
    counter: list[int]
    profiled: frozenset[int] = frozenset()
    times: list[float] = field(default_factory=list)
    ran: list[bool] = field(default_factory=list)
    kernels: dict[int, tuple[int, int]] = field(default_factory=dict)
    _profile: profile | None = None
    _seen: int = 0
    _begun: float = 0.0

    def begin(self) -> None:
        self._seen = self.counter[0]
        self._start(0)

    def ended(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        synchronise(self.device)
        self.times.append(time.perf_counter() - self._begun)
        self.ran.append(self.counter[0] > self._seen)
        self._seen = self.counter[0]
        if self._profile is not None:
            self._profile.stop()
            self.kernels[step] = counted(self._profile, self.device)
            self._profile = None
        self._start(step + 1)
        return tensors

    def _start(self, step: int) -> None:
        if step in self.profiled:
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()
        self._begun = time.perf_counter()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def counted(run: profile, device: torch.device) -> tuple[int, int]:
    """Kernels and device-to-host transfers of what was profiled; without a device, operators and `item()`s."""
    events = run.events()
    if device.type == "cuda":
        names = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [name for name in names if not name.startswith(("Memcpy", "Memset"))]
        return len(kernels), sum(name.startswith("Memcpy DtoH") for name in names)
    names = [event.name for event in events]
    return sum(name.startswith("aten::") for name in names), names.count("aten::_local_scalar_dense")


def watched(net: nn.Module, last: str) -> list[int]:
    """How often the module `last` has run, counted below whatever cache is put on it later."""
    module, count = net.get_submodule(last), [0]
    forward = module.forward

    @wraps(forward)
    def run(*arguments: Any, **keywords: Any) -> Any:
        count[0] += 1
        return forward(*arguments, **keywords)

    module.forward = run
    return count


class Bench:
    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.device = torch.device(options.device)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.subject: Network = network(name, options.tiny)
        self.deadline = time.monotonic() + options.seconds
        self.rows: list[Row] = []
        self.patterns: dict[str, list[bool]] = {}

    def run(self) -> None:
        for compiled in (False, True):
            for variant in VARIANTS:
                self.row(variant, compiled)
                self._save()

    def row(self, variant: Variant, compiled: bool) -> Row:
        """Measures, and adds to the rows."""
        steps = self.subject.steps
        row = Row(self.name, variant.name, compiled, self._device_name(), str(self.dtype)[6:], 0, steps)
        self.rows.append(row)
        if time.monotonic() > self.deadline:
            row.note = f"not run: the {self.options.seconds:g} s for {self.name} were over"
            return row
        try:
            with torch.inference_mode(), ExitStack() as stack:
                self._measure(row, variant, compiled, stack)
        except Exception as error:  # one cache that fails, or a lack of memory, does not end the others
            row.note = (
                f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
            )
        return row

    def _measure(self, row: Row, variant: Variant, compiled: bool, stack: ExitStack) -> None:
        """Builds the network anew, so that nothing of another cache is left in it."""
        pipe = self.subject.build(self.device, self.dtype)
        net = getattr(pipe, self.subject.denoiser)
        row.parameters = sum(p.numel() for p in net.parameters())
        counter = [0] if compiled else watched(net, self.subject.last)
        if variant.inside is not None:
            variant.inside(pipe, net, row.steps)
        if compiled:
            torch._dynamo.reset()
            self._compile(net)
        if variant.outside is not None:
            stack.enter_context(stepcache.attach(pipe, variant.outside))
        inputs = self.subject.inputs(self.device, self.dtype)
        warm_ups = [WARM_UP] if variant.inside is None else [row.steps] * (1 + compiled)  # caches inside compile twice
        for steps in warm_ups:
            self._sample(pipe, inputs, steps, Watch(self.device, counter))
        allocated = self._reset_peak()
        watch = Watch(self.device, counter)
        row.seconds = self._sample(pipe, inputs, row.steps, watch)
        if self.device.type == "cuda":
            row.peak_gib = (torch.cuda.max_memory_allocated() - allocated) / 2**30
        ran = self.patterns.setdefault(variant.name, watch.ran) if not compiled else self.patterns.get(variant.name)
        if ran is None:
            row.note = "which steps are computed is not known: its run without compilation failed"
            return
        self._fill(row, ran, watch.times)
        if all(ran) and variant is not VARIANTS[0]:
            row.note = "skips nothing in this network"
        if not compiled:
            self._profile(row, pipe, inputs, ran, counter)

    def _fill(self, row: Row, ran: list[bool], times: list[float]) -> None:
        row.computed = sum(ran)
        row.ideal = row.steps / max(1, row.computed)
        for name, kind in (("computed_ms", True), ("skipped_ms", False)):
            chosen = [seconds for seconds, computed in zip(times, ran, strict=True) if computed is kind]
            setattr(row, name, 1e3 * statistics.median(chosen) if chosen else None)
        full = next((r for r in self.rows if r.compiled == row.compiled and r.method == VARIANTS[0].name), None)
        row.speedup = full.seconds / row.seconds if full and full.seconds else None

    def _profile(self, row: Row, pipe: Any, inputs: dict[str, Any], ran: list[bool], counter: list[int]) -> None:
        """One more run, of which a late computed step and a late skipped one are profiled."""
        chosen = {kind: max((i for i, r in enumerate(ran[:-1]) if r is kind), default=None) for kind in (True, False)}
        watch = Watch(self.device, counter, frozenset(i for i in chosen.values() if i is not None))
        self._sample(pipe, inputs, row.steps, watch)
        for name, kind in (("computed", True), ("skipped", False)):
            if (found := watch.kernels.get(chosen[kind])) is not None:
                setattr(row, f"{name}_kernels", found[0])
                setattr(row, f"{name}_transfers", found[1])

    def _sample(self, pipe: Any, inputs: dict[str, Any], steps: int, watch: Watch) -> float:
        generator = torch.Generator(self.device).manual_seed(0)
        synchronise(self.device)
        begun = time.perf_counter()
        watch.begin()
        out = pipe(
            **inputs,
            num_inference_steps=steps,
            generator=generator,
            output_type="latent",
            callback_on_step_end=watch.ended,
        )
        synchronise(self.device)
        seconds = time.perf_counter() - begun
        if not torch.isfinite(out[0]).all():
            raise FloatingPointError("the latents are not finite")
        return seconds

    def _compile(self, net: nn.Module) -> None:
        """The repeated blocks alone, which takes seconds instead of minutes."""
        net.compile_repeated_blocks(backend="eager" if self.options.tiny else "inductor")

    def _reset_peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"

    def _save(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / f"{self.name}.json"
        path.write_text(json.dumps([asdict(row) for row in self.rows], indent=1) + "\n", encoding="utf-8")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", choices=("sdxl", "flux", "wan"))
    parser.add_argument("--out", type=Path, default=Path("gpu-output"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a miniature, compiled without a compiler: a dry run")
    parser.add_argument("--seconds", type=float, default=120, help="no measurement begins after them")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    Bench(options.network, options).run()


if __name__ == "__main__":
    main()
