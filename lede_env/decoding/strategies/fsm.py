"""LayerSkip whose draft length follows the last round: the finite state machine that DEL compares itself with."""

from __future__ import annotations

from dataclasses import dataclass

from lede_env.arguments import whole_number
from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.engine.round import check_speculation


class _UpAndDown(Control):
    def __init__(self, exit_layer: int, speculation: int):
        self.layers, self.speculation = (exit_layer,), speculation

    def path(self, round_):
        return self.layers

    def keep_drafting(self, signals, round_):
        return len(round_.drafts) < self.speculation

    def learn(self, round_):
        step = 1 if round_.accepted == len(round_.drafts) else -1
        self.speculation = max(1, min(self.speculation + step, self.cap))


@dataclass(frozen=True)
class FiniteStateMachine(Strategy):
    """Draft at `exit_layer`: one token more after a round accepted whole, else one fewer, within 1 and the cap of 12.

    Every prompt begins with `speculation` tokens. Entezari Zarch et al. 2025 (DEL), baselines.
    """

    exit_layer: int
    speculation: int = 4
    name = "fsm"

    def __post_init__(self) -> None:
        whole_number("exit_layer", self.exit_layer)
        check_speculation(self.speculation)

    def start(self, lm, seed) -> Control:
        lm.check_exit_layer(self.exit_layer)
        return _UpAndDown(self.exit_layer, self.speculation)
