"""The pictures of docs/how-it-works.md can be made."""

from __future__ import annotations

import sys

import pytest
from package import ROOT

for needed in ("matplotlib", "k_diffusion", "diffusers"):
    pytest.importorskip(needed)
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402


def test_every_picture_of_the_page_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--out", str(tmp_path), "--steps", "8"])
    figures.main()
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"trajectory.png", "forecast.png", "trace.png"}
    assert all(f"]({name})" in page for name in made)


def test_a_prediction_is_the_models_output_where_the_model_ran():
    run = figures.walk(figures.Forecast(), 9)
    computed = run.computed
    assert 0 < sum(computed) < 9
    off = (run.outputs - run.truths).abs().flatten(1).amax(1)
    assert all((gap < 1e-3) == made for gap, made in zip(off.tolist(), computed, strict=True))
