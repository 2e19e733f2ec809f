"""One press of Generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepcache import Report

from . import infotext
from .messages import TITLE
from .options import Options


class Job:
    """The options of a job, and what each pass of the current batch has saved."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.passes: list[Pass] = []

    def forget_run(self, p: Any) -> None:
        """A run was not cached. The image says nothing of the cache then, unless another of its passes was cached."""
        if not self.passes:
            infotext.remove(p.extra_generation_params)

    def record_run(self, p: Any, report: Report, negative_only: bool, hires: bool) -> None:
        """Writes what the run saved to the console, and what all passes saved into the image."""
        self.passes.append(Pass.of(report, negative_only))
        p.extra_generation_params.update(infotext.write(self.options))
        p.extra_generation_params[infotext.RESULT] = result(self.passes)
        print(f"{TITLE}{', hires. fix' * hires}: {result(self.passes[-1:])}")
        if self.options.table:
            print(f"{report.table()}\n{report}")


@dataclass(frozen=True)
class Pass:
    """What one pass of the sampler has saved.

    Attributes:
        computed: evaluations in which everything was computed.
        total: all evaluations.
        unit: "steps", or "evaluations" if some steps have more than one.
        negative_only: in the others the prompt was computed, too.
        made: network calls, one for each prompt.
        asked: as many as there are without a cache.
    """

    computed: int
    total: int
    unit: str
    negative_only: bool
    made: int
    asked: int

    @classmethod
    def of(cls, report: Report, negative_only: bool) -> Pass:
        total, unit = report.evaluations, "steps" if report.steps == report.evaluations else "evaluations"
        return cls(
            total - skipped_evaluations(report, negative_only),
            total,
            unit,
            negative_only,
            report.calls,
            len(report.events),
        )

    def __str__(self) -> str:
        count = f"{self.computed} of {self.total} {self.unit}"
        return f"negative prompt computed in {count}" if self.negative_only else f"{count} computed"


def result(passes: list[Pass]) -> str:
    """A line for the image and the console.

    Example:
        >>> result([Pass(11, 20, "steps", False, 22, 40)])
        '11 of 20 steps computed (1.8x fewer network calls)'
    """
    made, asked = sum(one.made for one in passes), sum(one.asked for one in passes)
    saved = f"{asked / made:.1f}x fewer network calls" if made < asked else "nothing saved"
    return f"{' + '.join(map(str, passes))} ({saved})"


def skipped_evaluations(report: Report, negative_only: bool) -> int:
    """How many evaluations computed no branch; with `negative_only`, how many did not compute every branch."""
    skipped = {event.position.evaluation for event in report.events if not event.computed}
    computed = {event.position.evaluation for event in report.events if event.computed}
    return len(skipped if negative_only else skipped - computed)
