"""`stepcache install HOST PATH`: writes a short entry point into a host's folder. All code stays in this package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stepcache import OptionError, __version__

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

WEBUI = f'''"""StepCache's panel. The code is in the Python package stepcache."""

{MARK}
import sys

from modules import script_callbacks, scripts

try:
    from stepcache.samplers import webui
except ImportError as error:
    raise ImportError(
        f"StepCache's panel needs the package stepcache in the web UI's own Python ({{sys.executable}}): {{error}}. "
        "Install it there, or delete the folder extensions/stepcache"
    ) from error


class StepCache(webui.Extension, scripts.Script):
    """The panel and the hooks of `webui.Extension` as a script of the host."""


webui.register(script_callbacks, scripts)
'''
METADATA = f"{MARK}\n[Extension]\nName = stepcache\n"
PANEL, NODES = "scripts/stepcache_webui.py", "samplers/comfyui/nodes.py"
"""Files by which a clone of this repository is recognised."""


@contextmanager
def _os_errors_explained() -> Iterator[None]:
    """Raises OptionError for errors of the file system: no permission, or a file in place of a folder."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"{error.filename}: {error.strerror}. Nothing can be installed there") from error


@_os_errors_explained()
def comfyui(path: Path) -> list[str]:
    """Creates custom_nodes/stepcache in a ComfyUI folder.

    Returns sentences about what it did. Raises OptionError if `path` is no ComfyUI folder, if custom_nodes/ has a clone
    of this repository, which is the nodes already, if custom_nodes/stepcache is not ours, or if it cannot be written.
    """
    _check(path, "ComfyUI", COMFYUI_HAS, "ComfyUI's main.py", "ComfyUI")
    for file in sorted(path.glob(f"custom_nodes/*/{NODES}")):
        raise OptionError(
            f"the nodes are there already, as a clone of their repository: {file.parents[2]}. Restart ComfyUI to use "
            "them, or delete that folder and install again"
        )
    sentences = [_write(path / "custom_nodes" / "stepcache", {"__init__.py": COMFYUI})]
    sentences.extend(_other_python("ComfyUI", path / "venv", path / ".venv", path.parent / "python_embeded"))
    sentences.append("Restart ComfyUI; the nodes are under model_patches/stepcache.")
    return sentences


@_os_errors_explained()
def webui(path: Path) -> list[str]:
    """Creates extensions/stepcache in the folder of a web UI (A1111 or one of the Forge family), as `comfyui` does.

    Raises OptionError also if the extensions already include a clone of this repository: it is the whole extension.
    """
    _check(path, "web UI", WEBUI_HAS, "webui-user.bat", "webui")
    folder = path / "extensions" / "stepcache"
    for file in sorted(path.glob(f"extensions/*/{PANEL}")):
        there = file.parents[1]
        if there != folder or (there / "pyproject.toml").exists():
            raise OptionError(
                f"the extension is there already, as a clone of its repository: {there}. Update it, or delete it "
                "and install again. With both, the panel would be there twice"
            )
    sentences = [_write(folder, {PANEL: WEBUI, "metadata.ini": METADATA})]
    sentences.extend(_other_python("the web UI", path / "venv", path / ".venv", path.parent / "system" / "python"))
    sentences.append("Restart the web UI; the panel StepCache is in txt2img and img2img.")
    return sentences


HOSTS: dict[str, Callable[[Path], list[str]]] = {"comfyui": comfyui, "webui": webui}
"""What `stepcache install` accepts as HOST."""

COMFYUI_HAS = ("nodes.py", "comfy/samplers.py", "custom_nodes")
WEBUI_HAS = ("modules/scripts.py", "modules/processing.py", "extensions")


def _check(path: Path, host: str, has: tuple[str, ...], start: str, usual: str) -> None:
    """Raises OptionError if the folder lacks what the host `has`. `usual`: a subfolder that is often meant instead."""
    lacks = [part for part in has if not (path / part).exists()]
    if not lacks:
        return
    inside = path / usual
    hint = f"; did you mean {inside}?" if all((inside / part).exists() for part in has) else ""
    raise OptionError(f"{path} is no {host}: it lacks {', '.join(lacks)}. Give the folder that has {start} in it{hint}")


def _write(folder: Path, files: dict[str, str]) -> str:
    """Writes the files of an entry point, the main one first. Returns what it did.

    Raises OptionError if the folder is not ours, or cannot be written.
    """
    main = folder / next(iter(files))
    for written in (folder, *((folder / name).parent for name in files), *(folder / name for name in files)):
        if written.is_symlink():
            raise OptionError(f"{written} is a link to {written.readlink()}: remove the link, then install again")
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file. Nothing can be installed there: move it away, then install again")
    there = {
        name: (folder / name).read_text(encoding="utf-8", errors="replace")
        for name in files
        if (folder / name).exists()
    }
    if there == files:
        return f"{main} is there already, nothing to do."
    for name, text in there.items():
        if MARK not in text:
            raise OptionError(f"{folder / name} was not written by stepcache: move {folder} away, then install again")
    if not there and folder.exists() and any(folder.iterdir()):
        raise OptionError(f"{folder} is there already and is not ours: move it away, then install again")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return f"Wrote {main}; it loads stepcache {__version__} from Python's packages."


def _other_python(host: str, *own: Path) -> list[str]:
    """A sentence if the host has a Python of its own that is not the running one."""
    found = next((folder for folder in own if folder.is_dir()), None)
    if found is None or Path(sys.prefix).resolve() == found.resolve():
        return []
    return [
        f"Note: {host} seems to run on the Python in {found}, and this one is in {sys.prefix}: install stepcache there."
    ]
