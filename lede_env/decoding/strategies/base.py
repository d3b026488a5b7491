"""What a decoding strategy is: an immutable rule that makes one `Control` a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from lede_env.engine.round import DRAFT_CAP, Round
from lede_env.engine.signals import Signals

if TYPE_CHECKING:
    from torch import Tensor

    from lede_env.engine.layered_lm import LayeredLM


class Control:
    """The state of one strategy on one row. The decoder asks it, in this order, for every draft of a round:

    `path`, `leave` at every layer of the path but the last, `drew`, then, unless the draft is an EOS or the round is
    full, `keep_drafting`, and if it is the last one by that, `wants_bonus`; after verification, `study` (with `taps`)
    and `learn`. On CUDA `path` is also asked ahead of drafts that are never made: it must only look. Losslessness needs
    no care here: `leave` is asked before the layer's token is drawn, and a drawn token is always verified.
    """

    cap: int = DRAFT_CAP  # most drafts a round
    taps: tuple[int, ...] = ()  # layers whose states `study` wants to see

    def path(self, round_: Round) -> tuple[int, ...]:
        """Layers at which the next draft may leave, ascending; at the last it does.

        `round_.exits` has all drafts before it; `round_.drafts` may lack the last one, still on the device.
        """
        raise NotImplementedError

    def leave(self, signals: Signals, round_: Round) -> bool:
        """Whether to draw the draft at this layer of the path rather than go on to the next."""
        raise NotImplementedError

    def keep_drafting(self, signals: Signals, round_: Round) -> bool:
        """Whether to make another draft after `round_.drafts[-1]`, drawn from the distribution of `signals`."""
        raise NotImplementedError

    def wants_bonus(self, signals: Signals, round_: Round) -> bool:
        """Whether to run the round's last draft through the layers too, so that there is a bonus token should all
        drafts be accepted. If not they are verified all the same, and the next round begins with the last of them.

        On CUDA nobody asks: there its layers are launched before the strategy is done.
        """
        return True

    def drew(self, signals: Signals, round_: Round) -> None:
        """See that `round_.drafts[-1]` was drawn from the distribution of `signals`."""

    def study(self, states: Tensor, lm: LayeredLM) -> int:
        """See the (taps, n, H) states of n verified positions leaving each tapped layer: the end of the prompt, then
        those of each round up to and including the first miss. Returns how many states went through the head."""
        raise NotImplementedError

    def learn(self, round_: Round) -> None:
        """See a verified round. Rounds that the token budget cut short are not shown."""

    def carry(self, earlier: Control) -> None:
        """Go on from what a Control of the same strategy learned on an earlier prompt. By default nothing is kept."""


class Strategy(ABC):
    """Chooses exit layers and draft lengths. Immutable: what changes lives in its Controls."""

    name: str
    reads: tuple[str, ...] = ()  # features its signals use; those of the text so far are kept only if named here

    @abstractmethod
    def start(self, lm: LayeredLM, seed: int) -> Control:
        """A fresh Control for one row of `lm`; raises LedeError when the strategy does not fit the model.

        `seed` is for coins of its own, apart from those that draw tokens.
        """
