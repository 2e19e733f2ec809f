"""What the options of a method were found for."""

from __future__ import annotations

from dataclasses import dataclass

from ..run_info import RunInfo
from ..settings import Settings
from .base import Gate, GateCheck


@dataclass(frozen=True)
class MadeFor(Gate):
    """Computes nothing by itself. The report says if the run is not the one that the settings were made for."""

    settings: Settings

    def begin(self, run: RunInfo) -> GateCheck:
        length = run.evaluations
        self.settings.compare(run, f"is used in {length}: what was measured for it does not hold here")
        return lambda position, counts: None
