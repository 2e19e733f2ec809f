"""ComfyUI's custom node StepCache: a clone of this repository in custom_nodes/, under any folder name.

Nothing is installed: the package is imported from this folder, unless another copy of it was imported before. The log
says which copy is in use.
"""

import logging
import sys
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

# A clone in a folder called stepcache, whose parent is on the path, is found as the package `stepcache`: by a script
# that runs beside it, by pytest. The package is one folder further in.
if __name__ == "stepcache":
    del sys.modules["stepcache"]

sys.path.insert(0, str(FOLDER))
try:
    stepcache = import_module("stepcache")
finally:
    sys.path.remove(str(FOLDER))  # samplers/, tests/ and so on are not to be found as packages of the host

if __name__ != "stepcache":
    log = logging.getLogger("stepcache")
    used = Path(stepcache.__file__ or "").resolve().parents[1]
    if used == FOLDER:
        log.info("StepCache %s: %s", stepcache.__version__, FOLDER)
    else:
        log.warning(
            "StepCache: another copy was imported first. %s (version %s) is in use, not %s: remove one of them",
            used,
            stepcache.__version__,
            FOLDER,
        )
    exports = import_module("stepcache.samplers.comfyui").exports()
    NODE_CLASS_MAPPINGS = exports["NODE_CLASS_MAPPINGS"]
    NODE_DISPLAY_NAME_MAPPINGS = exports["NODE_DISPLAY_NAME_MAPPINGS"]
    if "comfy_entrypoint" in exports:  # for a host that reads the second interface (V3) alone
        comfy_entrypoint = exports["comfy_entrypoint"]

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
