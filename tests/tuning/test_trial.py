"""A trial: what it computes, that a shared beginning costs nothing, and that its profile repeats it."""

from __future__ import annotations

import pytest
from mixture import mixture

from stepcache import Forecast, load_profile, method
from stepcache.bench.metrics import psnr_of_range
from stepcache.demo import sampling
from stepcache.profile import Prediction, Profile
from stepcache.tuning.trial import RIDGE, Trial

SEEDS = range(4)
PLACES = (0, 2, 5, 7)


def tried(places=PLACES, sampler="euler", guided=True, steps=9, **options):
    subject = mixture(guided)
    full = Trial().run(subject, sampler, steps, SEEDS).tape
    return subject, full, Trial(full, places, **options).run(subject, sampler, steps, SEEDS)


def mean(images, full):
    return sum(psnr_of_range(images, full, SEEDS)) / len(SEEDS)


def test_the_places_are_computed_and_nothing_else():
    _, _, trial = tried()
    assert trial.tape.calls == 4
    assert sorted(trial.chosen) == [1, 3, 4, 6, 8]


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_a_profile_repeats_the_trial_that_it_is_made_from(sampler, learn, tmp_path):
    subject, full, trial = tried(sampler=sampler, learn=learn)
    digits = tuple(int(n in PLACES) for n in range(full.evaluations))
    Profile(digits, trial.chosen).save(tmp_path / "profile.json")
    again = subject.sample(sampler, 9, load_profile(tmp_path / "profile.json"), SEEDS)
    assert mean(again.images, trial.tape.images) > 80
    assert again.calls == trial.tape.calls == 4


def test_a_profile_repeats_a_trial_on_a_flow():
    subject = sampling.subject("dit")
    full = Trial().run(subject, "dpmpp_2m", 8, SEEDS).tape
    trial = Trial(full, PLACES).run(subject, "dpmpp_2m", 8, SEEDS)
    profile = Profile(tuple(int(n in PLACES) for n in range(8)), trial.chosen)
    again = subject.sample("dpmpp_2m", 8, method("profile", path=profile), SEEDS)
    assert mean(again.images, trial.tape.images) > 80


def test_a_beginning_that_is_shared_costs_no_calls_and_changes_nothing():
    subject, full, first = tried((0, 2, 4, 7))
    alone = Trial(full, (0, 2, 5, 7)).run(subject, "euler", 9, SEEDS)
    shared = Trial(full, (0, 2, 5, 7), prefix=first, since=3).run(subject, "euler", 9, SEEDS)
    assert (alone.tape.calls, shared.tape.calls) == (4, 2)
    assert mean(shared.tape.images, alone.tape.images) > 80
    assert shared.chosen.keys() == alone.chosen.keys()


def test_learned_weights_are_nearer_to_the_full_run_than_orders_alone():
    _, full, learned = tried(learn=True)
    _, _, orders = tried(learn=False)
    assert mean(learned.tape.images, full.images) > mean(orders.tape.images, full.images)


def test_fits_beat_an_uncalibrated_forecast_at_as_many_calls():
    subject, full, trial = tried((0, 1, 3, 5, 8))
    forecast = subject.sample("euler", 9, Forecast(2, mask="110101001"), SEEDS)
    plain = subject.sample("euler", 9, method("static", mask="110101001"), SEEDS)
    assert mean(trial.tape.images, full.images) > mean(plain.images, full.images) + 3
    assert forecast.calls >= trial.tape.calls


def test_weights_are_shrunk_to_those_of_an_order():
    """With a ridge that is beyond all products, what is learned is what the order has."""
    import stepcache.tuning.trial as module

    _, _, orders = tried(learn=False)
    module.RIDGE = 1e12
    try:
        _, _, stiff = tried(learn=True)
    finally:
        module.RIDGE = RIDGE
    for n, how in stiff.chosen.items():
        assert (how.order, how.share) == (orders.chosen[n].order, orders.chosen[n].share)
        assert sum(how.derivative) == pytest.approx(1 - how.share, abs=1e-6)
        assert sum(how.denoised) == pytest.approx(how.share, abs=1e-6)


def test_before_a_computed_evaluation_the_latent_is_asked_back_to_the_full_run():
    """Euler goes on by (sigma' - sigma) d: with k = sigma / (sigma - sigma') the error is gone there."""
    _, full, trial = tried((0, 1, 5), guided=False)
    asked = [trial._return(n, full.sigma(n)) for n in range(9)]
    ends = {4: full.sigma(4) / (full.sigma(4) - full.sigma(5)), 8: 1.0}
    assert asked[2:] == pytest.approx([ends.get(n, 1.0) for n in range(2, 9)], rel=1e-3)


def test_with_a_rule_every_prediction_has_its_order_and_share():
    subject, full, trial = tried(rule=(2, 0.25))
    assert {(how.order, how.share, how.evaluations) for how in trial.chosen.values()} == {(2, 0.25, ())}
    same = {n: Prediction(2, 0.25) for n in trial.chosen}
    profile = Profile(tuple(int(n in PLACES) for n in range(9)), same)
    again = subject.sample("euler", 9, method("profile", path=profile), SEEDS)
    assert mean(again.images, trial.tape.images) > 80
    assert mean(again.images, full.images) > 10


def test_a_strength_changes_the_return_of_its_evaluation_alone():
    _, full, usual = tried((0, 1, 5), guided=False)
    _, _, weaker = tried((0, 1, 5), guided=False, returns={4: 0.5})
    k = [[trial._return(n, full.sigma(n)) for n in range(2, 9)] for trial in (usual, weaker)]
    assert k[1][2] == pytest.approx(k[0][2] / 2)
    assert k[1][:2] + k[1][3:] == k[0][:2] + k[0][3:]
    for n, same in ((3, True), (4, False)):
        one, other = usual.chosen[n], weaker.chosen[n]
        assert (other.derivative == pytest.approx(one.derivative, rel=1e-6)) is same
