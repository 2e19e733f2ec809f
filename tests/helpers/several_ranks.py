"""Runs a function in several processes that are the ranks of one gloo group, by themselves or under torchrun."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import ProcessExitedException

TIMEOUT = timedelta(seconds=60)
Save = Callable[[str, Any], None]


def together(count: int, work: Callable[[int, Save], None], folder: Path) -> list[dict[str, Any]]:
    """What each rank has saved: `work(rank, save)` is called in `count` processes.

    gloo sometimes aborts a process of a busy machine at start or exit. Such a start is made once more. An exception
    of `work` is not: it is raised here.
    """
    try:
        _spawn(count, work, folder / "first")
        folder = folder / "first"
    except ProcessExitedException as abort:
        warnings.warn(f"started again, because of: {abort}", stacklevel=2)
        folder = folder / "second"
        _spawn(count, work, folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


def under_torchrun(count: int, work: Callable[[int, Save], None], folder: Path) -> list[dict[str, Any]]:
    """The same, with the processes started by torchrun. `work` is a function of a module."""
    module = sys.modules[work.__module__]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
    command += [str(module.__file__), work.__name__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


def _spawn(count: int, work: Callable[[int, Save], None], folder: Path) -> None:
    folder.mkdir()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the parent keeps it until all have left
    torch.multiprocessing.spawn(_one, args=(count, store.port, work, str(folder)), nprocs=count)


def _one(rank: int, count: int, port: int, work: Callable[[int, Save], None], folder: str) -> None:
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    _work(rank, work, folder)


def _work(rank: int, work: Callable[[int, Save], None], folder: str) -> None:
    torch.set_num_threads(1)
    saved: dict[str, Any] = {}

    def save(name: str, value: Any) -> None:
        saved[name] = value
        Path(folder, f"{rank}.json").write_text(json.dumps(saved), encoding="utf-8")

    try:
        work(rank, save)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    file, function, target = sys.argv[1:]
    sys.path[:0] = [str(Path(file).parent), str(Path(__file__).parent)]
    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    _work(torch.distributed.get_rank(), getattr(importlib.import_module(Path(file).stem), function), target)
