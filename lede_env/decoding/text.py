"""Token ids to text as they come: partial UTF-8 and possible stop strings are held back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import LayeredLM

OPEN = "\ufffd"  # how tokenizers decode the bytes of a character that is not complete


class TextStream:
    """The text of one growing sequence, as decoding all of its tokens at once would give it.

    Replacement characters at the end are not text yet: the next token may complete them to a character. What stands
    before them is, so a stop string is found at the very token that completes it, whatever else that token begins.
    Each decoding goes over the tokens since the last complete character and a little context, not the whole text.
    """

    def __init__(self, lm: LayeredLM, stop: tuple[str, ...]):
        self.lm, self.stop = lm, stop
        self.ids: list[int] = []
        self.text = ""  # everything final, cut at a stop string
        self.sent = 0  # characters of `text` handed out
        self.stopped = False
        self._open = ""  # the replacement characters after `text`
        # ids[:_done] end in a complete character, the first _settled characters of `text` are theirs; ids[_begin:_done]
        # alone decode to _context.
        self._begin, self._done, self._settled, self._context = 0, 0, 0, ""

    def push(self, tokens: list[int]) -> int:
        """Append a round's tokens; returns how many of them the text keeps (fewer when a stop string ends it)."""
        for kept, token in enumerate(tokens, 1):
            self.ids.append(token)
            known = len(self.text)
            self._decode()
            if self._find_stop(known):
                return kept
        return len(tokens)

    def _decode(self) -> None:
        longer = self.lm.decode(self.ids[self._begin :])
        if longer.startswith(self._context):
            new = longer[len(self._context) :]
        else:  # byte-fallback tokenizers give up a whole run of bytes, complete characters too, while its end is open
            new = self.lm.decode(self.ids[self._done :])
        final = new.rstrip(OPEN)
        self.text, self._open = self.text[: self._settled] + final, new[len(final) :]
        if new and not self._open:
            self._begin, self._done, self._settled = self._done, len(self.ids), len(self.text)
            self._context = self.lm.decode(self.ids[self._begin :])

    def _find_stop(self, known: int) -> bool:
        """Cut the text at the first stop string that ends after its first `known` characters."""
        window = max(0, known - max(map(len, self.stop), default=0))
        found = [at for string in self.stop if (at := self.text.find(string, window)) >= 0]
        if found:
            self.text, self._open, self.stopped = self.text[: min(found)], "", True
        return self.stopped

    def take(self, last: bool = False) -> str:
        """Text that is safe to show: not the beginning of a stop string, nor of a character, unless this is the end."""
        if last:
            self.text, self._open = self.text + self._open, ""
        end = len(self.text) - (0 if last else self._held())
        piece, self.sent = self.text[self.sent : end], max(self.sent, end)
        return piece

    def _held(self) -> int:
        """Length of the longest suffix that could begin a stop string."""
        for length in range(min(max(map(len, self.stop), default=1) - 1, len(self.text)), 0, -1):
            if any(string.startswith(self.text[-length:]) for string in self.stop):
                return length
        return 0
