"""Caches that live inside the network beside ours, on the shipped DiT through diffusers, at as much work.

python benchmarks/peers.py [--together] [--samples 64] [--steps 20] [--out peers-output]

diffusers' FirstBlockCache, MagCache and TaylorSeer, cache-dit's DBCache with and without its calibrators, stepcache's
own methods, and fewer steps of the same sampler; with `--together`, stepcache outside of the others. Work is counted in
blocks that really ran. Needs diffusers from 0.36 on and cache-dit: pip install -e ".[demo,cache-dit]".

Thresholds are searched on other seeds, so that every method does the work of its group. They and MagCache's ratios are
kept in settings.json; a measurement that was broken off goes on.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import CacheMixin, hooks
from rich.console import Console
from torch import nn

from stepcache import DBCache, EasyCache, FBCache, Forecast, Method, Static, UCache
from stepcache.bench import Pipeline, Results, Sampled, bench
from stepcache.demo import pipelines
from stepcache.extend import AdaptiveOrder, Reuse, TaylorSeer, require

SAMPLER = "flow-match Euler"
CALIBRATION = range(1000, 1016)
"""Seeds that thresholds and ratios come from; none of them is measured."""


# --- what is put inside ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstBlock:
    """diffusers' FirstBlockCache."""

    threshold: float

    def put(self, net: nn.Module) -> None:
        hooks.apply_first_block_cache(net, hooks.FirstBlockCacheConfig(self.threshold))


@dataclass(frozen=True)
class Mag:
    """diffusers' MagCache. It counts calls: `ratios` has one for every call that reaches the network in a run."""

    threshold: float
    ratios: tuple[float, ...]

    def put(self, net: nn.Module) -> None:
        ratios = list(self.ratios)
        hooks.apply_mag_cache(net, hooks.MagCacheConfig(self.threshold, 3, 0.2, len(ratios), ratios))


@dataclass(frozen=True)
class MagCalibration:
    """diffusers' MagCache in calibration: computes everything, and prints its ratios after so many calls."""

    calls: int

    def put(self, net: nn.Module) -> None:
        hooks.apply_mag_cache(net, hooks.MagCacheConfig(num_inference_steps=self.calls, calibrate=True))


@dataclass(frozen=True)
class Taylor:
    """diffusers' TaylorSeer, of what attention and feed-forward add in every block, as in the paper.

    Its default names match no module of this network (`attn1` and `ff`), and so would do nothing.
    """

    interval: int
    before: int
    order: int = 1
    modules: tuple[str, ...] = (r"transformer_blocks\.\d+\.(attn1|ff)",)
    zeros: tuple[str, ...] | None = None

    def put(self, net: nn.Module) -> None:
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.before,
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=list(self.modules),
            skip_predict_identifiers=self.zeros and list(self.zeros),
        )
        hooks.apply_taylorseer_cache(net, config)


def lite(interval: int, before: int) -> Taylor:
    """TaylorSeer's lite mode for this network: blocks left out, the last layer continued."""
    return Taylor(interval, before, 1, ("proj_out_2",), (r"transformer_blocks\.\d+", "proj_out_1"))


@dataclass(frozen=True)
class CacheDiT:
    """cache-dit's DBCache on the first block (Fn 1, Bn 0), with a calibrator or none ("TaylorSeer", "DMD").

    With a `mask` of digits its zeros are skipped (policy "static") and the threshold is not asked.
    """

    threshold: float = 1.0
    warmup: int = 4
    calibrator: str = ""
    mask: tuple[int, ...] | None = None
    steps: int = 20

    def put(self, net: nn.Module) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # it tells everything it does
        library = require("cache_dit", "cache-dit")
        config = library.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=self.threshold,
            max_warmup_steps=self.warmup,
            num_inference_steps=self.steps,
            steps_computation_mask=self.mask and list(self.mask),
            steps_computation_policy="static" if self.mask else "dynamic",
        )
        calibrators = {"TaylorSeer": library.TaylorSeerCalibratorConfig, "DMD": library.DMDCalibratorConfig}
        calibrator = calibrators[self.calibrator]() if self.calibrator else None
        library.enable_cache(net, cache_config=config, calibrator_config=calibrator)


Inside = FirstBlock | Mag | MagCalibration | Taylor | CacheDiT


# --- how it is measured ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is measured: a method of stepcache outside, another cache inside, or both."""

    outside: Method | None = None
    inside: Inside | None = None


@dataclass(frozen=True)
class Counted(Sampled):
    """A batch whose calls are the blocks that ran, in whole forwards: of four blocks one is a quarter of a call.

    `whole`: how often the last block ran, and so all of them.
    """

    forwards: float
    whole: int

    @property
    def calls(self) -> float:
        return self.forwards


class Peers:
    """The shipped DiT as a subject of `stepcache.bench`, with `Setting`s for methods.

    Every batch has a copy of the network of its own, so that nothing of a cache outlives it.
    """

    name = "dit, diffusers"

    def __init__(self) -> None:
        self.base: Pipeline = pipelines.measured("dit")
        self.metrics, self.limit, self.noisy = self.base.metrics, self.base.limit, self.base.noisy
        self.settings = self.base.settings

    def sample(self, sampler: str, steps: int, method: Setting | None, seeds: Sequence[int]) -> Counted:
        setting = method or Setting()
        denoiser = copy.deepcopy(self.base.pipe.denoiser)
        ran = counters(denoiser.net)
        if setting.inside is not None:
            setting.inside.put(denoiser.net)
        pipe = pipelines.DigitsPipeline(denoiser, self.base.pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
        with CacheMixin.cache_context(denoiser.net, "both"):  # uncond and cond come in one call
            result = replace(self.base, pipe=pipe).sample(sampler, steps, setting.outside, seeds)
        forwards = sum(attention + feed for attention, feed in ran) / (2 * len(ran))
        return Counted(result.images, result.seconds, result.report, forwards, ran[-1][1])


def counters(net: nn.Module) -> list[list[int]]:
    """Of every block how often its attention and its feed-forward have run, below whatever is put on them later."""
    ran = []
    for block in net.transformer_blocks:
        counts = [0, 0]
        for i, module in enumerate((block.attn1, block.ff)):
            module.forward = counted(module.forward, counts, i)
        ran.append(counts)
    return ran


def counted(forward: Callable[..., Any], counts: list[int], i: int) -> Callable[..., Any]:
    @wraps(forward)
    def run(*arguments: Any, **keywords: Any) -> Any:
        counts[i] += 1
        return forward(*arguments, **keywords)

    return run


# --- settings, from other seeds --------------------------------------------------------------------------------------


class Search:
    """Thresholds and ratios found on `CALIBRATION`, kept in a file."""

    def __init__(self, subject: Peers, steps: int, path: Path) -> None:
        self.subject, self.steps, self.path = subject, steps, path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, name: str, make: Callable[[float], Setting], target: float) -> Setting:
        """The setting whose work is nearest to `target` whole forwards, by bisection of the threshold."""
        if name not in self.found:
            low, high = 1e-3, 4.0
            best, least = low, float("inf")
            for _ in range(10):
                middle = (low * high) ** 0.5
                work = self.subject.sample(SAMPLER, self.steps, make(middle), CALIBRATION[:8]).calls
                if abs(work - target) < least:
                    best, least = middle, abs(work - target)
                if least == 0:
                    break
                low, high = (middle, high) if work > target else (low, middle)
            self._keep(name, round(best, 6))
        return make(self.found[name])

    def ratios(self, outside: Method | None = None) -> tuple[float, ...]:
        """MagCache's, from its own calibration, as it prints them; with stepcache outside, of the calls it leaves."""
        name = "MagCache, ratios" + (f" under {outside.name}" if outside else "")
        if name not in self.found:
            calls = self.subject.sample(SAMPLER, self.steps, Setting(outside), CALIBRATION[:1]).calls
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                self.subject.sample(SAMPLER, self.steps, Setting(outside, MagCalibration(int(calls))), CALIBRATION)
            (line,) = (line for line in printed.getvalue().splitlines() if line.startswith("[1.0"))
            self._keep(name, ast.literal_eval(line))
        return tuple(self.found[name])

    def _keep(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def spread(steps: int, computed: int) -> tuple[int, ...]:
    """A mask of so many computed steps, evenly spread from the first to the last."""
    ones = {round(i * (steps - 1) / (computed - 1)) for i in range(computed)}
    return tuple(int(step in ones) for step in range(steps))


def taylor_mask(steps: int, interval: int, before: int) -> tuple[int, ...]:
    """The calls that diffusers' TaylorSeer computes, as a mask."""
    return tuple(int(step < before or (step - before - 1) % interval == 0) for step in range(steps))


def side_by_side(search: Search) -> dict[str, Setting]:
    """Three groups of as much work: 8 and 11 whole forwards of 20, and 11 whole evaluations and 9 first blocks."""
    steps, found = search.steps, {}
    ratios = search.ratios()
    for every, warmup in ((2, 4), (3, 2)):
        alone = Setting(Forecast(every))
        work = search.subject.sample(SAMPLER, steps, alone, CALIBRATION[:1]).calls
        whole = round((work - steps / 4) / 0.75)  # evaluations of four blocks, where the first always runs
        intervals = {2: (2, 3), 3: (3, 2)}[every]
        calls = taylor_mask(steps, *intervals)
        found |= {f"{name}, {work:g}": setting for name, setting in {
            "Forecast" if every == 2 else "Forecast(3)": alone,
            "UCache": search(f"UCache, {work:g}", lambda t: Setting(UCache(t)), work),
            "EasyCache": search(f"EasyCache, {work:g}", lambda t: Setting(EasyCache(t)), work),
            "MagCache": search(f"MagCache, {work:g}", lambda t: Setting(None, Mag(t, ratios)), work),
            "Forecast at TaylorSeer's calls": Setting(Static(calls, predictor=AdaptiveOrder())),
            "our taylorseer": Setting(Static(calls, predictor=TaylorSeer(1, baseline="zero"))),
            "TaylorSeer": Setting(None, Taylor(*intervals)),
            "TaylorSeer, order 2": Setting(None, Taylor(*intervals, 2)),
            "TaylorSeer, lite": Setting(None, lite(*intervals)),
            **first_block(search, f"{work:g}", work, whole, warmup),
        }.items()}  # fmt: skip
    whole = int(search.subject.sample(SAMPLER, steps, Setting(Forecast()), CALIBRATION[:1]).calls)
    work = whole + (steps - whole) / 4
    return found | {
        f"{name}, {work:g}": setting for name, setting in first_block(search, f"{work:g}", work, whole, 4).items()
    }


def first_block(search: Search, label: str, work: float, whole: int, warmup: int) -> dict[str, Setting]:
    """Those that always run the first block."""
    mask = spread(search.steps, whole)
    steps = search.steps

    def inside(calibrator: str) -> Callable[[float], Setting]:
        return lambda t: Setting(None, CacheDiT(t, warmup, calibrator, steps=steps))

    def found(name: str, make: Callable[[float], Setting]) -> Setting:
        return search(f"{name}, {label}", make, work)

    return {
        "our fbcache": found("our fbcache", lambda t: Setting(FBCache(t))),
        "our dbcache": found("our dbcache", lambda t: Setting(DBCache(1, 0, t, warmup))),
        "our cache-dit": found(
            "our cache-dit", lambda t: Setting(DBCache(1, 0, t, warmup, predictor=TaylorSeer(1, baseline="input")))
        ),
        "FirstBlockCache": found("FirstBlockCache", lambda t: Setting(None, FirstBlock(t))),
        "DBCache": found("DBCache", inside("")),
        "DBCache+TaylorSeer": found("DBCache+TaylorSeer", inside("TaylorSeer")),
        "DBCache+DMD": found("DBCache+DMD", inside("DMD")),
        "DBCache+TaylorSeer, mask": Setting(None, CacheDiT(1.0, 1, "TaylorSeer", mask, steps)),
        "DBCache+DMD, mask": Setting(None, CacheDiT(1.0, 1, "DMD", mask, steps)),
    }


def together(search: Search) -> dict[str, Setting]:
    """Every cache inside alone and under stepcache, with the thresholds that alone make about half the work.

    Those that count calls are told how many are left.
    """
    steps, outside = search.steps, Forecast()
    half = search.subject.sample(SAMPLER, steps, Setting(outside), CALIBRATION[:1]).calls
    ratios = search.ratios()
    mag = search(f"MagCache, {half:g}", lambda t: Setting(None, Mag(t, ratios)), half).inside
    blocks = first_block(search, f"{half:g}", half, round((half - steps / 4) / 0.75), 4)
    under = replace(mag, ratios=search.ratios(outside))
    inside: dict[str, tuple[Inside, Inside]] = {
        "FirstBlockCache": (blocks["FirstBlockCache"].inside,) * 2,
        "MagCache": (mag, under),
        "TaylorSeer": (Taylor(2, 3),) * 2,
        "TaylorSeer, lite": (lite(2, 3),) * 2,
        "DBCache": (blocks["DBCache"].inside, replace(blocks["DBCache"].inside, steps=int(half))),
        "DBCache+TaylorSeer": (
            blocks["DBCache+TaylorSeer"].inside,
            replace(blocks["DBCache+TaylorSeer"].inside, steps=int(half)),
        ),
    }
    found = {"Forecast": Setting(outside), "Forecast(3)": Setting(Forecast(3)), "Forecast(4)": Setting(Forecast(4))}
    found["reuse at Forecast's calls"] = Setting(outside.replace(predictor=Reuse()))
    for name, (alone, below) in inside.items():
        found[name] = Setting(None, alone)
        found[f"{name} under Forecast"] = Setting(outside, below)
    return found


# --- the table -------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> Iterator[str]:
    """Work and time as shares of the full run, and how far PSNR is ahead of others, sample by sample.

    Fewer steps make no more work. Forecast is that of the same group, or, where the group has none, the first one.
    """
    forecasts = [row.method for row in results.rows if row.method.startswith("Forecast")]
    yield "| method | work | time | PSNR | fewer steps | ahead of fewer steps | ahead of Forecast | SSIM | right |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in results.rows:
        group = row.method.rpartition(", ")[2]
        rival = next((name for name in forecasts if name.endswith(f", {group}")), forecasts[0])
        ahead = "" if row.same or row.method == rival else results.ahead(row, rival).text(sign=True)
        fewer = (f"{row.fewer.scores['PSNR']:.1f}", row.fewer.gain.text(sign=True)) if row.fewer else ("", "")
        mark, ssim, right = (row.scores[name] for name in ("PSNR", "SSIM", "right"))
        work = f"{row.calls:.4g} = {row.calls / row.asked:.2f}"
        cells = (
            row.method, work, f"{1 / row.speedup:.2f}", "same" if row.same else mark.text(), *fewer, ahead,
            f"{ssim.mean:.4f} ±{ssim.half or 0:.4f}", f"{right.mean:.1%} ±{right.half or 0:.1%}",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("peers-output"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    subject = Peers()
    search = Search(subject, options.steps, options.out / f"settings-{options.steps}.json")
    settings = (together if options.together else side_by_side)(search)
    out = options.out / ("together" if options.together else "side-by-side")
    results = bench(
        subject, [SAMPLER], [options.steps], settings, options.samples, 0, options.batch, (), out, 1, console
    )
    text = "\n".join(markdown(results)) + "\n"
    (out / "work.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
