"""The package's modules, found by their files: nothing else in the repository is imported by looking for them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = {"stepcache": "stepcache", "samplers": "stepcache.samplers", "examples/demo": "stepcache.demo"}


def modules() -> dict[str, Path]:
    """Every module by its full name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return found
