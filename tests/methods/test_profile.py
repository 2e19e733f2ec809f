"""A profile: a readable file that any host replays, that says what it was not made for, and that no text can break."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from toys import SIX, Toy, cached, decisions, drive

from stepcache import METHODS, OptionError, load_profile, method
from stepcache.fingerprint import Fingerprint
from stepcache.profile import Prediction, Profile

LEARNED = Prediction(1, 0.0, (0, 2), (-1.0, 3.0), (0.0, 0.0))
THREE_OF_SIX = Profile(
    (1, 0, 1, 0, 0, 1),
    {1: Prediction(0, 0.0), 3: Prediction(1, 0.0), 4: LEARNED},
    schedule=SIX,
    sampler="euler",
    guidance={"cond": 1.0},
)


def replayed(profile, network=None, sigmas=SIX):
    model = cached(network or Toy(), method("profile", path=profile), sigmas=sigmas)
    return model, drive(model, sigmas[:-1], range(1, len(sigmas)))


def test_a_run_by_hand():
    """The network doubles x, and in `plain` scalings its output is the denoised image: d = (x - 2 x) / sigma."""
    model, answers = replayed(THREE_OF_SIX)
    assert decisions(model) == "CSCSSC"
    assert answers[0] == 2
    assert answers[1] == pytest.approx(2 - 8 * (-1 / 10))
    assert answers[3] == pytest.approx(4 - 4 * (-3 / 6 + (-3 / 6 + 1 / 10) / 2))
    assert answers[4] == pytest.approx(5 - 2 * (-1 * (-1 / 10) + 3 * (-3 / 6)))


def test_a_share_goes_through_the_denoised_image():
    profile = Profile((1, 0, 1), {1: Prediction(0, 0.25)})
    _, answers = replayed(profile, sigmas=(4.0, 2.0, 1.0, 0.0))
    assert answers[1] == pytest.approx(0.75 * (2 - 2 * (-1 / 4)) + 0.25 * 2)


def test_learned_weights_are_used_only_for_the_evaluations_that_they_were_learned_for():
    other = Prediction(0, 0.0, (0, 1), (-1.0, 3.0), (0.0, 0.0))
    profile = Profile((1, 0, 1, 0, 0, 1), {**THREE_OF_SIX.predictions, 4: other})
    _, answers = replayed(profile)
    assert answers[4] == pytest.approx(5 - 2 * (-3 / 6))


def test_a_file_gives_back_what_was_saved(tmp_path):
    model = Fingerprint.of(torch.nn.Linear(3, 3))
    whole = replace(THREE_OF_SIX, model=model, measured={"held out": {"mean": 1}}, versions={"torch": "2"})
    whole.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == whole
    assert load_profile(tmp_path / "p.json").name == "profile"
    assert method("profile", f"path={tmp_path / 'p.json'}").predictor.profile == whole
    assert json.loads((tmp_path / "p.json").read_text())["computed"] == "101001"


def test_another_number_of_steps_gets_the_same_share_at_the_same_places_and_the_report_says_so():
    model = cached(Toy(), method("profile", path=THREE_OF_SIX), sigmas=(*range(12, 0, -1), 0))
    drive(model, range(12, 0, -1), 1.0)
    assert decisions(model) == "CSCSCSCSCSSC"
    assert "made for 6 evaluations and is scaled to 12" in " ".join(model.report.notes)


@pytest.mark.parametrize("evaluations", range(2, 60))
def test_any_number_of_steps_can_be_had(evaluations):
    scaled = THREE_OF_SIX.scaled(evaluations)
    assert scaled.evaluations == evaluations
    assert scaled.computed[0] == 1
    assert scaled.calls == max(1, round(3 * evaluations / 6))
    assert all(not how.evaluations or evaluations == 6 for how in scaled.predictions.values())


def test_another_schedule_is_noted():
    model, _ = replayed(THREE_OF_SIX, sigmas=(12.0, 8.0, 6.0, 4.0, 2.0, 1.0, 0.0))
    assert "another schedule of as many steps" in " ".join(model.report.notes)
    same, _ = replayed(THREE_OF_SIX)
    assert not any("schedule" in note for note in same.report.notes)


def test_without_a_schedule_everything_is_computed_with_a_warning():
    model = cached(Toy(), method("profile", path=THREE_OF_SIX))
    with pytest.warns(UserWarning, match="the profile cannot act"):
        drive(model, SIX[:-1], range(1, 7))
    assert decisions(model) == "C" * 6


class Weighted(torch.nn.Module):
    def __init__(self, size: int = 4, value: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((size,), value), requires_grad=False)

    def forward(self, x, sigma):
        return 2 * x


def test_another_model_is_warned_of_and_the_same_one_is_not(recwarn):
    profile = Profile(THREE_OF_SIX.computed, THREE_OF_SIX.predictions, schedule=SIX, model=Fingerprint.of(Weighted()))
    replayed(profile, Weighted())
    replayed(profile, Weighted(value=1.001))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="made for other weights of Weighted"):
        replayed(profile, Weighted(value=1.5))
    with pytest.warns(UserWarning, match="made for another model"):
        replayed(profile, Weighted(5))


def test_a_fingerprint_outlasts_a_change_of_dtype():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8))
    before = Fingerprint.of(network)
    half = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8))
    half.load_state_dict(network.state_dict())
    assert before.difference(Fingerprint.of(half.to(torch.bfloat16))) is None


def test_an_offloaded_model_is_known_by_its_shapes():
    network, weights = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    away = torch.nn.Linear(3, 3, device="meta")
    assert Fingerprint.of(network).difference(Fingerprint.of(away)) is None
    assert Fingerprint.of(away).difference(Fingerprint.of(weights)) is None
    assert Fingerprint.of(away).difference(Fingerprint.of(torch.nn.Linear(4, 3))) is not None


def text_of(**changes):
    return json.dumps({**THREE_OF_SIX.written(), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is not JSON"),
        ("[" * 100_000, "this is not JSON"),
        ("[1]", "this is not a profile"),
        ('{"format": "other"}', "its format must be 'stepcache profile 1'"),
        (text_of(computed="012"), "accepted is text of 0 and 1"),
        (text_of(computed=5), "accepted is text of 0 and 1"),
        (text_of(computed="0" * 6), "the first is 1"),
        (text_of(computed="1" * 5000), "at most 2,000"),
        (text_of(skipped={}), "evaluation 1 is skipped, and skipped does not say how"),
        (text_of(skipped=[1]), "accepted is an object"),
        (text_of(skipped={"0": {}}), "which computed does not skip"),
        (text_of(skipped={"1": 3}), "accepted is an object with order and share"),
        (text_of(skipped={"1": {"order": 9, "share": 0}}), "order of 1=9: accepted is a whole number from 0 to 2"),
        (text_of(skipped={"1": {"order": 1, "share": 2}}), "share of 1=2"),
        (text_of(skipped={"1": {"order": 1, "share": 0, "from": [0]}}), "must be lists of one length"),
        (
            text_of(skipped={"1": {"order": 1, "share": 0, "from": [0], "derivative": [1e99], "denoised": [0]}}),
            "weight of 1=",
        ),
        (text_of(schedule="x"), "accepted is a list of sigmas"),
        (text_of(schedule=[None]), "sigma=None"),
        (text_of(model=3), "accepted is an object with class, shapes and weights"),
        (text_of(guidance={"a": "b"}), "guidance='b'"),
    ],
)
def test_what_is_no_profile_is_refused_with_a_sentence(text, message):
    with pytest.raises(OptionError, match=message):
        Profile.read(text)


def test_a_text_that_was_damaged_anywhere_is_read_or_refused():
    rng, whole = random.Random(0), text_of(model=Fingerprint.of(Weighted()).written())
    for _ in range(3000):
        at, length = rng.randrange(len(whole)), rng.randrange(4)
        broken = whole[:at] + "".join(rng.choice('{}[],:"01-eN') for _ in range(length)) + whole[at + length :]
        try:
            Profile.read(broken).scaled(9)
        except OptionError as refusal:
            assert len(str(refusal).split()) > 3  # noqa: PT017


def test_a_path_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"cannot be read"):
        load_profile(tmp_path / "missing.json")
    with pytest.raises(OptionError, match=r"cannot be read"):
        load_profile(tmp_path)
    with pytest.raises(OptionError, match=r"cannot be read"):
        load_profile("a\0b")
    (tmp_path / "large").write_bytes(b" " * (2**22 + 1))
    with pytest.raises(OptionError, match="is larger than 4 MiB"):
        load_profile(tmp_path / "large")
    with pytest.raises(OptionError, match="accepted is the path of a file that stepcache tune wrote"):
        method("profile")


def test_it_is_among_the_methods_and_takes_the_common_options():
    assert METHODS["profile"](THREE_OF_SIX, max_consecutive=1).max_consecutive == 1
    model = cached(Toy(), METHODS["profile"](THREE_OF_SIX, mask="000100"), sigmas=SIX)
    drive(model, SIX[:-1], 1.0)
    assert decisions(model) == "CSCCSC"
