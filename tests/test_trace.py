"""The run as a picture: which cell has which colour, and what the plot shows of which method."""

from __future__ import annotations

import pytest
import torch
from toys import SIX, cached, drive, heun, twice

from stepcache import EasyCache, Forecast, Method, OptionError, Report, Static
from stepcache.extend import Event, Position
from stepcache.trace import BARS, DECIDED, FAILED, HELD, PAPER, SKIPPED, colours, figure, places


def event(evaluation: int, reason: str | None, branch: str = "cond", step: int | None = None, off: float | None = None):
    """An event; skipped without a reason. `off`: how far the checked prediction was off."""
    position = Position(0, evaluation, 10.0 - evaluation, evaluation if step is None else step)
    checked = {} if off is None else {"prediction_error": off, "size": 1.0}
    return Event(position, branch, reason is not None, reason or "interval of 2", **checked)


def colour_at(image: torch.Tensor, x: int, y: int) -> str:
    return "#" + bytes(image[y, x].tolist()).hex()


def test_each_cell_of_the_strip_has_the_colour_of_its_decision():
    events = [
        event(0, "warm-up"),
        event(0, "warm-up", "uncond"),
        event(1, "interval of 2", off=0.2),
        event(1, None, "uncond"),
        event(2, None),
        event(2, "prediction not finite", "uncond"),
        event(3, "last step", off=0.1),
        event(3, "last step", "uncond", off=0.05),
    ]
    image = Report("mine", events=events).strip(width=420, row=20)
    assert (image.dtype, image.shape) == (torch.uint8, (2 * 10 + 2 * (20 + 5) + 40, 420, 3))
    middles = [10 + 50 + 100 * number for number in range(4)]
    assert [colour_at(image, x, 20) for x in middles] == [HELD[0], DECIDED[0], SKIPPED, HELD[1]]
    assert [colour_at(image, x, 45) for x in middles] == [HELD[0], SKIPPED, FAILED[0], HELD[1]]
    heights = [sum(colour_at(image, x, y) == BARS for y in range(60, 110)) for x in middles]
    assert heights == [0, 35, 0, 18]  # relative to the largest; of two branches the larger
    assert colour_at(image, 110, 20) == PAPER  # between two steps


def test_a_strip_without_checks_has_no_bars_and_without_events_no_cells():
    checked, plain = (Report("mine", events=[event(0, "mask", off=off)]) for off in (0.1, None))
    assert checked.strip().shape[0] > plain.strip().shape[0]
    assert Report("none").strip().unique().tolist() == [255]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 20}, r"width=20: accepted is a whole number from 30 \(2 pixels for each of 3 evaluations"),
        ({"width": 64.5}, "width=64.5: accepted is a whole number"),
        ({"row": 0}, "row=0: accepted is a whole number from 4 to 512"),
    ],
)
def test_a_strip_that_would_be_too_small_is_refused(options, said):
    report = Report("mine", events=[event(number, None) for number in range(3)])
    with pytest.raises(OptionError, match=said):
        report.strip(**options)
    assert report.strip(width=30).shape[1] == 30


def test_evaluations_of_one_step_are_closer_together():
    edges = places([event(0, None, step=0), event(1, None, step=0), event(2, None, step=1)])
    assert edges[1][0] - edges[0][1] < edges[2][0] - edges[1][1]


def test_reasons_keep_their_colour_in_every_run_and_two_of_a_kind_differ():
    first = colours([event(0, "before window"), event(1, "above threshold"), event(2, "after window")])
    again = colours([event(0, "above threshold"), event(1, "last step")])
    assert first == {"before window": HELD[0], "above threshold": DECIDED[0], "after window": HELD[1]}
    assert again == {"above threshold": DECIDED[0], "last step": HELD[0]}


def drawn(method: Method, two_a_step: bool = False) -> tuple[Report, list]:
    """A run's report, and the panels of its plot."""
    model = cached(twice, method, sigmas=SIX)
    if two_a_step:
        drive(model, heun(SIX), range(11))
    else:
        drive(model, SIX[:-1], [10, 8, 7.5, 7, 6.5, 6])
    report = model.report
    return report, figure(report.events, report.branches, "mine").axes


def labels(axis) -> list[str]:
    return axis.get_legend_handles_labels()[1]


def test_the_plot_of_a_criterion_shows_its_numbers_the_errors_and_the_reasons():
    report, (criterion, errors, cells) = drawn(EasyCache(0.2, window=None, start=0, end=1))
    estimates = [e.estimate for e in report.events if e.estimate is not None]
    lines = {line.get_label(): [*line.get_ydata()] for line in criterion.lines}
    assert lines == {"estimate": estimates, "threshold": [0.2] * len(estimates)}
    shares = [e.error_share for e in report.events if e.error_share is not None]
    assert [*errors.lines[0].get_ydata()] == shares
    assert labels(cells) == [
        "computed, no cache yet: 1",
        "computed, no estimate yet: 1",
        "skipped: 3",
        "computed, above threshold: 1",
    ]
    assert [tick.get_text() for tick in cells.get_xticklabels()] == [*"012345"]
    sigmas = [tick.get_text() for tick in criterion.child_axes[0].get_xticklabels()]
    assert sigmas == [f"{sigma:.3g}" for sigma in SIX[:-1]]


def test_the_plot_of_forecast_has_no_criterion():
    _, (errors, cells) = drawn(Forecast(min_evaluations=2))
    assert errors.get_ylabel() == "a skip would\nbe off by"
    assert any(text.startswith("computed, interval of 2") for text in labels(cells))


def test_two_evaluations_a_step_are_numbered_by_steps():
    _, (*_, cells) = drawn(Static("110101"), two_a_step=True)
    assert cells.get_xlabel() == "step, two evaluations each"
    assert [tick.get_text() for tick in cells.get_xticklabels()] == [*"012345"]


@pytest.mark.parametrize("events", [[], [event(0, "mask")], [event(n, None) for n in range(300)]], ids=len)
def test_empty_short_and_long_runs_are_drawn(events, tmp_path):
    path = Report("mine", events=events).plot(tmp_path / "run.png")
    assert path.stat().st_size > 2000
