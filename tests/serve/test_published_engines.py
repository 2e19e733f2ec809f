"""The doubles of tests/helpers/serving_engines.py beside the published vLLM-Omni and SGLang.

Both engines need an accelerator to be imported, so their source is read. Skipped if they are not installed; for this
test `pip install --no-deps vllm-omni sglang` is enough."""

from __future__ import annotations

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import serving_engines
from package import ROOT

from stepcache.samplers import sglang, vllm_omni

DOUBLES = ast.parse(inspect.getsource(serving_engines))
RUNTIME = "multimodal_gen/runtime"
STAGE = f"{RUNTIME}/pipelines_core/stages/denoising.py"


def published(engine, file):
    """The syntax tree of one of the engine's files. Nothing of the engine is imported."""
    spec = find_spec(engine)
    if spec is None or spec.origin is None:
        pytest.skip(f"{engine} is not installed")
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))


def definition(tree, name):
    """A function or class, or a method by `Class.method`."""
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


def signature(function):
    """Kind, name and default of every argument, and the decorators; types are left out."""
    given = function.args
    places = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(places) - len(given.defaults)) + given.defaults
    every = [("position", one, default) for one, default in zip(places, defaults, strict=True)]
    every += [("keyword", *pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    every += [("rest", one, None) for one in (given.vararg, given.kwarg) if one is not None]
    arguments = [(kind, one.arg, default and ast.unparse(default)) for kind, one, default in every]
    return arguments, [ast.unparse(one) for one in function.decorator_list]


def fields(tree, name):
    """The annotated fields of a class with their defaults."""
    body = definition(tree, name).body
    return {one.target.id: one.value and ast.unparse(one.value) for one in body if isinstance(one, ast.AnnAssign)}


@pytest.mark.parametrize(
    ("engine", "file", "name"),
    [
        ("vllm_omni", "diffusion/cache/base.py", "CacheBackend.__init__"),
        ("vllm_omni", "diffusion/cache/base.py", "CacheBackend.enable"),
        ("vllm_omni", "diffusion/cache/base.py", "CacheBackend.refresh"),
        ("vllm_omni", "diffusion/cache/base.py", "CacheBackend.is_enabled"),
        ("vllm_omni", "diffusion/cache/selector.py", "get_cache_backend"),
        ("sglang", "srt/plugins/hook_registry.py", "HookRegistry.register"),
        ("sglang", "srt/plugins/hook_registry.py", "HookRegistry.apply_hooks"),
        ("sglang", STAGE, "DenoisingStage._run_denoising_loop"),
    ],
)
def test_a_double_has_the_published_signature(engine, file, name):
    assert signature(definition(DOUBLES, name)) == signature(definition(published(engine, file), name))


def test_vllm_omni_asks_a_backend_for_no_more_than_the_double_does():
    base = definition(published("vllm_omni", "diffusion/cache/base.py"), "CacheBackend")
    methods = {one.name for one in base.body if isinstance(one, ast.FunctionDef)}
    assert methods - {"__repr__"} == {"__init__", "enable", "refresh", "is_enabled"}


def test_vllm_omni_keeps_unknown_options_where_they_are_read():
    theirs = fields(published("vllm_omni", "diffusion/data.py"), "DiffusionCacheConfig")
    ours = fields(DOUBLES, "DiffusionCacheConfig")
    assert theirs["_extra_params"].startswith("field(default_factory=dict")
    del ours["_extra_params"]
    assert {name: theirs.get(name, "missing") for name in ours} == ours


def test_vllm_omni_has_no_backend_of_this_name():
    names = [one.value for one in ast.walk(published("vllm_omni", "diffusion/cache/selector.py")) if is_text(one)]
    assert "step_cache" in names
    assert vllm_omni.NAME not in names


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize(
    ("engine", "file", "names"),
    [
        ("vllm_omni", "diffusion/distributed/parallel_state.py", ("get_sp_group", "get_cfg_group", "get_pp_group")),
        ("sglang", f"{RUNTIME}/distributed/parallel_state.py", ("get_sp_group", "get_tp_group", "get_cfg_group")),
    ],
)
def test_the_groups_of_ranks_are_asked_for_by_the_published_names(engine, file, names):
    tree = published(engine, file)
    for name in names:
        assert signature(definition(tree, name)) == ([], [])


def test_sglangs_stage_and_context_have_what_the_plug_in_reads():
    tree = published("sglang", STAGE)
    assert {"scheduler", "timesteps", "latents", "is_warmup"} <= fields(tree, "DenoisingContext").keys()
    made = {ast.unparse(one) for one in ast.walk(definition(tree, "DenoisingStage.__init__"))}
    assert {"self.transformer", "self.transformer_2", "self.scheduler"} <= made
    assert "self.server_args" in {ast.unparse(one) for one in ast.walk(definition(tree, "DenoisingStage"))}
    arguments = published("sglang", f"{RUNTIME}/server_args/server_args.py")
    assert "enable_breakable_cuda_graph" in fields(arguments, "ServerArgs")
    stage = STAGE.removesuffix(".py").replace("/", ".")
    assert f"sglang.{stage}.DenoisingStage._run_denoising_loop" == sglang.TARGET


def test_sglang_has_the_doubles_types_of_hooks():
    kinds = definition(published("sglang", "srt/plugins/hook_registry.py"), "HookType")
    assert {ast.unparse(one) for one in kinds.body if isinstance(one, ast.Assign)} == {
        ast.unparse(one) for one in definition(DOUBLES, "HookType").body
    }


@pytest.mark.parametrize(
    ("engine", "file"), [("vllm_omni", "plugins/__init__.py"), ("sglang", f"{RUNTIME}/platforms/plugins.py")]
)
def test_the_entry_points_are_in_a_group_that_the_engine_loads(engine, file):
    groups = {one.value for one in ast.walk(published(engine, file)) if is_text(one) and "plugins" in one.value}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert any(f'[project.entry-points."{group}"]' in project for group in groups)
