"""Prompts already prefilled: episodes play the same ones again and again, and a copy takes a fraction of the time."""

from __future__ import annotations

from collections import OrderedDict
from weakref import WeakKeyDictionary

from torch import Tensor

from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.session import Session

LIMIT = 2**30  # bytes a language model: every training prompt of the embedded one takes 0.6 GB


class PromptMemory:
    """Keys and values of prompts of one language model, at most `limit` bytes; those not used the longest go first.

    What it gives back is what was computed, bit for bit. Only on the CPU: on a GPU a prefill takes no longer than a
    token, and memory is for the model.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit, self.used = limit, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def prefill(self, session: Session, row: int, ids: list[int]) -> None:
        """As `session.prefill`."""
        key = tuple(ids)
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            session.restore(row, self._kept[key])
            return
        self.misses += 1
        session.prefill(row, ids)
        if session.lm.device.type == "cpu":
            self._keep(key, session.kept(row))

    def _keep(self, key: tuple[int, ...], states: Tensor) -> None:
        if states.nbytes > self.limit:
            return
        self._kept[key] = states
        self.used += states.nbytes
        while self.used > self.limit:
            self.used -= self._kept.popitem(last=False)[1].nbytes


_MEMORIES: WeakKeyDictionary[LayeredLM, PromptMemory] = WeakKeyDictionary()


def memory_of(lm: LayeredLM) -> PromptMemory:
    """The memory that all environments on a language model share."""
    return _MEMORIES.setdefault(lm, PromptMemory())
