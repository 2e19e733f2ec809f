"""A published method for a target: its number is found on the subject, and the file replays what was measured."""

from __future__ import annotations

import json

import pytest
import torch
from mixture import mixture
from toys import Toy, cached, decisions, drive

import stepcache
from stepcache import OptionError, load_profile, method
from stepcache.cli import main
from stepcache.fingerprint import Fingerprint
from stepcache.settings import Settings


def tuned(name, **target):
    return stepcache.tune(mixture(True), method=name, steps=20, seeds=6, **target)


def sampled(how, seeds=range(3, 6)):
    subject = mixture(True)
    full = subject.sample("euler", 20, None, seeds).images
    result = subject.sample("euler", 20, how, seeds)
    return result.calls, sum(subject.metrics["PSNR"](result.images, full, seeds)) / 3


@pytest.mark.parametrize(
    ("name", "knob"), [("magcache", "threshold"), ("ucache", "threshold"), ("seacache", "threshold")]
)
def test_calls_are_reached_and_the_file_replays_what_was_measured(name, knob, tmp_path):
    found = tuned(name, calls=10)
    assert {*found.options} == {knob} | ({"ratios"} if name == "magcache" else set())
    assert found.measured["calibration"]["calls"] <= 10
    found.save(tmp_path / "found.json")
    how = load_profile(tmp_path / "found.json")
    assert how.name == name
    calls, mean = sampled(how)
    held = found.measured["held out"]
    assert (calls, mean) == (held["calls"], pytest.approx(held["mean"], abs=0.01))
    assert Settings.load(tmp_path / "found.json").written() == json.loads(json.dumps(found.written()))


def test_a_little_less_of_the_number_makes_more_calls():
    """So the search has found the edge, and not just any value with few enough calls."""
    found = tuned("magcache", calls=10)
    less = method("magcache", ratios=found.options["ratios"], threshold=0.97 * found.options["threshold"])
    assert sampled(less, range(3))[0] > 10


def test_whole_numbers_are_all_tried():
    found = tuned("hicache", calls=8)
    assert isinstance(found.options["interval"], int)
    tried = [sampled(method("hicache", interval=n), range(3)) for n in range(1, 21)]
    best = max(mean for calls, mean in tried if calls <= 8)
    assert found.measured["calibration"]["mean"] == pytest.approx(best, abs=0.01)


def test_a_quality_is_reached_with_as_few_calls_as_the_method_can():
    found = tuned("seacache", psnr=30)
    assert found.measured["calibration"]["mean"] >= 30
    more = method("seacache", threshold=1.5 * found.options["threshold"])
    assert sampled(more, range(3))[1] < 30


def test_options_beside_the_number_are_kept():
    found = tuned("magcache:max_skip_steps=6,retention_ratio=0", calls=5)
    assert found.method == "magcache:max_skip_steps=6,retention_ratio=0"
    assert method("profile", path=found).criterion.max_skip_steps == 6
    assert method("profile", path=found, warmup=3).warmup == 3


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("magcache", {"calls": 2}, "2 calls are not reached: with every threshold it makes 8 or more"),
        ("magcache:threshold=1", {"calls": 9}, "threshold: given both as text and as keyword"),
        ("seacache", {"psnr": 1e4}, "10000 is not reached: its best threshold reaches"),
        ("static:mask=101", {"calls": 9}, "has no number that a target could be reached by"),
        ("magcahce", {"calls": 9}, "Did you mean 'magcache'"),
        ("ucache", {"calls": 9, "budget": 20}, "budget=20 with method='ucache': it is for profiles alone"),
        ("ucache", {"calls": 9, "workers": 2}, "workers=2 with method"),
        ("ucache", {"calls": 9, "state": "x"}, "state='x' with method"),
    ],
)
def test_what_cannot_be_had_is_said(name, more, message):
    with pytest.raises(OptionError, match=message):
        tuned(name, **more)


class Weighted(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), value), requires_grad=False)

    def forward(self, x, sigma):
        return 2 * x


def test_the_report_says_if_it_was_made_for_another_run_or_model():
    six = (6, 5, 4, 3, 2, 1, 0)
    made = Settings("ucache", {"threshold": 0.5}, 6, schedule=six, model=Fingerprint.of(Weighted(1.0)))
    model = cached(Weighted(1.0), method("profile", path=made), sigmas=(*range(12, 0, -1), 0))
    drive(model, range(12, 0, -1), 1.0)
    assert "made for 6 evaluations and is used in 12" in " ".join(model.report.notes)
    model = cached(Weighted(2.0), method("profile", path=made), sigmas=(6, 5, 4, 3, 2, 1, 0))
    with pytest.warns(UserWarning, match="made for other weights of Weighted"):
        drive(model, range(6, 0, -1), 1.0)


def test_it_holds_nothing_by_itself():
    made = Settings("static:mask=101010", {}, 6)
    model = cached(Toy(), method("profile", path=made), sigmas=(6, 5, 4, 3, 2, 1, 0))
    drive(model, range(6, 0, -1), 1.0)
    assert decisions(model) == "CSCSCS"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "profile:path=other.json"}, "accepted is the name of a published method"),
        ({"method": 3}, "accepted is the name of a published method"),
        ({"method": "unknown"}, "unknown method"),
        ({"options": {"threshold": [1]}}, "is neither text nor a number"),
        ({"options": {"treshold": 1}}, "Did you mean 'threshold'"),
        ({"options": []}, "accepted is an object"),
        ({"evaluations": 0}, "evaluations=0"),
        ({"schedule": 1}, "accepted is a list of sigmas"),
    ],
)
def test_a_file_that_is_none_is_refused_with_a_sentence(changes, message, tmp_path):
    text = {**Settings("ucache", {"threshold": 0.5}, 6).written(), **changes}
    (tmp_path / "broken.json").write_text(json.dumps(text))
    with pytest.raises(OptionError, match=message):
        load_profile(tmp_path / "broken.json")


def test_on_the_command_line(tmp_path, capsys):
    out = tmp_path / "magcache.json"
    assert main(["tune", "--network=dit", "--method=magcache", "--calls=10", "--samples=4", f"--out={out}"]) == 0
    assert "calls of 20" in capsys.readouterr().out
    assert load_profile(out).name == "magcache"
