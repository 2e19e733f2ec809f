"""Runs a function in several processes that are the ranks of one gloo group."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

Save = Callable[[str, Any], None]


def together(count: int, work: Callable[[int, Save], None], folder: Path) -> list[dict[str, Any]]:
    """What each rank has saved: `work(rank, save)` is called in `count` processes."""
    torch.multiprocessing.spawn(_one, args=(count, work, str(folder)), nprocs=count)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


def _one(rank: int, count: int, work: Callable[[int, Save], None], folder: str) -> None:
    torch.set_num_threads(1)
    saved: dict[str, Any] = {}

    def save(name: str, value: Any) -> None:
        saved[name] = value
        Path(folder, f"{rank}.json").write_text(json.dumps(saved), encoding="utf-8")

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    try:
        work(rank, save)
    finally:
        torch.distributed.destroy_process_group()
