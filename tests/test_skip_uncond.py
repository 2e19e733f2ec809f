"""`skip="uncond"`: the reference is always computed, and what the others add to it is predicted."""

from __future__ import annotations

import statistics
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import PIPELINES
from tiny_pipelines import run as image_of
from torch import Tensor
from toys import SIX, LogSigmaLine, cached, decisions, drive, filled, level, reasons

from stepcache import Forecast, Method, OptionError, Static, UCache
from stepcache.bench import METRICS
from stepcache.demo import sampling
from stepcache.extend import Lagrange
from stepcache.samplers.batching import CannotSplit, cut_rows
from stepcache.samplers.diffusers import attach
from stepcache.samplers.k_diffusion import CachedDenoiser, InTurn

ALTERNATE = "101011"
BOTH = ("uncond", "cond")
FOLLOW = Static(ALTERNATE, skip="uncond")


class Rows:
    """cond = wild(x), which nothing predicts; uncond = cond + shift(sigma). Notes what rows it was called with."""

    def __init__(self, shift=lambda sigma: 3.0) -> None:
        self.shift, self.labels = shift, []

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor, **extra) -> Tensor:
        self.labels.append(label.tolist())
        uncond = (label == 0).view(-1, 1, 1, 1)
        return torch.sin(37 * x) + uncond * self.shift(float(sigma[0]))


XS = (1.0, -0.3, 0.8, 0.1, -0.9, 0.4)
LABELS = torch.tensor([0, 1])


def batched(model: CachedDenoiser, network_label: Tensor = LABELS) -> list[Tensor]:
    """Six evaluations of uncond and cond in one call, each with a new random x: the answers."""
    answers = []
    for sigma, x in zip(SIX[:6], XS, strict=True):
        answers.append(model(filled(x, rows=2), level(sigma, 2), label=network_label))
    return answers


def test_what_follows_is_exact_where_the_output_itself_cannot_be_told():
    network = Rows()
    model = cached(network, FOLLOW, sigmas=SIX, branches=BOTH)
    exact = batched(cached(Rows(), None, sigmas=SIX, branches=BOTH))
    for ours, theirs in zip(batched(model), exact, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert network.labels == [[0, 1], [1], [0, 1], [1], [0, 1], [0, 1]]
    assert (decisions(model, "cond"), decisions(model, "uncond")) == ("CCCCCC", "CSCSCC")
    assert reasons(model, "cond")[1] == "the others follow"
    assert model.report.calls == 10
    all_skipped = batched(cached(Rows(), Static(ALTERNATE), sigmas=SIX, branches=BOTH))
    assert (all_skipped[1] - exact[1]).abs().max() > 0.1


def test_the_difference_is_extrapolated_by_the_predictor():
    """Linear in log sigma: a line through two computed evaluations reproduces it, reuse does not."""
    by_hand = {sigma: 2 * torch.tensor(sigma).log().item() for sigma in SIX[:6]}
    exact = batched(cached(Rows(by_hand.get), None, sigmas=SIX, branches=BOTH))
    line = batched(cached(Rows(by_hand.get), FOLLOW.replace(predictor=Lagrange(1)), sigmas=SIX, branches=BOTH))
    reuse = batched(cached(Rows(by_hand.get), FOLLOW, sigmas=SIX, branches=BOTH))
    torch.testing.assert_close(line[3], exact[3], rtol=1e-4, atol=1e-5)
    assert (reuse[3] - exact[3])[0].abs().max() == pytest.approx(abs(by_hand[4.0] - by_hand[6.0]), rel=1e-4)


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_in_calls_of_their_own_the_first_is_kept_and_the_other_follows(order):
    network = Rows()
    model = cached(network, FOLLOW, sigmas=SIX, branches=InTurn(*order))
    for sigma, x in zip(SIX[:6], XS, strict=True):
        expected = {}
        for name in order:
            label = torch.tensor([1 if name == "cond" else 0])
            expected[name] = Rows()(filled(x), level(sigma), label)
            torch.testing.assert_close(model(filled(x), level(sigma), label=label), expected[name])
    assert (decisions(model, order[0]), decisions(model, order[1])) == ("CCCCCC", "CSCSCC")
    assert len(network.labels) == 10


def test_a_branch_that_was_away_is_computed_before_it_follows_again():
    network = Rows(lambda sigma: sigma)
    names = lambda x, sigma, label: "cond" if label else "uncond"  # noqa: E731
    model = cached(network, Static("100000", skip="uncond"), sigmas=SIX, branches=names)
    for step, sigma in enumerate(SIX[:6]):
        model(filled(0.5), level(sigma), label=torch.tensor([1]))
        if step not in (0, 1):
            model(filled(0.5), level(sigma), label=torch.tensor([0]))
    assert decisions(model, "uncond")[0] == "C"


def test_alone_the_reference_is_computed_and_the_report_says_so():
    model = cached(lambda x, sigma: 2 * x, FOLLOW, sigmas=SIX)
    assert drive(model, SIX[:6], XS) == pytest.approx([2 * x for x in XS])
    assert decisions(model) == "CCCCCC"
    assert "skip='uncond': if guided is the only branch, nothing is skipped" in model.report.notes


def test_the_report_does_not_say_that_nothing_was_skipped_where_the_others_end_within_the_run():
    names = lambda x, sigma, label: BOTH if len(label) == 2 else ("cond",)  # noqa: E731
    model = cached(Rows(), Static("101000", skip="uncond"), sigmas=SIX, branches=names)
    for sigma, x in zip(SIX[:6], XS, strict=True):
        label = LABELS if sigma > 4 else LABELS[1:]
        model(filled(x, rows=len(label)), level(sigma, len(label)), label=label)
    assert decisions(model, "uncond") == "CSC"
    assert [note for note in model.report.notes if "nothing is skipped" in note] == [
        "skip='uncond': if cond is the only branch, nothing is skipped"
    ]


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_call_that_cannot_be_taken_apart_is_computed_whole(kind):
    class Packed(Rows):
        def __call__(self, x, sigma, label, other):
            assert other.packed.shape == (1, 4)  # two rows packed into one, as nothing tells
            if len(x) != 2:
                raise kind("shapes do not fit")
            return super().__call__(x, sigma, label)

    def answers(method):
        model = cached(Packed(), method, sigmas=SIX, branches=BOTH)
        made = [
            model(filled(x, rows=2), level(s, 2), label=LABELS, other=SimpleNamespace(packed=torch.ones(1, 4)))
            for s, x in zip(SIX[:6], XS, strict=True)
        ]
        return model, made

    (model, ours), (_, off) = answers(FOLLOW), answers(None)
    assert all(torch.equal(a, b) for a, b in zip(ours, off, strict=True))
    assert decisions(model, "uncond") == "CCCCCC"
    assert any("the call for cond alone fails: shapes do not fit" in note for note in model.report.notes)


@pytest.mark.parametrize("other", [torch.ones(1, 4), torch.ones(3), [1.0, 2.0]], ids=["one", "three", "numbers"])
def test_a_call_is_not_taken_apart_if_an_argument_may_belong_to_all_rows(other):
    network = Rows()
    model = cached(network, FOLLOW, sigmas=SIX, branches=BOTH)
    for sigma, x in zip(SIX[:6], XS, strict=True):
        model(filled(x, rows=2), level(sigma, 2), label=LABELS, other=other)
    assert network.labels == [[0, 1]] * 6
    assert any("it may belong to all rows or to some" in note for note in model.report.notes)


def test_images_of_a_batch_are_not_taken_for_branches():
    """Without guidance the wrapper passes two images of one branch, where there were one of two."""
    network = Rows()
    model = cached(network, FOLLOW, sigmas=SIX, branches=BOTH)
    for sigma, x in zip(SIX[:6], XS, strict=True):
        images = torch.cat([filled(x), filled(x + 1)])
        answer = model(images, level(sigma, 2), label=torch.tensor([1, 1]))
        torch.testing.assert_close(answer, torch.sin(37 * images))
    assert decisions(model, "uncond") == "CCCCCC"
    assert any("they are no branches" in note for note in model.report.notes)


@pytest.mark.parametrize("how", ["together", "in turn"])
def test_a_prediction_relative_to_an_output_that_is_not_finite_is_computed_instead(how):
    def network(x, sigma, label):
        cond = label.view(-1, 1, 1, 1) == 1
        return torch.where(cond & (sigma[0] == 8), float("nan"), 2 * x)

    together = how == "together"
    model = cached(network, FOLLOW, sigmas=SIX, branches=BOTH if together else InTurn("cond", "uncond"))
    for sigma, x in zip(SIX[:2], XS, strict=False):
        if together:
            uncond = model(filled(x, rows=2), level(sigma, 2), label=LABELS)[:1]
        else:
            model(filled(x), level(sigma), label=LABELS[1:])
            uncond = model(filled(x), level(sigma), label=LABELS[:1])
        assert (uncond == 2 * x).all()
    assert reasons(model, "uncond")[1] == "prediction not finite"


def test_the_models_own_error_is_not_swallowed():
    def broken(x, sigma, label):
        if float(sigma[0]) < 9:
            raise RuntimeError("out of paper")
        return x

    model = cached(broken, FOLLOW, sigmas=SIX, branches=BOTH)
    model(filled(1.0, rows=2), level(10.0, 2), label=LABELS)
    with pytest.raises(RuntimeError, match="out of paper"):
        model(filled(1.0, rows=2), level(8.0, 2), label=LABELS)


def test_a_difference_that_is_not_finite_is_never_an_answer():
    network = Rows(lambda sigma: float("nan") if sigma == 10.0 else 1.0)
    model = cached(network, FOLLOW, sigmas=SIX, branches=BOTH)
    answers = batched(model)
    assert decisions(model, "uncond") == "CCCSCC"
    assert all(answer.isfinite().all() for answer in answers[1:])
    assert reasons(model, "uncond")[1] == "prediction not finite"


def test_a_follower_that_a_predictor_cannot_tell_yet_is_computed():
    """A line needs two outputs; uncond comes one evaluation later than cond."""
    names = lambda x, sigma, label: BOTH if len(label) == 2 else ("cond",)  # noqa: E731
    method = Static("110011", predictor=LogSigmaLine(), skip="uncond")
    model = cached(Rows(), method, sigmas=SIX, branches=names)
    for sigma, x in zip(SIX[:6], XS, strict=True):
        label = LABELS if sigma < SIX[0] else LABELS[1:]
        model(filled(x, rows=len(label)), level(sigma, len(label)), label=label)
    assert decisions(model, "uncond") == "CCSCC"
    assert reasons(model, "uncond")[1] == "no cache yet"


def test_a_new_size_in_mid_run_cannot_be_leant_on():
    model = cached(Rows(), FOLLOW, sigmas=SIX, branches=InTurn("cond", "uncond"))
    one, two = torch.tensor([1]), torch.tensor([0, 0])
    for sigma in SIX[:4]:
        assert model(filled(0.5), level(sigma), label=one).shape[0] == 1
        assert model(filled(0.5, rows=2), level(sigma, 2), label=two).shape[0] == 2
    assert decisions(model, "uncond") == "CCCC"


def test_it_is_an_option_of_every_method_and_needs_a_deciding_reference():
    assert Forecast(skip="uncond").skip == UCache(skip="uncond").skip == "uncond"
    with pytest.raises(OptionError, match=r"unknown skip 'followers'\. Accepted: all, uncond"):
        Method(skip="followers")
    with pytest.raises(OptionError, match="skip='uncond' with decide='each': the reference is always computed"):
        cached(Rows(), FOLLOW, branches=BOTH, decide="each")


def test_arguments_are_cut_by_rows_however_deep_they_are():
    value = {"x": torch.arange(4.0), "c": [torch.eye(4)], "pair": (torch.ones(4), 2.0), "n": 3, "mask": None}
    got = cut_rows(value, 4, slice(2, 4))
    assert got["x"].tolist() == [2, 3]
    assert got["c"][0].shape == (2, 4)
    assert [len(got["pair"][0]), got["pair"][1]] == [2, 2.0]
    assert (got["n"], got["mask"]) == (3, None)
    assert cut_rows(torch.ones(1, 4), 4, slice(2, 4), shared=True).shape == (1, 4)


@pytest.mark.parametrize("value", [torch.ones(7), torch.ones(1, 4), ["a", "b", "c", "d"], (1, 2, 3, 4)])
def test_arguments_that_may_or_may_not_be_ordered_by_rows_are_not_cut(value):
    with pytest.raises(CannotSplit):
        cut_rows({"deep": [value]}, 4, slice(2, 4))


def test_forecast_continues_the_difference_in_a_line():
    assert Forecast(skip="uncond").predictor == Lagrange(1)
    assert Forecast(skip="uncond", predictor=Lagrange(2)).predictor == Lagrange(2)
    assert Forecast(skip="all").predictor == Forecast().predictor != Lagrange(1)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_under_fresh_noise_it_is_worth_several_db_at_the_same_calls(network):
    """Measured: 4.2 to 5 dB over reuse with 15 of 20 calls; bars 2 dB under that."""
    subject, seeds = sampling.subject(network), range(12)
    full, ours, reuse = (
        subject.sample("euler_ancestral", 20, method, seeds)
        for method in (None, Forecast(skip="uncond"), Static("1110" * 5))
    )
    assert (ours.calls, reuse.calls) == (15.5, 15)
    ours, reuse = (statistics.fmean(METRICS["PSNR"](one.images, full.images, seeds)) for one in (ours, reuse))
    assert ours > reuse + 2


@pytest.mark.parametrize("name", ["sd", "pix2pix", "sd-controlnet", "wan", "sdxl"])
def test_in_a_pipeline_the_reference_is_computed_alone(name):
    """Batched guidance is taken apart, calls of their own are told apart; the report counts what was run."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    module = getattr(pipe, tiny.denoisers[0])
    rows, forward = [], type(module).forward
    handle = module.register_forward_hook(
        lambda m, args, kwargs, out: rows.append(_rows(args, kwargs)), with_kwargs=True
    )
    expected = image_of(pipe, tiny)
    full = sum(rows)
    rows.clear()
    with attach(pipe, Static(ALTERNATE, skip="uncond")) as cache:
        ours = image_of(pipe, tiny)
    report = cache.report
    followers = [c for c in report.branches if "S" in report.decisions(c)]
    assert len(followers) == len(report.branches) - 1
    assert sum(rows) == full - report.skipped * full // len(report.events)
    assert not torch.equal(ours, expected)
    rows.clear()
    assert torch.equal(image_of(pipe, tiny), expected)
    assert type(module).forward is forward
    handle.remove()


def _rows(args, kwargs) -> int:
    x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    return len(x)
