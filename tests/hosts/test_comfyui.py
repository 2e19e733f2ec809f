"""The situations of tests/helpers/comfyui_situations.py on a real ComfyUI, and the host's own nodes beside ours.

Skipped unless STEPCACHE_COMFYUI is the folder of a checkout; docs/hosts.md says how to prepare one.
"""
# ruff: noqa: E402

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

CHECKOUT = os.environ.get("STEPCACHE_COMFYUI")
if not CHECKOUT:
    pytest.skip("STEPCACHE_COMFYUI is not set", allow_module_level=True)

pytest.register_assert_rewrite("comfyui_situations")

from comfyui_real import Real
from comfyui_situations import *  # noqa: F403
from comfyui_situations import SIGMAS, SKIP_UNCOND, STEPS, chosen, decisions, run

from stepcache.samplers.comfyui import NODE_CLASS_MAPPINGS, cache_of, comfy_entrypoint, in_one_line, patched


@pytest.fixture(scope="module")
def host() -> Real:
    return Real(Path(CHECKOUT))


@pytest.fixture(params=Real.samplers)
def sampler(request: Any) -> str:
    return request.param


def node(module: str, name: str) -> Any:
    """One of the host's own nodes."""
    return getattr(__import__(f"comfy_extras.{module}", fromlist=[name]), name)


def first(output: Any) -> Any:
    return output.result[0]


@pytest.mark.parametrize("sampler", Real.samplers)
def test_what_it_prints(host: Real, sampler: str, capsys: Any) -> None:
    plain = host.model()
    bare = run(host, plain, sampler)
    model = patched(plain, chosen("forecast"))
    off = (run(host, model, sampler) - bare).norm() / bare.norm()
    with capsys.disabled():
        print(f"\n{sampler:16} {in_one_line(cache_of(model).report)}, {decisions(model)}, off by {off:.1%}", end="")
    assert off.isfinite()


@pytest.mark.filterwarnings("ignore:the last step cannot be protected")  # dpm_fast leaves the schedule
def test_every_sampler_of_the_host_counts_right(host: Real) -> None:
    import comfy.samplers

    model = patched(host.model(), chosen("forecast"))
    for name in comfy.samplers.SAMPLER_NAMES:
        assert run(host, model, name).isfinite().all(), name
        report = cache_of(model).report
        assert report.calls == sum(host.rows), name
        assert report.steps == STEPS or name in ("dpm_fast", "dpm_adaptive"), name
        assert report.skipped > 0 or name == "dpm_adaptive", name


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        ("nodes_pag", "PerturbedAttentionGuidance", {"scale": 3.0}),
        ("nodes_sag", "SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    ],
)
def test_the_hosts_guidance_nodes(host: Real, module: str, name: str, options: dict[str, float]) -> None:
    plain = first(node(module, name).execute(host.model(), **options))
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    bare = run(host, plain, x=x)
    rows = sum(host.rows)
    off = patched(plain, chosen("none"))
    assert torch.equal(run(host, off, x=x), bare)
    model = patched(plain, chosen("forecast"))
    assert run(host, model, x=x).isfinite().all()
    report = cache_of(model).report
    assert rows == 3 * STEPS
    assert sum(host.rows) == report.calls + STEPS
    assert decisions(model).count("S") == 4
    follow = patched(plain, chosen("forecast", SKIP_UNCOND))
    assert run(host, follow, "euler_ancestral", x=x).isfinite().all()
    assert sum(host.rows) == cache_of(follow).report.calls + STEPS
    assert (decisions(follow), decisions(follow, "uncond")) == ("C" * STEPS, "CSCSCSCSCC")


def test_the_hosts_easy_cache_on_the_same_model(host: Real) -> None:
    easy = node("nodes_easycache", "EasyCacheNode")
    plain = first(easy.execute(host.model(), 0.2, 0.15, 0.95, False))
    follow = patched(plain, chosen("forecast", SKIP_UNCOND))
    assert run(host, follow, "euler_ancestral").isfinite().all()
    assert decisions(follow, "uncond") == "CSCSCSCSCC"
    assert "EasyCache is on this model too" in str(cache_of(follow).report.notes)
    for model in (
        patched(plain, chosen("forecast")),
        first(easy.execute(patched(host.model(), chosen("forecast")), 0.2, 0.15, 0.95, False)),
    ):
        assert run(host, model).isfinite().all()
        assert decisions(model) == "CCSCSCSCSC"
        assert "stepcache" not in model.model_options["transformer_options"]


def test_ksampler_with_a_part_of_the_schedule(host: Real) -> None:
    """Img2img (denoise below 1) and KSampler Advanced (steps 3 to 8, leftover noise): shares of this run's steps."""
    import comfy.sample

    model = patched(host.model(), chosen("ucache", "threshold=1.5"))
    x = torch.randn(1, 4, 8, 8)
    for options, steps in (({"denoise": 0.3}, 10), ({"start_step": 3, "last_step": 8, "disable_noise": True}, 5)):
        with torch.inference_mode():
            comfy.sample.sample(
                model,
                x,
                10,
                5.0,
                "euler",
                "normal",
                host.cond(1),
                host.cond(2),
                x,
                seed=1,
                disable_pbar=True,
                **options,
            )
        report = cache_of(model).report
        assert (report.steps, report.scheduled_steps) == (steps, steps)


def test_inpainting_with_a_mask(host: Real) -> None:
    import comfy.sample

    plain, x = host.model(), torch.randn(1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    results = []
    for model in (plain, patched(plain, chosen("none")), patched(plain, chosen("forecast"))):
        with torch.inference_mode():
            results.append(
                comfy.sample.sample(
                    model, x, 10, 5.0, "euler", "normal", host.cond(1), host.cond(2), x, noise_mask=mask, seed=1
                )
            )
    assert torch.equal(results[0], results[1])
    assert torch.allclose(results[2][..., 4:], results[0][..., 4:], atol=1e-4)
    assert cache_of(model).report.skipped > 0


def test_area_branches(host: Real) -> None:
    plain = host.model()
    positive = host.cond(1) + host.cond(3, area=(4, 8, 0, 0), strength=1.0)
    bare = run(host, plain, positive=positive)
    assert torch.equal(run(host, patched(plain, chosen("none")), positive=positive), bare)
    model = patched(plain, chosen("forecast"))
    run(host, model, positive=positive)
    assert decisions(model) == "CCSCSCSCSC"
    assert cache_of(model).report.branches[::-1] == ["cond", "uncond"]


def test_area_branches_with_skip_uncond(host: Real) -> None:
    """Both parts of cond are run if uncond is predicted. If uncond has the same parts, the prediction is exact."""
    plain = host.model()
    parts = host.cond(1) + host.cond(3, area=(4, 8, 0, 0), strength=1.0)
    bare = run(host, plain, "euler_ancestral", positive=parts, negative=parts)
    model = patched(plain, chosen("forecast", SKIP_UNCOND))
    assert torch.allclose(
        run(host, model, "euler_ancestral", positive=parts, negative=parts), bare, rtol=1e-3, atol=1e-3
    )
    run(host, model, "euler_ancestral", positive=parts)
    assert (decisions(model), decisions(model, "uncond")) == ("C" * STEPS, "CSCSCSCSCC")
    assert sorted(host.rows) == [1, 1] * 4 + [2, 2] * 6  # the whole latent and the area, which uncond is given too


def test_guiders_of_the_custom_sampler_nodes(host: Real) -> None:
    custom = __import__("comfy_extras.nodes_custom_sampler", fromlist=["Guider_DualCFG"])
    model = patched(host.model(), chosen("forecast"))
    guider = custom.Guider_DualCFG(model)
    guider.set_conds(host.cond(1), host.cond(3), host.cond(2))
    guider.set_cfg(5.0, 3.0)
    with torch.inference_mode():
        x = torch.randn(1, 4, 8, 8)
        guider.sample(x, torch.zeros_like(x), host.sampler("euler"), SIGMAS.clone(), seed=1)
    report = cache_of(model).report
    assert set(report.branches) == {"cond", "middle", "uncond"}
    assert {report.decisions(name) for name in report.branches} == {"CCSCSCSCSC"}


def test_both_other_branches_of_dual_guidance_are_predicted(host: Real) -> None:
    custom = __import__("comfy_extras.nodes_custom_sampler", fromlist=["Guider_DualCFG"])
    model = patched(host.model(), chosen("forecast", SKIP_UNCOND))
    guider = custom.Guider_DualCFG(model)
    guider.set_conds(host.cond(1), host.cond(3), host.cond(2))
    guider.set_cfg(5.0, 3.0)
    host.rows.clear()
    with torch.inference_mode():
        x = torch.randn(1, 4, 8, 8)
        guider.sample(x, torch.zeros_like(x), host.sampler("euler_ancestral"), SIGMAS.clone(), seed=1)
    report = cache_of(model).report
    assert host.rows == [3, 1] * 4 + [3, 3]
    assert {name: report.decisions(name) for name in report.branches} == {
        "cond": "C" * STEPS,
        "middle": "CSCSCSCSCC",
        "uncond": "CSCSCSCSCC",
    }


def test_the_second_interface_has_the_nodes_of_the_first(host: Real) -> None:
    """As ComfyUI describes them to its frontend, and run."""
    from comfy_api.latest import ComfyExtension

    extension = asyncio.run(comfy_entrypoint())
    assert isinstance(extension, ComfyExtension)
    nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    assert list(nodes) == list(NODE_CLASS_MAPPINGS)
    for name, node in nodes.items():
        first, second = NODE_CLASS_MAPPINGS[name], node.GET_NODE_INFO_V1()
        asked = first.INPUT_TYPES()
        for group in ("required", "optional"):
            there = {key: value[-1] for key, value in second["input"].get(group, {}).items()}
            for key, (kind, *rest) in asked.get(group, {}).items():
                options = rest[0] if rest else {}
                assert options.items() <= {"advanced": False, "multiline": False, **there[key]}.items(), key
                assert not isinstance(kind, list) or there[key]["options"] == kind
            assert list(there) == list(asked.get(group, {}))
        assert tuple(second["output"]) == first.RETURN_TYPES
    given = {name: rest[0]["default"] for name, (_, *rest) in asked_of("StepCacheAdvanced").items() if rest}
    clone = nodes["StepCacheAdvanced"].PREPARE_CLASS_CLONE({"prompt": {}, "unique_id": "1"})
    model = clone.execute(model=host.model(), **given).result[0]
    run(host, model)
    latent, text, image = nodes["StepCacheReport"].execute(latent={}, model=model, table=False).result
    assert (latent, "8 skipped" in text, image.shape[-1]) == ({}, True, 3)


def asked_of(node: str) -> dict[str, Any]:
    """The inputs of one of our nodes by name."""
    groups = NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    return {**groups["required"], **groups["optional"]}
