"""No cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..criteria.always import Never
from .base import Method
from .registry import register

if TYPE_CHECKING:
    pass


@register("none")
def Off() -> Method:
    """Computes everything; the model is called directly.

    Example:
        >>> from stepcache import Off
        >>> Off().never_skips
        True
    """
    return Method(criterion=Never(), name="none")
