"""What happened in a run, evaluation by evaluation, and what it comes to."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import trace
from .branch import Branch
from .clock import Position
from .event import Event
from .options import OptionError, number
from .plan import Plan


@dataclass
class Report:
    """One run's events and totals. Three things are counted apart: steps, evaluations and calls.

    `print(report)` is a summary, `report.table()` has a row for every evaluation, `report.to_json()` everything,
    `report.plot(path)` a picture, `report.strip()` a small one without words. The report holds numbers only, never
    latents.

    Example:
        >>> from stepcache import Report
        >>> report = Report("forecast")
        >>> report.passed(Position(0, 0, 14.6), ["cond"], "off")
        >>> report.calls, report.skipped
        (1, 0)
    """

    method: str
    run: int | None = None
    scheduled_steps: int | None = None
    notes: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)

    def append(
        self, position: Position, plan: Plan, branches: Mapping[str, Branch], skip_reason: str, whose: str = ""
    ) -> None:
        """Records what became of each branch of a call, why, and how far predictions were off.

        `whose` is added to the branches' names.
        """
        for name, branch in branches.items():
            reason, verdict = plan.reasons[name], plan.verdicts.get(name)
            self.events.append(
                Event(
                    position,
                    name + whose,
                    reason is not None,
                    skip_reason if reason is None else reason.reason,
                    None if verdict is None else verdict.estimate,
                    None if verdict is None else verdict.threshold,
                    branch.prediction_error,
                    branch.size if branch.checked else None,
                )
            )

    def passed(self, position: Position, names: Iterable[str], reason: str) -> None:
        """Records a call that went to the model without a decision."""
        self.events += [Event(position, name, True, reason) for name in names]

    def note(self, sentence: str) -> None:
        """Adds a sentence, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def obstacle(self, sentence: str) -> None:
        """Adds a sentence about why skip='uncond' could not act; hosts show these."""
        if sentence not in self.obstacles:
            self.obstacles.append(sentence)
            self.note(f"skip='uncond': {sentence}")

    @property
    def steps(self) -> int | None:
        """Steps that the run has got to; None if steps are not known."""
        steps = {event.position.step for event in self.events} - {None}
        return len(steps) if steps else None

    @property
    def evaluations(self) -> int:
        """Requests of the sampler for a prediction at (x, sigma)."""
        return len({event.position.evaluation for event in self.events})

    @property
    def branches(self) -> list[str]:
        """The branches seen, in order of appearance."""
        return list(dict.fromkeys(event.branch for event in self.events))

    @property
    def calls(self) -> int:
        """Forwards of the network for one branch that were made; batched branches count one each."""
        return sum(event.computed for event in self.events)

    @property
    def skipped(self) -> int:
        """Calls that were answered without the network."""
        return len(self.events) - self.calls

    @property
    def speedup(self) -> float:
        """Calls asked for over calls made: an estimate that leaves out everything but the network. 1 without any."""
        return len(self.events) / self.calls if self.calls else 1.0

    def decisions(self, branch: str) -> str:
        """One letter an evaluation of `branch`: C computed, S skipped."""
        return "".join("C" if event.computed else "S" for event in self.events if event.branch == branch)

    def __str__(self) -> str:
        if not self.events:
            return f"{self.method}: nothing evaluated yet"
        steps = "steps unknown" if self.steps is None else f"{self.steps} steps"
        lines = [
            ("method", f"{self.method}: {steps}, {self.evaluations} evaluations, {len(self.events)} calls asked for"),
            ("calls", f"{self.calls} made, {self.skipped} skipped: {self.speedup:.2f}x fewer calls"),
            *[(branch, self.decisions(branch)) for branch in self.branches],
            ("computed", self._reasons(computed=True)),
        ]
        if self.skipped:
            lines.append(("skipped", self._reasons(computed=False)))
        offs = [event.error_share for event in self.events if event.error_share is not None]
        if offs:
            checked = (
                f"{statistics.median(offs):.1%} of the output (median of {len(offs)} checks, worst {max(offs):.1%})"
            )
            lines.append(("off by", checked))
        lines += [("note", note) for note in self.notes]
        width = max(len(label) for label, _ in lines)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)

    def table(self) -> str:
        """A row for every branch of every evaluation."""
        head = ("eval", "step", "sigma", "branch", "decision", "reason", "estimate", "threshold", "off by")
        rows: list[tuple[str, ...]] = [head]
        for event in self.events:
            position, off = event.position, event.error_share
            step = (
                "?"
                if position.step is None
                else f"{position.step}{'abc'[min(position.stage, 2)] if position.stage else ''}"
            )
            estimates = ("" if n is None else f"{n:.4f}" for n in (event.estimate, event.threshold))
            decision = "computed" if event.computed else "skipped"
            sigma = f"{position.sigma:.4g}"
            percent = "" if off is None else f"{off:.1%}"
            rows.append(
                (str(position.evaluation), step, sigma, event.branch, decision, event.reason, *estimates, percent)
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers, strings and lists; NaN and Inf become None."""
        return {
            "method": self.method,
            "run": self.run,
            "scheduled_steps": self.scheduled_steps,
            "steps": self.steps,
            "evaluations": self.evaluations,
            "calls": self.calls,
            "skipped": self.skipped,
            "speedup_in_calls": self.speedup,
            "notes": list(self.notes),
            "events": [
                {
                    "evaluation": event.position.evaluation,
                    "step": event.position.step,
                    "stage": event.position.stage,
                    "sigma": _number(event.position.sigma),
                    "branch": event.branch,
                    "computed": event.computed,
                    "reason": event.reason,
                    "estimate": _number(event.estimate),
                    "threshold": _number(event.threshold),
                    "prediction_error": event.error_share,
                }
                for event in self.events
            ],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON text, also written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> Path:
        """Draws the run to `path`: what was computed and why, step by step, with the noise levels above.

        A method with a criterion also shows its estimate and threshold, and a run in which predictions were checked
        how far a skip would have been off. Needs matplotlib: `pip install 'stepcache[demo]'`.
        """
        path = Path(path)
        title = f"{self.method}: {self.calls} of {len(self.events)} calls made"
        trace.figure(self.events, self.branches, title).savefig(path, dpi=120)
        return path

    def strip(self, width: int = 640, row: int = 24) -> Tensor:
        """The run as a small picture without words: uint8 (height, width, 3) RGB on the CPU. Needs nothing but torch.

        There is one row of cells for each branch, in the order of `branches`, and one cell for each evaluation;
        evaluations of the same step are closer together. Grey: skipped. Dark blue: computed, the method chose so.
        Light colours: computed, the method had no choice (warm-up, last step, ...). Orange to red: computed, because a
        skip was not possible. The red bars below show how far predictions were off if they were checked, relative to
        the largest. All white if nothing was evaluated.

        `width` and `row` (the height of a row of cells) are in pixels; an evaluation needs 2 pixels or more.

        Example:
            `report.strip()[None].float() / 255` is a batch of one image (1, height, width, 3) from 0 to 1.
        """
        row = number("row", row, low=4, high=512, whole=True)
        narrowest = row + 2 * max(1, self.evaluations)
        if not narrowest <= number("width", width, low=1, whole=True) <= 16384:
            raise OptionError(
                f"width={width}: accepted is a whole number from {narrowest} (2 pixels for each of "
                f"{self.evaluations} evaluations, and a border) to 16384"
            )
        return trace.strip(self.events, self.branches, int(width), int(row))

    def _reasons(self, computed: bool) -> str:
        counted = Counter(event.reason for event in self.events if event.computed == computed)
        return ", ".join(f"{reason} ({count})" for reason, count in counted.items())


def _number(value: float | None) -> float | None:
    """A finite float, or None: JSON has no NaN and no Inf."""
    return value if value is not None and math.isfinite(value) else None
