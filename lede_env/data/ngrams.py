"""How much of a text repeats itself: small models loop, which flatters every method."""

from __future__ import annotations

from collections.abc import Sequence


def repeated_ngrams(texts: Sequence[Sequence[int]], n: int) -> float:
    """Share of the n-grams that occurred before in the same text."""
    seen = total = 0
    for text in texts:
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        total += len(grams)
        seen += len(grams) - len(set(grams))
    return seen / total if total else 0.0
