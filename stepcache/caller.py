"""Who calls: a thread, or an asyncio task in it."""

from __future__ import annotations

import asyncio
import threading
from weakref import WeakKeyDictionary


class Caller:
    """A thread or an asyncio task. Unlike an identifier of a thread, it is never used again for another one."""

    __slots__ = ("__weakref__",)


_threads = threading.local()
_tasks: WeakKeyDictionary[asyncio.Task[object], Caller] = WeakKeyDictionary()


def caller() -> Caller:
    """The caller that this code runs for; it is always the same object for the same thread or task.

    Example:
        >>> from stepcache.caller import caller
        >>> caller() is caller()
        True
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop is running in this thread
        task = None
    if task is None:
        own: Caller = _threads.__dict__.setdefault("own", Caller())
        return own
    return _tasks.setdefault(task, Caller())
