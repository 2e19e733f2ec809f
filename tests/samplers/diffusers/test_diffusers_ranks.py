"""diffusers' own parallelism: the ranks of one model are found, and those that draw other images are not among them."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from several_ranks import Save, together, under_torchrun
from tiny_pipelines import FLUX_GUIDED, E, make, sched
from torch import distributed as dist
from torch import nn

from stepcache import UCache
from stepcache.ranks import DROPPED
from stepcache.samplers.diffusers import StepCacheCallback, attach
from stepcache.samplers.diffusers.parallel import parallel_groups

diffusers = pytest.importorskip("diffusers", minversion="0.36")
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")

STEPS = 12
METHOD = UCache(0.7, start=0)
"""At this threshold the seeds 0 and 1 skip other evaluations."""


class Pipeline:
    """Flux without what is around it: text encoders alone would take most of the time to import."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = make("FluxTransformer2DModel", **FLUX_GUIDED)
        self.scheduler = sched("FlowMatchEulerDiscrete")

    @torch.no_grad()
    def __call__(self, seed: int, callback_on_step_end=None) -> torch.Tensor:
        x = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed))
        places = torch.zeros(16, 3)
        places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
        self.scheduler.set_timesteps(STEPS)
        for step, t in enumerate(self.scheduler.timesteps):
            out = self.transformer(
                hidden_states=x,
                timestep=t.expand(1) / 1000,
                guidance=torch.ones(1),
                pooled_projections=E(1, 16, seed=2),
                encoder_hidden_states=E(1, 4, 16),
                txt_ids=torch.zeros(4, 3),
                img_ids=places,
                return_dict=False,
            )[0]
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, t, {"latents": x})
        return x


def parallel(pipe, mesh=None, **degrees: int) -> None:
    """`enable_parallelism` as on an accelerator, of which it takes the CPU for one."""
    config = diffusers.ContextParallelConfig(**degrees, mesh=mesh)
    pipe.transformer.enable_parallelism(config=config)


def attention_with_lse(ctx, query, key, value, mask, dropout, causal, scale, gqa, return_lse, **more):
    """Attention that also returns the logarithm of its sums, which ring attention needs and no CPU backend gives."""
    query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    out = (scores.softmax(-1) @ value).permute(0, 2, 1, 3)
    return (out, scores.logsumexp(-1).permute(0, 2, 1)) if return_lse else out


def on_the_cpu() -> None:
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda: torch.device("cpu")
    from diffusers.models import attention_dispatch

    attention_dispatch._native_attention_forward_op = attention_with_lse


def drawn(pipe: Pipeline, seed: int, way: str = "attach", **options) -> dict[str, object]:
    calls: list[int] = []
    counting = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    if way == "attach":
        with attach(pipe, METHOD, **options) as cache:
            image = pipe(seed)
    else:
        image = pipe(seed, callback_on_step_end=(cache := StepCacheCallback(METHOD, **options)))
    counting.remove()
    report = cache.report
    return {
        "decisions": report.decisions(*report.branches),
        "calls": len(calls),
        "notes": report.notes,
        "image": image.flatten().tolist(),
    }


def two_ranks(rank: int, save: Save) -> None:
    on_the_cpu()
    for seed in (0, 1):
        save(f"alone {seed}", drawn(Pipeline(), seed))
    save("alone callback", drawn(Pipeline(), 0, "callback"))
    for name, degrees in {"ulysses": {"ulysses_degree": 2}, "ring": {"ring_degree": 2}}.items():
        pipe = Pipeline()
        parallel(pipe, **degrees)
        for way in ("attach", "callback"):
            save(f"{name} {way}", drawn(pipe, 0, way))
    save("FSDP", drawn(fully_sharded(), rank))
    save("copies", copies())


def fully_sharded() -> Pipeline:
    from torch.distributed.fsdp import fully_shard

    pipe = Pipeline()
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        fully_shard(block)
    return pipe


def copies() -> dict[str, list[str]]:
    """The notes of copies of a callback that was given a group."""
    callback = StepCacheCallback(METHOD, group=dist.group.WORLD)
    found = {}
    for name, other in {"copy": copy.deepcopy(callback), "pickle": pickle.loads(pickle.dumps(callback))}.items():
        Pipeline()(0, callback_on_step_end=other)
        found[name] = other.report.notes
    return found


def four_ranks(rank: int, save: Save) -> None:
    """Two images at once, by two ranks each."""
    on_the_cpu()
    mesh = dist.init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("image", "ring", "ulysses"))
    pipe = Pipeline()
    parallel(pipe, mesh, ulysses_degree=2)
    save("drawn", drawn(pipe, rank // 2))


def four_together(rank: int, save: Save) -> None:
    """One image by four ranks."""
    on_the_cpu()
    save("alone", drawn(Pipeline(), 0))
    for name, degrees in {"ring": {"ring_degree": 4}, "both": {"ring_degree": 2, "ulysses_degree": 2}}.items():
        pipe = Pipeline()
        parallel(pipe, **degrees)
        save(name, drawn(pipe, 0))
    save("FSDP", drawn(fully_sharded(), rank))


LONG = pytest.mark.skipif("STEPCACHE_LONG" not in os.environ, reason="under torchrun: STEPCACHE_LONG=1")


@pytest.fixture(scope="module", params=["spawned", pytest.param("torchrun", marks=LONG)])
def two(request, tmp_path_factory):
    start = together if request.param == "spawned" else under_torchrun
    return start(2, two_ranks, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("way", ["attach", "callback"])
@pytest.mark.parametrize("parallelism", ["ulysses", "ring"])
def test_context_parallelism_draws_the_image_of_one_process(two, parallelism, way):
    alone, both = (
        two[0]["alone 0" if way == "attach" else "alone callback"],
        [rank[f"{parallelism} {way}"] for rank in two],
    )
    assert both[0]["decisions"] == both[1]["decisions"]
    assert both[0]["calls"] == both[1]["calls"] < STEPS
    for rank in both:
        assert "decides together with ranks 0, 1" in rank["notes"]
        torch.testing.assert_close(torch.tensor(rank["image"]), torch.tensor(alone["image"]), rtol=1e-3, atol=1e-3)


def test_ranks_of_a_sharded_denoiser_decide_alike_though_they_draw_other_images(two):
    assert two[0]["alone 0"]["decisions"] != two[0]["alone 1"]["decisions"]
    assert two[0]["FSDP"]["decisions"] == two[1]["FSDP"]["decisions"]
    assert two[0]["FSDP"]["calls"] == two[1]["FSDP"]["calls"] < STEPS
    assert two[0]["FSDP"]["image"] != two[1]["FSDP"]["image"]


def test_a_callback_with_a_group_can_be_copied_and_pickled(two):
    for rank in two:
        assert "decides together with the other ranks of group=" in rank["copies"]["copy"]
        assert DROPPED in rank["copies"]["pickle"]


@LONG
def test_four_ranks_under_torchrun_draw_the_image_of_one_process(tmp_path):
    four = under_torchrun(4, four_together, tmp_path)
    alone = four[0]["alone"]
    for way in ("ring", "both"):
        for rank in four:
            assert rank[way]["decisions"] == four[0][way]["decisions"]
            assert rank[way]["calls"] < STEPS
            image, expected = torch.tensor(rank[way]["image"]), torch.tensor(alone["image"])
            torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-3)
    assert len({rank["FSDP"]["decisions"] for rank in four}) == 1
    assert four[0]["FSDP"]["calls"] < STEPS


def test_ranks_that_draw_other_images_stay_independent(two, tmp_path):
    four = together(4, four_ranks, tmp_path)
    found = [rank["drawn"] for rank in four]
    for seed, pair in enumerate((found[:2], found[2:])):
        for rank in pair:
            assert rank["decisions"] == two[0][f"alone {seed}"]["decisions"]
            assert f"decides together with ranks {2 * seed}, {2 * seed + 1}" in rank["notes"]
    assert found[0]["decisions"] != found[2]["decisions"]


def test_the_mesh_of_tensor_parallelism_is_found(monkeypatch):
    """diffusers refuses it on a CPU, so that only where its mesh is kept can be looked at."""
    groups: list[Callable] = [object(), object()]
    mesh = SimpleNamespace(get_all_groups=lambda: groups)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1] if group is groups[0] else [0])
    module = nn.Linear(1, 1)
    module._parallel_config = SimpleNamespace(tensor_parallel_config=SimpleNamespace(_mesh=mesh))
    assert parallel_groups(module) == groups[:1]
    assert diffusers.TensorParallelConfig(2)._mesh is None
