"""Host adapters, one module a host. Importing this package imports no host."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diffusers import attach as attach
else:

    def __getattr__(name: str) -> Any:
        """`attach`, whose adapter is imported when it is first asked for."""
        if name == "attach":
            from .diffusers import attach

            return attach
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
