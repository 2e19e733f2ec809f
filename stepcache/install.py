"""`stepcache install HOST PATH`: puts a thin entry point into a host's folder; all logic stays in this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .options import OptionError

MARK = "# Written by `stepcache install`; a later run replaces it."

COMFYUI = f'''"""StepCache's nodes. The code is in the Python package stepcache."""

{MARK}
import sys

try:
    from stepcache.samplers.comfyui import exports
except ImportError as error:
    raise ImportError(
        f"StepCache's nodes need the package stepcache in ComfyUI's own Python ({{sys.executable}}): {{error}}. "
        "Install it there, or delete this folder"
    ) from error

globals().update(exports())
'''


def comfyui(path: Path) -> list[str]:
    """Creates custom_nodes/stepcache in a ComfyUI folder. Returns what it did; OptionError where it is none."""
    if not _is_comfyui(path):
        inside = path / "ComfyUI"
        hint = f"; did you mean {inside}?" if _is_comfyui(inside) else ""
        raise OptionError(
            f"{path} is no ComfyUI: it lacks nodes.py, comfy/samplers.py or custom_nodes. Give the folder that has "
            f"ComfyUI's main.py in it{hint}"
        )
    said = [_write(path / "custom_nodes" / "stepcache" / "__init__.py", COMFYUI)]
    said.extend(_other_python(path))
    said.append("Restart ComfyUI; the nodes are under model_patches/stepcache.")
    return said


HOSTS: dict[str, Callable[[Path], list[str]]] = {"comfyui": comfyui}
"""What `stepcache install` knows, by the name that is written there."""


def _is_comfyui(path: Path) -> bool:
    return all((path / part).exists() for part in ("nodes.py", "comfy/samplers.py", "custom_nodes"))


def _write(file: Path, text: str) -> str:
    """Writes an entry point, once; never over a file that is not ours."""
    if file.exists():
        there = file.read_text(encoding="utf-8")
        if there == text:
            return f"{file} is there already, nothing to do."
        if MARK not in there:
            raise OptionError(f"{file} was not written by stepcache: move that folder away, then install again")
    elif file.parent.exists() and any(file.parent.iterdir()):
        raise OptionError(f"{file.parent} is there already and is not ours: move it away, then install again")
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return f"Wrote {file}; it loads stepcache {__version__} from Python's packages."


def _other_python(path: Path) -> list[str]:
    """A sentence where the host keeps a Python of its own that is not the one running."""
    own = [path / "venv", path / ".venv", path.parent / "python_embeded"]
    found = next((folder for folder in own if folder.is_dir()), None)
    if found is None or Path(sys.prefix).resolve() == found.resolve():
        return []
    return [
        f"Note: ComfyUI seems to run on the Python in {found}, and this one is in {sys.prefix}: "
        "install stepcache there."
    ]
