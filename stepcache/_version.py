"""The version, which is written down in pyproject.toml alone."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

LINE = re.compile(r'^name = "stepcache"\nversion = "(.+)"$', re.MULTILINE)


def version(root: Path) -> str:
    """The version of the clone in `root` if it is one, else of the installed package.

    A clone comes first: it may be used without an installation, or beside an installation of another version. A copy
    of the folder stepcache/ alone is neither, and its version is "unknown".
    """
    project = root / "pyproject.toml"
    if project.is_file() and (found := LINE.search(project.read_text(encoding="utf-8"))):
        return found[1]
    try:
        return installed("stepcache")
    except PackageNotFoundError:
        return "unknown"
