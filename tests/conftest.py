"""What all tests share: the cores, a way to run an example, the record of a run, and that the root is no package."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import versions
from hypothesis import settings
from package import EXAMPLES

settings.register_profile("same examples in every run", derandomize=True)
settings.load_profile("same examples in every run")

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # torch takes all cores for each worker otherwise
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


class RootIsNoPackage:
    """The root has an `__init__.py`, for ComfyUI. pytest would import it as a package with the name of the folder."""

    @staticmethod
    @pytest.hookimpl
    def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == EXAMPLES.parent else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsNoPackage())


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs a script of examples/ with a command line, in this process: importing its packages anew takes longest."""
    import torch

    threads = torch.get_num_threads()

    def run(name: str, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *options])
        monkeypatch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    yield run
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if folder := os.environ.get("STEPCACHE_RECORD"):
        path = versions.write(versions.record(config, terminalreporter.stats), Path(folder))
        terminalreporter.write_line(f"Recorded in {path}")
