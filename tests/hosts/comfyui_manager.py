"""Installs a repository as ComfyUI-Manager does on a click: with its own `gitclone_install`, in its own process.

    python comfyui_manager.py CHECKOUT BASE URL

BASE/custom_nodes/ComfyUI-Manager is a copy of the Manager. COMFYUI_PATH is the checkout, as in its command line.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path


def main(checkout: str, base: str, url: str) -> None:
    manager = Path(base) / "custom_nodes" / "ComfyUI-Manager"
    sys.path[:0] = [str(manager / "glob"), checkout]
    sys.argv = [sys.argv[0], "--cpu", "--base-directory", base]
    import comfy.options

    comfy.options.enable_args_parsing()
    import cm_global
    import folder_paths

    cm_global.pip_blacklist, cm_global.pip_downgrade_blacklist = {"torch", "torchsde", "torchvision"}, []
    cm_global.pip_overrides = {}
    folder_paths.folder_names_and_paths["custom_nodes"] = ([str(manager.parent)], set())
    import manager_core

    manager_core.get_config()["network_mode"] = "offline"  # the lists of nodes are not fetched

    def refuse(*command: object, **keywords: object) -> bool:
        print("RAN", command)
        return False

    manager_core.try_install_script = refuse  # what it would run of ours: pip, or install.py
    result = asyncio.run(manager_core.gitclone_install(url, instant_execution=True))
    print("RESULT", result.result, result.target, result.msg)


if __name__ == "__main__":
    main(*sys.argv[1:])
