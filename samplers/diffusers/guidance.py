"""How the branches of guidance come, if the user says so."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from stepcache import OptionError
from stepcache.extend import flag


@dataclass(frozen=True)
class Guidance:
    """How the branches come, in cache-dit's names. None: the adapter finds out by looking.

    Attributes:
        enable_separate_cfg: True: every branch comes in a call of its own. False: all come in one call, and a further
            call at the same place is computed. None: rows that repeat each other are branches batched in one call.
        cfg_compute_first: of separate calls, True: the first is uncond; False: the first is cond. None: the pipeline's
            `cache_context` names them, else they are "call", "call 2", ...
        cfg_diff_compute_separate: True: every branch decides by its own change. False and None: the reference decides.

    Example:
        >>> from stepcache.samplers.diffusers import Guidance
        >>> Guidance(enable_separate_cfg=True, cfg_compute_first=False).cfg_compute_first
        False
    """

    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool | None = None
    cfg_diff_compute_separate: bool | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, flag(field.name, value))
        if self.enable_separate_cfg is False and self.cfg_compute_first is not None:
            raise OptionError(
                f"cfg_compute_first={self.cfg_compute_first} with enable_separate_cfg=False: it orders separate calls; "
                "leave one of them out"
            )

    @classmethod
    def pop(cls, options: dict[str, Any]) -> Guidance:
        """Takes these options out of all that were given."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls) if field.name in options})
