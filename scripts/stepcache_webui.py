"""The entry point for A1111, Forge, reForge, Forge Classic and Forge Neo; everything is in samplers/webui/.

The extension runs from its folder: it needs torch, which the host has, and installs nothing.
"""

import sys
from pathlib import Path

from modules import script_callbacks, scripts

FOLDER = Path(__file__).resolve().parents[1]

sys.path.insert(0, str(FOLDER))
try:
    import stepcache

    if (used := Path(stepcache.__file__).resolve().parents[1]) != FOLDER:
        print(f"StepCache: another copy was loaded first. {used} is in use, not {FOLDER}")
    from stepcache.samplers import webui
finally:
    sys.path.remove(str(FOLDER))  # samplers/, tests/ and so on are not to be found as packages of the host


class StepCache(webui.Extension, scripts.Script):
    """The panel and the hooks of `webui.Extension` as a script of the host."""


webui.register(script_callbacks, scripts)
