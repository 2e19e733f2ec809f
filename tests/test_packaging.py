"""What an installation holds."""

from pathlib import Path

import pytest

import stepcache

ROOT = Path(stepcache.__file__).parents[1]


def test_every_folder_of_the_package_is_in_the_wheel():
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    files = [*ROOT.glob("stepcache/**/__init__.py"), *ROOT.glob("samplers/**/__init__.py")]
    names = [".".join(file.parent.relative_to(ROOT).parts) for file in files]
    names = [name if name.startswith("stepcache") else f"stepcache.{name}" for name in names]
    assert sorted(listed) == sorted([*names, "stepcache.demo"])
