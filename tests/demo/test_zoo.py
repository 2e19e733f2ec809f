"""The zoo of networks, the reader of galaxygrad's files, and what the zoo is measured with."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from itertools import pairwise
from statistics import fmean
from types import SimpleNamespace
from unittest.mock import Mock

import numpy
import pytest
import torch

import stepcache.bench
from stepcache import Forecast, Method, OptionError
from stepcache.bench import KDiffusion
from stepcache.bench.metrics import CAP, psnr_of_range
from stepcache.bench.unipc import sample_unipc
from stepcache.cli import main
from stepcache.demo import galaxy, zoo
from stepcache.demo.sampling import Guided
from stepcache.extend import Reuse, TaylorSeer

PACKAGED = {*galaxy.FILES, "colour"}


def test_the_split_is_disjoint_and_holds_everything():
    assert len({*zoo.DEVELOPMENT}) == len(zoo.DEVELOPMENT)
    assert not {*zoo.DEVELOPMENT} & {*zoo.TEST}
    assert {*galaxy.FILES, "edm", "v", "colour", *zoo.SHIPPED} == {*zoo.NAMES}
    assert len(zoo.NAMES) == 17
    assert {*zoo.SPLITS["development"], *zoo.SPLITS["test"]} == {*zoo.NAMES}


def two(subject: KDiffusion) -> None:
    made = subject.sample("unipc", 3, None, [0, 1])
    assert made.calls == 3
    assert made.images.shape == (2, *subject.shape)
    assert made.images.isfinite().all()
    assert not made.images[0].equal(made.images[1])


@pytest.mark.parametrize("name", sorted({*zoo.NAMES} - PACKAGED))
def test_every_shipped_network_samples(name):
    two(zoo.subject(name))


def test_the_colour_network_samples():
    two(zoo.subject("colour"))


@pytest.mark.parametrize("name", sorted(galaxy.FILES))
def test_every_galaxy_network_samples(name):
    if find_spec("galaxygrad") is None:  # to import it would need JAX
        pytest.skip("galaxygrad is not installed: pip install --no-deps galaxygrad==0.2.0")
    (subject,) = zoo.subjects([name])
    assert str(subject.model.inner_model.size) in name
    two(subject)


@pytest.mark.parametrize(
    ("name", "sampler", "every", "over_fewer", "over_taylorseer"),
    [
        ("edm", "euler", 2, 8, 3),
        ("edm", "unipc", 3, 1, 1),
        ("v", "euler", 3, 1, 0),
        ("hsc32", "euler", 2, 6, 1),
        ("hsc32", "unipc", 2, 0.5, 0.5),
        ("hsc32", "dpmpp_2m", 3, 1, 0.5),
    ],
)
def test_forecast_is_above_fewer_steps_and_taylorseer(name, sampler, every, over_fewer, over_taylorseer):
    """Bars below what was measured, in dB, far above what extrapolating the residual reaches; 8 samples, 20 steps."""
    if name in galaxy.FILES and find_spec("galaxygrad") is None:
        pytest.skip("galaxygrad is not installed: pip install --no-deps galaxygrad==0.2.0")
    subject, seeds = zoo.subject(name), range(8)
    full = subject.sample(sampler, 20, None, seeds)

    def marks(method: Method | None, steps: int = 20) -> tuple[float, float]:
        result = subject.sample(sampler, steps, method, seeds)
        return fmean(psnr_of_range(result.images, full.images, seeds)), result.calls

    ours, calls = marks(Forecast(every))
    rival, same = marks(Forecast(every, predictor=TaylorSeer(1)))
    assert calls == same < 12
    assert ours >= rival + over_taylorseer
    assert ours >= marks(None, round(calls))[0] + over_fewer


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde"])
def test_under_fresh_noise_forecast_is_above_reuse(sampler):
    """On the network with EDM preconditioning, 8 samples, 20 steps, half the calls."""
    subject, seeds = zoo.subject("edm"), range(8)
    full = subject.sample(sampler, 20, None, seeds)
    ours, reuse = (subject.sample(sampler, 20, m, seeds) for m in (Forecast(), Forecast(predictor=Reuse())))
    assert fmean(psnr_of_range(ours.images, full.images, seeds)) > fmean(
        psnr_of_range(reuse.images, full.images, seeds)
    )


def test_guidance_1_is_the_branchal_branch_alone():
    one, three = zoo.subject("unet@1"), zoo.subject("unet@3")
    report = one.sample("euler", 3, None, [4]).report
    assert report.branches == ["cond"]
    assert report.calls == 3
    x, sigma, label = torch.randn(1, 1, 16, 16), torch.ones(1), torch.tensor([4])
    guided = Guided(three.model, 1.0)(x, sigma, label)
    torch.testing.assert_close(guided, one.model(x, sigma, label=label), rtol=1e-4, atol=1e-4)


def test_guidance_asks_for_the_null_label_it_is_given():
    asked = []

    def model(x, sigma, label):
        asked.extend(label.tolist())
        return x

    guided = Guided(torch.nn.Identity(), 3.0, null=7)
    guided.inner_model.forward = model
    guided(torch.zeros(2, 1), torch.ones(2), torch.tensor([1, 2]))
    assert asked == [7, 7, 1, 2]


def test_an_unknown_network_is_named_with_the_nearest(capsys):
    with pytest.raises(OptionError, match=r"unknown network 'unet@2'.*Did you mean 'unet@"):
        zoo.subject("unet@2")
    with pytest.raises(SystemExit):
        main(["bench", "--network", "hsc33"])
    assert "Did you mean 'hsc32'?" in capsys.readouterr().err


def test_bench_takes_names_of_the_zoo(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(stepcache.bench, "bench", lambda *options: given.extend(options) or Mock())
    main(["bench", "--network", "unet", "edm", "dit@3, shift 3", "--out", str(tmp_path)])
    assert [subject.name for subject in given[0]] == ["unet", "edm", "dit@3, shift 3"]
    assert given[0][2].model.shift == 3


def test_bench_takes_a_guidance_for_networks_that_have_none_of_their_own(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(stepcache.bench, "bench", lambda *options: given.extend(options) or Mock())
    main(["bench", "--network", "unet", "--guidance", "5", "--out", str(tmp_path)])
    assert [subject.name for subject in given[0]] == ["unet, guidance 5"]
    with pytest.raises(SystemExit):
        main(["bench", "--network", "unet", "edm", "--guidance", "5", "--out", str(tmp_path)])
    assert "--guidance=5: accepted with unet, dit, colour; edm has one of its own" in capsys.readouterr().err


def galaxy_file(path, size: int = 16, hidden: int = 6, end: float = 10.0, seed: int = 0) -> list[numpy.ndarray]:
    """A file in the layout of galaxygrad 0.2.0: a network for images of `size`, one array after another."""
    random, patches, inside = numpy.random.default_rng(seed), (size // 4) ** 2, 5
    shapes: list[tuple[int, ...]] = [(hidden, 2, 4, 4), (hidden, 1, 1), (1, hidden, 4, 4), (1, 1, 1)]
    for _ in range(galaxy.BLOCKS):
        shapes += [(inside, patches), (inside,), (patches, inside), (patches,)]
        shapes += [(inside, hidden), (inside,), (hidden, inside), (hidden,)]
        shapes += [(hidden, patches)] * 2 + [(patches, hidden)] * 2
    shapes += [(hidden, patches)] * 2
    arrays = [random.normal(size=shape).astype("float32") / 3 for shape in shapes] + [numpy.float32(end)]
    with path.open("wb") as file:
        for array in arrays:
            numpy.save(file, array)
    return arrays


@pytest.fixture
def own_galaxies(tmp_path, monkeypatch):
    """The package galaxygrad, with one network that the test wrote."""
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(galaxy, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    return tmp_path, galaxy_file(tmp_path / galaxy.FILES["hsc32"])


def test_the_galaxy_reader_puts_every_array_where_it_belongs(own_galaxies):
    """Against the network written out in numpy, in double precision."""
    _, arrays = own_galaxies
    arrays = [array.astype("float64") for array in arrays]
    mixer = galaxy.load("hsc32").inner_model
    assert mixer.size == 16
    image, t = numpy.random.default_rng(1).normal(size=(1, 16, 16)), 2.5

    def norm(weight, bias, y):
        return (y - y.mean()) / numpy.sqrt(y.var() + 1e-5) * weight + bias

    def mlp(w1, b1, w2, b2, y):
        return w2 @ numpy.maximum(w1 @ y + b1[:, None], 0) + b2[:, None]

    defer = iter(arrays).__next__
    kernel, bias, back, back_bias = defer(), defer(), defer(), defer()
    x = numpy.concatenate([image, numpy.full((1, 16, 16), t / 10)])
    patches = x.reshape(2, 4, 4, 4, 4).transpose(1, 3, 0, 2, 4)  # row, column, channel, y, x
    y = numpy.einsum("rcklm,oklm->orc", patches, kernel).reshape(6, 16) + bias.reshape(6, 1)
    for _ in range(galaxy.BLOCKS):
        patch, channel = [defer() for _ in range(4)], [defer() for _ in range(4)]
        norm1, norm2 = [defer(), defer()], [defer(), defer()]
        z = norm(*norm1, y)
        w1, b1, w2, b2 = patch
        y = y + (w2 @ numpy.maximum(w1 @ z.T + b1[:, None], 0) + b2[:, None]).T
        y = (y.T + mlp(*channel, norm(*norm2, y.T).T).T).T
    y = norm(defer(), defer(), y).reshape(6, 4, 4)
    # JAX's transposed convolution correlates with the kernel as it is: pixel l of a patch meets kernel 3 - l
    out = numpy.einsum("hrc,ohlm->orlcm", y, back[:, :, ::-1, ::-1]).reshape(1, 16, 16) + back_bias
    found = mixer(torch.tensor(image, dtype=torch.float32)[None], torch.tensor([t]))[0].numpy()
    numpy.testing.assert_allclose(found, out, rtol=2e-3, atol=2e-4)


def test_a_galaxy_network_of_another_version_is_refused(own_galaxies):
    folder, arrays = own_galaxies
    with (folder / galaxy.FILES["hsc32"]).open("wb") as file:
        for array in arrays[:-3]:
            numpy.save(file, array)
    with pytest.raises(OptionError, match=r"52 arrays.*galaxygrad 0\.2\.0"):
        galaxy.load("hsc32")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(galaxy, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'stepcache\[zoo\]'"):
        zoo.subject("hsc32")


def test_psnr_of_range_by_hand():
    reference = torch.tensor([[[[0.0, 4.0], [1.0, 2.0]]], [[[5.0, 15.0], [5.0, 5.0]]], [[[0.0, 1.0], [0.0, 0.0]]]])
    images = reference.clone()
    images[0, 0, 0, 0] += 2.0  # mean square 1, range 4
    images[1] += 1.0  # mean square 1, range 10
    found = psnr_of_range(images, reference, [0, 1, 2])
    assert found == pytest.approx([10 * math.log10(16), 20.0, CAP])
    assert psnr_of_range(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), [0]) == [CAP]


def mixture(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """denoised of data that are N(1, 0.5^2) or N(-1, 0.5^2), alike often."""
    variance = sigma.reshape(-1, 1) ** 2 + 0.25
    mean = (x / variance).tanh()
    return mean + 0.25 / variance * (x - mean)


def test_unipc_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="sample", use_karras_sigmas=True)
    scheduler.set_timesteps(8)
    sigmas = scheduler.sigmas.double()
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double() * sigmas[0]
    ours = sample_unipc(mixture, start, sigmas)
    scaled = start / (1 + sigmas[0] ** 2).sqrt()  # diffusers moves x / sqrt(1 + sigma^2)
    for i, t in enumerate(scheduler.timesteps):
        scale = (1 + sigmas[i] ** 2).sqrt()
        denoised = mixture(scaled * scale, sigmas[i].expand(3))
        scaled = scheduler.step(denoised, t, scaled, return_dict=False)[0]
    torch.testing.assert_close(ours, scaled, rtol=1e-5, atol=1e-5)


def test_unipc_is_of_order_2_and_evaluates_once_a_step():
    start = torch.tensor([[2.0, -7.0, 4.0]], dtype=torch.float64)
    calls = []

    def end(steps: int) -> torch.Tensor:
        sigmas = torch.logspace(math.log10(20), math.log10(0.05), steps + 1, dtype=torch.float64)
        calls.clear()
        return sample_unipc(mixture, start, sigmas, callback=lambda info: calls.append(info["i"]))

    exact = end(3000)
    errors = [(end(steps) - exact).abs().max() for steps in (40, 80, 160)]
    assert calls == list(range(160))
    assert all(coarse / fine > 3.6 for coarse, fine in pairwise(errors))


def test_unipc_under_the_cache_computes_half():
    from stepcache import Forecast

    subject = zoo.subject("edm")
    full, half = (subject.sample("unipc", 12, method, [0, 1]) for method in (None, Forecast(2)))
    assert (full.calls, half.calls) == (12, 7)
    assert min(psnr_of_range(half.images, full.images, [0, 1])) > 20


def test_hicache_pp_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "hicache_pp", None)
    from stepcache.extend import require

    with pytest.raises(ImportError, match=r"stepcache\[zoo\]"):
        require("hicache_pp", "zoo")
