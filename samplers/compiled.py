"""What is said if the cache is inside of what `torch.compile` compiles."""

from __future__ import annotations

COMPILE_FIRST = (
    "the cache is inside of what torch.compile compiles, so that neither it nor the model inside it is compiled: "
    "compile first, then attach, {}"
)
