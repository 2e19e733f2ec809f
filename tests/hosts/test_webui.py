"""The web UI extension on real checkouts of its hosts, headless on the CPU, with tiny random networks.

    STEPCACHE_FORGE=~/stable-diffusion-webui-forge pytest -n 0 tests/hosts/test_webui.py

STEPCACHE_A1111, STEPCACHE_FORGE, STEPCACHE_REFORGE, STEPCACHE_CLASSIC and STEPCACHE_NEO each name a checkout; without
it the tests are skipped. The interpreter is that of the checkout's `venv`, or what STEPCACHE_A1111_PYTHON and so on
name; nothing needs to be installed there. docs/webui.md says how to prepare a checkout without a GPU, and what was run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HOSTS = ("A1111", "FORGE", "REFORGE", "CLASSIC", "NEO")
HERE = Path(__file__).parent
AXES = ("Enabled", "Speed", "Method", "Number", "Skip", "Mask preset", "Mask")
SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM++ SDE", "DPM++ 2S a", "Heun", "UniPC")
LATENTS = 1e-4
"""Of the largest latent: rounding, over a run."""


@pytest.fixture(scope="module", params=HOSTS)
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What `situations.py` prints for this host; it takes a minute or two."""
    name = request.param
    checkout = os.environ.get(f"STEPCACHE_{name}")
    if not checkout:
        pytest.skip(f"STEPCACHE_{name} names no checkout")
    checkout = Path(checkout).expanduser().resolve()
    own = checkout / "venv" / "bin" / "python"
    python = os.environ.get(f"STEPCACHE_{name}_PYTHON") or (str(own) if own.exists() else sys.executable)
    command = [python, "-W", "ignore", str(HERE / "situations.py"), name.lower(), str(checkout)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def test_every_situation_runs_through(found):
    errors = {
        situation: [entry[kind]["error"] for kind in ("without", "never", "on", "whole", "mask", "negative only")]
        for situation, entry in found["situations"].items()
    }
    assert {situation: error for situation, error in errors.items() if any(error)} == {}
    assert len(errors) >= 35


def test_disabled_and_never_skipping_are_bit_identical_to_the_host_without_it(found):
    for situation, entry in found["situations"].items():
        bare = entry["without"]
        assert entry["off"] == [bare["digest"]] * 2, situation
        assert (entry["never"]["digest"], entry["never"]["calls"]) == (bare["digest"], bare["calls"]), situation


def test_calls_are_skipped_and_counted(found):
    for situation, entry in found["situations"].items():
        if situation == "DPM adaptive":
            assert entry["on"]["calls"] == entry["without"]["calls"]
            assert "DPM adaptive chooses its steps" in entry["on"]["said"][0]
        elif situation == "AND, unequal batch" and not entry["on"]["evaluations"][0]:
            assert "different numbers of prompts joined by AND" in entry["on"]["said"][-1]
        elif situation == "alternating words":  # another prompt at every step, so that no two outputs are comparable
            assert entry["on"]["calls"] == entry["without"]["calls"]
            assert "no step of this run was skipped" in entry["on"]["said"][-1]
        elif 0 < max(entry["on"]["evaluations"], default=0) <= 8:  # DDIM makes one step fewer than others
            assert entry["on"]["calls"] == entry["without"]["calls"]
            assert "is too short to predict steps in it" in entry["on"]["said"][-1]
        else:
            assert entry["on"]["calls"] < entry["without"]["calls"], situation
            counts = zip(entry["on"]["skipped"], entry["on"]["evaluations"], strict=True)
            passes = [f"{all_ - skipped} of {all_} " for skipped, all_ in counts]
            passes = passes[-1:] if "2 batches" in situation or "twice" in situation else passes
            result = entry["on"]["infotext"].partition("StepCache result: ")[2].partition(" (")[0]
            assert all(one in part for one, part in zip(passes, result.split(" + "), strict=True)), situation
            assert "x fewer network calls)" in entry["on"]["infotext"], situation


def test_plain_runs_have_the_counts_that_follow_from_their_steps(found):
    """12 steps of one evaluation, 23 of two; DDIM as many as its host runs it for."""
    for sampler in ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE"):
        entry = found["situations"][sampler]
        assert (entry["whole"]["skipped"], entry["whole"]["evaluations"]) == ([5], [12]), sampler
        assert entry["whole"]["calls"] == 14, sampler
        assert entry["mask"]["calls"] == 12, sampler
    assert found["situations"]["Heun"]["on"]["evaluations"] == [23]
    for sampler in ("DDIM", "UniPC"):
        entry = found["situations"][sampler]
        assert entry["on"]["evaluations"][0] == entry["without"]["calls"] / 2


def test_nothing_is_left_in_the_host(found):
    assert {situation: entry["left"] for situation, entry in found["situations"].items() if entry["left"]} == {}
    for what, entry in found["broken off"].items():
        assert (entry["left"], entry["memory"], entry["then off"]) == ([], [], True), what


def test_broken_off_runs_end_as_the_host_ends_them(found):
    broken = found["broken off"]
    assert (broken["interrupt"]["error"], broken["skip"]["error"]) == (None, None)
    assert broken["interrupt"]["evaluations"] == [6]
    assert broken["out of memory"]["error"].startswith("OutOfMemoryError")


def test_the_same_decisions_and_latents_as_the_k_diffusion_adapter(found):
    for what, entry in found["compared"].items():
        assert entry["host"] == entry["adapter"], what
        assert entry["latents off"] < LATENTS, what
    if found["compared"]:
        for what, entry in found["compared"].items():
            if "negative" in what:
                assert sorted("S" in decisions for decisions in entry["host"]) == [False, True], what
        assert any("S" in entry["host"][0] for what, entry in found["compared"].items() if "easycache" in what)


def test_with_the_negative_prompt_only_the_prompt_is_computed_at_every_evaluation(found):
    for situation, entry in found["situations"].items():
        bare, ours = entry["without"], entry["negative only"]
        assert ours["calls"] <= bare["calls"], situation
        if situation in ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "prompt editing", "low memory"):
            assert (ours["skipped"], ours["evaluations"]) == ([5], [12]), situation
            assert ours["calls"] == bare["calls"] - 5, situation
        if situation in ("Euler a", "DPM++ 2M SDE"):
            assert ours["rows"] == [2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 2], situation
        if situation == "batch of 2":
            assert set(ours["rows"]) == {2, 4}
    assert found["situations"]["Euler a"]["negative only"]["said"] == [
        "StepCache: negative prompt computed in 7 of 12 steps (1.3x fewer network calls)"
    ]


def test_what_is_skipped_is_chosen_by_the_sampler(found):
    for sampler, entry in ((name, found["situations"].get(name)) for name in SAMPLERS):
        if entry is not None:
            chosen = "negative only" if sampler in ("Euler a", "DPM++ 2M SDE", "DPM++ 3M SDE") else "whole"
            assert entry["on"]["digest"] == entry[chosen]["digest"], sampler
            assert entry["on"]["calls"] == entry[chosen]["calls"], sampler


def test_auxiliary_calls_pass_through(found):
    for situation in ("PAG", "SAG", "PAG, AND"):
        if situation in found["situations"]:
            assert found["situations"][situation]["auxiliary"] == 60, situation  # five runs of 12 evaluations
            assert found["situations"][situation]["mask"]["skipped"] == [6], situation


def test_wrong_options_are_said_and_the_image_is_the_host_s_own(found):
    wrong = dict(found["wrong options"])
    plain = wrong.pop("plain")
    for arguments, entry in wrong.items():
        assert entry["digest"] == plain, arguments
        assert "without the cache" in entry["said"][0], arguments
        assert "StepCache" not in entry["infotext"], arguments


def test_hires_can_be_left_out(found):
    assert (found["hires off"]["error"], found["hires off"]["skipped"]) == (None, [5])


def test_the_xyz_plot_and_the_infotext(found):
    assert found["axes"] == [f"[StepCache] {name}" for name in AXES]
    assert "StepCache: custom, StepCache method: ucache, StepCache number: 0.4" in found["axis"]["infotext"]
    mask = "1,1,1,0,0,1,0,0,1,0,0,1"
    fields = ["ucache", "0.5", "whole steps", "10-90", "1", "3", mask, "static", False, "decay=0.9,reset=0"]
    assert found["pasted"] == [True, "custom: method under Advanced", *fields]
    assert found["pasted without"] == [False, *[None] * 11]
