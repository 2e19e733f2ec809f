"""Who calls: a thread, or an asyncio task in it."""

from __future__ import annotations

import asyncio
import threading
from weakref import WeakKeyDictionary


class Caller:
    """A thread or an asyncio task. Unlike an identifier of a thread, it is never used again for another one."""

    __slots__ = ("__weakref__",)


class _Thread(threading.local):
    """Has another `caller` in every thread."""

    def __init__(self) -> None:
        self.caller = Caller()


_thread = _Thread()
_tasks: WeakKeyDictionary[asyncio.Task[object], Caller] = WeakKeyDictionary()


def caller() -> Caller:
    """The caller that this code runs for; it is always the same object for the same thread or task.

    Example:
        >>> from stepcache.caller import caller
        >>> caller() is caller()
        True
    """
    if asyncio._get_running_loop() is None:
        return _thread.caller
    task = asyncio.current_task()
    return _thread.caller if task is None else _tasks.setdefault(task, Caller())
