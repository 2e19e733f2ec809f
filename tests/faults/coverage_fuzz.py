"""The targets of test_fuzz.py, searched by atheris, which keeps what reaches new lines of stepcache.

    pip install atheris
    PYTHONPATH=.:tests/helpers python tests/faults/coverage_fuzz.py 200000

runs that many inputs, in equal parts, one process a target; a name of a target after it runs that one alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SEEDS, LONGEST = 30, 4096
"""Files of random bytes to begin with, and the length of one."""


def search(name: str, count: int, folder: str) -> None:
    """One target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["stepcache"]):
        from fuzzing import TARGETS
    from hypothesis import HealthCheck, given, settings

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(TARGETS[name].inputs)
    def check(value: object) -> None:
        nonlocal drawn
        drawn += 1
        TARGETS[name].check(value)

    def one(data: bytes) -> None:
        """Bytes that are too short for an input do not count."""
        check.hypothesis.fuzz_one_input(data)
        if drawn == count:
            print(f"drawn {drawn}", file=sys.stderr, flush=True)
            os._exit(0)

    drawn = 0
    source = random.Random(1)
    for number in range(SEEDS):
        (Path(folder) / f"seed{number}").write_bytes(source.randbytes(LONGEST))
    atheris.Setup([sys.argv[0], "-seed=1", f"-max_len={LONGEST}", "-verbosity=0", folder], one)
    atheris.Fuzz()


def main(count: int, names: list[str]) -> int:
    from fuzzing import TARGETS

    failed = 0
    for name in names or TARGETS:
        with TemporaryDirectory() as folder:
            share = -(-count // len(names or TARGETS))
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, str(share), folder], capture_output=True, text=True
            )
            kept = len(list(Path(folder).iterdir())) - SEEDS
        drawn = f"drawn {share}" in done.stderr
        print(
            f"{name}: {share} inputs, {kept} of them kept for new lines, {'passed' if drawn else 'FAILED'}", flush=True
        )
        if not drawn:
            failed += 1
            print(done.stdout[-3000:], done.stderr[-3000:])
    return failed


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        search(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
