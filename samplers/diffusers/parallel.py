"""The ranks that call a denoiser together."""

from __future__ import annotations

from typing import Any

from torch import nn

from stepcache.extend import groups_of, groups_of_mesh


def parallel_groups(module: nn.Module) -> list[Any]:
    """The groups whose ranks share one call of a denoiser: `enable_parallelism`, FSDP, or sharded weights.

    Ranks beside that mesh, which make other images, are not among them.
    """
    denoiser = getattr(module, "_orig_mod", module)
    config: Any = getattr(denoiser, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    tensor = getattr(config, "tensor_parallel_config", None)
    meshes = [getattr(context, "_flattened_mesh", None), getattr(tensor, "_mesh", None)]
    found = [group for mesh in meshes if mesh is not None for group in groups_of_mesh(mesh)]
    return [*found, *groups_of(denoiser)]
