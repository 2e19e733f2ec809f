"""`stepcache compare`: what is sampled, what the page's data are, and which options are refused."""

from __future__ import annotations

import base64
import io
import re
import sys
from dataclasses import replace

import painter
import pytest
import torch
from package import EXAMPLES
from PIL import Image

from stepcache import Forecast, OptionError, Static, UCache
from stepcache.bench import METRICS, compare
from stepcache.bench.page import _gain, _limits, page
from stepcache.cli import main
from stepcache.demo import named


@pytest.fixture(scope="module")
def painted():
    methods = {"Forecast 2x": Forecast(), "all <computed>": Static("1" * 12)}
    return compare(painter.subject(), methods, "euler", 12, [0, 1])


def pictures(html: str, alt: str) -> list[torch.Tensor]:
    """The pictures of a page with this text in place of them, as (H, W, 3) of uint8."""
    found = re.findall(rf'<img[^>]*src="data:image/png;base64,([^"]+)"[^>]*alt="{alt}', html)
    return [
        torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB").tobytes()), dtype=torch.uint8)
        .view(painter.SIZE, painter.SIZE, 3)
        for one in found
    ]  # fmt: skip


def test_every_image_is_marked_against_the_full_run_of_its_seed(painted):
    forecast, computed = painted.entries
    subject = painter.subject()
    for number in (0, 1):
        full = subject.sample("euler", 12, None, [number])
        assert torch.equal(painted.full[number].image, full.images[0])
        cached = subject.sample("euler", 12, Forecast(), [number])
        assert torch.equal(forecast.shots[number].image, cached.images[0])
        assert forecast.shots[number].score == METRICS["PSNR"](cached.images, full.images, [number])[0]
        assert (forecast.shots[number].calls, painted.full[number].calls) == (7, 12)
        fewer = subject.sample("euler", 7, None, [number])
        assert torch.equal(forecast.fewer[number].image, fewer.images[0])
    assert computed.fewer == (None, None)
    assert [shot.score for shot in computed.shots] == [100, 100]


def test_fewer_steps_make_no_more_calls_than_the_method_did():
    entry = compare(painter.subject(), {"forecast": Forecast()}, "heun", 10).entries[0]
    assert entry.fewer[0].calls <= entry.shots[0].calls < 19
    assert entry.fewer[0].calls == 2 * entry.fewer[0].steps - 1


def test_methods_with_as_many_calls_share_their_rival():
    entries = compare(painter.subject(), {"a": Forecast(), "b": Forecast()}, "euler", 12).entries
    assert entries[0].fewer[0] is entries[1].fewer[0]


def test_the_page_shows_the_images_and_their_differences_times_the_gain(painted):
    html = page(painted, gain=10)
    full, ours = painted.full[0].image, painted.entries[0].shots[0].image
    expected = ((ours - full).abs() / 2 * 10).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    assert torch.equal(pictures(html, "difference from the full run, 10 times as bright")[0], expected)
    shown = ((ours + 1) / 2).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    assert torch.equal(pictures(html, "Forecast 2x")[0], shown)
    assert "difference &times; 10" in html
    assert "identical" in html


def test_names_are_escaped_and_nothing_is_fetched(painted):
    html = page(replace(painted, captions=("<script>alert(1)</script>", "b")))
    assert "<script>alert" not in html
    assert "all &lt;computed&gt;" in html
    assert "all <computed>" not in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "http" not in html.replace("http-equiv", "")


def test_the_gain_fits_the_worst_image():
    assert _gain([torch.full((3, 8, 8), 0.011), torch.zeros(3, 8, 8)]) == 50
    assert _gain([torch.zeros(3, 8, 8)]) == 200
    assert _gain([torch.ones(3, 8, 8)]) == 1


def test_images_in_another_range_are_shown_in_their_own():
    assert _limits(torch.tensor([-0.9, 1.1])) == (-1, 1)
    assert _limits(torch.tensor([0.0, 100.0])) == (0, 100)
    assert _limits(torch.tensor([0.0, 0.01])) == (0, pytest.approx(0.01))
    assert _limits(torch.tensor([3.0, 3.0])) == (2, 4)


@pytest.mark.parametrize("shape", [(1, 1, 24, 24), (1, 5, 3, 24, 24)], ids=["grey", "video"])
def test_grey_images_and_videos_are_shown(shape):
    subject = painter.subject(decode=lambda latents: latents[:, :1].expand((*shape[:-3], 1, 24, 24)).expand(shape))
    html = page(compare(subject, {"forecast": Forecast()}, "euler", 8))
    assert ("of 5 frames the middle one is shown" in html) == (len(shape) == 5)
    assert len(pictures(html, "forecast")) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": []}, "seeds: accepted is one or more"),
        ({"steps": 0}, "steps=0: accepted is a whole number from 1"),
        ({"repeats": 0}, "repeats=0: accepted"),
        ({"subject": painter.subject(decode=lambda x: x[:, :2])}, r"shape \(1, 2, 24, 24\).*1 or 3 channels.*decode="),
        ({"sampler": "oiler"}, "sampler='oiler': accepted is"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, said):
    with pytest.raises(OptionError, match=said):
        compare(**{"subject": painter.subject(), "methods": {"forecast": Forecast()}, **options})


def test_a_gain_that_is_none_is_refused(painted, tmp_path):
    with pytest.raises(OptionError, match="gain=0: accepted is a number from 1"):
        painted.save(tmp_path / "page.html", gain=0)


def test_the_command_writes_a_page_of_a_users_own_subject(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "new" / "page.html"
    text = "forecast,ucache:threshold=0.5,decay=0.9"
    main(["compare", "--network=painter:subject", f"--methods={text}", "--steps=12", "--samples=2", f"--out={out}"])
    html = out.read_text(encoding="utf-8")
    assert html.count('<article class="card"') in (3, 4)
    assert "<h2>ucache:threshold=0.5,decay=0.9</h2>" in html
    assert f"Written to {out}" in capsys.readouterr().out


def test_without_options_the_shipped_colour_network_is_drawn_by_forecast_and_ucache(tmp_path):
    main(["compare", "--steps=4", "--samples=1", "--class=cats", f"--out={tmp_path / 'page.html'}"])
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>colour</h1>" in html
    assert "cats, seed 1" in html
    assert [name in html for name in ("Forecast 2x", "Forecast 3x", "UCache")] == [True] * 3


def test_methods_come_apart_at_commas_but_their_options_do_not():
    from stepcache.cli import _methods

    assert [*_methods(["forecast,ucache:threshold=0.5,decay=0.9,easycache", "static:mask=110"])] == [
        "forecast",
        "ucache:threshold=0.5,decay=0.9",
        "easycache",
        "static:mask=110",
    ]
    assert (
        _methods(["ucache:threshold=0.5,decay=0.9"])["ucache:threshold=0.5,decay=0.9"].criterion
        == UCache(threshold=0.5, decay=0.9).criterion
    )


def test_seeds_ask_for_the_class():
    assert named.seeds("colour", "cats", 0, 3) == [1, 11, 21]
    assert named.seeds("unet", "3", 7, 2) == [13, 23]
    assert named.seeds("hsc32", None, 5, 2) == [5, 6]
    assert named.captions("colour")(11) == "cats, seed 11"
    with pytest.raises(OptionError, match=r"unknown class 'kats'. Did you mean 'cats'"):
        named.seeds("colour", "kats", 0, 1)
    with pytest.raises(OptionError, match="hsc32 draws no classes"):
        named.seeds("hsc32", "cats", 0, 1)


def test_a_users_function_gets_the_options_that_it_has_parameters_for(tmp_path, monkeypatch):
    (tmp_path / "mine_too.py").write_text(
        "import painter\n"
        "def asked(prompt='none'):\n    return painter.subject(strength=len(prompt))\n"
        "def nothing():\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert named.subject("mine_too:asked", prompt="four").extra_args([0]) == {"strength": 4}
    for name, options, said in (
        ("mine_too:asked", {"guidance": 2.0}, r"--guidance: asked\(\) in mine_too has no parameter"),
        ("mine_too:other", {}, "mine_too has no function 'other'"),
        ("mine_too:nothing", {}, "returned NoneType; accepted is a subject"),
        ("absent_here:make", {}, "No module named 'absent_here'.*in the folder of absent_here.py"),
        (":make", {}, "accepted is MODULE:FUNCTION"),
    ):
        with pytest.raises(OptionError, match=said):
            named.subject(name, **options)


def test_networks_take_the_guidance_that_they_have():
    assert named.subject("colour").name == named.subject("colour", 3.0).name == "colour"
    assert named.subject("colour", 5.0).name == "colour, guidance 5"
    assert named.subject("colour", 5.0).guided(None).scale == 5
    for name, options, said in (
        ("v", {"guidance": 5.0}, "--guidance=5: accepted with unet, dit, colour; v has one of its own"),
        ("unet", {"prompt": "a cat"}, "--prompt='a cat': unet draws classes.*--class"),
        ("colours", {}, "unknown network 'colours'. Did you mean 'colour'"),
    ):
        with pytest.raises(OptionError, match=said):
            named.subject(name, **options)


def test_a_pipeline_is_read_from_a_folder_and_asked_for_the_prompt(tmp_path, monkeypatch, capsys):
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    monkeypatch.syspath_prepend(EXAMPLES)
    import k_diffusion_sd

    parts = k_diffusion_sd.tiny(["a lighthouse at dusk"], torch.float32)
    StableDiffusionPipeline(
        parts.vae, parts.text_encoder, parts.tokenizer, parts.unet,
        EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        None, None, requires_safety_checker=False,
    ).save_pretrained(tmp_path / "pipe")  # fmt: skip
    page = tmp_path / "page.html"
    given = ["compare", f"--pipeline={tmp_path / 'pipe'}", "--device=cpu", "--methods=forecast", f"--out={page}"]
    main([*given, "--prompt=a lighthouse", "--guidance=4", "--steps=9"])
    html = page.read_text(encoding="utf-8")
    assert "<h1>StableDiffusionPipeline: a lighthouse</h1>" in html
    assert "EulerDiscreteScheduler, 9 steps" in html
    assert html.count("data-sample=") == 2
    for wrong, said in (
        (["--sampler=euler"], "--sampler: not with --pipeline"),
        (["--class=cats"], "--class: not with"),
    ):
        with pytest.raises(SystemExit):
            main([*given, *wrong])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", f"--pipeline={tmp_path / 'nothing'}", "--prompt=a"])
    assert "cannot be read as a diffusers pipeline" in capsys.readouterr().err
