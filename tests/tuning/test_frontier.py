"""The whole frontier: better with every call, replayed as measured, beside its rivals, in a table, a plot and files."""

from __future__ import annotations

import io
import time
from functools import partial
from statistics import fmean

import pytest
from mixture import mixture

from stepcache import Forecast, OptionError, UCache, load_profile
from stepcache.tuning import frontier
from stepcache.tuning.progress import progress

RIVALS = {"Forecast": [partial(Forecast, n, min_evaluations=0) for n in (2, 3)], "UCache": [partial(UCache, 0.3)]}
HELD_OUT = [3, 4, 5]


@pytest.fixture(scope="module")
def found():
    return frontier(mixture(True), steps=7, seeds=6, budget=2, others=["heun", "dpmpp_2m"], rivals=RIVALS)


def test_every_call_more_makes_it_better(found):
    calls = [profile.calls for profile in found.profiles]
    scores = [profile.measured["calibration"]["mean"] for profile in found.profiles]
    assert calls == sorted(set(calls))
    assert {2, 3, 4} <= set(calls)
    assert scores == sorted(scores)


def test_a_figure_is_what_its_run_gives(found, tmp_path):
    subject = mixture(True)
    full = subject.sample("euler", 7, None, HELD_OUT).images

    def mean(sampled):
        return fmean(subject.metrics["PSNR"](sampled.images, full, HELD_OUT))

    folder = found.save(tmp_path / "frontier")
    method = load_profile(folder / "03-calls.json")
    assert mean(subject.sample("euler", 7, method, HELD_OUT)) == pytest.approx(_of(found, 3), abs=0.01)
    assert mean(subject.sample("euler", 3, None, HELD_OUT)) == pytest.approx(found.best("fewer steps", 3), abs=0.01)
    half = subject.sample("euler", 7, Forecast(2, min_evaluations=0), HELD_OUT)
    assert mean(half) == pytest.approx(
        next(p.mean for p in found.points if p.calls == half.calls and p.name == "Forecast")
    )


def _of(found, calls):
    return next(p.measured["held out"]["mean"] for p in found.profiles if p.calls == calls)


def test_a_rival_is_shown_with_as_many_calls_or_fewer(found):
    three = [line for line in found.table().splitlines() if line.startswith("| 3 |")]
    assert len(three) == 1
    assert f"**{_of(found, 3):.1f}**" in three[0]
    assert f"| {found.best('fewer steps', 3):.1f} |" in three[0]
    assert found.best("Forecast", 1) is None
    assert found.table().count("best other sampler") == 1


def test_it_writes_a_profile_a_number_of_calls_a_table_and_a_plot(found, tmp_path):
    folder = found.save(tmp_path / "frontier")
    names = {path.name for path in folder.iterdir()}
    assert {f"{p.calls:02d}-calls.json" for p in found.profiles} | {"table.md", "points.json", "frontier.png"} == names


def test_the_progress_has_no_end_without_a_budget():
    """The command shows it on a console; nobody knows before how many full runs a frontier takes."""
    from rich.console import Console

    with progress(Console(file=io.StringIO(), force_terminal=True, width=100), float("inf")) as say:
        for spent in range(5):
            say("7 calls: 40.00", spent)
            time.sleep(0.15)  # the bar is drawn ten times a second


@pytest.mark.parametrize("calls", [[0], [8], [2.5]])
def test_calls_that_cannot_be_are_refused(calls):
    with pytest.raises(OptionError, match="calls="):
        frontier(mixture(), steps=7, seeds=2, calls=calls)
