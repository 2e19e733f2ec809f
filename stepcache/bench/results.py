"""What was measured: rows with confidence intervals, the table, the numbers and the plot."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stepcache._optional import require

Record = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over samples, and how far its 95 % confidence interval (Student's t) reaches to either side."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: list[float]) -> Interval:
        """`half` is None for fewer than two samples."""
        if len(values) < 2:
            return cls(values[0], None)
        quantile = float(require("scipy.stats", "bench").t.ppf(0.975, len(values) - 1))
        return cls(statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5)

    def text(self, form: str = "{:.1f}", sign: bool = False) -> str:
        form = form.replace(":", ":+") if sign else form
        return form.format(self.mean) + ("" if self.half is None else f" ±{self.half:.1f}")


@dataclass(frozen=True)
class Rival:
    """What the same calls give without a cache. `gain`: the method's first metric less this one's, sample by sample."""

    sampler: str
    steps: float
    scores: dict[str, float]
    gain: Interval
    limit: float | None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        subject, sampler, steps, method: what was run.
        calls, asked: calls made for one branch, and asked for; means over batches.
        speedup: seconds of the full run over its own, the median over batches.
        same: whether every image is bit-identical to the full run's.
        scores: of every metric the mean over samples, against the full run of the same seeds.
        limit: the first metric against the subject's limit instead.
        fewer, other: the same sampler in fewer steps, and the best other one, with as many calls; None if the
            method made as many calls as the full run. Best is nearest to the limit, or, without one, to the full run.
    """

    subject: str
    sampler: str
    steps: int
    method: str
    calls: float
    asked: float
    speedup: float
    same: bool
    scores: dict[str, Interval]
    limit: Interval | None
    fewer: Rival | None
    other: Rival | None


class Results:
    """The rows of a measurement. `records` are what `stepcache.bench.run.compared` gives."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.metrics = list(self.records[0]["scores"]) if self.records else []

    @cached_property
    def cells(self) -> dict[tuple[str, str, int], list[Record]]:
        """The records of every (subject, sampler, steps), in the order of the first."""
        found: dict[tuple[str, str, int], list[Record]] = {}
        for record in self.records:
            found.setdefault((record["subject"], record["sampler"], record["steps"]), []).append(record)
        return dict(sorted(found.items(), key=lambda item: [r["subject"] for r in self.records].index(item[0][0])))

    @cached_property
    def rows(self) -> list[Row]:
        return [row for cell in self.cells.values() for row in self._rows(cell)]

    def _rows(self, cell: list[Record]) -> Iterable[Row]:
        full = {_seeds(r): r for r in cell if r["role"] == "full"}
        rivals = {
            (r["role"], r["own_sampler"], r["budget"], _seeds(r)): r for r in cell if r["role"] in ("fewer", "other")
        }
        for name in dict.fromkeys(r["name"] for r in cell if r["role"] in ("full", "method")):
            mine = _made_by(cell, name)
            yield Row(
                subject=mine[0]["subject"],
                sampler=mine[0]["sampler"],
                steps=mine[0]["steps"],
                method=name,
                calls=statistics.fmean(r["calls"] for r in mine),
                asked=statistics.fmean(full[_seeds(r)]["calls"] for r in mine),
                speedup=statistics.median(full[_seeds(r)]["seconds"] / r["seconds"] for r in mine),
                same=all(r["same"] for r in mine),
                scores={metric: Interval.of(_values(mine, metric)) for metric in self.metrics},
                limit=None if mine[0]["limit"] is None else Interval.of(_values(mine, None)),
                fewer=self._best(mine, full, rivals, "fewer"),
                other=self._best(mine, full, rivals, "other"),
            )

    def _best(
        self, mine: list[Record], full: dict[tuple[int, ...], Record], rivals: dict[tuple[Any, ...], Record], role: str
    ) -> Rival | None:
        """The best rival; a batch in which nothing was skipped has the full run for its rival."""
        if all(r["calls"] >= full[_seeds(r)]["calls"] for r in mine):
            return None
        metric, found = self.metrics[0], []
        for sampler in dict.fromkeys(key[1] for key in rivals if key[0] == role):
            budgets = [(r["calls"], _seeds(r)) for r in mine]
            paired = [
                full[seeds] if calls >= full[seeds]["calls"] else rivals.get((role, sampler, calls, seeds))
                for calls, seeds in budgets
            ]
            theirs = [r for r in paired if r is not None]
            if len(theirs) < len(mine):
                continue
            gains = [a - b for a, b in zip(_values(mine, metric), _values(theirs, metric), strict=True)]
            limit = None if theirs[0]["limit"] is None else statistics.fmean(_values(theirs, None))
            scores = {name: statistics.fmean(_values(theirs, name)) for name in self.metrics}
            steps = statistics.fmean(r["own_steps"] for r in theirs)
            found.append(Rival(sampler, steps, scores, Interval.of(gains), limit))
        return max(found, key=lambda rival: _rank(rival, metric), default=None)

    def ahead(self, row: Row, method: str) -> Interval:
        """How far a row's first metric is ahead of another method's of the same cell, sample by sample."""
        cell = self.cells[row.subject, row.sampler, row.steps]
        mine, theirs = (_values(_made_by(cell, name), self.metrics[0]) for name in (row.method, method))
        return Interval.of([a - b for a, b in zip(mine, theirs, strict=True)])

    def to_json(self, path: str | Path | None = None) -> str:
        """Every row, as plain numbers; also written to `path` if one is given."""
        text = json.dumps([asdict(row) for row in self.rows], indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def markdown(self) -> str:
        """The table as Markdown."""
        file = io.StringIO()
        require("rich.console", "bench").Console(file=file, width=250).print(self.table(markdown=True))
        return "\n".join(line.strip() for line in file.getvalue().strip().splitlines()) + "\n"

    def show(self, console: Any) -> None:
        """Prints the table; of columns that do not fit the last are left out, and named."""
        table = self.table()
        left_out: list[str] = []
        wide = console.options.update(width=1000)
        while len(table.columns) > 4 and console.measure(table, options=wide).maximum > console.width:
            left_out.insert(0, table.columns.pop().header)
        console.print(table)
        if left_out:
            console.print(f"Too wide for this window: {', '.join(left_out)}")

    def table(self, markdown: bool = False) -> Any:
        """The table, for `rich`: a block for every subject, sampler and number of steps."""
        box = require("rich.box", "bench")
        table = require("rich.table", "bench").Table
        made = table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        first, *rest = self.metrics
        made.add_column("method", no_wrap=True)
        limits = ["to the limit"] if any(row.limit is not None for row in self.rows) else []
        for column in ("calls", "speed", first, "fewer steps", *limits, "best other", *rest):
            made.add_column(column, justify="right", no_wrap=True)
        cell = None
        for row in self.rows:
            if cell != (cell := (row.subject, row.sampler, row.steps)):
                title = f"{row.subject}, {row.sampler}, {row.steps} steps"
                made.add_row(f"**{title}**" if markdown else f"[bold]{title}")
            made.add_row(*self._cells(row, first, rest, bool(limits)))
        return made

    def _cells(self, row: Row, first: str, rest: list[str], limits: bool) -> Iterable[str]:
        fewer, other = row.fewer, row.other
        yield row.method
        yield f"{row.calls:g}" if row.calls == int(row.calls) else f"{row.calls:.1f}"
        yield f"{row.speedup:.2f}x"
        yield "same" if row.same else row.scores[first].text()
        yield "" if fewer is None else f"{fewer.scores[first]:.1f} ({fewer.gain.text(sign=True)})"
        if limits:
            theirs = fewer.limit if fewer else None
            yield "" if row.limit is None else f"{row.limit.mean:.1f}" + _bracket(theirs, "{:.1f}")
        yield "" if other is None else f"{_rank(other, first):.1f} {other.sampler}"
        for metric in rest:
            ours = "same" if row.same else f"{row.scores[metric].mean:.3f}"
            yield ours + _bracket(fewer.scores[metric] if fewer else None, "{:.3f}")

    def plot(self, path: str | Path) -> Path:
        """The first metric against calls, a panel for every cell: methods, fewer steps, the best other sampler.

        What no other point beats in both directions is joined: the Pareto front. Needs matplotlib.
        """
        metric = self.metrics[0]
        cells = list(dict.fromkeys((row.subject, row.sampler, row.steps) for row in self.rows))
        columns = min(3, len(cells))
        lines = -(-len(cells) // columns)
        figure = require("matplotlib.figure", "bench").Figure(figsize=(5 * columns, 3.8 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False)
        names = list(dict.fromkeys(row.method for row in self.rows if not row.same))
        for panel in panels.flat[len(cells) :]:
            panel.set_axis_off()
        for panel, cell in zip(panels.flat, cells, strict=False):
            rows = [row for row in self.rows if (row.subject, row.sampler, row.steps) == cell and not row.same]
            self._panel(panel, rows, names, metric)
            panel.set_title("{}, {}, {} steps".format(*cell), fontsize=11)
            panel.set_xlabel("calls for one branch")
            panel.set_ylabel(f"{metric} to the full run")
        handles: dict[str, Any] = {}
        for panel in panels.flat:
            handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=9)
        figure.savefig(path, dpi=110)
        return Path(path)

    @staticmethod
    def _panel(panel: Any, rows: list[Row], names: list[str], metric: str) -> None:
        points = []
        for row in rows:
            mark = row.scores[metric]
            points.append((row.calls, mark.mean))
            number = names.index(row.method)
            panel.errorbar(
                row.calls, mark.mean, mark.half, fmt="osD^vP*X"[number % 8], color=f"C{number % 10}", ms=6,
                label=row.method, zorder=3,
            )  # fmt: skip
        for name, style, pick in (("fewer steps", "0.35", "fewer"), ("best other sampler", "0.7", "other")):
            line = sorted({(row.calls, getattr(row, pick).scores[metric]) for row in rows if getattr(row, pick)})
            if line:
                panel.plot(*zip(*line, strict=True), ".-", color=style, label=name, zorder=1)
                points += line
        front = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)]
        if len(front) > 1:
            panel.plot(
                *zip(*sorted(front), strict=True), "-", color="C2", lw=6, alpha=0.2, label="Pareto front", zorder=0
            )


def _rank(rival: Rival, metric: str) -> float:
    """Nearness to the limit if there is one: another sampler's way there is not the full run's."""
    return rival.scores[metric] if rival.limit is None else rival.limit


def _bracket(value: float | None, form: str) -> str:
    return "" if value is None else f" ({form.format(value)})"


def _made_by(cell: list[Record], name: str) -> list[Record]:
    return [r for r in cell if r["name"] == name and r["role"] in ("full", "method")]


def _seeds(record: Record) -> tuple[int, ...]:
    return tuple(record["seeds"])


def _values(records: list[Record], metric: str | None) -> list[float]:
    """A number a sample, batch after batch; against the limit if no metric is named."""
    return [value for r in records for value in (r["limit"] if metric is None else r["scores"][metric])]
