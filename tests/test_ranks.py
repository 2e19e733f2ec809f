"""Ranks that call one model together take the same decisions, and a rank that fails leaves nobody waiting."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import time
import traceback
from datetime import timedelta

import pytest
import torch
from several_ranks import Save, together, under_torchrun
from torch import Tensor, nn
from torch import distributed as dist

from stepcache import OptionError, Static, UCache
from stepcache.extend import groups_of
from stepcache.ranks import DROPPED, OTHER_RUN, Ranks
from stepcache.samplers.k_diffusion import CachedDenoiser

SIGMAS = torch.linspace(10, 0, 15)
METHOD = UCache(0.25, start=0)
"""At this threshold the seeds 0 and 1 skip other evaluations."""

LONG = pytest.mark.skipif("STEPCACHE_LONG" not in os.environ, reason="under torchrun: STEPCACHE_LONG=1")
needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


class Denoiser(nn.Module):
    """eps = W2 tanh(W1 x), the same weights in every process."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        self.requires_grad_(False)
        self.calls = 0

    def eps(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        level = sigma.view(-1, 1)
        return x - level * self.eps(x / (1 + level**2).sqrt())


class SplitByHand(Denoiser):
    """Each rank has its part of the latents, and the parts look at each other: who calls it waits for the other."""

    def eps(self, x: Tensor) -> Tensor:
        everywhere = x.clone()
        dist.all_reduce(everywhere)
        return self.inner(x) + 0.1 * torch.tanh(everywhere - x)


def start(seed: int) -> Tensor:
    return 10 * torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))


def sampled(model: CachedDenoiser, x: Tensor) -> Tensor:
    with torch.no_grad(), model.run(SIGMAS, 1):
        for sigma, following in itertools.pairwise(SIGMAS):
            x = x + (x - model(x, sigma.expand(len(x)))) / sigma * (following - sigma)
    return x


def decisions(network: nn.Module, seed: int, **options) -> str:
    model = CachedDenoiser(network, METHOD, scalings="eps", **options)
    sampled(model, start(seed))
    return model.report.decisions("guided")


# What two ranks do.


def two_ranks(rank: int, save: Save) -> None:
    save("alone", decisions(Denoiser(), rank))
    save("split by hand", decisions(SplitByHand(), rank, group=dist.group.WORLD))
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("both",))
    save("a mesh", decisions(SplitByHand(), rank, group=mesh))
    save("FSDP", decisions(fully_sharded(), rank))
    save("FSDP 1", decisions(sharded_by_wrapping(), rank))
    save("tensor parallel", decisions(tensor_parallel(mesh), rank))
    image = sampled(CachedDenoiser(fully_sharded(), METHOD, scalings="eps"), start(0))
    save("as in one process", torch.equal(image, sampled(CachedDenoiser(Denoiser(), METHOD, scalings="eps"), start(0))))
    save("copies", copies())
    save("runs at once", at_once(rank))
    save("runs in another order", error_of(lambda: in_another_order(rank)))
    save("another number of steps", error_of(lambda: other_steps(rank)))
    save("a rank fails", failing(rank))
    save("a rank is gone", None)
    if rank == 1:
        os._exit(0)
    save("a rank is gone", error_of(lambda: decisions(Denoiser(), 0, group=dist.group.WORLD)))


def fully_sharded() -> nn.Module:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # before torch 2.6 it needs a GPU
        return sharded_by_wrapping()

    network = Denoiser()
    for layer in network.inner:
        fully_shard(layer)
    return fully_shard(network)


def sharded_by_wrapping() -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(Denoiser(), device_id=torch.device("cpu"))


def tensor_parallel(mesh) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    network = Denoiser()
    parallelize_module(network.inner, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return network


def copies() -> dict[str, list[str]]:
    model = CachedDenoiser(Denoiser(), METHOD, scalings="eps", group=dist.group.WORLD)
    notes = {}
    for name, other in {"copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}.items():
        sampled(other, start(0))
        notes[name] = other.report.notes
    return notes


def error_of(act) -> str:
    try:
        act()
    except RuntimeError as error:
        return str(error)
    return "none"


def at_once(rank: int) -> list[str]:
    """Two runs, step by step in turn; then each of them alone."""
    model = CachedDenoiser(Denoiser(), METHOD, scalings="eps", group=dist.group.WORLD)
    with torch.no_grad(), model.run(SIGMAS, 1) as one, model.run(SIGMAS, 1) as two:
        xs = {one: start(rank), two: start(0)}
        for sigma, following in itertools.pairwise(SIGMAS):
            for run, x in xs.items():
                xs[run] = x + (x - run(x, sigma.expand(len(x)))) / sigma * (following - sigma)
    found = [run.report.decisions("guided") for run in xs]
    for x in (start(rank), start(0)):
        sampled(model, x)
        found.append(model.report.decisions("guided"))
    return found


def in_another_order(rank: int) -> None:
    """Rank 1 calls the second run first. Without the check each run would take the other's decisions for its own."""
    model = CachedDenoiser(Denoiser(), METHOD, scalings="eps", group=dist.group.WORLD)
    with torch.no_grad(), model.run(SIGMAS, 1) as one, model.run(SIGMAS, 1) as two:
        for sigma in SIGMAS[:-1]:
            for run in (two, one) if rank else (one, two):
                run(start(0), sigma.expand(2))


def other_steps(rank: int) -> None:
    """Rank 1 broke off its run at the fifth step and begins again; rank 0 goes on."""
    model = CachedDenoiser(Denoiser(), METHOD, scalings="eps", sigmas=SIGMAS, group=dist.group.WORLD)
    with torch.no_grad():
        for sigma in SIGMAS[:5]:
            model(start(0), sigma.expand(2))
        for sigma in SIGMAS[:6] if rank else SIGMAS[5:11]:
            model(start(0), sigma.expand(2))


def failing(rank: int) -> dict[str, object]:
    """Rank 1 fails in evaluation 6 and does not go on; rank 0 waits for it at the next one, two seconds."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    network = Denoiser()

    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        if rank == 1 and network.calls > 5:
            raise MemoryError("out of memory")
        return network(x, sigma)

    began = time.monotonic()
    try:
        sampled(CachedDenoiser(broken, UCache(1e-9, start=0), scalings="eps", group=group), start(0))
    except (RuntimeError, MemoryError) as error:
        text = "".join(traceback.format_exception(error))
        dist.barrier()
        return {"error": str(error), "type": type(error).__name__, "seconds": time.monotonic() - began, "text": text}
    return {}


def four_ranks(rank: int, save: Save) -> None:
    """A model that four ranks call together, and two that two ranks each do."""
    save("alone", decisions(Denoiser(), rank))
    save("split by hand", decisions(SplitByHand(), rank, group=dist.group.WORLD))
    save("FSDP", decisions(fully_sharded(), rank))
    save("FSDP 1", decisions(sharded_by_wrapping(), rank))
    save("tensor parallel", decisions(tensor_parallel(dist.init_device_mesh("cpu", (4,))), rank))
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("image", "shard"))
    save("pairs", decisions(tensor_parallel(mesh["shard"]), rank))
    save("a rank fails", failing(rank))


@pytest.fixture(scope="module", params=["spawned", pytest.param("torchrun", marks=LONG)])
def ranks(request, tmp_path_factory) -> list[dict]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    start = together if request.param == "spawned" else under_torchrun
    return start(2, two_ranks, tmp_path_factory.mktemp("ranks"))


def test_without_a_group_ranks_with_other_latents_decide_otherwise(ranks):
    assert ranks[0]["alone"] != ranks[1]["alone"]


@pytest.mark.parametrize("way", ["split by hand", "a mesh", "FSDP", "FSDP 1", "tensor parallel"])
def test_ranks_that_call_one_model_together_skip_if_both_would(ranks, way):
    """Given as a group or a mesh if the model is split by hand, and found in the model if torch has split it."""
    assert ranks[0][way] == ranks[1][way]
    assert "S" in ranks[0][way]


def test_a_sharded_model_gives_the_image_of_one_process(ranks):
    assert ranks[0]["as in one process"]


def test_a_copy_keeps_the_group_and_a_pickled_one_says_that_it_has_none(ranks):
    for rank in ranks:
        assert "decides together with the other ranks of group=" in rank["copies"]["copy"]
        assert DROPPED in rank["copies"]["pickle"]


def test_ranks_at_different_evaluations_are_told_so(ranks):
    for rank in ranks:
        assert rank["another number of steps"].startswith("the ranks are at different evaluations (")


def test_runs_at_once_in_the_same_order_agree_each_for_itself(ranks):
    one, two, *alone = ranks[0]["runs at once"]
    assert [one, two] == alone
    assert one != two
    assert ranks[1]["runs at once"] == ranks[0]["runs at once"]


def test_runs_at_once_in_another_order_are_told_so(ranks):
    for rank in ranks:
        assert rank["runs in another order"] == OTHER_RUN


def test_if_one_rank_fails_the_other_ends_within_the_timeout_with_a_clear_error(ranks):
    assert ranks[1]["a rank fails"]["type"] == "MemoryError"
    left = ranks[0]["a rank fails"]
    assert "could not agree on evaluation 7: another rank has failed" in left["error"]
    assert left["seconds"] < 20


def test_if_one_process_is_gone_the_other_ends_with_a_clear_error(ranks):
    assert "another rank has failed, has stopped" in ranks[0]["a rank is gone"]


@LONG
@needs_gloo
def test_four_ranks_under_torchrun_skip_if_all_four_would(tmp_path):
    """And the two pairs of a mesh each for itself."""
    four = under_torchrun(4, four_ranks, tmp_path)
    assert len({rank["alone"] for rank in four}) > 1
    for way in ("split by hand", "FSDP", "FSDP 1", "tensor parallel"):
        assert len({rank[way] for rank in four}) == 1
        assert "S" in four[0][way]
    assert four[0]["pairs"] == four[1]["pairs"]
    assert four[2]["pairs"] == four[3]["pairs"]
    for rank in four:
        found = rank["a rank fails"]
        assert found["type"] == ("RuntimeError" if rank is not four[1] else "MemoryError")
        assert found["seconds"] < 20


# In one process.


@pytest.fixture
def world(monkeypatch):
    """A group of one rank, and a list of what it was asked."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    asked = []
    monkeypatch.setattr(dist, "all_reduce", lambda flags, op, group: asked.append(flags.tolist()))
    yield dist.group.WORLD, asked
    dist.destroy_process_group()


def test_nothing_is_exchanged_at_evaluations_that_a_gate_computes(world):
    group, asked = world
    model = CachedDenoiser(Denoiser(), Static("11101101101111"), scalings="eps", group=group)
    sampled(model, start(0))
    assert model.report.decisions("guided") == "CCCSCCSCCSCCCC"
    assert [evaluation for _, evaluation, *_ in asked] == [3, 6, 9]


def test_off_and_a_model_in_one_piece_ask_nobody(world):
    _, asked = world
    for method, group in ((None, world[0]), (METHOD, None), (METHOD, False)):
        sampled(CachedDenoiser(Denoiser(), method, scalings="eps", group=group), start(0))
    assert asked == []
    assert groups_of(Denoiser()) == []


def test_a_group_that_is_none_is_refused(world):
    for wrong in ("nccl", 3, [world[0], "gloo"], dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(OptionError, match=r"^group=.*accepted are a process group of torch.distributed"):
            CachedDenoiser(Denoiser(), METHOD, group=wrong)


def test_a_group_before_torch_distributed_begins_is_refused():
    with pytest.raises(OptionError, match=r"torch\.distributed has not been initialized"):
        Ranks("gloo")
