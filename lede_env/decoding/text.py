"""Token ids to text as they come: partial UTF-8 and possible stop strings are held back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import LayeredLM


class TextStream:
    """The text of one growing sequence. Decoding is incremental: a few tokens of left context, not the whole text."""

    CONTEXT = 4  # tokens decoded again, for tokenizers whose pieces depend on their neighbours

    def __init__(self, lm: LayeredLM, stop: tuple[str, ...]):
        self.lm, self.stop = lm, stop
        self.ids: list[int] = []
        self.text = ""  # everything decoded, cut at a stop string
        self.sent = 0  # characters of `text` handed out
        self._done = 0  # tokens whose text is in `text`
        self.stopped = False

    def push(self, tokens: list[int]) -> int:
        """Append a round's tokens; returns how many of them the text keeps (fewer when a stop string ends it)."""
        for kept, token in enumerate(tokens, 1):
            self.ids.append(token)
            self._decode()
            if self._find_stop():
                return kept
        return len(tokens)

    def _decode(self) -> None:
        begin = max(0, self._done - self.CONTEXT)
        known = self.lm.decode(self.ids[begin : self._done])
        longer = self.lm.decode(self.ids[begin:])
        if not longer.endswith("\ufffd"):  # else the last character is still incomplete
            self.text += longer[len(known) :]
            self._done = len(self.ids)

    def _find_stop(self) -> bool:
        window = max(0, self.sent - max(map(len, self.stop), default=0))
        found = [at for string in self.stop if (at := self.text.find(string, window)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self.stopped

    def take(self, last: bool = False) -> str:
        """Text that is safe to show: not the beginning of a stop string, unless this is the end."""
        if last and not self.stopped:
            begin = max(0, self._done - self.CONTEXT)
            known = self.lm.decode(self.ids[begin : self._done])
            self.text += self.lm.decode(self.ids[begin:])[len(known) :]
            self._done = len(self.ids)
        end = len(self.text) - (0 if last else self._held())
        piece, self.sent = self.text[self.sent : end], max(self.sent, end)
        return piece

    def _held(self) -> int:
        """Length of the longest suffix that could begin a stop string."""
        for length in range(min(max(map(len, self.stop), default=1) - 1, len(self.text)), 0, -1):
            if any(string.startswith(self.text[-length:]) for string in self.stop):
                return length
        return 0
