"""The progress of a search, shown with rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stepcache._optional import require


@contextmanager
def progress(console: Any, budget: float) -> Iterator[Callable[[str, float], None]]:
    """A bar of what was spent of the budget, with the best so far: a function of both. Without a console, nothing."""
    if console is None:
        yield lambda sentence, spent: None
        return
    with require("rich.progress", "bench").Progress(console=console) as bar:
        task = bar.add_task("the full run", total=budget)
        yield lambda sentence, spent: bar.update(task, description=sentence, completed=spent)
