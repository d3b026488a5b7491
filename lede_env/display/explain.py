"""A strategy that writes down what another one saw and chose, draft by draft, for the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lede_env.decoding.strategies.base import Control, Strategy
from lede_env.engine.round import Round
from lede_env.engine.signals import DRAFT_FEATURES, Signals

SHOWN = tuple(name for name in DRAFT_FEATURES if name not in ("phase", "position"))  # signals a note keeps


@dataclass
class Look:
    """One sight of a draft's distribution at one layer."""

    layer: int
    signals: dict[str, float]  # by name: SHOWN, and what else the strategy reads
    q: tuple[float, float] | None  # Q(continue), Q(exit), where a policy that has them was asked
    left: bool  # whether the draft was drawn here


@dataclass
class DraftNote:
    """One draft, accepted or not: the layers at which it was looked at, ascending, and what came after."""

    looks: list[Look]
    goes_on: bool | None = None  # whether the strategy wanted another draft; None: it was not asked (EOS, round full)
    q: tuple[float, float] | None = None  # of that question: Q(continue) is "verify now", Q(exit) "draft on"


class Noting(Control):
    """Passes every question to another Control and keeps the answers."""

    def __init__(self, inner: Control, shown: tuple[str, ...]):
        self.inner, self.shown = inner, shown
        self._notes: dict[int, tuple[Round, list[DraftNote]]] = {}  # by id of the round, which is kept alive beside
        self._looks: list[Look] = []

    @property
    def cap(self) -> int:  # type: ignore[override]
        return self.inner.cap

    @property
    def taps(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.taps

    def notes(self, round_: Round) -> list[DraftNote]:
        """One note for each draft of a round of the generation; drafts that a cut removed are gone here too."""
        return self._notes[id(round_)][1][: len(round_.drafts)] if round_.drafts else []

    def path(self, round_):
        self._looks = []
        return self.inner.path(round_)

    def leave(self, signals, round_):
        answer, q = self._ask(self.inner.leave, signals, round_)
        self._looks.append(self._look(signals, q, answer))
        return answer

    def drew(self, signals, round_):
        self.inner.drew(signals, round_)
        if not (self._looks and self._looks[-1].left):  # the end of the path: nobody was asked
            self._looks.append(self._look(signals, None, True))
        self._notes.setdefault(id(round_), (round_, []))[1].append(DraftNote(self._looks))

    def keep_drafting(self, signals, round_):
        note = self._notes[id(round_)][1][-1]
        note.goes_on, note.q = self._ask(self.inner.keep_drafting, signals, round_)
        return note.goes_on

    def wants_bonus(self, signals, round_):
        return self.inner.wants_bonus(signals, round_)

    def study(self, states, lm):
        return self.inner.study(states, lm)

    def learn(self, round_):
        self.inner.learn(round_)

    def carry(self, earlier):
        self.inner.carry(earlier.inner)

    def _ask(self, question: Callable[[Signals, Round], bool], signals: Signals, round_: Round):
        """(the answer, the policy's two Q-values if it was consulted and has any)"""
        before = round_.decisions
        answer = question(signals, round_)
        policy: Any = getattr(self.inner, "policy", None)
        if round_.decisions == before or not hasattr(policy, "q_values"):
            return answer, None
        stay, leave = policy.q_values(signals.features(policy.features)[None])[0]
        return answer, (float(stay), float(leave))

    def _look(self, signals: Signals, q: tuple[float, float] | None, left: bool) -> Look:
        values = map(float, signals.features(self.shown))
        return Look(signals.layer, dict(zip(self.shown, values, strict=True)), q, left)


@dataclass(frozen=True)
class Explained(Strategy):
    """`strategy`, noting what it sees: the same text, more slowly. Its generation's `control` is a Noting."""

    strategy: Strategy

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*SHOWN, *(name for name in self.strategy.reads if name not in SHOWN))

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.strategy.name

    def start(self, lm, seed) -> Noting:
        shown = tuple(name for name in self.reads if name not in ("phase", "position"))
        return Noting(self.strategy.start(lm, seed), shown)
