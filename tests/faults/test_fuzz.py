"""Whatever comes from outside is accepted or refused with an OptionError: text, values, command lines, files, sigmas.

    STEPCACHE_FUZZ=200000 pytest -n 0 tests/faults/test_fuzz.py

draws that many inputs; without the variable 40 of each kind. `coverage_fuzz.py` searches with atheris."""

from __future__ import annotations

import math
import os

import pytest
from fuzzing import TARGETS
from hypothesis import HealthCheck, given, settings

COUNT = math.ceil(int(os.environ.get("STEPCACHE_FUZZ", "0")) / len(TARGETS)) or 40


@pytest.mark.parametrize("name", TARGETS)
def test_anything_is_accepted_or_refused_with_a_sentence(name, record_property):
    target, drawn = TARGETS[name], 0

    @settings(deadline=None, max_examples=COUNT, suppress_health_check=list(HealthCheck), database=None)
    @given(target.inputs)
    def check(value):
        nonlocal drawn
        drawn += 1
        target.check(value)

    check()
    record_property("inputs", drawn)
    assert drawn >= COUNT
