"""What may come from outside, as strategies of hypothesis, and what must become of it: it is accepted, or refused.

A refusal is an OptionError. tests/faults/test_fuzz.py draws a number of inputs, tests/faults/coverage_fuzz.py lets
atheris search."""

from __future__ import annotations

import contextlib
import io
import json
import math
import string
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from fractions import Fraction
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from toys import cached, filled, level, twice

from stepcache import METHODS, Method, OptionError, StepMask, load_config, load_profile, method, parse
from stepcache.calibrated import FORMAT
from stepcache.compat.cache_dit import FIELDS, NEUTRAL
from stepcache.extend import Clock, accepted_options
from stepcache.profile import Profile
from stepcache.settings import Settings

LONGEST_MESSAGE = 3000


@dataclass(frozen=True)
class Target:
    """One entrance: what is drawn, and the function that must accept it or refuse it with a sentence."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]


TARGETS: dict[str, Target] = {}


def target(inputs: st.SearchStrategy[Any]) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    def decorate(check: Callable[[Any], None]) -> Callable[[Any], None]:
        TARGETS[check.__name__] = Target(inputs, check)
        return check

    return decorate


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Lets an OptionError with a sentence pass as a refusal; every other error goes on. Warnings are not looked at."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            yield
        except OptionError as refusal:
            said = str(refusal)
        else:
            return
    assert len(said.split()) > 3, f"no sentence: {said}"
    assert len(said) < LONGEST_MESSAGE, "a message nobody reads"


THINGS: list[Any] = [[], {}, (), object(), 10**400, -(10**400), 10**300, 10**20, 10**6, math.nan, math.inf, -math.inf]
THINGS += [-1, 0, 1, 2, 0.5, 1e308, 5e-324, "x", "", b"x", None, date(2020, 1, 1), torch.ones(2), torch.ones(1)]
THINGS += [torch.ones(0), 1j, [1, 0], [[1]], Fraction(1, 3), range(3), True, "fast", "101010", set(), "static"]
THINGS += ["training", len, "\ud800", "٣", "1_0"]
OBJECTS = st.sampled_from(THINGS)
NUMBERS = st.integers(-3, 70) | st.floats() | st.integers()
VALUES = OBJECTS | NUMBERS | st.text(max_size=8) | st.lists(st.integers(-1, 2), max_size=8)
WORDS = ["=", ",", "-", "0", "1", ".5", "e", "inf", "nan", "_", "٣", " ", "\x00", '"', "'", "\\", ":", "[", "{", "true"]
TEXTS = st.text(max_size=30) | st.text(string.printable, max_size=30)


# Option text and values


@st.composite
def option_texts(draw: st.DrawFn) -> tuple[str, str]:
    name = draw(st.sampled_from(list(METHODS)))
    keys = st.sampled_from([*accepted_options(name), *WORDS]) | st.text(max_size=4)
    values = VALUES.map(str) | st.text(max_size=6)
    pairs = st.tuples(keys, st.sampled_from(["=", "==", " = ", ""]), values).map("".join)
    return name, draw(st.lists(pairs, max_size=4).map(",".join) | st.lists(keys, max_size=10).map("".join) | TEXTS)


@target(option_texts())
def option_text(given: tuple[str, str]) -> None:
    name, text = given
    with refusals():
        lasts(method(name, text, **({"mask": "fast"} if name == "static" and "mask" not in text else {})))


@target(st.text(max_size=12) | OBJECTS)
def method_name(given: Any) -> None:
    with refusals():
        method(given)


EVERY = [(name, option) for name in METHODS for option in accepted_options(name)]


@target(st.tuples(st.sampled_from(EVERY), VALUES, st.sampled_from(EVERY), VALUES))
def option_values(given: Any) -> None:
    (name, option), value, (_, second), other = given
    mask = {"mask": "fast"} if name == "static" and option != "mask" else {}
    chosen = {option: value} | ({second: other} if second in accepted_options(name) else {})
    with refusals():
        lasts(method(name, **mask | chosen))


def lasts(accepted: Method) -> None:
    """Options that act in the middle of a run only must have been refused before: the run is made here."""
    assert isinstance(accepted, Method)
    sigmas = [2.0**-k for k in range(6)]
    model = cached(twice, accepted, sigmas=[*sigmas, 0.0])
    with contextlib.suppress(OptionError):  # the run itself refuses a mask of another length, at its beginning
        model.engine.announce([*sigmas, 0.0], 1)
        for k, sigma in enumerate(sigmas):
            try:
                model(filled(k), level(sigma))
            except OptionError as refusal:
                raise AssertionError(f"refused in the middle of a run: {refusal}") from refusal


# Command lines

MODES = [*METHODS, "disabled", "none", "ucahce", ""]
OPTIONS = [
    "--cache-mode",
    "--cache-option",
    "--cache-preset",
    "--scm-mask",
    "--scm-policy",
    "--cache-mod",
    "--scm",
    "--",
]
GIVEN = ["threshold=1.5,reset=0", "fast", "ultra", "1,1,0,1", "static", "dynamic", "-m", "model.safetensors", "=", "-1"]
LINE = st.sampled_from([*OPTIONS, *MODES, *GIVEN, *WORDS]) | st.text(max_size=6)


@target(st.lists(LINE, max_size=9) | st.lists(LINE, max_size=9).map(" ".join) | TEXTS | OBJECTS)
def sd_cpp_command_line(given: Any) -> None:
    with refusals():
        assert isinstance(parse(given), Method)


FLAGS = ["--network", "--sampler", "--steps", "--methods", "--method", "--other", "--guidance", "--samples", "--batch"]
FLAGS += ["--seed", "--workers", "--class", "--repeats", "--gain", "--device", "--prompt", "--calls", "--speedup"]
FLAGS += ["--psnr", "--frontier", "--budget", "--metric", "--state", "--version", "--help", "-h", "--step"]
ARGUMENTS = ["unet", "dit", "colour", "edm", "uent", "nosuchmodule:f", "math:pi", "math:sqrt", ":", "a:b:c", "euler"]
ARGUMENTS += ["forecast", "forecast:interval=3", "ucache:threshold=0.5,reset=0,static:mask=fast", "cats", "0", "1", "7"]
ARGUMENTS += ["-1", "20", "10", "inf", "nan", "1e400", "9" * 400, "2147483649", "comfyui", "webui", "nowhere", "."]
COMMANDS = ["demo", "bench", "compare", "tune", "install", "tnue"]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    words = st.sampled_from([*ARGUMENTS, *WORDS]) | st.text(max_size=5)
    pairs = st.tuples(st.sampled_from(FLAGS), words).map(list) | st.tuples(words).map(list)
    return [*draw(st.lists(st.sampled_from(COMMANDS), max_size=1)), *chain(*draw(st.lists(pairs, max_size=4)))]


@cache
def nowhere() -> Path:
    return Path(tempfile.mkdtemp(prefix="stepcache-fuzz-"))


@cache
def drawn_once(subject: Callable[..., Any]) -> Callable[..., Any]:
    """Networks are loaded once, not for every line."""
    return cache(subject)


@target(command_lines())
def own_command_line(given: list[str]) -> None:
    """A wrong line ends with a status and a sentence, never with a traceback. What would take long is not done."""
    from stepcache import bench, cli
    from stepcache.demo import named, sampling, zoo
    from stepcache.demo import run as demo

    out, said = nowhere(), io.StringIO()
    line = [*given, "--out", str(out / ("p.html" if "compare" in given[:1] else "out"))]
    done = mock.Mock(name="done", spec=["show", "save", "table"])
    quiet = [
        mock.patch.object(bench, "bench", return_value=done),
        mock.patch.object(bench, "compare", return_value=done),
        mock.patch.object(demo, "demo"),
        mock.patch.object(cli.command, "run"),
        mock.patch.object(sampling, "subject", return_value=done),
        mock.patch.object(zoo, "subject", drawn_once(zoo.subject)),
        mock.patch.object(named, "pipeline", return_value=mock.Mock(schedulers={"own": None})),
        mock.patch.dict(cli.HOSTS, {"comfyui": lambda path: ["done"]}, clear=False),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ]
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in quiet:
            stack.enter_context(one)
        try:
            status = cli.main(given if "install" in given[:1] else line)
        except SystemExit as end:
            status = end.code
    assert status in (0, 1, 2), status
    assert status == 0 or len(said.getvalue().split()) > 3, f"no sentence: {said.getvalue()}"


# Configurations

FIELD = st.sampled_from([*FIELDS, *NEUTRAL, "cache_config", "quantize_config", "x", 1, None, (1, 2)]) | st.text(
    max_size=5
)
FLAT = st.dictionaries(FIELD, VALUES | st.sampled_from(["DBCache", "NONE", "residual", "hidden_states"]), max_size=5)


@target(FLAT | FLAT.map(lambda fields: {"cache_config": fields}) | OBJECTS.map(lambda value: {"cache_config": value}))
def configuration(given: Any) -> None:
    with refusals():
        assert isinstance(load_config(given)["method"], Method)


YAML = [
    "\n",
    "\n  ",
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "!!",
    "!!bool ",
    "!!python/object:os.system ",
    "<<: ",
]
YAML += [
    "? ",
    "| ",
    "> ",
    "2024-01-01",
    "1" * 310,
    "1e9",
    ".inf",
    "0x",
    "0o7",
    "\t",
    "#",
    "%",
    "@",
    "---\n",
    "...",
    "''",
]
YAML += ["...", "''", *FIELDS[:6], "cache_config", "fast", "true", "null", "~", "1101", "\ufeff", "\x85", "\x00"]
LINES = st.tuples(
    st.sampled_from([*FIELDS, *NEUTRAL]), st.sampled_from([*YAML, "1", "0.5", "fast"]) | st.text(max_size=6)
)
PIECES = st.lists(st.sampled_from(YAML), max_size=12).map("".join)


@target(
    st.tuples(
        st.sampled_from([".yaml", ".json"]),
        (PIECES | st.lists(LINES.map(": ".join), max_size=5).map("\n".join)).map(lambda t: t.encode("utf-8", "replace"))
        | FLAT.map(lambda fields: json.dumps(fields, default=str, skipkeys=True).encode())
        | st.binary(max_size=40),
    )
)
def configuration_file(given: tuple[str, bytes]) -> None:
    suffix, data = given
    path = nowhere() / f"configuration{suffix}"
    path.write_bytes(data)
    with refusals():
        assert isinstance(load_config(path)["method"], Method)


# Masks

DIGITS = st.text("01, fsmu2\n", max_size=20) | st.lists(st.integers(0, 1), max_size=20) | VALUES
POLICIES = st.sampled_from(["dynamic", "static", "dynamc", "", None, 1])


@target(st.tuples(DIGITS, POLICIES, VALUES))
def mask(given: Any) -> None:
    entries, policy, steps = given
    with refusals():
        digits = StepMask(entries, policy).for_steps(steps)
        assert len(digits) == steps
        assert set(digits) <= {0, 1}


@target(st.tuples(VALUES, VALUES, POLICIES))
def mask_preset(given: Any) -> None:
    name, steps, policy = given
    with refusals():
        assert isinstance(StepMask.preset(name if isinstance(name, str) else "fast", steps, policy), StepMask)


BINS = st.lists(st.integers(-1, 9) | OBJECTS, max_size=5) | OBJECTS


@target(st.tuples(BINS, BINS))
def mask_bins(given: Any) -> None:
    with refusals():
        assert isinstance(StepMask.bins(*given), StepMask)


# Profiles

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SOUND = st.integers(0, 2)
PREDICTION = st.fixed_dictionaries(
    {"order": SOUND, "share": st.floats(0, 1)},
    optional={
        "from": st.lists(st.integers(0, 12), max_size=4),
        "derivative": st.lists(st.floats(-9, 9), max_size=4),
        "denoised": st.lists(st.floats(-9, 9), max_size=4),
    },
)


@st.composite
def profiles(draw: st.DrawFn) -> bytes:
    """A sound profile in which up to two places hold something else."""
    digits = "1" + draw(st.text("01", min_size=1, max_size=9))
    skipped = {str(j): draw(PREDICTION) for j, digit in enumerate(digits) if digit == "0"}
    known: dict[str, Any] = {"format": FORMAT, "computed": digits, "skipped": skipped, "sampler": "euler"}
    known |= {"guidance": {"cond": 1.0}, "measured": {}, "versions": {"torch": "2"}}
    known |= {"schedule": draw(st.lists(st.floats(0, 20), max_size=12))}
    known |= {"model": draw(st.none() | st.just({"class": "Toy", "shapes": "", "weights": [1.0]}) | JUNK)}
    for _ in range(draw(st.integers(0, 2))):
        inside = draw(st.sampled_from([known, skipped, *(one for one in skipped.values() if isinstance(one, dict))]))
        key = draw(st.sampled_from([*inside, "x"]) | st.text(max_size=3))
        inside[key] = draw(JUNK | st.floats() | st.sampled_from([10**400, -1, 3, "1" * 3000, "10", [[]], {"1": {}}]))
    return json.dumps(known).encode()


@target(profiles() | JUNK.map(lambda junk: json.dumps(junk).encode()) | st.binary(max_size=60))
def profile(given: bytes) -> None:
    path = nowhere() / "profile.json"
    path.write_bytes(given)
    with refusals():
        known = Profile.read(given)
        for evaluations in (2, 3, 7, 40):
            assert known.scaled(evaluations).evaluations == evaluations
        known.save(path)
        assert Profile.load(path).computed == known.computed
        lasts(load_profile(path))


VALUES = (
    st.floats() | st.integers() | st.booleans() | st.text(max_size=5) | st.sampled_from(["fast", "1/1.1", 0.2, 10**400])
)


@st.composite
def settings(draw: st.DrawFn) -> bytes:
    """A sound file of a published method in which up to two places hold something else."""
    name = draw(st.sampled_from([*METHODS]) | st.text(max_size=5))
    text = name + draw(st.sampled_from(["", "", ":", ":warmup=1", ":mask=101", ":path=x", ":threshold=nan"]))
    keys = st.sampled_from(["threshold", "interval", "ratios", "mask", "start", "gates", "predictor", "path", "dtype"])
    known: dict[str, Any] = {
        "format": FORMAT,
        "method": text,
        "evaluations": draw(st.integers(0, 30)),
        "sampler": "euler",
    }
    known |= {"options": draw(st.dictionaries(keys, VALUES, max_size=2)), "schedule": [3.0, 1.0, 0.0], "measured": {}}
    for _ in range(draw(st.integers(0, 2))):
        known[draw(st.sampled_from([*known, "x"]))] = draw(JUNK | VALUES)
    return json.dumps(known).encode()


@target(settings())
def found(given: bytes) -> None:
    path = nowhere() / "found.json"
    path.write_bytes(given)
    with refusals():
        how = load_profile(path)
        Settings.load(path).save(path)
        assert load_profile(path) == how
        lasts(how)


# Timelines

SIGMAS = st.floats(0, 20) | st.sampled_from([14.6, 10.0, 5.0, 5.0, 1.0, 0.03, 0.0, 0.0]) | st.floats()
FALLING = st.lists(st.floats(0.01, 100), min_size=1, max_size=12).map(lambda s: [*sorted(s, reverse=True), 0.0])
SCHEDULES = FALLING | st.lists(SIGMAS, max_size=8) | OBJECTS | st.lists(OBJECTS, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
EVENTS = (
    st.tuples(st.just("locate"), SIGMAS, DTYPES)
    | st.tuples(st.just("follow"), st.integers(0, 3), DTYPES)
    | st.tuples(st.just("set_step"), st.integers(-2, 12))
    | st.tuples(st.just("announce"), SCHEDULES, st.sampled_from([None, 1, 2, 3, "1"]), st.booleans(), st.booleans())
    | st.tuples(st.sampled_from(["end", "restart"]))
)


@target(st.tuples(st.none() | SCHEDULES, st.lists(EVENTS, max_size=16)))
def timeline(given: Any) -> None:
    """Evaluations count up by one within a run, runs by one; a step is one of the schedule's."""
    schedule, events = given
    positions = []
    with refusals():
        clock = Clock(schedule)
        for kind, *arguments in events:
            if kind in ("locate", "follow"):
                value, dtype = arguments
                if kind == "follow" and clock.schedule is not None:  # what a sampler asks for next
                    value = clock.schedule[min(len(positions) % len(clock.schedule) + value, len(clock.schedule) - 1)]
                if dtype == torch.int64 and not math.isfinite(value):
                    continue
                positions.append(clock.locate(torch.tensor([min(max(value, -1e9), 1e9)], dtype=dtype)))
                step = positions[-1].step
                assert step is None or (step >= 0 and (clock.steps is None or step < clock.steps))
            else:
                with refusals():
                    getattr(clock, kind)(*arguments)
    for before, after in pairwise((one.run, one.evaluation) for one in positions):
        assert after in ((before[0], before[1] + 1), (before[0] + 1, 0))


NAMES = st.sampled_from([*(name for name in METHODS if name not in ("static", "profile")), "static:fast"])


@target(st.tuples(NAMES, st.none() | SCHEDULES, st.lists(SIGMAS, max_size=14), st.sampled_from([None, 1, 2])))
def sampling_loop(given: Any) -> None:
    """Any sigmas, with any schedule: every evaluation is answered with a tensor of x's shape."""
    name, schedule, asked, stages = given
    with refusals():
        chosen = method("static", "mask=fast") if name == "static:fast" else method(name)
        model = cached(twice, chosen)
        with model.run(schedule, stages):
            for k, sigma in enumerate(asked):
                sigma = torch.tensor([sigma], dtype=torch.float64).float()
                assert model(filled(k), sigma).shape == (1, 1, 2, 2)
