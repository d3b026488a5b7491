"""How each token of a generation came about, and which characters of the text are its own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lede_env.decoding.text import TextStream

if TYPE_CHECKING:
    from lede_env.decoding.generate import Piece
    from lede_env.engine.layered_lm import LayeredLM
    from lede_env.engine.round import Round


@dataclass(frozen=True)
class Origin:
    """How one emitted token came about."""

    kind: str  # "draft" (accepted), or the target's own token: "corrected", "bonus" or "plain" (a round of no drafts)
    layer: int | None = None  # exit layer of a draft


def origins(round_: Round) -> list[Origin]:
    """One Origin for each token the round emitted."""
    found = [Origin("draft", layer) for layer in round_.exits[: round_.accepted]]
    if len(round_.emitted) > round_.accepted:
        missed = len(round_.drafts) > round_.accepted
        found.append(Origin("plain" if not round_.drafts else "corrected" if missed else "bonus"))
    return found


class Alignment:
    """Which token each character of a growing text belongs to: the one that completed it.

    Token i owns the characters ends[i - 1]..ends[i]; a token that holds a part of a character may own none.
    """

    def __init__(self, lm: LayeredLM):
        self._stream = TextStream(lm, ())
        self.ends: list[int] = []

    def push(self, tokens: list[int]) -> None:
        for token in tokens:
            self._stream.push([token])
            # The text of byte-fallback tokenizers may shrink while a run of bytes is open.
            self.ends.append(max(len(self._stream.text), self.ends[-1] if self.ends else 0))

    def owner(self, character: int) -> int:
        """Index of the token that owns this character; what no token completed is the last one's."""
        return min(bisect_right(self.ends, character), len(self.ends) - 1)

    def parts(self, text: str, begin: int = 0) -> Iterator[tuple[int, str]]:
        """(token index, its characters) of `text`, which starts at character `begin`; tokens that own none left out."""
        at = 0
        while at < len(text):
            token = self.owner(begin + at)
            end = len(text) if token == len(self.ends) - 1 else min(len(text), self.ends[token] - begin)
            yield token, text[at:end]
            at = end


class StreamOrigins:
    """The origins of a stream's text, piece by piece, whatever the decoder held back in between."""

    def __init__(self, lm: LayeredLM):
        self._alignment = Alignment(lm)
        self._origins: list[Origin] = []
        self._shown = 0

    def split(self, piece: Piece) -> list[tuple[str, Origin]]:
        """The piece's text in runs, each with the Origin of its token."""
        if piece.round is not None:
            self._alignment.push(piece.round.emitted)
            self._origins += origins(piece.round)
        runs = [(text, self._origins[token]) for token, text in self._alignment.parts(piece.text, self._shown)]
        self._shown += len(piece.text)
        return runs
