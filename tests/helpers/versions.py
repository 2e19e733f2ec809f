"""The table of versions in docs/versions.md, written from what test runs recorded of themselves.

`STEPCACHE_RECORD=docs/versions pytest` adds a file to that folder at the end of the run, named after the versions, and
`python tests/helpers/versions.py` makes the page of all files there.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER, PAGE = ROOT / "docs" / "versions", ROOT / "docs" / "versions.md"
PACKAGES = ("torch", "diffusers", "transformers", "k-diffusion", "cache-dit", "numpy")
COUNTED = ("passed", "failed", "error", "skipped")
INTRODUCTION = """# Versions

<!-- Written by `nox -s versions` from the files in docs/versions/. Do not edit. -->

The test suite ran with these versions. Each run recorded its own line (`STEPCACHE_RECORD=docs/versions pytest`).
"not installed" means that the tests of that package were skipped. The first lines have the oldest releases that
`pyproject.toml` admits, the last ones the newest.
"""


def record(config: Any, outcomes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What a pytest run, configured by `config`, ran with and how it ended."""
    chosen = [] if config.args == config.getini("testpaths") else [str(argument) for argument in config.args]
    chosen += [text for text in (config.getoption("keyword"), config.getoption("markexpr")) if text]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _installed(name) for name in PACKAGES},
        **{name: len(outcomes.get(name, ())) for name in COUNTED},
        "chosen": chosen,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def write(found: dict[str, Any], folder: Path) -> Path:
    """Keeps one file for each combination of Python, torch and diffusers: the latest run of it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}-{_public(found[name])}" for name in ("python", "torch", "diffusers")]
    path = folder / ("_".join(names).replace("not installed", "none") + ".json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown page of all records, oldest versions first."""
    columns = ("python", *PACKAGES, "passed", "failed", "skipped", "system", "commit", "date")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for found in sorted(records, key=lambda found: [_number(found[name]) for name in ("torch", "diffusers", "python")]):
        cells = dict(found) | {"failed": found["failed"] + found["error"]}
        cells |= {name: _public(found[name]) for name in PACKAGES}
        if found["chosen"]:
            cells["passed"] = f"{found['passed']} (only {', '.join(found['chosen'])})"
        lines.append("| " + " | ".join(str(cells[name]) for name in columns) + " |")
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _public(text: str) -> str:
    """A version without the part after the plus, which names the build."""
    return text.partition("+")[0]


def _number(text: str) -> list[int]:
    return [int(part) for part in _public(text).split(".") if part.isdigit()]


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(folder: Path = FOLDER, to: Path = PAGE) -> None:
    files = sorted(folder.glob("*.json"))
    if not files:
        sys.exit(f"{folder} has no records: run STEPCACHE_RECORD={folder} pytest first")
    to.write_text(page([json.loads(file.read_text(encoding="utf-8")) for file in files]), encoding="utf-8")


if __name__ == "__main__":
    main()
