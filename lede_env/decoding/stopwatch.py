"""Wall-clock of one generation, and where it goes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.signals import no_lap

PARTS = ("prefill", "drafting layers", "heads", "signals", "policy", "verification", "rest")

Lap = Callable[[str], None]  # books the time since the last lap on a part


class Stopwatch:
    """Seconds of prefill and decoding; with `split`, of each of PARTS too. The device is synchronised at every reading.

    Splitting synchronises a GPU at every part, so a profiled run on it is slower than an ordinary one.
    """

    def __init__(self, lm: LayeredLM, split: bool = False):
        self._cuda = lm.device if lm.device.type == "cuda" else None
        self.prefill = self.decode = 0.0
        self.profile: dict[str, float] | None = dict.fromkeys(PARTS, 0.0) if split else None
        self.lap: Lap = self._lap if split else no_lap

    def start(self) -> None:
        self._begin = self._last = self._now()

    def prefilled(self) -> None:
        """The prompt is in: what follows is decoding."""
        now = self._now()
        self.prefill = now - self._begin
        self._begin = now
        self.lap("prefill")

    def played(self) -> None:
        """A round is over."""
        self.decode = self._now() - self._begin
        self.lap("rest")

    def _lap(self, part: str) -> None:
        assert self.profile is not None
        now = self._now()
        self.profile[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()
