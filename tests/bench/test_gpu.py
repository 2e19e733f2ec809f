"""benchmarks/gpu.sh, dry: every part runs on the CPU and fills its part of the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers.ModelMixin, "compile_repeated_blocks"):
    pytest.skip("benchmarks/gpu.sh needs diffusers from 0.36 on", allow_module_level=True)
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_networks  # noqa: E402
import gpu_report  # noqa: E402
import torch  # noqa: E402

COMPUTED = {"full run": 20, "Forecast": 11, "Forecast(3)": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One network of the three, for the time; the next test builds the others."""
    out = tmp_path_factory.mktemp("gpu")
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", "--networks", "flux", "--out", str(out)]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (out / "faults.txt").exists(), (out / "faults.txt").read_text() + done.stderr[-2000:]
    return out


def test_our_rows_are_full_with_and_without_compilation(folder):
    rows = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))["flux"]
    ours = [row for row in rows if row["method"] in COMPUTED]
    assert len(ours) == 6
    for row in ours:
        assert row["note"] == ""
        assert row["computed"] == COMPUTED[row["method"]]
        assert row["ideal"] == 20 / row["computed"]
        assert row["computed_ms"] > 0
        assert (row["skipped_ms"] is None) == (row["method"] == "full run")


def test_a_skipped_step_needs_fewer_kernels_and_no_transfer_of_ours(folder):
    rows = json.loads((folder / "flux.json").read_text(encoding="utf-8"))
    plain, forecast = (next(r for r in rows if r["method"] == name) for name in ("full run", "Forecast"))
    assert forecast["skipped_kernels"] < plain["computed_kernels"]
    assert forecast["computed_transfers"] == forecast["skipped_transfers"] == plain["computed_transfers"]


def test_the_page_has_every_part(folder):
    text = (folder / "gpu.md").read_text(encoding="utf-8")
    assert text.count("Not measured.") == 2  # the networks that were not asked for
    assert "| Forecast | 11 of 20 |" in text
    assert "| Forecast(2) | 11 of 20 |" in text
    assert "coloured discs" in text
    assert "skipped" in text.partition("## What the wrapper itself costs")[2]
    assert "did not end well" not in text


@pytest.mark.parametrize("name", ["sdxl", "wan"])
def test_a_network_that_no_time_is_left_for_has_rows_that_say_so(name, tmp_path):
    gpu.main([name, "--tiny", "--device", "cpu", "--seconds", "-1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert len(rows) == 2 * len(gpu.VARIANTS)
    assert {row["note"] for row in rows} == {f"not run: the -1 s for {name} were over"}
    gpu_report.main([str(tmp_path)])
    assert "0 billion weights" not in (tmp_path / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["sdxl", "wan"])
def test_a_cache_that_fails_is_a_row_and_does_not_end_the_others(name, tmp_path, monkeypatch):
    def broken(pipe, net, steps):
        raise RuntimeError("out of everything\nand more")

    variants = (gpu.VARIANTS[0], gpu.Variant("broken", inside=broken), gpu.VARIANTS[1])
    monkeypatch.setattr(gpu, "VARIANTS", variants)
    bench = gpu.Bench(name, gpu.arguments([name, "--tiny", "--device", "cpu", "--out", str(tmp_path)]))
    rows = [bench.row(variant, compiled=False) for variant in variants]
    assert rows[1].note == "failed: RuntimeError: out of everything"
    assert rows[2].note == ""
    assert rows[2].skipped_ms is not None


@pytest.mark.parametrize(
    ("kind", "config", "parameters"),
    [
        ("UNet2DConditionModel", "SDXL", 2_567_463_684),
        ("FluxTransformer2DModel", "FLUX", 11_901_408_320),
        ("WanTransformer3DModel", "WAN", 1_418_996_800),
    ],
)
def test_the_configurations_have_as_many_weights_as_the_published_networks(kind, config, parameters):
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**getattr(gpu_networks, config))
    assert sum(p.numel() for p in model.parameters()) == parameters
