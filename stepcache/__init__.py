"""stepcache: answers some of a diffusion sampler's evaluations without running the model.

These are the names for users. `stepcache.extend` has those for authors of methods and hosts; the hosts' adapters are in
`stepcache.samplers`. See docs/design.md.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import version
from .compat import load_config, parse
from .masks import StepMask
from .methods import METHODS, Method, method
from .methods.cache_dit import CacheDiT
from .methods.dbcache import DBCache
from .methods.easycache import EasyCache
from .methods.fbcache import FBCache
from .methods.forecast import Forecast
from .methods.hicache import HiCache
from .methods.magcache import MagCache
from .methods.off import Off
from .methods.profile import load_profile
from .methods.seacache import SeaCache
from .methods.spectrum import Spectrum
from .methods.static import Static
from .methods.taylorseer import TaylorSeerCache
from .methods.ucache import UCache
from .options import OptionError
from .report import Report

_ROOT = Path(__file__).parent.parent
if (_ROOT / "samplers" / "install.py").is_file() and (_ROOT / "pyproject.toml").is_file():
    __path__ += [str(_ROOT), str(_ROOT / "examples")]  # a clone, not installed: samplers/ and examples/demo/ are parts

__version__ = version(_ROOT)

if TYPE_CHECKING:
    from .samplers import attach
    from .tuning import tune
else:

    def __getattr__(name: str) -> Any:
        """`stepcache.attach` and `stepcache.tune`: imported when they are first asked for."""
        if name == "attach":
            from .samplers import attach

            return attach
        if name == "tune":
            from .tuning import tune

            return tune
        raise AttributeError(f"module 'stepcache' has no attribute {name!r}")


__all__ = [
    "METHODS",
    "CacheDiT",
    "DBCache",
    "EasyCache",
    "FBCache",
    "Forecast",
    "HiCache",
    "MagCache",
    "Method",
    "Off",
    "OptionError",
    "Report",
    "SeaCache",
    "Spectrum",
    "Static",
    "StepMask",
    "TaylorSeerCache",
    "UCache",
    "attach",
    "load_config",
    "load_profile",
    "method",
    "parse",
    "tune",
]
