"""The search over choices: where it begins, that nothing it returns is worse than that, and what trials share."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from mixture import mixture

from stepcache.tuning.calibrate import prepared
from stepcache.tuning.choice import Choice
from stepcache.tuning.placement import even, spread
from stepcache.tuning.search import RULES


@contextmanager
def searching(budget=30, sampler="dpmpp_2m"):
    with prepared(mixture(True), sampler, 9, 6, None, budget, None, 1, lambda sentence, spent: None) as (search, _):
        yield search


def test_it_begins_at_the_least_expected_error_and_at_even_places_with_every_rule():
    with searching() as search:
        starts = search.starts(4)
        assert starts[0] == Choice(search.study.placement.best(4)[4])
        assert {one.rule for one in starts if one.places == even(9, 4)} == {None, *RULES}
        assert {one.places for one in starts[1:3]} == {even(9, 4), even(9, 4, 2)}
        assert {one.places for one in starts[1:]} - {even(9, 4), even(9, 4, 2)} < spread(9, 4)
        assert all(len(one.places) == 4 for one in starts)
        assert {len(one.places) for one in search.starts(1)} == {1}


def test_what_it_returns_is_no_worse_than_any_start():
    """Not even with a budget that is spent when the starts are."""
    with searching(budget=1e6) as search:
        starts = search.starts(4)
        best = max(search.study.scored(starts), key=lambda found: found.score)
        assert search.climb(starts, 0.5).score >= best.score
        assert search.climb(starts, 6).score > best.score


def test_a_start_with_a_rule_is_not_searched_around_but_is_what_is_found_if_it_is_best():
    with searching() as search:
        rule, fitted = Choice(even(9, 8), (1, 0.25)), Choice((0,))
        assert search.study.score(rule).score > search.study.score(fitted).score
        spent = search.study.spent
        assert search.climb([rule], 4).choice == rule
        assert search.climb([fitted, rule], 4).choice == rule
        assert search.study.spent == spent


@pytest.mark.parametrize(
    ("one", "other", "since"),
    [
        (Choice((0, 3, 6)), Choice((0, 3, 7)), 5),
        (Choice((0, 3, 6)), Choice((0, 3, 6), returns=((5, 0.7),)), 5),
        (Choice((0, 3, 6), returns=((2, 0.7), (5, 1.4))), Choice((0, 3, 6), returns=((2, 0.7),)), 5),
        (Choice((0, 3, 6)), Choice((0, 3, 6), (1, 0.25)), 0),
        (Choice((0, 1, 6)), Choice((0, 2, 6)), 0),
    ],
)
def test_what_two_trials_share_is_not_run_again(one, other, since):
    assert one.since(other) == other.since(one) == since
    assert one.name != other.name


def test_a_trial_that_shares_its_beginning_is_the_same_as_one_of_its_own():
    first, second = Choice((0, 2, 4, 7)), Choice((0, 2, 4, 7), returns=((6, 0.7), (8, 1.4)))
    with searching() as search:
        search.study.score(first)
        spent = search.study.spent
        shared = search.study.scored([second], first)[0]
        assert search.study.spent - spent == pytest.approx(1 / 9)
    with searching() as search:
        alone = search.study.score(second)
    assert shared.mean == pytest.approx(alone.mean, abs=0.01)
