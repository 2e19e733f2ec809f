"""Who imports whom: arrows point down only, the core knows no host, and a plain copy works without installation."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from package import FOLDERS, ROOT, modules

import stepcache

LAYERS = """
_optional _version options
parametrization clock deferred masks offload plan call caller noise probe ranks
run_info
fingerprint
calibrated
profile settings
branch
event
trace
report
gates.base criteria.base predictors.base
gates.* criteria.* predictors.*
gates criteria predictors
methods.base
methods.registry
methods.*
methods
run
runs planner
samples
engine
compat.*
compat
extend experimental
stepcache
samplers samplers.*
bench bench.*
demo demo.*
tuning tuning.*
cli __main__
"""
"""Lowest first. A module imports from lower lines, and from its own line if that makes no circle."""

SHORTCUTS = {
    ("stepcache", "samplers"): "stepcache.attach, imported when it is first asked for",
    ("stepcache", "tuning"): "stepcache.tune, imported when it is first asked for",
}
"""Imports upward that are allowed."""

HOSTS = re.compile(r"diffusers|comfy|a1111|automatic1111|\bforge\b|web_?ui", re.IGNORECASE)

PUBLIC = ("stepcache.extend", "stepcache.experimental", "stepcache.cli")
PARTS = ("stepcache.bench", "stepcache.demo", "stepcache.samplers", "stepcache.tuning")


MODULES = modules()


def imports(path: Path, name: str = "") -> Iterator[tuple[str, str]]:
    """Each import as (module, attribute), at any depth of the file; relative ones from the module called `name`.

    `CommonOptions`, which methods import for type checkers alone, is left out.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names if alias.name != "CommonOptions")


def short(name: str) -> str:
    return name.removeprefix("stepcache.")


def graph() -> dict[str, set[str]]:
    """Of each module the modules of this package that it imports."""
    found = {}
    for name, path in MODULES.items():
        wanted = [(f"{module}.{attribute}", module) for module, attribute in imports(path, name)]
        chosen = (next((one for one in pair if one in MODULES), None) for pair in wanted)
        found[short(name)] = {short(one) for one in chosen if one and one != name}
    return found


def layer(name: str) -> int:
    """The line of `LAYERS` that names a module, in full or else by its folder."""
    lines = [line.split() for line in LAYERS.strip().splitlines()]
    exact = [number for number, line in enumerate(lines) if name in line]
    folder = [number for number, line in enumerate(lines) if any(fnmatchcase(name, pattern) for pattern in line)]
    assert exact or folder, f"no line of LAYERS names {name}"
    return (exact or folder)[0]


GRAPH = graph()


@pytest.mark.parametrize("name", GRAPH)
def test_no_module_imports_upward(name):
    for other in GRAPH[name]:
        assert layer(other) <= layer(name) or (name, other) in SHORTCUTS, f"{name} imports {other}"


def test_no_imports_go_in_a_circle():
    below = {name: {other for other in others if (name, other) not in SHORTCUTS} for name, others in GRAPH.items()}
    assert set(TopologicalSorter(below).static_order()) == {*GRAPH}


def test_the_shortcuts_are_used():
    for name, other in SHORTCUTS:
        assert other in GRAPH[name]


class WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | ast.Pass:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if is_text else node


@pytest.mark.parametrize("path", sorted((ROOT / "stepcache").rglob("*.py")), ids=lambda path: path.stem)
def test_the_core_names_no_host_in_code(path):
    """Docstrings and comments may name one as the source of a rule; code, error texts and imports do not."""
    if path.name != "cli.py":
        code = ast.unparse(WithoutDocstrings().visit(ast.parse(path.read_text(encoding="utf-8"))))
        assert HOSTS.findall(code) == []


def outside() -> list[Path]:
    """The adapters and what is built on them."""
    folders = ("samplers", "examples", "benchmarks", "scripts")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", outside(), ids=lambda path: str(path.relative_to(ROOT)))
def test_outside_of_the_core_only_its_public_names_are_imported(path):
    """`stepcache` has the names for users and `stepcache.extend` those for authors."""
    name = {path: name for name, path in MODULES.items()}.get(path, path.stem)
    for module, attribute in imports(path, name):
        if module.partition(".")[0] != "stepcache" or module.startswith(PARTS):
            continue
        full = f"{module}.{attribute}"
        if module == "stepcache":
            known = attribute in ("", "__version__", *stepcache.__all__) or full in (*PUBLIC, *PARTS)
            assert known, f"{full} is none of the names for users"
        else:
            assert module in PUBLIC, f"{module} is the core's own"


ALONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch
before = {name.partition(".")[0] for name in sys.modules}
from importlib import import_module
for name in NAMES:
    path = import_module(name).__file__
    assert path.startswith(COPY), path
new = {name.partition(".")[0] for name in sys.modules} - before - sys.stdlib_module_names
print(sorted(new))
"""


def test_a_plain_copy_is_imported_without_installation_and_needs_torch_alone(tmp_path):
    """Every module of the core and every adapter: hosts and optional packages are imported when they are needed."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    names = [name for name in MODULES if not name.startswith("stepcache.demo.") and not name.endswith("__main__")]
    code = f"NAMES, COPY = {names!r}, {str(tmp_path)!r}\n{ALONE}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "['stepcache']\n"
