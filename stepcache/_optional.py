"""Optional packages, imported when first needed, with a sentence that says how to get them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, or says which extra of stepcache brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"This needs the package {package!r} ({error}). Install it with: pip install 'stepcache[{extra}]'"
        ) from error
