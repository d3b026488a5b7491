"""What a decoding strategy is: an immutable rule that makes one `Control` a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from lede_env.engine.round import DRAFT_CAP, Round
from lede_env.engine.signals import Signals

if TYPE_CHECKING:
    from lede_env.engine.layered_lm import LayeredLM


class Control:
    """The state of one strategy on one row. The decoder asks it, in this order, for every draft of a round:

    `path` once, `leave` at every layer of the path but the last, then, unless the draft is an EOS or the round is
    full, `keep_drafting`; after verification, `learn`. Losslessness needs no care here: `leave` is asked before the
    layer's token is drawn, and a drawn token is always verified.
    """

    cap: int = DRAFT_CAP  # most drafts a round

    def path(self, round_: Round) -> tuple[int, ...]:
        """Layers at which the next draft may leave, ascending; at the last it does."""
        raise NotImplementedError

    def leave(self, signals: Signals, round_: Round) -> bool:
        """Whether to draw the draft at this layer of the path rather than go on to the next."""
        raise NotImplementedError

    def keep_drafting(self, signals: Signals, round_: Round) -> bool:
        """Whether to make another draft after `round_.drafts[-1]`, drawn from the distribution of `signals`."""
        raise NotImplementedError

    def learn(self, round_: Round) -> None:
        """See a verified round. Rounds that the token budget cut short are not shown."""


class Strategy(ABC):
    """Chooses exit layers and draft lengths. Immutable: what changes lives in its Controls."""

    name: str
    needs_trace: bool = False  # whether its signals read the `trace` feature

    @abstractmethod
    def start(self, lm: LayeredLM) -> Control:
        """A fresh Control for one row of `lm`; raises LedeError when the strategy does not fit the model."""
