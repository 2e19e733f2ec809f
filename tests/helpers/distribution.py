"""Checks what distributions contain: `python tests/helpers/distribution.py dist/*`; exits with 1 if it is wrong."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

NEEDED = (
    "stepcache/__init__.py",
    "stepcache/py.typed",
    "stepcache/samplers/__init__.py",
    "stepcache/samplers/comfyui/nodes.py",
    "stepcache/samplers/diffusers/attachment.py",
    "stepcache/samplers/webui/panel.py",
    "stepcache/demo/run.py",
    "stepcache/demo/weights/unet.safetensors",
)
LARGEST = 20_000_000
"""Bytes. The networks of the demo are most of it."""


def faults(path: Path) -> list[str]:
    """What is wrong with one distribution. A wheel has the package alone, a source distribution its sources too."""
    found = []
    if path.stat().st_size > LARGEST:
        found.append(f"{path.stat().st_size:,} bytes, more than {LARGEST:,}")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            names = set(wheel.namelist())
        found += [f"{name} is missing" for name in NEEDED if name not in names]
        foreign = {name.partition("/")[0] for name in names} - {"stepcache"}
        found += [f"{name}/ does not belong into it" for name in sorted(foreign) if not name.endswith(".dist-info")]
        found += [f"{name} is a test" for name in sorted(names) if "/test_" in name or "conftest" in name]
    else:
        with tarfile.open(path) as source:
            names = {name.partition("/")[2] for name in source.getnames()}
        found += [f"{name} is missing" for name in ("pyproject.toml", "LICENSE", "README.md") if name not in names]
    return [f"{path.name}: {fault}" for fault in found]


def main(paths: list[str]) -> None:
    found = [fault for path in paths for fault in faults(Path(path))]
    if found or not paths:
        sys.exit("\n".join(found) or "no distribution was given")
    print(f"{len(paths)} distributions have what they should")


if __name__ == "__main__":
    main(sys.argv[1:])
