"""What followed the last time: a guess at the next token from the text itself (prompt lookup).

Text repeats itself, and so small models' text does above all. Whether a layer's favourite is also what followed these
words before says much about whether it is right, and costs no arithmetic.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from lede_env.engine.round import DRAFT_CAP

GRAMS = (8, 4, 2)  # lengths of context looked up, the longest first
LAG = DRAFT_CAP  # a place counts only this far back: before any open round, whose drafts may yet be dropped
NO_GUESS = (-1, 0.0)


class Lookup:
    """The tokens of one sequence, and where each of its n-grams went on.

    A guess is a function of the tokens before it alone, not of how they were decoded, so a trace replays it.
    """

    def __init__(self, tokens: Sequence[int]):
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # n-gram -> places right after it, ascending
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            place = len(self.tokens)
            for n in GRAMS:
                if n <= place:
                    self._places.setdefault(tuple(self.tokens[place - n : place]), []).append(place)
            self.tokens.append(token)

    def guess(self, drafts: Sequence[int] = (), start: int | None = None) -> tuple[int, float]:
        """(token, match): what followed the last `n` tokens before, and n over the longest; NO_GUESS if they are new.

        The context is the first `start` tokens (by default all), then `drafts`.
        """
        start = len(self.tokens) if start is None else start
        tail = [*self.tokens[max(0, start - GRAMS[0]) : start], *drafts][-GRAMS[0] :]
        horizon = start + len(drafts) - LAG
        for n in GRAMS:
            places = self._places.get(tuple(tail[-n:]), ()) if n <= len(tail) else ()
            older = bisect_right(places, horizon)
            if older:
                return self.tokens[places[older - 1]], n / GRAMS[0]
        return NO_GUESS
