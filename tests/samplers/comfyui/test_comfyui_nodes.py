"""ComfyUI's nodes on a double of the host; see tests/hosts for the real one."""
# ruff: noqa: E402

from __future__ import annotations

import asyncio
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("comfyui_situations")

from comfyui_double import Double, modules
from comfyui_situations import *  # noqa: F403
from comfyui_situations import run

from stepcache import OptionError, StepMask
from stepcache.cli import main
from stepcache.extend import Prediction, Profile
from stepcache.fingerprint import Fingerprint
from stepcache.samplers import comfyui
from stepcache.samplers.comfyui import NODE_CLASS_MAPPINGS, SPEEDS, cache_of, chosen_method, patched

SKIPS = ["automatic", "all", "uncond"]


@pytest.fixture(scope="module")
def host() -> Any:
    before = {name: sys.modules.get(name) for name in modules()}
    sys.modules.update(modules())
    yield Double()
    for name, module in before.items():
        sys.modules.pop(name) if module is None else sys.modules.update({name: module})


@pytest.fixture(params=Double.samplers)
def sampler(request: Any) -> str:
    return request.param


def defaults(node: str) -> dict[str, Any]:
    inputs = NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    given = {**inputs["required"], **inputs.get("optional", {})}
    return {
        name: options[0]["default"] for name, (kind, *options) in given.items() if options and "default" in options[0]
    }


def test_the_node_with_its_defaults_is_forecast(host: Double) -> None:
    node = NODE_CLASS_MAPPINGS["StepCache"]()
    (model,) = node.patch(host.model(), **defaults("StepCache"))
    run(host, model)
    latent, text, image = NODE_CLASS_MAPPINGS["StepCacheReport"]().read({"samples": 1}, model)
    assert latent == {"samples": 1}
    assert "forecast: 10 steps, 10 evaluations, 20 calls asked for" in text
    assert colours_along(image) == ["computed"] * 2 + ["skipped", "computed"] * 4
    _, table, _ = NODE_CLASS_MAPPINGS["StepCacheReport"]().read({}, model, table=True)
    assert len(table.splitlines()) > 20
    _, text, image = NODE_CLASS_MAPPINGS["StepCacheReport"]().read({}, host.model())
    assert "this model has no cache" in text
    assert colours_along(image) == []


def colours_along(image: torch.Tensor) -> list[str]:
    """What the report's image shows of each evaluation, read off its first row of cells from left to right."""
    assert (image.dtype, image.dim(), image.shape[0], image.shape[3]) == (torch.float32, 4, 1, 3)
    assert 0 <= image.min() <= image.max() == 1
    grey = torch.tensor([227, 230, 235]) / 255
    for line in image[0, 60:90]:
        cells, before = [], "paper"
        for pixel in line[110:]:
            paper, skipped = pixel.min() > 0.99, torch.allclose(pixel, grey)
            now = "paper" if paper else "skipped" if skipped else "computed"
            if now != before and now != "paper":
                cells.append(now)
            before = now
        if cells:
            return cells
    return []


def test_the_run_is_in_the_log_in_one_line(host: Double, caplog: Any) -> None:
    (model,) = NODE_CLASS_MAPPINGS["StepCache"]().patch(host.model(), **defaults("StepCache"))
    with caplog.at_level("INFO", "stepcache"):
        run(host, model)
    (record,) = caplog.records
    assert record.message == (
        "StepCache: forecast: 10 steps, 10 evaluations, 12 of 20 calls made, 8 skipped (1.67x fewer)"
    )


def test_the_fields_make_the_method() -> None:
    made = chosen_method("ucache", "0.5", "reset=0\nwarmup=2,\n", start="0.1", mask="fast", policy="static")
    assert (made.criterion.threshold, made.criterion.reset, made.start, made.end) == (0.5, False, 0.1, 0.95)
    assert (made.mask.mask, made.mask.policy, made.warmup) == ("fast", "static", 2)
    assert chosen_method("forecast", "3").gates[1].n == 3
    assert chosen_method("forecast", "3", "interval=4").gates[1].n == 4
    assert chosen_method("forecast", " Default ", start="").gates[1].n == 2
    assert chosen_method("dbcache", "0.2").criterion.threshold == 0.2
    assert chosen_method("static", options="mask=110").mask.mask == (1, 1, 0)
    assert [
        chosen_method("forecast", options=text, skip=skip).skip for text in ("", "skip=uncond") for skip in SKIPS
    ] == [
        *("all", "all", "uncond"),
        *("uncond", "uncond", "uncond"),
    ]
    assert chosen_method("forecast", options="skip=all", skip="uncond").skip == "all"


class Cond:
    """One of ComfyUI's `CONDRegular`: a value for all images, or one for each."""

    def __init__(self, cond: Any) -> None:
        self.cond = cond

    def _copy_with(self, cond: Any) -> Cond:
        return Cond(cond)


def test_the_images_of_a_batch_get_their_own_rows_of_a_prompt() -> None:
    from stepcache.samplers.comfyui.rows import of_rows, separable

    mine = {name: Cond(torch.arange(rows * 2.0).reshape(rows, 2)) for name, rows in (("text", 1), ("concat", 3))}
    entry = {"uuid": 1, "strength": 1.0, "control": None, "model_conds": mine | {"flag": Cond(7)}}
    assert separable([[entry], None], {"transformer_options": {"patches": {}}}, 3)
    kept = of_rows(entry, 3, [2, 0])["model_conds"]
    assert kept["concat"].cond.tolist() == [[4, 5], [0, 1]]
    assert (kept["text"], kept["flag"]) == (mine["text"], entry["model_conds"]["flag"])
    assert not separable([[entry]], {}, 2)  # concat is for three
    for more in ({"control": object()}, {"mask": torch.ones(1, 8, 8)}, {"model_conds": {"a": Cond([torch.ones(1)])}}):
        assert not separable([[entry | more]], {}, 3)
    for options in ({"model_function_wrapper": print}, {"transformer_options": {"patches_replace": {"attn2": {}}}}):
        assert not separable([[entry]], options, 3)


@pytest.mark.parametrize(
    ("speed", "cond", "uncond"),
    [
        ("2x: every second step", "CCSCSCSCSC", "CCSCSCSCSC"),
        ("3x: every third step", "CCSSCSSCSC", "CCSSCSSCSC"),
        ("4x: every fourth step", "CCSSSCSSSC", "CCSSSCSSSC"),
        ("1.3x: the negative prompt only", "C" * 10, "CSCSCSCSCC"),
        ("off", "C" * 10, "C" * 10),
    ],
)
def test_each_speed_computes_the_steps_that_it_says(host: Double, speed: str, cond: str, uncond: str) -> None:
    assert speed in NODE_CLASS_MAPPINGS["StepCache"].INPUT_TYPES()["required"]["speed"][0]
    (model,) = NODE_CLASS_MAPPINGS["StepCache"]().patch(host.model(), speed)
    run(host, model)
    report = cache_of(model).report
    assert (report.decisions("cond"), report.decisions("uncond")) == (cond, uncond)


def test_the_tooltips_figures_of_a_run_of_20_steps_are_right(host: Double) -> None:
    """Of speed: steps that are computed. Of mask: steps that a preset holds."""
    sigmas = torch.cat([torch.linspace(14, 0.05, 20), torch.zeros(1)])
    tip = NODE_CLASS_MAPPINGS["StepCache"].INPUT_TYPES()["required"]["speed"][1]["tooltip"]
    words = ("every second, {} of 20", "every third, {} of 20", "every fourth, {} of 20", "{} of 20 for the negative")
    for method, figure in zip(SPEEDS.values(), words, strict=False):
        model = patched(host.model(), method)
        run(host, model, sigmas=sigmas)
        assert figure.format(cache_of(model).report.decisions("uncond").count("C")) in tip
    tip = NODE_CLASS_MAPPINGS["StepCacheAdvanced"].INPUT_TYPES()["required"]["mask"][1]["tooltip"]
    for preset in ("slow", "medium", "fast", "ultra"):
        assert f"{preset} {sum(StepMask.preset(preset, 20).mask)}" in tip


def test_the_advanced_node_with_its_defaults_is_the_node_at_2x(host: Double) -> None:
    (model,) = NODE_CLASS_MAPPINGS["StepCacheAdvanced"]().patch(host.model(), **defaults("StepCacheAdvanced"))
    assert cache_of(model).method == next(iter(SPEEDS.values()))


def test_off_is_off_whatever_the_other_fields_say(host: Double) -> None:
    fields = {"method": "none", "threshold_or_interval": "x", "start": "2", "mask": "fast"}
    fields |= {"skip": "uncond", "decide": "each", "options": "warmup=x"}
    (model,) = NODE_CLASS_MAPPINGS["StepCacheAdvanced"]().patch(
        host.model(), **{**defaults("StepCacheAdvanced"), **fields}
    )
    run(host, model)
    assert host.rows == [2] * 10
    assert cache_of(model).report.method == "none"


def test_with_skip_uncond_the_node_runs_the_positive_prompt_alone(host: Double) -> None:
    given = {**defaults("StepCacheAdvanced"), "skip": "uncond"}
    (model,) = NODE_CLASS_MAPPINGS["StepCacheAdvanced"]().patch(host.model(), **given)
    run(host, model, "euler_ancestral")
    assert host.rows == [2, 1] * 4 + [2, 2]
    kind, options = NODE_CLASS_MAPPINGS["StepCacheAdvanced"].INPUT_TYPES()["required"]["skip"]
    assert kind == SKIPS
    assert "the model still runs for the positive one" in options["tooltip"]


@pytest.mark.parametrize("node", ["StepCache", "StepCacheAdvanced"])
def test_with_samplers_that_add_noise_at_every_step_the_negative_prompt_only_is_skipped(
    host: Double, node: str, caplog: Any
) -> None:
    """As automatic does it in the web UIs. Not without guidance, nor if the noise is turned off."""
    (model,) = NODE_CLASS_MAPPINGS[node]().patch(host.model(), **defaults(node))
    sampled = {}
    for name in host.samplers:
        run(host, model, name)
        sampled[name] = cache_of(model).report.decisions("cond").count("S")
    assert sampled["euler_ancestral"] == sampled["dpmpp_2m_sde"] == 0
    assert all(skipped for name, skipped in sampled.items() if name not in ("euler_ancestral", "dpmpp_2m_sde"))
    with caplog.at_level("INFO", "stepcache"):
        run(host, model, "euler_ancestral")
    assert caplog.messages == [
        "StepCache: forecast, negative prompt only: 10 steps, 10 evaluations, 16 of 20 calls made, 4 skipped (1.25x "
        "fewer)"
    ]
    note = "euler_ancestral adds noise at every step: only the negative prompt is skipped"
    assert note in cache_of(model).report.notes
    run(host, model, "euler_ancestral", cfg=1.0)
    assert cache_of(model).report.decisions("cond") == "CCSCSCSCSC"
    assert note not in cache_of(model).report.notes


@pytest.mark.parametrize(
    "fields",
    [{"skip": "all"}, {"options": "skip=all"}, {"method": "ucache"}, {"decide": "each", "options": "interval=3"}],
    ids=["all", "options", "another method", "each"],
)
def test_what_is_chosen_by_hand_acts_with_every_sampler(host: Double, fields: dict[str, str]) -> None:
    given = {**defaults("StepCacheAdvanced"), **fields}
    (model,) = NODE_CLASS_MAPPINGS["StepCacheAdvanced"]().patch(host.model(), **given)
    assert cache_of(model).noisy is None
    assert cache_of(model).method.skip == "all"


@pytest.mark.parametrize("text", ["", "interval=3\nwarmup=4"])
def test_automatic_has_the_other_fields_with_noise_too(host: Double, text: str) -> None:
    given = {**defaults("StepCacheAdvanced"), "mask": "fast", "options": text}
    (model,) = NODE_CLASS_MAPPINGS["StepCacheAdvanced"]().patch(host.model(), **given)
    whole, noisy = cache_of(model).method, cache_of(model).noisy
    assert (noisy.skip, noisy.mask, noisy.warmup) == ("uncond", whole.mask, whole.warmup)
    assert noisy.gates[1].n == whole.gates[1].n


def test_a_speed_that_is_none_is_an_error_of_our_node(host: Double) -> None:
    with pytest.raises(OptionError, match="speed='5x': accepted is one of '2x: every second step'"):
        NODE_CLASS_MAPPINGS["StepCache"]().patch(host.model(), "5x")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"threshold_or_interval": "2.5"}, "threshold_or_interval=2.5: forecast's interval is a whole number"),
        (
            {"threshold_or_interval": "0"},
            "^threshold_or_interval=0 sets forecast's interval: interval=0: accepted is a whole number of at least 1",
        ),
        ({"threshold_or_interval": "two"}, "='two': accepted is 'default' or a number: forecast's interval, 2 by def"),
        ({"threshold_or_interval": "0", "start": "0.9", "end": "0.2"}, "^start=0.9, end=0.2: the window is empty"),
        ({"start": "half"}, "start='half': accepted is 'default' or a number: a share of the run from 0 to 1"),
        ({"end": "1.5"}, "end=1.5"),
        ({"options": "treshold=1"}, "unknown option 'treshold'"),
        ({"method": "magcache"}, "^ratios='': MagCache needs the ratios"),
        ({"method": "static"}, "static needs a mask"),
        ({"method": "static", "mask": "fast", "threshold_or_interval": "3"}, "=3: static has no number"),
        ({"method": "ucache", "start": "0.9", "end": "0.2"}, "the window is empty"),
        ({"method": "ucache", "options": "treshold=1"}, "Did you mean 'threshold'"),
        ({"skip": "uncond", "decide": "each"}, "skip='uncond' with decide='each'"),
        ({"skip": "uncond", "method": "fbcache", "threshold_or_interval": "0.1"}, "skip='uncond' with fbcache"),
        ({"decide": "all"}, "unknown value of decide 'all'"),
        ({"method": "fbcache", "threshold_or_interval": "0.1", "options": "block=nowhere"}, "nowhere"),
        ({"method": "static", "options": "mask=10x"}, "mask"),
    ],
)
def test_what_no_run_could_accept_is_an_error_of_our_node(host: Double, fields: dict, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        NODE_CLASS_MAPPINGS["StepCacheAdvanced"]().patch(host.model(), **{**defaults("StepCacheAdvanced"), **fields})


def workflow(kind: str, **inputs: Any) -> dict[str, Any]:
    """Our node, another one that passes its model on, and a sampler."""
    return {
        "1": {"class_type": "StepCacheAdvanced", "inputs": {"model": ["9", 0]}},
        "2": {"class_type": "FreeU", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": kind, "inputs": {"model": ["2", 0], **inputs}, "_meta": {"title": "The sampler"}},
        "4": {"class_type": "KSampler", "inputs": {"model": ["9", 0], "steps": 77}},
    }


@pytest.mark.parametrize(
    ("prompt", "steps"),
    [
        (workflow("KSampler", steps=20, denoise=1.0), 20),
        (workflow("KSampler", steps=20, denoise=0.4), 20),
        (workflow("KSamplerAdvanced", steps=20, start_at_step=5, end_at_step=10000), 15),
        (workflow("KSamplerAdvanced", steps=20, start_at_step=5, end_at_step=12), 7),
    ],
)
def test_a_mask_of_another_length_is_an_error_of_our_node_before_the_run(host: Double, prompt: Any, steps: int) -> None:
    node, given = (
        NODE_CLASS_MAPPINGS["StepCacheAdvanced"](),
        {**defaults("StepCacheAdvanced"), "prompt": prompt, "unique_id": "1"},
    )
    sentence = rf"the mask has 3 entries, the run has {steps} steps: .* that of the node The sampler \(#3\)"
    with pytest.raises(OptionError, match=sentence):
        node.patch(host.model(), **{**given, "options": "mask=110"})
    assert node.patch(host.model(), **{**given, "options": f"mask={'1' * steps}"})
    assert node.patch(host.model(), **{**given, "mask": "fast"})


def test_steps_that_are_not_written_in_the_sampler_are_left_to_the_run(host: Double) -> None:
    node = NODE_CLASS_MAPPINGS["StepCacheAdvanced"]()
    for prompt in (
        workflow("KSampler", steps=["7", 0]),
        workflow("KSampler", steps=20, denoise=0),
        workflow("Other", steps=20),
        None,
    ):
        given = {**defaults("StepCacheAdvanced"), "options": "mask=110", "prompt": prompt, "unique_id": "1"}
        (model,) = node.patch(host.model(), **given)
    with pytest.raises(OptionError, match="in the node StepCache: the mask has 3 entries, the run has 10 steps"):
        run(host, model)


def test_with_an_ultra_static_mask_nothing_but_its_ones_is_computed(host: Double) -> None:
    given = {**defaults("StepCacheAdvanced"), "mask": "ultra", "policy": "static"}
    (model,) = NODE_CLASS_MAPPINGS["StepCacheAdvanced"]().patch(host.model(), **given)
    run(host, model)
    mask = StepMask.preset("ultra", 10).mask
    assert cache_of(model).report.decisions("cond") == "".join("C" if one else "S" for one in mask)


def test_a_dynamic_mask_is_slower_than_none_and_a_static_one_faster_as_the_tooltip_says(host: Double) -> None:
    calls = {}
    for fields in ({}, {"mask": "fast"}, {"mask": "fast", "policy": "static"}):
        (model,) = NODE_CLASS_MAPPINGS["StepCacheAdvanced"]().patch(
            host.model(), **{**defaults("StepCacheAdvanced"), **fields}
        )
        run(host, model)
        calls[fields.get("policy", fields.get("mask"))] = cache_of(model).report.calls
    assert calls["static"] < calls[None] < calls["fast"]
    tip = NODE_CLASS_MAPPINGS["StepCacheAdvanced"].INPUT_TYPES()["required"]["policy"][1]["tooltip"]
    assert "a mask makes it slower, never faster" in tip


def test_a_run_of_four_steps_is_computed_and_the_log_says_why(host: Double, caplog: Any) -> None:
    (model,) = NODE_CLASS_MAPPINGS["StepCache"]().patch(host.model(), **defaults("StepCache"))
    four = torch.tensor([14.0, 5.0, 2.0, 1.0, 0.0])
    bare = run(host, host.model(), sigmas=four)
    with caplog.at_level("INFO", "stepcache"):
        assert torch.equal(run(host, model, sigmas=four), bare)
    (record,) = caplog.records
    assert "0 skipped" in record.message
    assert "the run has only 4 evaluations: all are computed" in record.message


@pytest.mark.parametrize("key", ["easycache", "lazycache"])
def test_comfyuis_own_cache_on_the_same_model_is_warned_of(host: Double, caplog: Any, key: str) -> None:
    def other(executor: Any, *args: Any, **keywords: Any) -> Any:
        return executor(*args, **keywords)

    before = host.model()
    before.add_wrapper_with_key("outer_sample", key, other)
    before = patched(before, chosen_method("forecast"))
    behind = patched(host.model(), chosen_method("forecast"))
    behind.add_wrapper_with_key("outer_sample", key, other)
    name = {"easycache": "EasyCache", "lazycache": "LazyCache"}[key]
    for model in (before, behind):
        caplog.clear()
        run(host, model)
        (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert record.message.startswith(f"StepCache: {name} is on this model too")
        assert name in str(cache_of(model).report.notes)
    caplog.clear()
    run(host, patched(before, SPEEDS["off"]))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_teacache_is_recognised_by_its_option(host: Double) -> None:
    model = patched(host.model(), chosen_method("forecast"))
    model.model_options["transformer_options"]["rel_l1_thresh"] = 0.4
    run(host, model)
    assert "TeaCache is on this model too" in str(cache_of(model).report.notes)


def test_tooltips_name_the_values_of_their_field() -> None:
    for node in NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        for name, (kind, *rest) in {**inputs["required"], **inputs.get("optional", {})}.items():
            assert name == "model" or rest[0]["tooltip"]
            if name in ("policy", "decide", "skip"):
                assert all(f"{value}:" in rest[0]["tooltip"] for value in kind)


def test_apply_first_block_caches_inputs_are_kept(host: Double) -> None:
    """Name, order and default of each, so that a workflow's numbers fit after the swap."""
    assert list(NODE_CLASS_MAPPINGS["StepCacheFirstBlock"].INPUT_TYPES()["required"]) == [
        "model",
        "object_to_patch",
        "residual_diff_threshold",
        "start",
        "end",
        "max_consecutive_cache_hits",
    ]
    assert defaults("StepCacheFirstBlock") == {
        "object_to_patch": "diffusion_model",
        "residual_diff_threshold": 0.0,
        "start": 0.0,
        "end": 1.0,
        "max_consecutive_cache_hits": -1,
    }
    node = NODE_CLASS_MAPPINGS["StepCacheFirstBlock"]()
    given = {**defaults("StepCacheFirstBlock"), "residual_diff_threshold": 0.5, "max_consecutive_cache_hits": 1}
    (model,) = node.patch(host.model(), **given)
    run(host, model)
    decisions = cache_of(model).report.decisions("cond")
    assert "S" in decisions
    assert "SS" not in decisions
    (off,) = node.patch(host.model(), **defaults("StepCacheFirstBlock"))
    run(host, off)
    assert cache_of(off).report.skipped == 0


def profile_of_five(folder: Path, **more: Any) -> Path:
    skipped = {n: Prediction(1, 0.25) for n in (2, 4, 6, 7, 8)}
    Profile((1, 1, 0, 1, 0, 1, 0, 0, 0, 1), skipped, **more).save(folder / "five.json")
    return folder / "five.json"


def test_the_profile_node_replays_a_file_and_the_advanced_node_does_the_same(host: Double, tmp_path: Path) -> None:
    path = profile_of_five(tmp_path)
    (model,) = NODE_CLASS_MAPPINGS["StepCacheProfile"]().patch(host.model(), f' "{path}"\n')
    images = run(host, model)
    assert cache_of(model).report.decisions("cond") == "CCSCSCSSSC"
    given = {**defaults("StepCacheAdvanced"), "method": "profile", "options": f"path={path}"}
    (other,) = NODE_CLASS_MAPPINGS["StepCacheAdvanced"]().patch(host.model(), **given)
    assert torch.equal(run(host, other), images)
    run(host, model, sigmas=torch.cat([torch.linspace(14, 0.05, 20), torch.zeros(1)]))
    assert cache_of(model).report.decisions("cond").count("C") == 10
    assert "scaled to 20" in str(cache_of(model).report.notes)


def test_a_profile_of_another_model_is_warned_of(host: Double, tmp_path: Path) -> None:
    path = profile_of_five(tmp_path, model=Fingerprint.of(torch.nn.Linear(2, 2)))
    (model,) = NODE_CLASS_MAPPINGS["StepCacheProfile"]().patch(host.model(), str(path))
    with pytest.warns(UserWarning, match=r"the profile was made for another model \(Linear; this is Model\)"):
        run(host, model)
    assert "made for another model" in str(cache_of(model).report)
    path = profile_of_five(tmp_path, model=Fingerprint.of(host.model().model))
    (model,) = NODE_CLASS_MAPPINGS["StepCacheProfile"]().patch(host.model(), str(path))
    run(host, model)
    assert "another model" not in str(cache_of(model).report)


def test_a_file_that_is_no_profile_is_an_error_of_the_profile_node(host: Double, tmp_path: Path) -> None:
    node = NODE_CLASS_MAPPINGS["StepCacheProfile"]()
    with pytest.raises(OptionError, match=r"missing\.json' cannot be read: .*No such file"):
        node.patch(host.model(), str(tmp_path / "missing.json"))
    with pytest.raises(OptionError, match="path='': accepted is the path of a file that stepcache tune wrote"):
        node.patch(host.model(), **defaults("StepCacheProfile"))
    (tmp_path / "workflow.json").write_text("{}")
    with pytest.raises(OptionError, match="this is not a profile"):
        node.patch(host.model(), str(tmp_path / "workflow.json"))


def test_a_profile_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    node, path = NODE_CLASS_MAPPINGS["StepCacheProfile"], profile_of_five(tmp_path)
    before = node.IS_CHANGED(path=str(path), model=None)
    assert node.IS_CHANGED(path=str(path), model=None) == before
    os.utime(path, (1, 1))
    assert node.IS_CHANGED(path=str(path), model=None) != before
    assert node.IS_CHANGED(path=str(tmp_path / "missing.json")) == ""


def test_a_guider_that_does_not_announce_evaluations_is_left_alone(host: Double) -> None:
    class Silent(type(host.guider(host.model(), [], []))):
        def __call__(self, x: Any, timestep: Any, model_options: Any, seed: Any = None) -> Any:
            return self.predict_noise(x, timestep, model_options, seed)

    class Other(Double):
        def guider(self, patcher: Any, positive: Any, negative: Any, cfg: float = 5.0) -> Any:
            return Silent(patcher, positive, negative, cfg)

    other = Other()
    (model,) = NODE_CLASS_MAPPINGS["StepCache"]().patch(other.model(), **defaults("StepCache"))
    run(other, model)
    assert len(other.rows) == 10
    assert "does not announce its evaluations" in str(cache_of(model).report.notes)


def test_an_old_comfyui_is_told_to_update(host: Double, monkeypatch: Any) -> None:
    monkeypatch.delattr(sys.modules["comfy.patcher_extension"].WrappersMP, "PREDICT_NOISE")
    with pytest.raises(RuntimeError, match=r"no wrappers at PREDICT_NOISE; update ComfyUI"):
        NODE_CLASS_MAPPINGS["StepCache"]().patch(host.model(), **defaults("StepCache"))


class Field:
    """An input or output of the double of ComfyUI's second node interface: remembers what it was made with."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self.args, self.keywords = args, keywords


def test_the_second_interface_has_the_same_nodes(host: Double, monkeypatch: Any) -> None:
    class Node:
        hidden = types.SimpleNamespace(prompt=workflow("KSampler", steps=20), unique_id="1")

    io = types.SimpleNamespace(ComfyNode=Node, Schema=Field, NodeOutput=Field)
    io.Hidden = types.SimpleNamespace(prompt="PROMPT", unique_id="UNIQUE_ID")
    for kind in ("Model", "Latent", "Image", "String", "Float", "Int", "Boolean", "Combo"):
        setattr(io, kind, types.SimpleNamespace(Input=Field, Output=Field))
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, type("ComfyExtension", (), {})
    monkeypatch.setitem(sys.modules, "comfy_api", types.ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    assert list(comfyui.exports()) == ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "comfy_entrypoint"]

    async def listed() -> list[Any]:
        return await (await comfyui.comfy_entrypoint()).get_node_list()

    nodes = {node.define_schema().keywords["node_id"]: node for node in asyncio.run(listed())}
    assert list(nodes) == list(NODE_CLASS_MAPPINGS)
    advanced = nodes["StepCacheAdvanced"]
    fields = advanced.define_schema().keywords["inputs"]
    given = {field.args[0]: field.keywords["default"] for field in fields if "default" in field.keywords}
    assert given == defaults("StepCacheAdvanced")
    assert [field.args[0] for field in fields if field.keywords["optional"]] == ["options"]
    assert nodes["StepCacheProfile"].fingerprint_inputs(path="missing.json", model=None) == ""
    assert not hasattr(advanced, "fingerprint_inputs")
    output = advanced.execute(model=host.model(), **given)
    run(host, output.args[0])
    assert cache_of(output.args[0]).report.skipped == 8
    with pytest.raises(OptionError, match="the mask has 3 entries, the run has 20 steps"):
        advanced.execute(model=host.model(), **{**given, "options": "mask=110"})


def test_a_comfyui_without_the_second_interface_gets_the_mappings(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    assert list(comfyui.exports()) == ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]


EXAMPLES = Path(__file__).parents[3] / "examples"
WORKFLOWS = sorted((EXAMPLES / "comfyui").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_workflow_has_our_nodes_with_every_input_at_its_default(path: Path) -> None:
    nodes = json.loads(path.read_text(encoding="utf-8"))
    ours = {node["class_type"]: node for node in nodes.values() if node["class_type"] in NODE_CLASS_MAPPINGS}
    assert list(ours) == ["StepCache", "StepCacheReport"]
    for name, node in ours.items():
        assert list(node["inputs"]) == list(NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"])
        assert {key: value for key, value in node["inputs"].items() if not isinstance(value, list)} == defaults(name)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_for_the_canvas_is_that_for_scripts_with_a_picture(path: Path) -> None:
    """ComfyUI lists `examples/*.json` among its templates, each with the picture of the same name."""
    scripted = json.loads(path.read_text(encoding="utf-8"))
    canvas = json.loads((EXAMPLES / f"comfyui_{path.name}").read_text(encoding="utf-8"))
    drawn = {str(node["id"]): node for node in canvas["nodes"]}
    assert {name: node["type"] for name, node in drawn.items()} == {
        name: node["class_type"] for name, node in scripted.items()
    }
    links = {
        (str(target), drawn[str(target)]["inputs"][slot]["name"]): [str(source), output]
        for _, source, output, target, slot, _ in canvas["links"]
    }
    for name, node in scripted.items():
        given = [value for value in node["inputs"].values() if not isinstance(value, list)]
        assert all(value in drawn[name]["widgets_values"] for value in given)
        for key, value in node["inputs"].items():
            assert not isinstance(value, list) or links.pop((name, key)) == value
    assert not links
    assert (EXAMPLES / f"comfyui_{path.stem}.jpg").stat().st_size < 200_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("comfy", "custom_nodes"):
        (tmp_path / "ComfyUI" / part).mkdir(parents=True)
    for part in ("nodes.py", "comfy/samplers.py"):
        (tmp_path / "ComfyUI" / part).write_text("")
    return tmp_path / "ComfyUI"


def test_install_writes_one_file_once(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    assert main(["install", "comfyui", str(folder)]) == 0
    file = folder / "custom_nodes" / "stepcache" / "__init__.py"
    assert f"Wrote {file}" in capsys.readouterr().out
    assert [one for one in folder.rglob("*.py") if "stepcache" in one.parts] == [file]
    main(["install", "comfyui", str(folder)])
    assert "nothing to do" in capsys.readouterr().out
    file.write_text(file.read_text() + "# an older text\n")
    main(["install", "comfyui", str(folder)])
    assert "Wrote" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    defined: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), defined)
    assert defined["NODE_CLASS_MAPPINGS"] is NODE_CLASS_MAPPINGS
    assert "comfy_entrypoint" not in defined


def test_install_refuses_what_is_no_comfyui_or_not_ours(folder: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["install", "comfyui", str(folder.parent)])
    assert f"did you mean {folder}?" in capsys.readouterr().err
    other = folder / "custom_nodes" / "stepcache"
    other.mkdir()
    (other / "nodes.py").write_text("")
    with pytest.raises(SystemExit):
        main(["install", "comfyui", str(folder)])
    assert "is not ours" in capsys.readouterr().err
    assert not (other / "__init__.py").exists()


def test_install_says_where_comfyui_has_a_python_of_its_own(folder: Path, capsys: Any) -> None:
    (folder.parent / "python_embeded").mkdir()
    main(["install", "comfyui", str(folder)])
    assert "install stepcache there" in capsys.readouterr().out
