"""What the extension writes to the console and under the image."""

from __future__ import annotations

from typing import Any

TITLE = "StepCache"


def notify(p: Any, sentence: str) -> None:
    """Writes a sentence to the console, and under the image if the host can show comments there."""
    print(f"{TITLE}: {sentence}")
    if hasattr(p, "comment"):
        p.comment(f"{TITLE}: {sentence}")
