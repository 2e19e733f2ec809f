"""Examples in docstrings and in README.md run as they are printed."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from package import ROOT, modules
from tiny_pipelines import PIPELINES
from torch import Tensor
from toys import twice

import stepcache
from stepcache import METHODS
from stepcache.samplers.k_diffusion import CachedDenoiser

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def examples() -> Iterator[doctest.DocTest]:
    """Of every module and of what it defines; an example sees its module's names, as in doctest.

    doctest passes over functions inside a decorator, as methods are, so what a module defines is passed one by one.
    """
    finder = doctest.DocTestFinder()
    for name, path in modules().items():
        if ">>> " in path.read_text(encoding="utf-8"):
            module = import_module(name)
            yield from finder.find(module.__doc__ or "", name, globs=dict(vars(module)))
            for key, value in vars(module).items():
                if getattr(value, "__module__", None) == name and getattr(value, "__name__", None) == key:
                    yield from finder.find(value, f"{name}.{key}", module=False, globs=dict(vars(module)))


EXAMPLES = {test.name: test for test in examples() if test.examples}


@pytest.fixture
def registered(monkeypatch):
    """What an example registers is gone afterwards."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_a_docstring_runs_as_it_is_printed(name):
    assert doctest.DocTestRunner().run(EXAMPLES[name]).failed == 0


def test_every_line_of_an_example_is_found():
    printed = sum(path.read_text(encoding="utf-8").count(">>> ") for path in modules().values())
    assert sum(len(test.examples) for test in EXAMPLES.values()) == printed > 20


class MyGuidance:
    """Classifier-free guidance with both branches in one call."""

    def __init__(self, model: CachedDenoiser) -> None:
        self.model = model

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        uncond, cond = self.model(torch.cat([x, x]), torch.cat([sigma, sigma]), **extra).chunk(2)
        return uncond + 3 * (cond - uncond)


@pytest.fixture
def pipe():
    """A tiny Stable Diffusion whose text encoder answers every prompt alike."""
    tiny = PIPELINES["sd"]
    made = tiny.build()
    inputs = tiny.call(made)
    made.encode_prompt = lambda *args, **kwargs: (inputs["prompt_embeds"], inputs["negative_prompt_embeds"])
    return made


def test_the_readmes_python_runs(pipe):
    """Its blocks in their order, in one namespace. The names that it leaves to the reader are toys here."""
    names = {
        "stepcache": stepcache,
        "model": twice,
        "MyGuidance": MyGuidance,
        "x": torch.ones(1, 4, 8, 8),
        "sigmas": torch.linspace(10, 0, 11),
        "extra_args": {},
        "pipe": pipe,
        "prompt": "a lighthouse",
    }
    assert BLOCKS
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
        if cache := names.pop("cache", None):
            assert cache.report.calls < cache.report.evaluations * 2
        if (cached := names.pop("cached", None)) is not None:
            assert cached.report.decisions(cached.report.branches[0]).count("S") > 0
