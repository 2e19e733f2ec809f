"""From a target to a profile: it is reached, within the budget, on held-out seeds, and can be stopped and resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from mixture import Mixture, mixture

import stepcache
from stepcache import OptionError, method
from stepcache.cli import main
from stepcache.profile import Profile
from stepcache.tuning.search import RULES

SEEDS = 6


def tuned(**options):
    return stepcache.tune(
        mixture(True),
        **{
            "calls": None if {"speedup", "psnr"} & options.keys() else 4,
            "steps": 9,
            "seeds": SEEDS,
            "sampler": "dpmpp_2m",
            **options,
        },
    )


@pytest.fixture(scope="module")
def four():
    return tuned()


def held_out(method_, calls=None, seeds=range(3, 6)):
    subject = mixture(True)
    full = subject.sample("dpmpp_2m", 9, None, seeds).images
    result = subject.sample("dpmpp_2m", calls or 9, method_, seeds)
    return sum(subject.metrics["PSNR"](result.images, full, seeds)) / 3


def test_a_number_of_calls_is_kept_and_the_figures_are_those_of_the_replay(four):
    assert (four.calls, four.evaluations) == (4, 9)
    assert held_out(method("profile", path=four)) == pytest.approx(four.measured["held out"]["mean"], abs=0.01)
    assert held_out(None, 4) == pytest.approx(four.measured["held out"]["fewer_steps"], abs=0.01)


def test_it_is_better_than_even_places_with_any_order_and_than_fewer_steps(four):
    from stepcache.extend import AdaptiveOrder, Lagrange

    predictors = [AdaptiveOrder(), Lagrange(1, "zero"), Lagrange(2, "zero"), Lagrange(1)]
    even = max(held_out(method("static", mask="100100101", predictor=one)) for one in predictors)
    assert four.measured["held out"]["mean"] > even + 3
    assert four.measured["held out"]["mean"] > four.measured["held out"]["fewer_steps"] + 3


def test_the_budget_holds(four):
    assert four.measured["cost in full runs"] <= 2.8 * 9
    assert tuned(budget=12).measured["cost in full runs"] <= 12


def test_learned_weights_are_kept_if_held_out_seeds_gain_by_them(four):
    figures = four.measured["held out"]
    learned = any(how.evaluations for how in four.predictions.values())
    three = [figures[name] for name in ("learned_weights", "orders_alone", "even_places")]
    assert learned == (figures["learned_weights"] == max(three))
    assert figures["mean"] == max(three)


def test_even_places_are_kept_if_they_are_best_on_held_out_seeds():
    """The metric prefers near images on the calibration seeds, and far ones on the others."""

    def liking_rules(images, full, seeds):
        off = (images - full).flatten(1).abs().mean(1)
        return -off if seeds[0] < 3 else off  # on the held-out seeds what is farther off is better

    subject = replace(mixture(True), metrics={"odd": liking_rules})
    profile = stepcache.tune(subject, calls=4, steps=9, seeds=SEEDS, sampler="dpmpp_2m")
    figures = profile.measured["held out"]
    assert figures["mean"] == figures["even_places"] > figures["learned_weights"]
    assert not any(how.evaluations for how in profile.predictions.values())
    assert {(how.order, how.share) for how in profile.predictions.values()} <= {*RULES}
    assert len({(how.order, how.share) for how in profile.predictions.values()}) == 1


def test_a_speed_up_is_reached_or_exceeded():
    assert tuned(speedup=3, budget=12).calls == 3
    assert tuned(speedup=2, budget=12).calls == 4


def test_a_quality_is_reached_with_as_few_calls_as_it_needs():
    profile = tuned(psnr=30)
    assert profile.measured["calibration"]["mean"] >= 30
    fewer = tuned(calls=profile.calls - 1)
    assert fewer.measured["calibration"]["mean"] < 30 + 3
    assert tuned(psnr=200, budget=12).calls == 9


def test_the_same_search_finds_the_same_profile(four):
    assert tuned().written() == four.written()


def test_a_search_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    """With calls to spare: what was lost by the stop is paid from the budget."""
    whole = tuned(budget=60)
    state = tmp_path / "folder" / "state.jsonl"
    from stepcache.tuning.team import Worker

    real, made = Worker.tried, []

    def breaks(self, *job):
        made.append(job)
        if len(made) == 6:
            raise KeyboardInterrupt
        return real(self, *job)

    monkeypatch.setattr(Worker, "tried", breaks)
    with pytest.raises(KeyboardInterrupt):
        tuned(state=state, budget=60)
    known = len(state.read_text().splitlines())
    made.clear()
    monkeypatch.setattr(Worker, "tried", lambda self, *job: made.append(job) or real(self, *job))
    again = tuned(state=state, budget=60)
    assert known > 5
    assert (again.computed, again.predictions.keys()) == (whole.computed, whole.predictions.keys())
    assert again.measured["held out"] == whole.measured["held out"]
    made.clear()
    tuned(state=state, budget=60)
    assert len(made) <= 2  # the one without learned weights, and the one around which there was nothing new


def test_a_search_that_has_ended_is_not_forgotten(tmp_path):
    """Its budget is spent: what the file knows is all that there is."""
    first, again = (tuned(budget=18, state=tmp_path / "state.jsonl") for _ in range(2))
    assert again.computed == first.computed
    assert again.measured["calibration"] == first.measured["calibration"]


def test_the_findings_of_another_model_or_run_are_refused(tmp_path):
    state = tmp_path / "state.jsonl"
    tuned(state=state, budget=12)
    with pytest.raises(OptionError, match="was begun for another model, sampler, number of steps or seeds"):
        tuned(state=state, sampler="euler")
    other = Mixture()
    other.means.data *= 0.5
    with pytest.raises(OptionError, match="its findings were made with another model"):
        stepcache.tune(mixture(True, other), calls=4, steps=9, seeds=SEEDS, sampler="dpmpp_2m", state=state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calls": None}, "give one target: calls=, speedup= or psnr="),
        ({"psnr": 40, "calls": 3}, "give one target"),
        ({"calls": 0}, "calls=0: accepted is a whole number from 1 to 9"),
        ({"calls": 10}, "calls=10: accepted is a whole number from 1 to 9"),
        ({"calls": None, "speedup": 0.5}, "speedup=0.5: accepted is a number from 1 to 9"),
        ({"seeds": 1}, "seeds=1: accepted is a whole number of at least 2"),
        ({"seeds": [1, 1]}, "accepted are two or more different ones"),
        ({"metric": "PNSR"}, "unknown metric 'PNSR'.*Accepted: PSNR"),
        ({"budget": 1}, "budget=1: accepted is a number of at least 11.5"),
        ({"steps": 1}, "steps=1: accepted is a whole number from 2"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        tuned(**options)


def test_the_command_writes_a_profile_and_says_what_it_reaches(tmp_path, capsys):
    out, state = tmp_path / "dit.json", tmp_path / "state"
    arguments = ["tune", "--network=dit", "--calls=3", "--steps=6", "--samples=4", "--budget=10", f"--state={state}"]
    assert main([*arguments, f"--out={out}"]) == 0
    said = capsys.readouterr().out
    profile = Profile.load(out)
    assert profile.calls == 3
    assert f"{profile.measured['held out']['mean']:.2f}" in said
    assert "fewer steps" in said
    assert json.loads(out.read_text())["guidance"] == pytest.approx({"uncond": -2, "cond": 3}, abs=0.1)
    assert torch.isfinite(torch.tensor(list(profile.schedule))).all()
