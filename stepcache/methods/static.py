"""A step mask alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..masks import StepMask
from .base import Method
from .registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .base import OptionsWithoutMask


@register("static")
def Static(mask: StepMask | str | list[int] | tuple[int, ...], **common: Unpack[OptionsWithoutMask]) -> Method:
    """Skips exactly the zeros of a step mask, whatever the latents do. `mask` as for `StepMask`.

    Example:
        >>> from stepcache import Static
        >>> str(Static("1110010010").mask)
        '1110010010 (static)'
        >>> Static("medium").mask.for_steps(10)
        (1, 1, 0, 1, 0, 0, 1, 0, 0, 1)
    """
    given = mask.mask if isinstance(mask, StepMask) else mask
    return Method.make(common, mask=StepMask(given, "static"), name="static")
