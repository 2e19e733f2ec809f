"""`decide="sample"` and `"any"`: whether a sample depends on its neighbours in the batch."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import Forgetful

from stepcache import EasyCache, FBCache, Forecast, Method, OptionError, UCache
from stepcache.samplers.k_diffusion import CachedDenoiser, InTurn

SIGMAS = torch.tensor([14.0, 9.0, 6.0, 4.0, 3.0, 2.2, 1.6, 1.2, 0.8, 0.5, 0.2, 0.0])
STRENGTH = torch.tensor([0.5, 1.0, 2.0, 0.1])
METHODS = {
    "ucache": UCache(1.0, start=0, max_consecutive=2),
    "easycache": EasyCache(0.3, start=0),
    "forecast": Forecast(min_evaluations=0),
}


class Network(nn.Module):
    """Works on every sample alone, strongly or weakly; remembers how many rows it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, strength: Tensor, **extra: Tensor) -> Tensor:
        self.rows.append(len(x))
        level = sigma.view(-1, 1, 1, 1)
        return x - level * torch.tanh(x / (1 + level**2).sqrt() * strength.view(-1, 1, 1, 1))


def start(samples: int = 4) -> Tensor:
    noise = [torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(samples)]
    return float(SIGMAS[0]) * torch.stack(noise)


def alone(x: Tensor, strength: Tensor, model: CachedDenoiser) -> Tensor:
    """No guidance."""
    return model(x[0], x[1], strength=strength)


def batched(x: Tensor, strength: Tensor, model: CachedDenoiser) -> Tensor:
    """uncond and cond in one call."""
    both = model(x[0].repeat(2, 1, 1, 1), x[1].repeat(2), strength=torch.cat([strength / 2, strength]))
    uncond, cond = both.chunk(2)
    return uncond + 2 * (cond - uncond)


def in_turn(x: Tensor, strength: Tensor, model: CachedDenoiser) -> Tensor:
    """cond and uncond in a call each."""
    cond = model(x[0], x[1], strength=strength)
    uncond = model(x[0], x[1], strength=strength / 2)
    return uncond + 2 * (cond - uncond)


BRANCHES = {alone: None, batched: ("uncond", "cond"), in_turn: lambda: InTurn("cond", "uncond")}


def sampled(
    guidance: Callable, method: Method, x: Tensor, strength: Tensor, two: bool = False, **options
) -> tuple[Tensor, CachedDenoiser]:
    """Euler, or Heun if `two`."""
    names = BRANCHES[guidance]
    names = names() if callable(names) else names
    model = CachedDenoiser(Network(), method, scalings="eps", branches=names, **options)
    ask = lambda x, sigma: guidance((x, sigma.expand(len(x))), strength, model)  # noqa: E731
    with torch.no_grad(), model.run(SIGMAS, 2 if two else 1):
        for sigma, following in itertools.pairwise(SIGMAS):
            slope = (x - ask(x, sigma)) / sigma
            ahead = x + slope * (following - sigma)
            if two and following > 0:
                slope = (slope + (ahead - ask(ahead, following)) / following) / 2
            x = x + slope * (following - sigma)
    return x, model


@pytest.mark.parametrize(
    ("guidance", "two"), [(alone, False), (alone, True), (batched, False), (batched, True), (in_turn, False)]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_sample_that_decides_for_itself_is_the_one_sampled_alone(method, guidance, two):
    """Bit for bit: this network is batch-invariant."""
    images, model = sampled(guidance, METHODS[method], start(), STRENGTH, two, decide="sample")
    made = 0
    for k, image in enumerate(images):
        expected, one = sampled(guidance, METHODS[method], start()[k : k + 1], STRENGTH[k : k + 1], two)
        assert torch.equal(image, expected[0])
        for name in one.report.branches:
            decisions = one.report.decisions(name)
            assert model.report.decisions(f"{name} of sample {k + 1}") == decisions
            assert "S" in decisions
        made += sum(one.inner_model.rows)
    assert sum(model.inner_model.rows) == made  # the model is called for nobody who does not need it
    assert model.report.calls == made


def test_samples_that_need_the_model_at_the_same_evaluation_share_one_call():
    _, model = sampled(batched, METHODS["ucache"], start(), STRENGTH, decide="sample")
    assert len(model.inner_model.rows) < sum(model.inner_model.rows) / 2
    assert len(set(model.inner_model.rows)) > 2


def test_with_any_nothing_is_skipped_against_the_rule_of_a_sample():
    """All samples are computed if one needs it; by the mean of the batch some would not be."""
    by_mean = sampled(alone, METHODS["ucache"], start(), STRENGTH)[1].report.decisions("guided")
    _, model = sampled(alone, METHODS["ucache"], start(), STRENGTH, decide="any")
    decisions = {model.report.decisions(name) for name in model.report.branches}
    assert len(decisions) == 1
    assert set(model.inner_model.rows) == {4}
    assert decisions.pop().count("C") > by_mean.count("C")
    assert "another sample is computed" in {event.reason for event in model.report.events}


def test_by_default_the_mean_of_the_batch_decides():
    images, model = sampled(alone, METHODS["ucache"], start(), STRENGTH)
    assert model.report.branches == ["guided"]
    assert set(model.inner_model.rows) == {4}
    others = [sampled(alone, METHODS["ucache"], start()[k : k + 1], STRENGTH[k : k + 1])[0] for k in range(4)]
    assert [torch.equal(image, other[0]) for image, other in zip(images, others, strict=True)] != [True] * 4


def test_a_batch_of_one_is_decided_as_ever():
    images = [sampled(alone, METHODS["ucache"], start(1), STRENGTH[:1], decide=how) for how in ("batch", "sample")]
    assert torch.equal(images[0][0], images[1][0])
    assert images[1][1].report.branches == ["guided"]


def test_what_cannot_be_taken_apart_is_decided_for_the_whole_batch_and_the_report_says_so():
    model = CachedDenoiser(Network(), METHODS["ucache"], scalings="eps", decide="sample", sigmas=SIGMAS)
    with torch.no_grad(), model.run(SIGMAS, 1):
        for sigma in SIGMAS[:-1]:
            shared = torch.ones(3)  # neither a row for each sample nor one for all
            model(start() * sigma / SIGMAS[0], sigma.expand(4), strength=STRENGTH, shared=shared)
    assert model.report.branches == ["guided"]
    assert any(note.startswith("the batch cannot be taken apart into its samples") for note in model.report.notes)


def test_a_model_that_cannot_be_called_for_some_samples_is_called_for_all():
    class Whole(Network):
        def forward(self, x: Tensor, *args: Tensor, **extra: Tensor) -> Tensor:
            if len(x) != 4:
                raise RuntimeError("a batch of 4 or nothing")
            return super().forward(x, *args, **extra)

    model = CachedDenoiser(Whole(), METHODS["ucache"], scalings="eps", decide="sample")
    expected, _ = sampled(alone, METHODS["ucache"], start(), STRENGTH, decide="sample")
    x = start()
    with torch.no_grad(), model.run(SIGMAS, 1):
        for sigma, following in itertools.pairwise(SIGMAS):
            x = x + (x - model(x, sigma.expand(4), strength=STRENGTH)) / sigma * (following - sigma)
    assert torch.equal(x, expected)
    assert any(note.startswith("the model cannot be called for some samples") for note in model.report.notes)


def test_a_batch_that_changes_begins_with_clean_caches():
    model = CachedDenoiser(Network(), Method(), scalings="eps", decide="sample")
    with torch.no_grad(), model.run(SIGMAS, 1):
        for k, sigma in enumerate(SIGMAS[:6]):
            rows = 4 if k < 3 else 2
            model(start(rows) * sigma / SIGMAS[0], sigma.expand(rows), strength=STRENGTH[:rows])
    assert model.report.decisions("guided of sample 1") == "CSSCSS"
    assert model.report.decisions("guided of sample 4") == "CSS"


def alive() -> int:
    """Latents of 777 elements, which nothing else here has."""
    gc.collect()
    return sum(type(thing) is Tensor and thing.numel() == 777 for thing in gc.get_objects())


def test_nothing_of_the_samples_survives_the_run():
    model = CachedDenoiser(Forgetful(lambda x, sigma: x / 2), Method(), scalings="eps", decide="sample")
    with torch.no_grad():
        with model.run(SIGMAS, 1):
            for sigma in SIGMAS[:3]:
                model(torch.ones(2, 1, 7, 111) * sigma, sigma.expand(2))
            assert alive() > 0
        assert alive() == 0
        with model.run(SIGMAS, 1):
            for sigma in SIGMAS[:-1]:
                model(torch.ones(2, 1, 7, 111) * sigma, sigma.expand(2))
            assert alive() == 0


@pytest.mark.parametrize("decide", ["sample", "any"])
def test_what_cannot_be_decided_for_a_sample_is_refused(decide):
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Identity() for _ in range(3))

    with pytest.raises(OptionError, match=f"^decide='{decide}' with fbcache, which decides inside the model"):
        CachedDenoiser(Blocks(), FBCache(0.1), decide=decide)
    with pytest.raises(OptionError, match=f"^skip='uncond' with decide='{decide}'"):
        CachedDenoiser(Network(), Method(skip="uncond"), branches=("uncond", "cond"), decide=decide)
