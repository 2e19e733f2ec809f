"""What a search has found so far, as JSON lines in a file, so that it can be stopped and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepcache.options import OptionError, shown


class Notebook:
    """Findings by name, kept in a file if a path is given.

    Args:
        path: of the file; None: nothing is written. What it holds already is known from the beginning.
        subject: what the findings depend on. OptionError if the file was begun for something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None, subject: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._known: dict[str, Any] = {}
        subject = json.loads(json.dumps(subject))
        if self._path is not None and self._path.exists():
            first, *lines = self._path.read_text(encoding="utf-8").splitlines() or ["{}"]
            if _read(first) != {"subject": subject}:
                raise OptionError(
                    f"state={shown(str(path))} was begun for another model, sampler, number of steps or seeds: give "
                    "another file, or remove it"
                )
            for line in lines:
                self._known |= _read(line)
        elif self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"subject": subject}) + "\n", encoding="utf-8")

    def get(self, name: str) -> Any:
        """A finding; None if there is none of this name."""
        return self._known.get(name)

    def add(self, name: str, finding: Any) -> None:
        self._known[name] = finding
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: finding}) + "\n")


def _read(line: str) -> dict[str, Any]:
    """A line's findings; none if it was broken off while it was written."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
