"""What a type checker and an editor see of the public names."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stepcache
from stepcache import METHODS, Forecast, UCache

ROOT = Path(stepcache.__file__).parents[1]

SNIPPET = """\
import stepcache
from stepcache import Forecast, Method, Static, StepMask, UCache
from stepcache.bench import KDiffusion, Subject
from stepcache.extend import number

UCache(threshold=1.0, mask="fast", max_cached=3)
Forecast(3, skip="uncond", mask=[1, 0], last_step=True).replace(mask="110")
StepMask([1, 1, 0], "static")
Method(mask="110")
Static("110", warmup=2)
UCache(nonsense=1)  # error
UCache(start="0.2")  # error
UCache(skip="cond")  # error
UCache(mask=1.5)  # error
Forecast(interval="x")  # error
Forecast(interval=2, last_step="yes")  # error
Static("110", mask="101")  # error
Method(mask=1.5)  # error
stepcache.nonsense  # error


def known(kdiffusion: KDiffusion, method: Method) -> None:
    subject: Subject = kdiffusion
    made: Method = Forecast()
    whole: int = number("steps", 3.0, whole=True)
    share: int = number("share", 0.5)  # error
    mask: StepMask | None = method.mask
    method.mask.policy  # error
    method.mask = "110"  # error
    steps: tuple[int, ...] = StepMask("slow").for_steps(28)


reveal_type(Forecast())
"""
WRONG = [number for number, line in enumerate(SNIPPET.splitlines(), start=1) if line.endswith("# error")]
REVEALED = len(SNIPPET.splitlines())

MYPY = """\
[mypy]
follow_imports = silent
ignore_missing_imports = true
[mypy-torch.*]
follow_imports = skip
"""
"""Nothing here is about the types of torch, which take most of the time."""


@pytest.fixture
def snippet(tmp_path):
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET, encoding="utf-8")
    return path


def test_mypy_accepts_the_options_of_a_method_and_refuses_others(snippet, tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    config = tmp_path / "mypy.ini"
    config.write_text(MYPY, encoding="utf-8")
    out, err, _ = api.run([f"--config-file={config}", f"--cache-dir={tmp_path}", str(snippet)])
    assert not err
    assert _lines(r"snippet\.py:(\d+): error", out) == WRONG, out
    assert f'snippet.py:{REVEALED}: note: Revealed type is "stepcache.methods.base.Method"' in out


def test_pyright_accepts_the_options_of_a_method_and_refuses_others(snippet, tmp_path):
    pyright = shutil.which("pyright") or pytest.skip("pyright is not installed")
    if subprocess.run([pyright, "--version"], capture_output=True, timeout=300).returncode:
        pytest.skip("pyright cannot start: it needs Node.js, which it downloads once")
    config = {"include": ["snippet.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    command = [pyright, "-p", str(tmp_path), "--pythonpath", sys.executable]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    assert _lines(r"snippet\.py:(\d+):\d+ - error", out) == WRONG, out
    assert re.search(rf'snippet\.py:{REVEALED}:\d+ - information: Type of "Forecast\(\)" is "Method"', out), out


def _lines(pattern, text):
    return sorted({int(line) for line in re.findall(pattern, text)})


def test_an_editor_shows_a_methods_own_options():
    assert list(inspect.signature(Forecast).parameters) == ["interval", "min_evaluations", "common"]
    own = inspect.signature(UCache).parameters
    assert list(own) == ["threshold", "start", "end", "decay", "relative", "reset", "common"]
    assert own["threshold"].default == 1.0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_that_it_returns_a_method(name):
    assert inspect.signature(METHODS[name]).return_annotation == "Method"
