"""Reports of several denoisers as one, and of a run that was joined after its first evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stepcache import Report
from stepcache.extend import Event, Position

from .schedule import Place


def merged(reports: Mapping[str, Report]) -> Report:
    """One report of denoisers (experts) that follow one another in a run, by their names."""
    seen = [report for report in reports.values() if report.events]
    if len(seen) < 2:
        return seen[0] if seen else next(iter(reports.values()))
    notes = [f"{name}: {note}" for name, report in reports.items() for note in report.notes]
    whole = Report(seen[0].method, seen[0].run, seen[0].scheduled_steps, notes)
    for report in seen:
        whole.events += _later(report, by=whole.evaluations)
    return whole


def with_first(report: Report, place: Place) -> Report:
    """The report with the run's first evaluation, which was computed before the cache was there.

    Its branches are taken to be those of the second one.
    """
    if not report.events:
        return report
    second = report.events[0].position
    sigma, step, stage = place
    position = Position(second.run, 0, sigma, step, stage)
    names = [event.branch for event in report.events if event.position.evaluation == second.evaluation]
    first = [Event(position, name, True, "before the cache was attached") for name in names]
    return replace(report, events=[*first, *_later(report, by=1)])


def _later(report: Report, by: int) -> list[Event]:
    """A report's events, so many evaluations later."""
    return [
        replace(event, position=replace(event.position, evaluation=event.position.evaluation + by))
        for event in report.events
    ]
