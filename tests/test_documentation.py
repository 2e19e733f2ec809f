"""Examples in docstrings, in README.md and in docs/ run as they are printed."""

from __future__ import annotations

import argparse
import doctest
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import pytest
import torch
from package import ROOT, modules
from tiny_pipelines import PIPELINES
from torch import Tensor
from toys import twice

import stepcache
from stepcache import METHODS
from stepcache.bench import KDiffusion
from stepcache.cli import main
from stepcache.extend import Profile
from stepcache.samplers.k_diffusion import CachedDenoiser

PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, without the indentation that they have in a list."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


SMALLER = {
    'device="cuda"': 'device="cpu"',
    "steps=[30], samples=64, batch=4": "steps=[8], samples=1, others=[], methods={'ucache': stepcache.UCache()}",
}
"""What is too large for a test, and the small thing that is run in its place."""


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
                if isinstance(value, (TypeVar, ParamSpec)):  # from Python 3.13 on their docstrings have examples
                    continue
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


@pytest.mark.parametrize("name", [name for name in stepcache.__all__ if callable(getattr(stepcache, name))])
def test_every_public_name_has_an_example(name):
    assert ">>> " in (inspect.getdoc(getattr(stepcache, name)) or "")


class MyGuidance:
    """Classifier-free guidance with both branches in one call."""

    def __init__(self, model: CachedDenoiser) -> None:
        self.model = model

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        uncond, cond = self.model(torch.cat([x, x]), torch.cat([sigma, sigma]), **extra).chunk(2)
        return uncond + 3 * (cond - uncond)


@pytest.fixture
def pipe():
    """A tiny Stable Diffusion whose text encoder answers every prompt alike, with the scheduler of the pages."""
    tiny = PIPELINES["sd"]
    made = tiny.build()
    made.scheduler = import_module("diffusers").EulerDiscreteScheduler.from_config(made.scheduler.config)
    inputs = tiny.call(made)
    made.encode_prompt = lambda *args, **kwargs: (inputs["prompt_embeds"], inputs["negative_prompt_embeds"])
    return made


def towards_zero(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
    """The exact denoiser of data that is normally distributed."""
    return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)


@pytest.fixture
def names(pipe):
    """What the pages leave to the reader: his model, latents, schedule and pipeline. Here they are small."""
    return {
        "stepcache": stepcache,
        "model": twice,
        "MyGuidance": MyGuidance,
        "x": torch.ones(1, 4, 8, 8),
        "sigmas": torch.linspace(10, 0, 11),
        "extra_args": {},
        "pipe": pipe,
        "prompt": "a lighthouse",
        "net": lambda x, t: x * (1 - t),
        "times": torch.linspace(1, 0, 11),
        "subject": KDiffusion("toy", towards_zero, (1, 8, 8), lambda n: torch.linspace(10, 0, n + 1), limit=None),
    }


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page, names, tmp_path, monkeypatch):
    """Its blocks in their order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        exec(compile(block, page, "exec"), names)
        if cache := names.pop("cache", None):
            assert cache.report.calls < cache.report.evaluations * 2
        if (cached := names.pop("cached", None)) is not None and cached.report.events:
            assert cached.report.decisions(cached.report.branches[0]).count("S") > 0
        if (engine := names.pop("engine", None)) is not None:
            assert engine.report.skipped > 0


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every call of `stepcache` in a block of a shell: the page and the arguments."""
    for page in PAGES:
        for block in blocks(page, "(?:bash|sh|console)"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "stepcache" in words and words[0] in ("stepcache", "python"):
                    yield page, words[words.index("stepcache") + 1 :]


class Parsed(Exception):
    """The arguments were accepted."""


FOUND = {"magcache": {"calibrate": True}, "profile": {"path": Profile((1, 1), {})}}
"""What `stepcache tune` finds by itself."""


@pytest.mark.parametrize(("page", "arguments"), [*commands()])
def test_a_command_of_a_page_is_accepted(page, arguments, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, given: list[str] | None = None, space: Any = None) -> None:
        named = getattr(parse(parser, given, space), "method", None) or ()
        for text in [named] if isinstance(named, str) else named:
            name, _, options = text.partition(":")
            stepcache.method(name, options, **FOUND.get(name, {}))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        main(arguments)
