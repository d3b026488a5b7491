"""Draft & Verify: stop drafting at the first improbable token, with a threshold that adapts (Zhang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from lede_env.arguments import number, whole_number
from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.errors import LedeError

TARGET = 0.90  # acceptance that the threshold steers to
STEP = 0.01
ACCEPTANCE_DECAY, THRESHOLD_DECAY = 0.5, 0.9


class _Adaptive(Control):
    def __init__(self, exit_layer: int, threshold: float):
        self.layers, self.threshold, self.acceptance = (exit_layer,), threshold, 0.0

    def path(self, round_):
        return self.layers

    def keep_drafting(self, signals, round_):
        round_.decisions += 1
        # Of the drawn token, before temperature, top-k and top-p: the largest one when decoding is greedy.
        return signals.probability >= self.threshold

    def learn(self, round_):
        rate = round_.accepted / len(round_.drafts)
        self.acceptance = ACCEPTANCE_DECAY * self.acceptance + (1 - ACCEPTANCE_DECAY) * rate
        if self.acceptance < TARGET:
            aim = self.threshold + STEP
        elif len(round_.drafts) == self.cap:
            aim = self.threshold
        else:
            aim = self.threshold - STEP
        self.threshold = THRESHOLD_DECAY * self.threshold + (1 - THRESHOLD_DECAY) * aim

    def carry(self, earlier):
        self.threshold = earlier.threshold


@dataclass(frozen=True)
class DraftVerify(Strategy):
    """Draft at `exit_layer` until a token's probability is below the threshold; that token is kept and verified.

    After each round the threshold rises while a running acceptance rate is below 0.9, else falls, unless the draft
    reached the cap of 12. It begins at `threshold`; `generate(..., carry_over=)` hands it on to the next prompt. The
    original skips sub-layers to draft; ours leaves early, as all strategies here.
    """

    exit_layer: int
    threshold: float = 0.6
    name = "draft_verify"

    def __post_init__(self) -> None:
        whole_number("exit_layer", self.exit_layer)
        if not 0.0 <= number("threshold", self.threshold) <= 1.0:
            raise LedeError(f"DraftVerify threshold={self.threshold} is not a probability; give a number in [0, 1]")

    def start(self, lm, seed) -> Control:
        lm.check_exit_layer(self.exit_layer)
        return _Adaptive(self.exit_layer, self.threshold)
