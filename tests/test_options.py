"""Options as text and as keywords: what is accepted gives the published values, all else an error that says what is."""

from __future__ import annotations

import inspect
import json
import math
import re
import string
import warnings
from collections.abc import Callable
from datetime import date
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SIX, cached, drive, twice

from stepcache import (
    METHODS,
    EasyCache,
    Forecast,
    Method,
    Off,
    OptionError,
    Spectrum,
    Static,
    StepMask,
    TaylorSeerCache,
    UCache,
    method,
)
from stepcache.experimental import ToleranceRule
from stepcache.extend import (
    DMD,
    PRESETS,
    AdaptiveOrder,
    FiniteDifference,
    Interval,
    Lagrange,
    UCacheRule,
    accepted_options,
)

CLI = json.loads((Path(__file__).parent / "data" / "golden.json").read_text(encoding="utf-8"))["tables"]["cli"]
DEFAULTS = {
    "ucache": {"threshold": 1.0, "start": 0.15, "end": 0.95, "decay": 1.0, "relative": True, "reset": True},
    "easycache": {"threshold": 0.2, "start": 0.15, "end": 0.95},
}

STRICTER = {
    "threshold=0.25abc": "threshold='0.25abc': accepted is a number",
    "threshold=0.25=3": "threshold='0.25=3': accepted is a number",
    "threshold=0.25;reset=0": "threshold='0.25;reset=0': accepted is a number",
    "threshold=0x1p-2": "threshold='0x1p-2': accepted is a number",
    "threshold=1,threshold=2": "threshold='2': the option is given twice",
    "threshold=nan": "threshold=nan: accepted is a number of at least 0",
    "start=nan": "start=nan: accepted is a number from 0 to 1",
    "relative=0.5": "relative='0.5': accepted is 0 or 1",
    "reset=nan": "reset='nan': accepted is 0 or 1",
    "decay=2": "decay=2.0: accepted is a number from 0 to 1",
    "decay=-1": "decay=-1.0: accepted is a number from 0 to 1",
    "w=0.5,window=4": "unknown option 'w'.",
    "Fn=4": "unknown option 'Fn'.",
    "decay=0.5": "unknown option 'decay'.",
}
"""Accepted by the original, refused here, and how the refusal begins. `decay=0.5` is a row of easycache."""

OTHERWISE = {"threshold=inf", "warmup=3"}
"""Accepted by both, with another meaning."""

LOOSER = {
    " threshold=0.25": {"threshold": 0.25},
    "threshold =0.25": {"threshold": 0.25},
    "threshold=1e50": {"threshold": 1e50},
    "relative=true": {"relative": True},
}
"""Refused by the original, accepted here."""

pytestmark = pytest.mark.filterwarnings("ignore:UCache with reset=0 and decay=1")


def options_of(chosen: Method) -> dict[str, Any]:
    """Every option of the method's own, as its signature names them."""
    names = [
        key for key, p in inspect.signature(METHODS[chosen.name]).parameters.items() if p.kind is not p.VAR_KEYWORD
    ]
    return {key: getattr(chosen if hasattr(chosen, key) else chosen.criterion, key) for key in names}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_method_without_options_has_the_published_defaults(name):
    assert options_of(method(name)) == DEFAULTS[name]


@pytest.mark.parametrize(
    ("name", "text", "changed"),
    [row[:2] + row[3:] for row in CLI if row[2] and row[1] not in {*STRICTER, *OTHERWISE}],
)
def test_text_that_the_original_accepts_gives_its_values(name, text, changed):
    assert options_of(method(name, text)) == pytest.approx(DEFAULTS[name] | changed, rel=1e-6)


@pytest.mark.parametrize(("name", "text"), [row[:2] for row in CLI if not row[2] and row[1] not in LOOSER])
def test_text_that_the_original_refuses_is_refused(name, text):
    with pytest.raises(OptionError):
        method(name, text)


@pytest.mark.parametrize("text", STRICTER)
def test_text_that_the_original_misreads_is_refused(text):
    """Where we are stricter than stable-diffusion.cpp, on purpose; it

    - reads the number at the beginning and drops the rest: `0.25abc`, `0.25=3`, `0.25;reset=0` (reset stays 1);
    - lets the second of two equal keys win;
    - takes NaN as threshold (nothing is then skipped), as start (the cache is then dropped) and as a 1 for booleans,
      as any number but 0 is;
    - takes a decay outside 0 to 1, of which one above 1 grows without bound and one below 0 alternates;
    - takes options of other methods and ignores them: w, window and Fn for ucache, decay for easycache.

    Hexadecimal numbers are refused because nobody writes them on purpose.
    """
    name = next(row[0] for row in CLI if row[1] == text and row[2])
    with pytest.raises(OptionError, match="^" + re.escape(STRICTER[text])):
        method(name, text)


@pytest.mark.parametrize(("text", "options"), LOOSER.items())
def test_text_that_the_original_refuses_needlessly_is_accepted(text, options):
    """Where we are looser: spaces around keys, true and false for 1 and 0, and numbers beyond float32."""
    assert [row[2] for row in CLI if row[1] == text] == [False]
    assert options_of(method("ucache", text)) == DEFAULTS["ucache"] | options


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_infinite_threshold_is_infinite(name):
    """Different: in the original it stands for the method's default; here, for skipping all it can."""
    assert [name, "threshold=inf", True, {}] in CLI
    assert method(name, "threshold=inf").criterion.threshold == math.inf


def test_a_warm_up_is_one_for_every_method():
    """Different: the original reads it for other methods of its own and ignores it for ucache; here it acts."""
    assert ["ucache", "warmup=3", True, {"max_warmup_steps": 3}] in CLI
    assert method("ucache", "warmup=3") == UCache(warmup=3)


@pytest.mark.parametrize(
    ("name", "text", "same"),
    [
        ("ucache", "max_cached=4,max_consecutive=2", UCache(max_cached=4, max_consecutive=2)),
        ("ucache", "max_cached=-1,max_consecutive=0", UCache(max_consecutive=0)),
        ("ucache", "last_step=1", UCache(last_step=True)),
        ("ucache", "last_step=false", UCache()),
        ("ucache", "window=training", UCache(window="training")),
        ("ucache", "evaluations=second,threshold=1.5", UCache(1.5, evaluations="second")),
        ("ucache", "mask=110101", UCache(mask=[1, 1, 0, 1, 0, 1])),
        ("easycache", "window=steps", EasyCache(window="steps")),
        ("easycache", " mask = Fast , warmup = 2 ,", EasyCache(mask="fast", warmup=2)),
        ("static", "mask=fast", Static("fast")),
        ("static", "mask=1101,max_cached=1", Static("1101", max_cached=1)),
    ],
)
def test_the_options_common_to_all_methods_can_be_written_as_text(name, text, same):
    assert method(name, text) == same


@pytest.mark.parametrize(
    "text",
    [
        "threshold=1.5,reset=0,relative=0",
        " threshold = 1.5 , reset = 0 , relative = 0 , ",
        "threshold=1.5,reset=false,relative=False",
        "relative=0,threshold=15e-1,reset=0,",
    ],
)
def test_spaces_order_spelling_and_a_trailing_comma_do_not_matter(text):
    assert method("ucache", text) == UCache(threshold=1.5, reset=False, relative=False)


@pytest.mark.parametrize("text", ["", " "])
def test_empty_text_changes_nothing(text):
    assert method("easycache", text) == EasyCache()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: method("ucahce"), "unknown method 'ucahce'. Did you mean 'ucache'?"),
        (lambda: method("EasyCache"), "unknown method 'EasyCache'. Did you mean 'easycache'?"),
        (lambda: method("ucache", "treshold=1"), "unknown option 'treshold'. Did you mean 'threshold'?"),
        (lambda: method("ucache", "Threshold=1"), "unknown option 'Threshold'. Did you mean 'threshold'?"),
        (lambda: method("easycache", "strat=0.1"), "unknown option 'strat'. Did you mean 'start'?"),
        (lambda: method("ucache", treshold=1), "unknown option 'treshold'. Did you mean 'threshold'?"),
        (
            lambda: method("ucache", max_consecutiv=2),
            "unknown option 'max_consecutiv'. Did you mean 'max_consecutive'?",
        ),
        (lambda: method("static", mask="fast", treshold=1), "unknown option 'treshold'."),
        (lambda: StepMask("fsat"), "unknown mask preset 'fsat'. Did you mean 'fast'?"),
        (lambda: StepMask("fast", policy="dynamc"), "unknown policy 'dynamc'. Did you mean 'dynamic'?"),
        (lambda: UCache(window="step"), "unknown window unit 'step'. Did you mean 'steps'?"),
        (lambda: UCache(evaluations="secnd"), "unknown evaluations 'secnd'. Did you mean 'second'?"),
        (lambda: method(None), "unknown method 'None'. Did you mean 'none'?"),
        (lambda: method(3), "unknown method '3'."),
        (lambda: method("ucache", "max_consecutiv=2"), "unknown option 'max_consecutiv'. Did you mean 'max_consec"),
        (lambda: method("ucache", "window=stepz"), "unknown window unit 'stepz'. Did you mean 'steps'?"),
        (lambda: method("ucache", "evaluations=secnd"), "unknown evaluations 'secnd'. Did you mean 'second'?"),
        (lambda: method("easycache", "mask=fsat"), "unknown mask preset 'fsat'. Did you mean 'fast'?"),
        (lambda: UCache(treshold=1), "unknown option 'treshold'. Did you mean 'threshold'?"),
        (lambda: UCache(warm_up=3), "unknown option 'warm_up'. Did you mean 'warmup'?"),
        (lambda: UCache(1.5, steps=20), "unknown option 'steps'."),
        (lambda: EasyCache(max_cache=3), "unknown option 'max_cache'. Did you mean 'max_cached'?"),
        (lambda: EasyCache(decay=0.9), "unknown option 'decay'."),
        (lambda: Static("fast", polcy="static"), "unknown option 'polcy'."),
        (lambda: Static(msk="fast"), "unknown option 'msk'. Did you mean 'mask'?"),
        (lambda: Static("fast", threshold=1), "unknown option 'threshold'."),
        (lambda: Off(warmup=3), "unknown option 'warmup'."),
        (lambda: UCache(name="mine"), "unknown option 'name'."),
        (lambda: EasyCache(criterion=None), "unknown option 'criterion'."),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(call, message):
    with pytest.raises(OptionError, match="^" + re.escape(message)):
        call()


def test_an_unknown_name_near_nothing_gets_the_names_there_are():
    with pytest.raises(OptionError) as refusal:
        method("xyz")
    names = [*METHODS]
    assert (names[0], names[-1]) == ("forecast", "none")
    assert str(refusal.value) == f"unknown method 'xyz'. Accepted: {', '.join(names)}."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threshold", "option 'threshold' has no '='. Write options as key=value, separated by commas."),
        ("0.3,0.1,0.9", "option '0.3' has no '='."),
        (",threshold=1", "option '' has no '='."),
        ("threshold=1,,reset=0", "option '' has no '='."),
        ("threshold=", "threshold='': accepted is a number"),
        ("threshold=high", "threshold='high': accepted is a number"),
        ("threshold=-1", "threshold=-1.0: accepted is a number of at least 0"),
        ("start=-0.1", "start=-0.1: accepted is a number from 0 to 1"),
        ("end=1.01", "end=1.01: accepted is a number from 0 to 1"),
        ("start=0.5,end=0.5", "start=0.5, end=0.5: the window is empty; accepted is start < end, from 0 to 1"),
        ("start=0.96", "start=0.96, end=0.95: the window is empty; accepted is start < end, from 0 to 1"),
        ("start=0.7,start=0.2", "start='0.2': the option is given twice"),
        ("threshold=1_0", "threshold='1_0': accepted is a number"),
        ("threshold=1_0.5", "threshold='1_0.5': accepted is a number"),
        ("warmup=1_0", "warmup='1_0': accepted is a whole number"),
        ("warmup=2.0", "warmup='2.0': accepted is a whole number"),
        ("warmup=-1", "warmup=-1: accepted is a whole number of at least 0"),
        ("max_cached=all", "max_cached='all': accepted is a whole number"),
        ("max_cached=-2", "max_cached=-2: accepted is a whole number of at least -1"),
        ("last_step=2", "last_step='2': accepted is 0 or 1"),
        ("mask=12", "mask entry 2 is '2': accepted is 1 (compute) or 0 (may be skipped)"),
        ("mask=", "the mask is empty"),
        ("window=", "unknown window unit ''."),
        ("evaluations=", "unknown evaluations ''."),
        ("predictor=reuse", "unknown option 'predictor'."),
        ("gates=1", "unknown option 'gates'."),
        ("name=mine", "unknown option 'name'."),
        ("criterion=always", "unknown option 'criterion'."),
        ("reset=2", "reset='2': accepted is 0 or 1"),
        ("reset=", "reset='': accepted is 0 or 1"),
    ],
)
def test_text_that_cannot_be_accepted_is_named_with_what_can(text, message):
    with pytest.raises(OptionError, match="^" + re.escape(message)):
        method("ucache", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.5}, "threshold=-0.5: accepted is a number of at least 0"),
        ({"threshold": math.nan}, "threshold=nan: accepted is a number of at least 0"),
        ({"threshold": "1.5"}, "threshold='1.5': accepted is a number of at least 0"),
        ({"threshold": None}, "threshold=None: accepted is a number of at least 0"),
        ({"decay": 1.5}, "decay=1.5: accepted is a number from 0 to 1"),
        ({"decay": math.nan}, "decay=nan: accepted is a number from 0 to 1"),
        ({"start": math.nan}, "start=nan: accepted is a number from 0 to 1"),
        ({"start": 0.5, "end": 0.4}, "start=0.5, end=0.4: the window is empty"),
        ({"warmup": -1}, "warmup=-1: accepted is a whole number of at least 0"),
        ({"warmup": 1.5}, "warmup=1.5: accepted is a whole number of at least 0"),
        ({"max_cached": -2}, "max_cached=-2: accepted is a whole number of at least -1"),
        ({"max_cached": math.inf}, "max_cached=inf: accepted is a whole number of at least -1"),
        ({"max_consecutive": 0.5}, "max_consecutive=0.5: accepted is a whole number of at least -1"),
        *[({"relative": bad}, f"relative={bad!r}: accepted is 0 or 1") for bad in (2, 0.5, -1, math.nan, "0", None)],
        *[({"reset": bad}, f"reset={bad!r}: accepted is 0 or 1") for bad in (2, 0.5, -1, math.nan, "0", None)],
        *[({"last_step": bad}, f"last_step={bad!r}: accepted is 0 or 1") for bad in (2, "0", None)],
        ({"mask": 5}, "mask=5: accepted are text, a list of 0 and 1, and a preset (slow, medium, fast, ultra)"),
        ({"window": ""}, "unknown window unit ''."),
    ],
)
def test_a_keyword_that_cannot_be_accepted_is_named_with_its_value(options, message):
    with pytest.raises(OptionError, match="^" + re.escape(message)):
        UCache(**options)


@pytest.mark.parametrize(("given", "meant"), [(0, False), (1, True), (False, False), (True, True), (1.0, True)])
def test_booleans_may_be_given_as_0_and_1(given, meant):
    same = UCache(relative=meant, reset=meant, last_step=meant, decay=0.9)
    assert UCache(relative=given, reset=given, last_step=given, decay=0.9) == same
    for rule in (same.criterion, UCache(relative=given, reset=given).criterion):
        assert (rule.relative, rule.reset) == (meant, meant)
        assert {type(rule.relative), type(rule.reset)} == {bool}


def test_a_static_mask_cannot_be_left_out():
    for call in (Static, lambda: method("static"), lambda: method("static", "warmup=3")):
        with pytest.raises(OptionError, match="mask"):
            call()


def test_easycache_refuses_what_ucache_refuses():
    with pytest.raises(OptionError, match=r"^threshold=-1: accepted is a number of at least 0$"):
        EasyCache(threshold=-1)
    with pytest.raises(OptionError, match=r"^start=1, end=0.95: the window is empty"):
        EasyCache(start=1)


def test_text_and_keywords_combine_but_not_on_one_option():
    assert method("ucache", "threshold=1.5", mask="fast", reset=False, decay=0.9) == UCache(
        threshold=1.5, mask="fast", reset=False, decay=0.9
    )
    with pytest.raises(OptionError, match=r"^threshold: given both as text and as keyword$"):
        method("ucache", "threshold=1.5", threshold=1.5)


def test_every_published_name_gives_its_method():
    assert method("ucache") == UCache()
    assert method("easycache") == EasyCache()
    assert method("static", mask="1101") == Static([1, 1, 0, 1])
    assert method("none") == Off()


def test_off_takes_no_options():
    with pytest.raises(OptionError, match=r"^unknown option 'threshold'\."):
        method("none", "threshold=1")
    with pytest.raises(OptionError, match=r"^unknown option 'mask'\."):
        method("none", mask="fast")


def test_but_changes_only_what_it_names():
    assert UCache(threshold=1.5, decay=0.9).replace(mask="fast", warmup=3) == UCache(
        threshold=1.5, decay=0.9, mask="fast", warmup=3
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda: UCache(reset=False),
        lambda: method("ucache", "reset=0"),
        lambda: method("ucache", "threshold=2", reset=0),
        lambda: UCacheRule(reset=False),
    ],
    ids=["UCache", "text", "keyword", "rule"],
)
def test_reset_0_with_decay_1_says_so_where_it_was_written(write):
    with pytest.warns(UserWarning) as said:  # noqa: PT030
        write()
    assert [str(warning.message) for warning in said] == [
        "UCache with reset=0 and decay=1: the error only grows, so after the first failed test little or nothing is "
        "skipped. Set decay below 1 (0.9, say), or keep reset=1."
    ]
    assert (said[0].filename, said[0].lineno) == (__file__, write.__code__.co_firstlineno)


@pytest.mark.parametrize("text", ["reset=0,decay=0.9", "reset=0,decay=0", "decay=1", "reset=0,threshold=0"])
def test_nothing_is_said_about_a_reset_that_can_act(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method("ucache", text)


SHARES = st.floats(0, 1)
WINDOWS = st.tuples(SHARES, SHARES).filter(lambda w: w[0] < w[1]).map(lambda w: {"start": w[0], "end": w[1]})
COMMON = {
    "warmup": st.integers(0, 50),
    "max_cached": st.integers(-1, 50),
    "max_consecutive": st.integers(-1, 50),
    "last_step": st.booleans(),
    "window": st.sampled_from(["steps", "training"]),
    "evaluations": st.sampled_from(["all", "second"]),
    "mask": st.sampled_from(["slow", "f", "ULTRA", "1101", "0"]),
}
OWN = {
    "ucache": {"threshold": st.floats(0), "decay": SHARES, "relative": st.booleans(), "reset": st.booleans()},
    "easycache": {"threshold": st.floats(0)},
}
SPACES = st.sampled_from(["", " ", "  ", "\t"])


@st.composite
def written(draw: st.DrawFn, name: str) -> tuple[dict[str, Any], str]:
    """Options that the method accepts, and one of the ways to write them."""
    options = draw(st.fixed_dictionaries({}, optional=OWN[name] | COMMON)) | draw(st.just({}) | WINDOWS)
    pieces = []
    for key in draw(st.permutations(list(options))):
        value = options[key]
        text = draw(st.sampled_from([str(int(value)), str(value)])) if isinstance(value, bool) else str(value)
        spaces = [draw(SPACES) for _ in range(4)]
        pieces.append(f"{spaces[0]}{key}{spaces[1]}={spaces[2]}{text}{spaces[3]}")
    return options, ",".join(pieces) + (draw(st.sampled_from(["", ","])) if pieces else "")


@settings(deadline=None)
@given(written("ucache"))
def test_ucache_options_survive_being_written_as_text(pair):
    options, text = pair
    assert method("ucache", text) == UCache(**options)


@settings(deadline=None)
@given(written("easycache"))
def test_easycache_options_survive_being_written_as_text(pair):
    options, text = pair
    assert method("easycache", text) == EasyCache(**options)


PIECES = st.sampled_from(
    [
        "threshold",
        "start",
        "end",
        "decay",
        "reset",
        "mask",
        "window",
        "warmup",
        "evaluations",
        "last_step",
        "max_cached",
        "=",
        ",",
        "-",
        "0",
        "1",
        ".5",
        "e",
        "inf",
        "nan",
        "_",
        "٣",
        " ",
    ]
)
NOISE = st.text() | st.text(string.printable) | st.lists(PIECES, max_size=12).map("".join)


def accepted_or_refused(call: Callable[[], Any]) -> Any:
    """What the call returns; None where it refuses with a sentence. Any other error passes through."""
    try:
        return call()
    except OptionError as refusal:
        return None if len(str(refusal).split()) > 3 else refusal


@settings(deadline=None)
@given(NOISE)
@pytest.mark.parametrize("name", METHODS)
def test_any_text_is_accepted_or_refused_with_a_sentence(name, text):
    mask = {"mask": "fast"} if name == "static" else {}
    accepted = accepted_or_refused(lambda: method(name, text, **mask))
    assert accepted is None or accepted.name == name


@settings(deadline=None)
@given(NOISE)
def test_any_method_name_is_known_or_refused_with_a_sentence(name):
    accepted = accepted_or_refused(lambda: method(name))
    assert accepted is None or accepted.name == name


@settings(deadline=None)
@given(NOISE)
def test_any_mask_text_is_accepted_or_refused_with_a_sentence(text):
    accepted = accepted_or_refused(lambda: StepMask(text))
    assert accepted is None or accepted.mask in PRESETS or set(accepted.mask) <= {0, 1}


@pytest.mark.parametrize("make", [Method, Forecast, Spectrum, partial(TaylorSeerCache, interval=2)])
@pytest.mark.parametrize("gates", [Interval(2), 5, (Interval(2), "every"), (Interval,)])
def test_gates_that_are_none_are_named(make, gates):
    with pytest.raises(
        OptionError, match=r"gates=.*: accepted are objects of classes made from Gate, in a tuple or a l"
    ):
        make(gates=gates)


VALUES = st.sampled_from(
    [[], {}, (), object(), 10**400, -(10**400), 10**300, 10**20, 10**6, math.nan, math.inf, -math.inf]  # noqa: RUF005
    + [-1, 0, 1, 2, 0.5, 1e308, "x", "", b"x", None, date(2020, 1, 1), torch.ones(2), torch.ones(1), 1j, [1, 0], [[1]]]
    + [Fraction(1, 3), range(3), True, "fast", "101010", set(), "static", "training", len]
)
EVERY = [(name, option) for name in METHODS for option in accepted_options(name)]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(EVERY), VALUES)
def test_any_value_of_any_option_is_refused_at_once_or_lasts_a_run(which, value):
    name, option = which
    mask = {"mask": "fast"} if name == "static" and option != "mask" else {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        accepted = accepted_or_refused(lambda: method(name, **mask, **{option: value}))
        if not isinstance(accepted, Method):
            return
        sigmas = [2.0**-k for k in range(6)]
        try:
            model = cached(twice, accepted, sigmas=[*sigmas, 0.0])
        except OptionError:
            return  # a mask of another length than the run, or a method that needs a network with blocks
        with model.run([*sigmas, 0.0], 1):
            drive(model, sigmas, range(6))


@pytest.mark.parametrize("predictor", [AdaptiveOrder(2.0), Lagrange(1.0), DMD(4.0, 2.0), FiniteDifference(2.0)])
def test_a_whole_number_may_be_given_as_a_float(predictor):
    model = cached(twice, Forecast(predictor=predictor), sigmas=SIX)
    drive(model, SIX[:-1], range(6))
    assert isinstance(predictor.history_size, int)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spectrum(window_size=math.inf), "window_size=inf: accepted is a number from 1 to 1000"),
        (lambda: Spectrum(flex_window=math.inf), "flex_window=inf: accepted is a number from 0 to 1000"),
        (lambda: Spectrum(m=1000000), "m=1000000: accepted is a whole number from 0 to 64"),
        (lambda: method("taylorseer", "order=1000"), "order=1000: accepted is a whole number from 0 to 64"),
        (lambda: ToleranceRule(tolerance=1e300), "tolerance=1e+300: accepted is a number from 0 to 1e+06"),
        (lambda: method("ucache", f"warmup={'1' * 310}"), "warmup=111111111111111111...1111111111111111111: accepted"),
        (lambda: UCache(warmup=torch.ones(2)), "warmup=tensor([1., 1.]): accepted is a whole number of at least 0"),
        (lambda: UCache(reset=torch.ones(2)), "reset=tensor([1., 1.]): accepted is 0 or 1"),
        (lambda: UCache(threshold=Fraction(1, 3)), "threshold=Fraction(1, 3): accepted is a number of at least 0"),
        (lambda: method("ucache", name="x"), "unknown option 'name'."),
        (lambda: method([]), "unknown method '[]'."),
        (lambda: method("ucache", 5), "options 5: accepted is text, key=value,key=value"),
    ],
)
def test_values_that_could_act_in_mid_run_only_are_refused_at_once(make, message):
    with pytest.raises(OptionError) as refusal:
        make()
    assert str(refusal.value).startswith(message)
