"""What a recorded run says of itself: guidance, how the sampler moves, fresh noise, and the growth of errors."""

from __future__ import annotations

import pytest
import torch
from mixture import mixture, sigmas

from stepcache.demo import sampling
from stepcache.tuning.trial import Trial

SEEDS = range(3)


def recorded(sampler, guided=False, steps=8):
    return Trial().run(mixture(guided), sampler, steps, SEEDS).tape


def test_a_recorded_run_is_the_run_itself():
    plain = mixture(True).sample("euler", 8, None, SEEDS)
    tape = recorded("euler", True)
    assert torch.equal(tape.images, plain.images)
    assert (tape.calls, tape.evaluations) == (8, 8)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_the_scale_of_guidance_is_seen_in_how_the_latent_moves(sampler):
    assert recorded(sampler, True).guidance == pytest.approx({"uncond": -3, "cond": 4}, abs=0.4)
    assert recorded(sampler).guidance == {"guided": 1}


def test_euler_moves_by_the_difference_of_the_sigmas():
    schedule = sigmas(8)
    assert recorded("euler").responses == pytest.approx((schedule[1:] - schedule[:-1]).tolist(), rel=1e-4)


def test_of_a_step_with_two_evaluations_each_counts_half():
    schedule = sigmas(3)
    first, second = (schedule[1] - schedule[0]) / 2, (schedule[2] - schedule[1]) / 2
    assert recorded("heun", steps=3).responses == pytest.approx(
        [float(h) for h in (first, first, second, second, -schedule[2])]
    )


@pytest.mark.parametrize(
    ("sampler", "noisy"), [("euler", False), ("dpmpp_2m", False), ("heun", False), ("euler_ancestral", True)]
)
def test_fresh_noise_is_what_the_latents_before_do_not_explain(sampler, noisy):
    assert recorded(sampler).noisy == noisy


def test_the_latent_at_the_end_is_the_sample():
    tape = recorded("euler", True)
    torch.testing.assert_close(tape.latent(8), tape.images, atol=1e-4, rtol=1e-4)


def test_of_a_flow_the_latents_are_taken_as_samplers_with_noise_move_them():
    tape = Trial().run(sampling.subject("dit"), "euler", 4, SEEDS).tape
    schedule = sampling.sigmas(sampling.subject("dit").model, 4)
    assert tape.scaled
    assert tape.sigma(1) == pytest.approx(float(schedule[1]), rel=1e-4)
    assert tape.responses == pytest.approx((schedule[1:] - schedule[:-1]).tolist(), rel=1e-3)
