"""Signals that came off the device with the token drawn from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lede_env.engine.signals import CONFIDENCE_K as TOP
from lede_env.engine.signals import LOG_FLOOR, Signals

# A read-out, float32: the TOP largest logits, their tokens, and these.
LOG_SUM, ENTROPY, GUESS, TOKEN, TOKEN_LOGIT, ODDS, SLOPE, AHEAD = range(2 * TOP, 2 * TOP + 8)
SIZE = 32


@dataclass(slots=True)
class ReadSignals(Signals):
    """`values` is a read-out."""

    values: list[float] = field(kw_only=True)

    def largest(self, count: int) -> list[float]:
        return [value for value in self.values[:TOP] if value > float("-inf")]

    @property
    def log_p_max(self) -> float:
        return max(self.values[0] - self.values[LOG_SUM], LOG_FLOOR)

    @property
    def entropy(self) -> float:
        return max(self.values[ENTROPY], 0.0)

    @property
    def best(self) -> int:
        """The most probable token."""
        return int(self.values[TOP])

    @property
    def guess_logit(self) -> float:
        return self.values[GUESS]

    @property
    def token_logit(self) -> float:
        self.need_token()
        return self.values[TOKEN_LOGIT]

    @property
    def outlook(self) -> tuple[float, float, float]:
        self.need_token()
        return self.values[ODDS], self.values[SLOPE], self.values[AHEAD]
