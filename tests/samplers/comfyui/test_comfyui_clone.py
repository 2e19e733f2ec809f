"""A clone of the repository in custom_nodes/: the folder is the custom node, nothing is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from package import ROOT

from stepcache import __version__
from stepcache.cli import main
from stepcache.samplers.comfyui import NODE_CLASS_MAPPINGS

IN_THE_CLONE = ("__init__.py", "pyproject.toml", "stepcache", "samplers")
WITHOUT_CACHES = shutil.ignore_patterns("__pycache__")

ALONE = "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in repr(one).lower()]\n"
"""Hides a copy of the package that was installed editable."""

AS_COMFYUI_LOADS = (
    ALONE
    + """
import importlib.util, logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)

def load(folder):
    name = folder.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

before = list(sys.path)
"""
)


def clone(folder: Path) -> Path:
    """What `git clone` makes, as far as the nodes need it."""
    folder.mkdir(parents=True)
    for name in IN_THE_CLONE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=WITHOUT_CACHES)
        else:
            shutil.copy(path, folder)
    return folder


def output(code: str, *arguments: Any, cwd: Path, path: Path | None = None) -> str:
    environment = {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["stepcache", "ComfyUI-Step.Cache nightly"])
def test_a_clone_under_any_name_has_the_nodes_and_leaves_the_path_as_it_was(tmp_path: Path, name: str) -> None:
    folder = clone(tmp_path / "custom_nodes" / name)
    code = AS_COMFYUI_LOADS + (
        "node = load(sys.argv[1])\n"
        "assert sys.path == before\n"
        "print(sorted(node.NODE_CLASS_MAPPINGS), sorted(node.NODE_DISPLAY_NAME_MAPPINGS))\n"
    )
    said = output(code, folder, cwd=tmp_path)
    names = sorted(NODE_CLASS_MAPPINGS)
    assert said == f"INFO StepCache {__version__}: {folder}\n{names} {names}\n"


def test_of_two_copies_one_is_loaded_and_the_log_names_both(tmp_path: Path) -> None:
    """As with a clone beside the installed package, or with two clones."""
    first, second = clone(tmp_path / "site-packages"), clone(tmp_path / "custom_nodes" / "StepCache")
    code = AS_COMFYUI_LOADS + (
        "import stepcache\n"
        "node = load(sys.argv[1])\n"
        "from stepcache.samplers.comfyui import NODE_CLASS_MAPPINGS\n"
        "assert node.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS\n"
    )
    assert output(code, second, cwd=tmp_path, path=first) == (
        f"WARNING StepCache: another copy was imported first. {first} (version {__version__}) is in use, not {second}: "
        "remove one of them\n"
    )


def test_an_installed_package_that_nobody_has_imported_gives_way_to_the_clone(tmp_path: Path) -> None:
    first, second = clone(tmp_path / "site-packages"), clone(tmp_path / "custom_nodes" / "StepCache")
    said = output(AS_COMFYUI_LOADS + "load(sys.argv[1])", second, cwd=tmp_path, path=first)
    assert said == f"INFO StepCache {__version__}: {second}\n"


def test_beside_a_clone_called_stepcache_the_package_is_imported_not_the_custom_node(tmp_path: Path) -> None:
    folder = clone(tmp_path / "stepcache")
    code = (
        ALONE + "import stepcache; print(stepcache.Forecast().name, stepcache.__file__, hasattr(stepcache, 'FOLDER'))"
    )
    assert output(code, cwd=tmp_path) == f"forecast {folder / 'stepcache' / '__init__.py'} False\n"


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_pytest_does_not_import_the_custom_node(tmp_path: Path, mode: str) -> None:
    """A root with an `__init__.py` is a package to pytest, with the folder's name: here one of ComfyUI's own."""
    folder = clone(tmp_path / "comfy")
    shutil.copytree(ROOT / "tests" / "helpers", folder / "tests" / "helpers", ignore=WITHOUT_CACHES)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    (folder / "tests" / "test_one.py").write_text(
        "import sys\n\n\ndef test_one():\n"
        "    files = {getattr(module, '__file__', None) for module in sys.modules.values()}\n"
        f"    assert {str(folder / '__init__.py')!r} not in files\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "0", f"--import-mode={mode}", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout


def test_the_static_list_of_nodes_is_that_of_the_exports() -> None:
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    assert list(listed) == list(NODE_CLASS_MAPPINGS)
    assert all(listed.values())


def test_the_requirements_install_nothing() -> None:
    """ComfyUI-Manager installs each line that is no comment, and reads the file in the system's encoding."""
    lines = (ROOT / "requirements.txt").read_text(encoding="ascii").splitlines()
    assert lines
    assert all(line.startswith("#") for line in lines)
    assert not (ROOT / "install.py").exists()


def test_the_registrys_archive_has_what_the_nodes_need_and_no_tests(tmp_path: Path) -> None:
    pathspec = pytest.importorskip("pathspec")
    patterns = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = pathspec.GitIgnoreSpec.from_lines(patterns)
    kept = [str(path.relative_to(ROOT)) for path in files(ROOT) if not ignored.match_file(path.relative_to(ROOT))]
    assert {name.partition("/")[0] for name in kept} <= {
        *("__init__.py", "pyproject.toml", "stepcache", "samplers", "examples", "requirements.txt", "node_list.json"),
        *(".comfyignore", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"),
    }
    examples = [name for name in kept if name.startswith("examples/")]
    assert examples
    assert all(name.startswith("examples/comfyui") for name in examples)
    for name in kept:
        (tmp_path / "node" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "node" / name)
    code = AS_COMFYUI_LOADS + "print(len(load(sys.argv[1]).NODE_CLASS_MAPPINGS))"
    assert output(code, tmp_path / "node", cwd=tmp_path).endswith(f"\n{len(NODE_CLASS_MAPPINGS)}\n")


def files(folder: Path) -> list[Path]:
    """The files of a checkout as git lists them: tracked, or new and not ignored."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(listing, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()
    return [folder / name for name in names if (folder / name).is_file()]


def test_one_address_for_the_registry_and_the_web_uis_index() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    address = project["project"]["urls"]["Repository"]
    assert project["tool"]["comfy"]["PublisherId"]
    entry = json.loads((ROOT / "docs" / "a1111-index" / "stepcache.json").read_text(encoding="utf-8"))
    assert list(entry) == ["name", "url", "description", "tags"]
    assert entry["url"] == f"{address}.git"


def test_install_leaves_a_clone_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("nodes.py", "comfy/samplers.py"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text("")
    there = clone(tmp_path / "custom_nodes" / "any name")
    with pytest.raises(SystemExit):
        main(["install", "comfyui", str(tmp_path)])
    assert f"the nodes are there already, as a clone of their repository: {there}." in capsys.readouterr().err
    assert not (tmp_path / "custom_nodes" / "stepcache").exists()
