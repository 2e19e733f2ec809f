"""One press of Generate."""

from __future__ import annotations

from typing import Any

from stepcache import Method, Report

from . import infotext
from .messages import TITLE
from .options import Options


class Job:
    """The options of a job, its method, and how much each pass of the current batch has skipped."""

    def __init__(self, options: Options, method: Method) -> None:
        self.options = options
        self.method = method
        self.passes: list[str] = []

    def forget_run(self, p: Any) -> None:
        """A run was not cached. The image says nothing of the cache then, unless another of its passes was cached."""
        if not self.passes:
            infotext.remove(p.extra_generation_params)

    def record_run(self, p: Any, report: Report, hires: bool) -> None:
        """Writes the run's line to the console, and its count into the image."""
        negative_only = self.method.skip == "uncond"
        total, skipped = report.evaluations, skipped_evaluations(report, negative_only)
        self.passes.append(f"{skipped}/{total}")
        p.extra_generation_params.update(infotext.write(self.options))
        p.extra_generation_params[f"{TITLE} skipped"] = " + ".join(self.passes)
        label = report.method + ", negative prompt only" * negative_only + ", hires. fix" * hires
        print(f"{TITLE}: {label}: skipped {skipped} of {total} evaluations, {report.speedup:.2f}x fewer model calls")
        if self.options.table:
            print(f"{report.table()}\n{report}")


def skipped_evaluations(report: Report, negative_only: bool) -> int:
    """How many evaluations computed no branch; with `negative_only`, how many did not compute every branch."""
    skipped = {event.position.evaluation for event in report.events if not event.computed}
    computed = {event.position.evaluation for event in report.events if event.computed}
    return len(skipped if negative_only else skipped - computed)
