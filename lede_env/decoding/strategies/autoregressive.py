"""Plain decoding on the same engine: every token runs the full depth. The baseline of every speedup."""

from __future__ import annotations

from dataclasses import dataclass

from lede_env.decoding.strategies.base import Control, Strategy


class _NoDrafts(Control):
    cap = 0


@dataclass(frozen=True)
class Autoregressive(Strategy):
    """One full-depth step a token."""

    name = "autoregressive"

    def start(self, lm, seed) -> Control:
        return _NoDrafts()
