"""The progress of a search, shown with rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stepcache._optional import require


@contextmanager
def progress(console: Any, budget: float) -> Iterator[Callable[[str, float], None]]:
    """Gives `say(best so far, spent)`, which moves a progress bar; without a console it does nothing."""
    if console is None:
        yield lambda sentence, spent: None
        return
    with require("rich.progress", "bench").Progress(console=console) as bar:
        task = bar.add_task("the full run", total=budget if budget < float("inf") else None)
        yield lambda sentence, spent: bar.update(task, description=sentence, completed=spent)
