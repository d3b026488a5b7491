"""One round on the engine: drafting as the strategies wish, verification, and what both leave on each row."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from lede_env.decoding.stopwatch import Lap
from lede_env.decoding.strategies import Control
from lede_env.decoding.text import TextStream
from lede_env.engine.acceptance import Draws, Sampling, draw_rows, greedy_match, speculative_matches
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.logit_signals import LogitSignals
from lede_env.engine.lookup import NO_GUESS, Lookup
from lede_env.engine.round import Counts, Round, draft_limit
from lede_env.engine.session import Session
from lede_env.engine.signals import LOG_FLOOR, Signals, TraceWindow, draft_peril, draft_risk, no_lap


@dataclass
class Row:
    """One sequence being decoded."""

    index: int
    prompt_ids: list[int]
    control: Control
    draws: Draws
    seed: int
    budget: int
    pending: int
    out_of: str  # the finish reason when the budget is used up
    text: TextStream | None
    trace: TraceWindow | None  # where the strategy's signals read it; likewise the lookup
    lookup: Lookup | None
    doubts: bool = False  # whether they read `doubt` or `peril`
    outlook: bool = False  # whether they read what the acceptance head says
    tokens: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    finish_reason: str = ""
    # of the open round
    round: Round = field(default_factory=Round)
    limit: int = 0
    q: list[Tensor] = field(default_factory=list)  # (V,) distribution of each draft, when sampling
    coins: list[float] = field(default_factory=list)  # what will decide its acceptance, likewise
    draft_trace: list[float] = field(default_factory=list)
    doubt: float = 0.0
    peril: float = LOG_FLOOR
    risk: float = 0.0

    def open_round(self) -> None:
        self.round, self.q, self.coins, self.draft_trace = Round(), [], [], []
        self.doubt, self.peril, self.risk = 0.0, LOG_FLOOR, 0.0
        self.limit = draft_limit(self.control.cap, self.budget - len(self.tokens))
        self.round.limited = self.limit == 0 < self.control.cap

    def context(self) -> tuple[float, tuple[int, float], float, float, float]:
        """The `trace`, the lookup's guess, the `doubt`, the `peril` and the `risk` for the next draft."""
        trace = self.trace.mean(self.draft_trace) if self.trace is not None else 0.0
        guess = self.lookup.guess(self.round.drafts) if self.lookup is not None else NO_GUESS
        return trace, guess, self.doubt, self.peril, self.risk

    def drew(self, signals: Signals) -> None:
        """Tell the signals that the draft left with what was drawn from them."""
        signals.token = self.round.drafts[-1]
        if self.coins:
            signals.coin = self.coins[-1]
        self.control.drew(signals, self.round)


@torch.inference_mode()
def play_round(session: Session, rows: list[Row], sampling: Sampling, lap: Lap = no_lap) -> None:
    """One round of every row, in lockstep, by the round protocol of design section 4."""
    lm = session.lm
    for row in rows:
        row.open_round()
    session.feed([row.index for row in rows], [row.pending for row in rows])
    drafting = [row for row in rows if row.limit > 0]
    while drafting:
        signals = _draft(session, drafting, sampling, lap)
        drafting = _go_on(session, drafting, signals)
        lap("policy")
    states = session.finish([row.index for row in rows])
    _verify(lm, rows, lm.logits(torch.cat(states) if len(states) > 1 else states[0]), sampling)
    for row in rows:
        kept = min(row.round.accepted + 1, len(session.depth[row.index]))  # slots
        if row.control.taps:
            row.round.studied = row.control.study(session.tapped_states(row.index, kept), lm)
        session.close_round(row.index, kept)
    lap("verification")


def _draft(session: Session, rows: list[Row], sampling: Sampling, lap: Lap) -> list[LogitSignals]:
    """Make the next draft of every row, at a layer of its strategy's path. Returns the signals each left with."""
    lm = session.lm
    paths = {row.index: row.control.path(row.round) for row in rows}
    known = {row.index: row.context() for row in rows}
    left: dict[int, LogitSignals] = {}
    walking, step = rows, 0
    while walking:
        session.advance([row.index for row in walking], [paths[row.index][step] for row in walking])
        lap("drafting layers")
        normed = lm.normed(session.newest([row.index for row in walking]))  # (R, H)
        logits = lm.unembed(normed)  # (R, V)
        lap("heads")
        staying: list[Row] = []
        leaving: dict[int, Row] = {}  # by place in the logits
        best = logits.argmax(-1).tolist() if sampling.greedy and len(walking) > 1 else []
        for at, row in enumerate(walking):
            path, made = paths[row.index], len(row.round.drafts)
            context = (path[step], lm.n_layers, made, row.control.cap, *known[row.index], sampling.temperature)
            signals = LogitSignals(*context, lap=lap, logits=logits[at])
            if row.outlook:
                assert lm.acceptance_head is not None  # `generate` has made sure
                signals.head = partial(lm.acceptance_head.ask, normed[at : at + 1])
            if step + 1 < len(path) and not row.control.leave(signals, row.round):
                row.round.checks += 1
                staying.append(row)
                continue
            left[row.index], leaving[at] = signals, row
            row.round.exits.append(path[step])
            if sampling.greedy:
                row.round.drafts.append(signals.best if len(walking) == 1 else best[at])
        if leaving and not sampling.greedy:
            lap("policy")
            own = logits if not staying else logits[list(leaving)]
            _sample_drafts(own, list(leaving.values()), sampling)
            lap("heads")
        for row in leaving.values():
            row.drew(left[row.index])
        walking, step = staying, step + 1
        lap("policy")
    return [left[row.index] for row in rows]


def _sample_drafts(logits: Tensor, rows: list[Row], sampling: Sampling) -> None:
    """Draw the next draft of each row from its (R, V) logits."""
    q = sampling.probabilities(logits)
    tokens = draw_rows(q, [row.draws.next() for row in rows])
    for row, own, token in zip(rows, q.unbind(), tokens, strict=True):
        row.q.append(own)
        row.coins.append(row.draws.next())
        row.round.drafts.append(token)


def _go_on(session: Session, rows: list[Row], signals: list[LogitSignals]) -> list[Row]:
    """Open a slot for each row's newest draft; of a round's last one, for the bonus token after it, unless the strategy
    gives that up. Returns the rows that make another draft."""
    going, opening = [], []
    for row, seen in zip(rows, signals, strict=True):
        more = goes_on(session.lm, row, seen)
        row.round.bonus = more or wants_bonus(session.lm, row, seen)
        going += [row] if more else []
        opening += [row] if row.round.bonus else []
    if opening:
        session.feed([row.index for row in opening], [row.round.drafts[-1] for row in opening])
    return going


def goes_on(lm: LayeredLM, row: Row, signals: Signals) -> bool:
    """Whether the row makes another draft this round."""
    if row.trace is not None:
        row.draft_trace.append(-signals.log_p_max)
    if row.round.drafts[-1] in lm.eos_ids:
        return False
    if len(row.round.drafts) >= row.limit:
        row.round.limited = row.limit < row.control.cap
        return False
    if row.doubts:
        doubt = signals.own_doubt
        row.doubt += doubt
        row.peril = max(row.peril, draft_peril(doubt, signals.coin))
    if row.outlook:
        row.risk += draft_risk(signals.own_odds)
    return row.control.keep_drafting(signals, row.round)


def wants_bonus(lm: LayeredLM, row: Row, signals: Signals) -> bool:
    """Whether the round's last draft is to open a slot: for the strategy to say where it chose to end the round.

    On CUDA all do, in batches too, since a row alone, on graphs, always does and batches must not change a text.
    """
    chosen = row.round.drafts[-1] not in lm.eos_ids and len(row.round.drafts) < row.limit
    return lm.device.type == "cuda" or not chosen or row.control.wants_bonus(signals, row.round)


def _verify(lm: LayeredLM, rows: list[Row], logits: Tensor, sampling: Sampling) -> None:
    """Settle the open rounds against the full-depth logits of their slots, (slots of all, V), row after row."""
    drafts, bonus = [row.round.drafts for row in rows], [row.round.bonus for row in rows]
    if sampling.greedy:
        targets = iter(logits.argmax(-1).tolist())
        outcomes = [
            greedy_match(own, list(islice(targets, len(own) + more))) for own, more in zip(drafts, bonus, strict=True)
        ]
    else:
        q, coins, after = [row.q for row in rows], [row.coins for row in rows], [row.draws.next() for row in rows]
        outcomes = speculative_matches(drafts, sampling.probabilities(logits), q, coins, after, bonus)
    traced = any(row.trace is not None for row in rows)
    doubts = iter((logits.logsumexp(-1) - logits.amax(-1)).tolist() if traced else ())  # -log p_max
    for row, outcome in zip(rows, outcomes, strict=True):
        settle(lm, row, outcome, list(islice(doubts, len(row.round.drafts) + row.round.bonus)))


def settle(lm: LayeredLM, row: Row, outcome: tuple[int, int | None], doubts: list[float]) -> None:
    """Book what verification said: (accepted, next token, if there is one), and, if anybody reads it, the -log p_max of
    each position."""
    if row.round.settle(*outcome, lm.eos_ids):
        row.finish_reason = "eos"
    if row.trace is not None:
        for value in doubts[: len(row.round.emitted)]:
            row.trace.push(value)
    if row.lookup is not None:
        row.lookup.extend(row.round.emitted)
