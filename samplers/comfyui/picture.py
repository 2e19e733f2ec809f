"""The report as an IMAGE: the strip of computed and skipped evaluations, with words around it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from stepcache import Report

WIDTH, ROW, MARGIN, LABELS = 960, 34, 16, 96
INK, FAINT = (24, 28, 36), (96, 102, 112)
LEGEND = "blue: computed   grey: predicted, the model did not run"
BARS = "red: how far off a prediction was, where it was checked: {:.1%} at most"


def picture(report: Report) -> Tensor:
    """The report as ComfyUI's IMAGE: (1, height, width, 3) from 0 to 1, black on white.

    The words need Pillow, which ComfyUI has.
    """
    image, draw, fonts = (import_module(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont"))
    large, small = _font(fonts, 22), _font(fonts, 16)
    wide = min(WIDTH - LABELS, 16384)
    strip = report.strip(max(wide, ROW + 2 * report.evaluations), ROW)
    height, width = strip.shape[0], strip.shape[1] + LABELS
    made = image.new("RGB", (width, height + 5 * MARGIN + 38), "white")
    pen = draw.Draw(made)
    pen.text((MARGIN, MARGIN), _title(report), INK, large)
    top = 2 * MARGIN + 22
    made.paste(image.fromarray(strip.numpy()), (LABELS, top))
    for place, branch in enumerate(report.branches):
        row_top = top + ROW // 2 + place * (ROW + ROW // 4)
        pen.text((MARGIN, row_top + ROW // 2), _short(branch), INK, small, anchor="lm")
    worst = max((event.error_share for event in report.events if event.error_share is not None), default=None)
    legend = LEGEND if worst is None else f"{LEGEND}   {BARS.format(worst)}"
    pen.text((MARGIN, made.height - 2 * MARGIN), legend, FAINT, small, anchor="ls")
    return _as_image(made)


def _font(fonts: Any, size: int) -> Any:
    try:
        return fonts.load_default(size)
    except TypeError:  # before Pillow 10.1 the only size is 11
        return fonts.load_default()


def _title(report: Report) -> str:
    if not report.events:
        return f"{report.method}: nothing was evaluated yet"
    steps = "" if report.steps is None else f"{report.steps} steps, "
    return f"{report.method}: {steps}{report.calls} of {len(report.events)} calls made, {report.speedup:.2f}x fewer"


def _short(branch: str) -> str:
    return branch if len(branch) <= 10 else f"{branch[:9]}…"


def _as_image(made: Any) -> Tensor:
    size = (made.height, made.width, 3)
    return torch.frombuffer(bytearray(made.tobytes()), dtype=torch.uint8).reshape(1, *size).float() / 255
