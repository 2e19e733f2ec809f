"""Step masks: their forms, their errors, and the presets at every number of steps from 1 to 1,000."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepcache import Method, OptionError, StepMask

PUBLISHED = {
    "slow": "1111111101110011100110010001",
    "medium": "1111110110001100011000110001",
    "fast": "1111110100010000100000100001",
    "ultra": "1111001000001000000100000001",
}
"""cache-dit 1.5.0, at 28 steps."""

TOO_FEW_STEPS = {"slow": [], "medium": [], "fast": [2, 4, 5], "ultra": [2, 3, 4, 5, 6, 8, 10]}
"""Where no mask keeps both the share and the bound on runs of zeros; the bound is kept."""


@cache
def digits(name: str, steps: int) -> str:
    return "".join(map(str, StepMask(name).for_steps(steps)))


def computed(name: str, steps: int) -> int:
    return digits(name, steps).count("1")


def longest_zeros(text: str) -> int:
    return max(len(zeros) for zeros in text.split("1"))


def bound(name: str, steps: int) -> int:
    return math.ceil(longest_zeros(PUBLISHED[name]) * steps / 28)


def excess(name: str, steps: int, count: int) -> float:
    return abs(count - PUBLISHED[name].count("1") * steps / 28)


@pytest.mark.parametrize(
    "form",
    [
        "1,1,0,1,0,1",
        "110101",
        " 1, 1 ,0,1,0,1 ",
        "1,1,0,1,0,1,",
        [1, 1, 0, 1, 0, 1],
        (1, 1, 0, 1, 0, 1),
        [True, True, False, True, False, True],
        ["1", "1", "0", "1", "0", "1"],
        torch.tensor([1, 1, 0, 1, 0, 1]),
    ],
    ids=str,
)
def test_every_form_of_a_mask_means_the_same(form):
    assert StepMask(form).for_steps(6) == (1, 1, 0, 1, 0, 1)
    assert StepMask(form) == StepMask("110101")
    assert Method(mask=form).mask == StepMask("110101")


def test_one_digit_is_a_mask():
    assert StepMask("1").for_steps(1) == (1,)
    assert StepMask("0,").for_steps(1) == (0,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_at_28_steps_are_the_published_ones(name):
    assert digits(name, 28) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("spelling", [str, str.upper, str.title, lambda name: f" {name} ", lambda name: name[0]])
def test_presets_go_by_name_or_first_letter_in_any_case(name, spelling):
    assert StepMask(spelling(name)) == StepMask(name)
    assert StepMask.preset(spelling(name)) == StepMask(name)


def test_a_preset_for_a_number_of_steps_is_the_digits():
    assert StepMask.preset("fast", 28) == StepMask(PUBLISHED["fast"])
    assert StepMask.preset("f", 28, "static") == StepMask(PUBLISHED["fast"], "static")
    assert str(StepMask.preset("fast", 28, "static")) == f"{PUBLISHED['fast']} (static)"
    assert str(StepMask("f")) == "fast (dynamic)"


def test_bins_alternate_and_end_computed():
    assert StepMask.bins([3, 1, 1], [2, 2]) == StepMask("111001001")
    assert StepMask.bins([2, 1], [1, 3], "static") == StepMask("1101001", "static")
    assert StepMask.bins([2], []) == StepMask("11")


def test_policy_is_dynamic_unless_said():
    assert StepMask("10").policy == "dynamic"
    assert StepMask("10") != StepMask("10", "static")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepMask("1102"), r"entry 4 is '2': accepted is 1 \(compute\) or 0 \(may be skipped\)"),
        (lambda: StepMask("1,,1"), "entry 2 is ''"),
        (lambda: StepMask("1,0,,"), "entry 3 is ''"),
        (lambda: StepMask([1, 0.5]), r"entry 2 is '0\.5'"),
        (lambda: StepMask([1, -1]), "entry 2 is '-1'"),
        (lambda: StepMask(""), "the mask is empty"),
        (lambda: StepMask([]), "the mask is empty"),
        (lambda: StepMask(5), "^mask=5: accepted are text, a list of 0 and 1, and a preset .slow, medium, fast, ultra"),
        (lambda: StepMask(None), "^mask=None: accepted are text"),
        (lambda: Method(mask=1.5), r"^mask=1\.5: accepted are text"),
        (lambda: StepMask("1" * 1001), "more than 1000 entries: accepted are 1 to 1000"),
        (lambda: StepMask("fats"), "Did you mean 'fast'.*slow, medium, fast, ultra"),
        (lambda: StepMask("10", "statik"), "unknown policy 'statik'. Did you mean 'static'"),
        (lambda: StepMask.preset("slowly", 9), "Did you mean 'slow'"),
        (lambda: StepMask.preset("slow", 0), "steps=0: .*whole number from 1 to 1000"),
        (lambda: StepMask.preset("slow", 1001), "steps=1001"),
        (lambda: StepMask.preset("slow", 9.5), r"steps=9\.5"),
        (lambda: StepMask.bins([1, 1], [1, 1, 1]), "2 compute bins and 3 cache bins"),
        (lambda: StepMask.bins([1, 1, 1], [1]), "3 compute bins and 1 cache bins"),
        (lambda: StepMask.bins([], []), "0 compute bins"),
        (lambda: StepMask.bins([1, 0], [1]), "compute bin=0"),
        (lambda: StepMask.bins([1, 1], [0]), "cache bin=0"),
        (lambda: StepMask.bins([1, 1.5], [2]), r"compute bin=1\.5"),
        (lambda: StepMask.bins(5, [2]), "^compute=5: accepted is a list of run lengths"),
        (lambda: StepMask.bins([1], None), "^cache=None: accepted is a list of run lengths"),
        (lambda: StepMask.bins([10**9], []), "compute bin=1000000000: accepted is a whole number from 1 to 1000"),
        (lambda: StepMask.bins([999, 2], [1]), "the compute bins have 1000 steps and more"),
        (lambda: StepMask(range(10**18)), "entry 3 is '2'"),
        (lambda: StepMask(itertools.repeat(1)), "more than 1000 entries"),
        (lambda: StepMask([torch.ones(2)]), r"entry 1 is 'tensor\(\[1., 1.\]\)'"),
        (lambda: StepMask.preset("fast", []), r"^steps=\[\]: accepted is a whole number from 1 to 1000"),
    ],
)
def test_what_is_no_mask_is_an_error_that_says_what_is(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_a_mask_of_another_length_names_both_lengths():
    with pytest.raises(OptionError, match=r"the mask has 4 entries, the run has 20 steps.*slow, medium, fast, ultra"):
        StepMask("1101").for_steps(20)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_compute_the_first_and_the_last_step_at_every_length(name):
    for steps in range(1, 1001):
        text = digits(name, steps)
        assert len(text) == steps
        assert text[0] == text[-1] == "1", steps


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_longest_run_of_zeros_never_outgrows_the_published_share(name):
    for steps in range(1, 1001):
        assert longest_zeros(digits(name, steps)) <= bound(name, steps), steps


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_keep_their_share_within_one_step_wherever_that_is_possible(name):
    missed = [steps for steps in range(1, 1001) if excess(name, steps, computed(name, steps)) > 1]
    assert missed == TOO_FEW_STEPS[name]


@pytest.mark.parametrize(("name", "steps"), [(name, n) for name, few in TOO_FEW_STEPS.items() for n in few])
def test_where_a_preset_misses_its_share_every_mask_would(name, steps):
    inner = itertools.product("01", repeat=steps - 2)
    masks = ("1" + "".join(middle) + "1" for middle in inner)
    bounded = [mask for mask in masks if longest_zeros(mask) <= bound(name, steps)]
    assert bounded
    assert all(excess(name, steps, mask.count("1")) > 1 for mask in bounded)
    assert computed(name, steps) == min(mask.count("1") for mask in bounded)


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_more_step_changes_the_computed_ones_by_at_most_one(name):
    counts = [computed(name, steps) for steps in range(1, 1001)]
    assert {b - a for a, b in itertools.pairwise(counts)} <= {-1, 0, 1}


def test_faster_presets_never_compute_more():
    for steps in range(1, 1001):
        counts = [computed(name, steps) for name in ("slow", "medium", "fast", "ultra")]
        assert counts == sorted(counts, reverse=True), steps


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=60))
def test_digits_survive_every_spelling(entries):
    plain = "".join(map(str, entries))
    for form in (plain, ",".join(plain), ",".join(plain) + ",", entries, tuple(entries)):
        mask = StepMask(form, "static")
        assert mask.for_steps(len(entries)) == tuple(entries)
        assert str(mask) == f"{plain} (static)"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8), st.booleans())
def test_bins_are_run_lengths(pairs, ends_in_zeros):
    compute, cache = zip(*pairs, strict=True)
    cache = cache if ends_in_zeros else cache[:-1]
    mask = StepMask.bins(compute, cache)
    groups = [(digit, len(list(group))) for digit, group in itertools.groupby(mask.mask)]
    given_back = list(itertools.chain(*itertools.zip_longest(((1, n) for n in compute), ((0, n) for n in cache))))
    expected = [group for group in given_back if group is not None]
    if ends_in_zeros:
        last = expected.pop()[1]
        if last > 1:
            expected += [(0, last - 1), (1, 1)]
        else:
            expected[-1] = (1, expected[-1][1] + 1)
    assert groups == expected
    assert mask.mask[-1] == 1
