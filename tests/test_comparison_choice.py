"""The compiler's choice of a comparison: digits and dropped bits by their price."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secure.mpc.comparing import cheapest_compare
from secure.mpc.prices import DEFAULT


@pytest.mark.parametrize(
    ("width", "spare", "thresholds", "digit", "drop"),
    [
        (13, 0, 5, 6, 0),  # two digits of 6 bits instead of three of 4: half of the variables
        (23, 10, 5, 6, 10),
        (23, 11, 5, 6, 10),  # no more is dropped than saves something
        (23, 12, 5, 5, 12),  # GeLU of |x| < 28: two digits of 5 bits, whose codes share a word
        (24, 12, 5, 6, 11),  # GeLU of |x| < 60
        (17, 0, 1, 4, 0),  # one threshold: four digits in one word, as more words would cost more than they save
        (17, 0, 5, 6, 0),
        (25, 0, 1, 6, 0),  # in one round with four digits of 6 bits, in two with six of 4
        (5, 0, 1, 4, 0),  # one digit, and no round
    ],
)
def test_the_cheapest_comparison(width: int, spare: int, thresholds: int, digit: int, drop: int) -> None:
    found = cheapest_compare((196608,), width, tuple(range(thresholds)), spare, DEFAULT.dealt_for_online)
    assert (found.digit, found.drop) == (digit, drop)


@given(st.integers(2, 64), st.integers(0, 70), st.integers(1, 12), st.integers(1, 5000))
def test_no_comparison_is_cheaper_than_the_chosen_one(width: int, spare: int, thresholds: int, n: int) -> None:
    found = cheapest_compare((n,), width, tuple(range(thresholds)), spare, DEFAULT.dealt_for_online)
    found.validate()
    assert found.width == width
    assert found.drop <= spare
    for digit in (3, 4, 5, 6):
        for drop in range(min(spare, width - 2) + 1):
            other = replace(found, digit=digit, drop=drop).cost()
            assert found.cost().rounds <= other.rounds
            if found.cost().rounds == other.rounds:
                saved = 2 * (found.cost().to_first - other.to_first)
                assert 16 * saved <= other.dealt - found.cost().dealt
