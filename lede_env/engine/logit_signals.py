"""Signals of logits that are at hand, each computed when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lede_env.engine.signals import Signals, entropy, log_probabilities, no_lap


@dataclass(slots=True)
class LogitSignals(Signals):
    """Signals of (V,) logits, each computed when it is asked for: not asking costs nothing."""

    logits: Tensor = field(kw_only=True)
    head: Callable[[Signals], tuple[float, float, float]] | None = None  # its `outlook`, from these signals
    lap: Callable[[str], None] = no_lap  # the profile's stopwatch
    _log_p: Tensor | None = None
    _numbers: np.ndarray | None = None  # the logits; numpy takes a fraction of torch's time for one row
    _best: int = -1
    _two: list[float] | None = None
    _outlook: tuple[float, float, float] | None = None

    @property
    def log_p(self) -> Tensor:
        """(V,) log-probabilities at temperature 1."""
        if self._log_p is None:
            self.lap("policy")
            self._log_p = log_probabilities(self.logits)
            self.lap("signals")
        return self._log_p

    @property
    def numbers(self) -> np.ndarray:
        """The logits on the host."""
        if self._numbers is None:
            self._numbers = self.logits.cpu().numpy()
        return self._numbers

    def largest(self, count: int) -> list[float]:
        numbers = self.numbers
        if count > 2:
            count = min(count, len(numbers))
            return np.sort(np.partition(numbers, -count)[-count:])[::-1].tolist()
        if self._two is None:
            best = self.best
            first = numbers[best]
            numbers[best] = -np.inf  # for a moment: the second is the largest of the others
            # By argmax again: between two drafts, with cold caches, `max` takes four times as long.
            self._two = [float(first), float(numbers[numbers.argmax()])][: len(numbers)]
            numbers[best] = first
        return self._two

    @property
    def best(self) -> int:
        """The most probable token."""
        if self._best < 0:
            self.lap("policy")
            self._best = int(self.numbers.argmax())
            self.lap("signals")
        return self._best

    @property
    def log_p_max(self) -> float:
        return float(self.log_p[self.best])

    @property
    def entropy(self) -> float:
        return entropy(self.log_p).item()

    @property
    def guess_logit(self) -> float:
        return float(self.numbers[self.guess[0]])

    @property
    def token_logit(self) -> float:
        self.need_token()
        return float(self.numbers[self.token])

    @property
    def outlook(self) -> tuple[float, float, float]:
        if self._outlook is None:
            assert self.head is not None  # whoever reads it has one
            self.lap("policy")
            self._outlook = self.head(self)
            self.lap("signals")
        return self._outlook
