"""The lookup's guesses, against a search through the tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lede_env.engine.lookup import GRAMS, LAG, NO_GUESS, Lookup


def searched(context: list[int]) -> tuple[int, float]:
    """By definition: the token after the most recent occurrence of the longest suffix, LAG tokens back at least."""
    for n in GRAMS:
        for place in range(len(context) - LAG, n - 1, -1):
            if len(context) >= n and context[place - n : place] == context[-n:]:
                return context[place], n / GRAMS[0]
    return NO_GUESS


tokens = st.lists(st.integers(0, 2), max_size=60)


@given(tokens, tokens, st.lists(st.integers(0, 2), max_size=LAG - 1))
def test_guesses_are_a_function_of_the_context(prompt, text, drafts):
    lookup = Lookup(prompt)
    assert lookup.guess() == searched(prompt)
    lookup.extend(text)
    assert lookup.guess(drafts) == searched(prompt + text + drafts)
    # From within a longer sequence: what comes later does not show.
    assert lookup.guess(drafts, start=len(prompt)) == searched(prompt + drafts)


def test_a_loop_is_found():
    lookup = Lookup([5, 6, 7, 8] * 6)
    assert lookup.guess() == (5, 1.0)
    assert lookup.guess([5, 6]) == (7, 1.0)
    assert lookup.guess([9]) == NO_GUESS
