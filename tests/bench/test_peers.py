"""stepcache outside of caches inside the network, on the shipped DiT, as `benchmarks/peers.py` measures it."""

from __future__ import annotations

import sys
from functools import wraps
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
if not hasattr(getattr(diffusers, "hooks", None), "MagCacheConfig"):
    pytest.skip("this diffusers has fewer caches", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers  # noqa: E402
from peers import CacheDiT, FirstBlock, Inside, Mag, Setting, Taylor, lite  # noqa: E402

from stepcache import FBCache, Forecast, Off, Static, UCache  # noqa: E402
from stepcache.bench import bench  # noqa: E402
from stepcache.demo import networks  # noqa: E402

STEPS, SEEDS = 6, (3, 8)
MASK, LEFT = "110101", 4
NEVER = (Off(), Static("111111"), Forecast(1), UCache(1e-9, start=0))


def mag(calls: int) -> Mag:
    return Mag(0.5, (1.0, *[0.95] * (calls - 1)))


def inner(name: str, calls: int) -> Inside:
    """A cache that skips something in so many calls."""
    if name.startswith("DBCache"):
        pytest.importorskip("cache_dit")
        mask = tuple(int(digit) for digit in "1101010101"[:calls]) if "mask" in name else None
        return CacheDiT(0.5, 1, name.removeprefix("DBCache+").split()[0] if "+" in name else "", mask, calls)
    return {"FirstBlockCache": FirstBlock(0.5), "MagCache": mag(calls), "TaylorSeer": Taylor(2, 1), "lite": lite(2, 1)}[
        name
    ]


INNER = ["FirstBlockCache", "MagCache", "TaylorSeer", "lite"]
INNER += ["DBCache", "DBCache+TaylorSeer", "DBCache+DMD", "DBCache+TaylorSeer mask"]


@pytest.fixture(scope="module")
def subject():
    return peers.Peers()


@pytest.fixture
def run(subject, monkeypatch):
    """Samples a setting; `run.calls` is how often the network was called."""
    forward = networks.DiT.forward

    @wraps(forward)  # what stepcache reads the branches from
    def counting(self, *arguments, **keywords):
        sample.calls += 1
        return forward(self, *arguments, **keywords)

    def sample(outside=None, inside=None, steps=STEPS):
        sample.calls = 0
        return subject.sample(peers.SAMPLER, steps, Setting(outside, inside), SEEDS)

    monkeypatch.setattr(networks.DiT, "forward", counting)
    return sample


@pytest.mark.parametrize("name", INNER)
def test_never_skipping_outside_leaves_the_inner_cache_as_it_is(run, name):
    full = run()
    assert (full.calls, full.whole, run.calls) == (STEPS, STEPS, STEPS)
    alone = run(None, inner(name, STEPS))
    assert alone.calls < STEPS  # it does something
    assert not torch.equal(alone.images, full.images)
    for method in NEVER:
        both = run(method, inner(name, STEPS))
        assert torch.equal(both.images, alone.images)
        assert (both.calls, both.whole, run.calls) == (alone.calls, alone.whole, STEPS)
    assert torch.equal(run().images, full.images)


@pytest.mark.parametrize("name", INNER)
def test_a_static_mask_outside_skips_exactly_the_named_calls(run, name):
    mask = Static(MASK)
    plain = run(mask)
    both = run(mask, inner(name, LEFT))
    assert run.calls == LEFT
    assert {both.report.decisions(branch) for branch in both.report.branches} == {"CCSCSC"}
    assert both.calls < LEFT  # and the inner one skips among those that are left
    assert torch.isfinite(both.images).all()
    assert not torch.equal(both.images, plain.images)
    assert torch.equal(run(mask, inner(name, LEFT)).images, both.images)


@pytest.mark.parametrize("idle", [FirstBlock(0.0), Taylor(1, 0), "cache-dit"], ids=str)
def test_an_inner_cache_that_never_skips_leaves_stepcache_as_it_is(run, idle):
    if idle == "cache-dit":
        pytest.importorskip("cache_dit")
        idle = CacheDiT(0.0, 0)
    for method in (Static(MASK), Forecast()):
        alone = run(method)
        both = run(method, idle)
        assert torch.equal(both.images, alone.images)
        assert both.calls == alone.calls


def test_work_is_counted_in_blocks_that_ran(run):
    always = run(None, FirstBlock(1e9))
    assert (always.whole, always.calls) == (1, 1 + (STEPS - 1) / 4)
    for interval, before in ((2, 3), (3, 2), (2, 1)):
        computed = run(None, Taylor(interval, before), 10)
        assert computed.calls == sum(peers.taylor_mask(10, interval, before))
    half = run(FBCache(1e9))
    assert half.calls == always.calls  # ours leaves the forward behind the first block


def test_cache_dits_mask_is_static(run):
    pytest.importorskip("cache_dit")
    masked = run(None, inner("DBCache+TaylorSeer mask", STEPS))
    assert (masked.whole, masked.calls) == (4, 4 + 2 / 4)


def test_settings_come_from_other_seeds_and_are_kept(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CALIBRATION", range(1000, 1002))
    path = tmp_path / "settings.json"
    search = peers.Search(subject, STEPS, path)
    target = 3 + (STEPS - 3) / 4
    found = search("fb", lambda t: Setting(None, FirstBlock(t)), target)
    assert subject.sample(peers.SAMPLER, STEPS, found, range(1000, 1002)).calls == target
    ratios, fewer = search.ratios(), search.ratios(Forecast(min_evaluations=0))
    assert (len(ratios), len(fewer)) == (STEPS, 4)
    assert ratios[0] == fewer[0] == 1.0
    assert ratios[1:] != (1.0,) * (STEPS - 1)
    again = peers.Search(None, STEPS, path)  # samples nothing
    assert again("fb", lambda t: Setting(None, FirstBlock(t)), target) == found
    assert (again.ratios(), again.ratios(Forecast())) == (ratios, fewer)


def test_the_table(subject):
    settings = {"Forecast": Setting(Static("101010")), "first": Setting(None, FirstBlock(1e9))}
    results = bench(subject, [peers.SAMPLER], [STEPS], settings, 4, 0, 2, ())
    header, line, full, half, first = peers.markdown(results)
    assert header.count("|") == line.count("|") == full.count("|")
    assert [row.split("|")[2].strip() for row in (full, half, first)] == ["6 = 1.00", "3 = 0.50", "2.25 = 0.38"]
    assert [row.split("|")[7].strip() for row in (full, half)] == ["", ""]
    gains = [
        a - b
        for r in zip(results.records[2::5], results.records[1::5], strict=True)
        for a, b in zip(*(one["scores"]["PSNR"] for one in r), strict=True)
    ]
    assert first.split("|")[7].split()[0] == f"{sum(gains) / 4:+.1f}"
    assert results.rows[1].fewer.steps == 3
    assert results.rows[2].fewer.steps == 2
