"""What stepcache itself costs: time and memory per evaluation and branch, in copies of the latent.

python benchmarks/overhead.py [--device cuda] [--markdown overhead.md] [--json overhead.json]

The model does nothing (it returns a tensor made before), so all that is measured is bookkeeping. Three kinds of
evaluation: `gated` (a gate holds it: computed and remembered), `computed` (the criterion is asked and computes) and
`skipped` (the criterion is asked and skips). One copy is `latent.clone()`, timed in turn with each of them. Memory:
`kept` is what stays between evaluations, `peak` the most that one evaluation holds beyond that. `transfers` are the
device-to-host transfers of one evaluation. `ops` are its tensor operations, about as many kernels on a GPU, and
`passes` what they read and write, in copies: both are the same on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from pathlib import Path

import torch
from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepcache import EasyCache, Forecast, Method, UCache
from stepcache.extend import DeferredScalars
from stepcache.samplers.k_diffusion import CachedDenoiser

SHAPES = ((1, 4, 64, 64), (1, 4, 128, 128), (4, 16, 128, 128), (1, 16, 21, 90, 160))
DTYPES = (torch.float32, torch.bfloat16)
METHODS = {"forecast": Forecast, "ucache": UCache, "easycache": EasyCache}
NEVER, ALWAYS = 1e-30, 1e30
"""Thresholds under which the criterion, when asked, always computes and always skips."""


class Work(TorchDispatchMode):
    """Bytes of the tensors alive that were made under it, the most there have been; operations, and their traffic."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.ops = self.traffic = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        given = [one for one in tree_leaves((arguments, keywords)) if isinstance(one, torch.Tensor)]
        known = {one.untyped_storage()._cdata for one in given}
        view = made and all(one.untyped_storage()._cdata in known for one in made) and not function._schema.is_mutable
        if not view:
            self.ops += 1
            self.traffic += sum(min(one.nbytes, one.untyped_storage().nbytes()) for one in (*given, *made))
        for tensor in made:
            self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


class Transfers:
    """Counts how often readings are brought from the device to the host."""

    def __enter__(self) -> Transfers:
        self.count, self._fetch = 0, DeferredScalars.fetch

        def fetch(deferred: DeferredScalars) -> None:
            self.count += 1
            self._fetch(deferred)

        DeferredScalars.fetch = fetch
        return self

    def __exit__(self, *error: object) -> None:
        DeferredScalars.fetch = self._fetch


def denoiser(method: Method, latents: list[torch.Tensor]) -> CachedDenoiser:
    """A cached model whose network costs nothing: it returns one of `latents` in turn."""
    state = {"calls": 0}

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        state["calls"] += 1
        return latents[state["calls"] % len(latents)]

    return CachedDenoiser(model, method)


def seconds(work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def methods(name: str) -> dict[str, Method]:
    """For every kind of evaluation the method at options under which it makes only that kind, after the first few."""
    if name == "forecast":  # has no criterion: its evaluations are gated or skipped
        return {"gated": Forecast(warmup=10_000), "skipped": Forecast(10_000, last_step=False)}
    make = METHODS[name]
    return {
        "gated": make(NEVER, start=0.0, end=1.0, warmup=10_000),
        "computed": make(NEVER, start=0.0, end=1.0),
        "skipped": make(ALWAYS, start=0.0, end=1.0),
    }


@torch.no_grad()
def measure(
    kind: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, repeats: int
) -> dict:
    """Median time of one evaluation of this kind over the median time of one copy, and its memory in copies."""
    method = methods(name)[kind]
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    sigmas = torch.linspace(10, 0.1, repeats + 9)
    model = denoiser(method, [0.5 * latent for latent in latents])
    copies, ours = [], []
    with model.run(torch.cat([sigmas, torch.zeros(1)]), stages=1):
        for k, sigma in enumerate(sigmas[:-2]):
            x = latents[(k + 1) % 4]
            sigma = sigma.to(device).expand(shape[0])
            elapsed = seconds(lambda x=x, sigma=sigma: model(x, sigma), device)
            copy = seconds(x.clone, device)
            if k >= 8:
                ours.append(elapsed)
                copies.append(copy)
        decisions = model.report.decisions("guided")[8:]
        assert set(decisions) == {"S" if kind == "skipped" else "C"}, decisions
        kept = sum(entry.x.nbytes + entry.out.nbytes for h in model.engine.runs.current.caches.values() for entry in h)
        with Work() as work, Transfers() as transfers:
            model(latents[0], sigmas[-2].to(device).expand(shape[0]))
    size = latents[0].nbytes
    return {
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "method": name,
        "evaluation": kind,
        "copy_us": statistics.median(copies) * 1e6,
        "us": statistics.median(ours) * 1e6,
        "copies": statistics.median(a / b for a, b in zip(ours, copies, strict=True)),
        "kept": kept / size,
        "peak": work.peak / size,
        "transfers": transfers.count,
        "ops": work.ops,
        "passes": work.traffic / 2 / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument(
        "--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES], help="(default %(default)s)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, text.split("x"))) for text in options.shapes]
    jobs = [
        (kind, name, shape, dtype) for shape in shapes for dtype in DTYPES for name in METHODS for kind in methods(name)
    ]
    device = torch.device(options.device)
    rows = [measure(*job, device, options.repeats) for job in track(jobs, description="measuring")]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if options.markdown:
        with options.markdown.open("w", encoding="utf-8") as file:
            Console(file=file, width=200).print(table(rows, markdown=True))
    Console(width=130).print(table(rows))


def table(rows: list[dict], markdown: bool = False) -> Table:
    made = Table(box=MARKDOWN if markdown else SIMPLE_HEAD)
    for column in ("latent", "dtype", "method", "evaluation"):
        made.add_column(column, no_wrap=True)
    for column in ("one copy, us", "ours, us", "copies", "kept", "peak", "transfers", "ops", "passes"):
        made.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        numbers = [f"{r['copy_us']:.0f}", f"{r['us']:.0f}", *(f"{r[key]:.1f}" for key in ("copies", "kept", "peak"))]
        numbers += [str(r["transfers"]), str(r["ops"]), f"{r['passes']:.1f}"]
        made.add_row(r["shape"], r["dtype"], r["method"], r["evaluation"], *numbers)
    return made


if __name__ == "__main__":
    main()
