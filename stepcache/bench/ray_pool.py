"""Work that Ray spreads over processes, GPUs and machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stepcache._optional import require
from stepcache.options import OptionError


def search_path() -> dict[str, str]:
    """The environment by which a worker imports what this process can: its modules are sent by name."""
    return {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


@contextmanager
def ray_pool(worker: type, workers: int, device: torch.device | str, *arguments: Any) -> Iterator[Any]:
    """`ray.util.ActorPool` of so many instances of a class, each in a process of its own.

    Ray is started on this machine, unless it runs here already or RAY_ADDRESS names a cluster; what was started is shut
    down at the end.

    Args:
        worker: the class.
        workers: how many. Each gets a GPU of its own if `device` is one, else a CPU.
        arguments: of the class. They are sent once.

    Raises OptionError if Ray has fewer GPUs or CPUs.
    """
    ray, util = require("ray", "ray"), require("ray.util", "ray")
    started = not ray.is_initialized()
    if started:
        environment = {"env_vars": search_path()}
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    try:
        kind = "GPU" if torch.device(device).type == "cuda" else "CPU"
        there = ray.cluster_resources().get(kind, 0)
        if there < workers:
            raise OptionError(f"workers={workers}: Ray has {there:g} {kind}s, and each worker needs one")
        actor = ray.remote(num_cpus=int(kind == "CPU"), num_gpus=int(kind == "GPU"))(worker)
        sent = [ray.put(argument) for argument in arguments]
        yield util.ActorPool([actor.remote(*sent) for _ in range(workers)])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        if started:
            ray.shutdown()
