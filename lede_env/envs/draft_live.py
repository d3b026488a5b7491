"""The draft MDP from the language model itself: rounds of drafting and verification, as the decoder plays them.

It makes the decoder's calls in the decoder's order, on the same session, so that a policy sees in the environment
what it sees there, bit for bit with one lane, but for the acceptance head: lanes ask it together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lede_env.engine.acceptance import Draws, Sampling, best_tokens, draw_rows, greedy_match, speculative_matches
from lede_env.engine.layered_lm import LayeredLM
from lede_env.engine.lookup import NO_GUESS, Lookup
from lede_env.engine.round import Round
from lede_env.engine.signals import (
    HEAD_FEATURES,
    LOG_FLOOR,
    LOOKUP_FEATURES,
    TraceWindow,
    asks_head,
    compute_features,
    draft_ahead,
    draft_doubt,
    draft_odds,
    draft_peril,
    draft_risk,
    raw_signals,
)
from lede_env.envs.prompt_memory import memory_of
from lede_env.errors import LedeError
from lede_env.tasks import Prompt, fit_prompt

NOTHING_SAID = [0.0, 0.0, 0.0]  # where no head is asked


@dataclass
class _Lane:
    """One sequence being decoded, and its open round."""

    pending: int
    draws: Draws
    lookup: Lookup | None  # of the text so far, where the features read it
    trace: TraceWindow = field(default_factory=TraceWindow)  # of the tokens emitted
    # of the open round
    round: Round = field(default_factory=Round)
    candidate: int = 0  # where phase 1 stands, or left
    kept: bool = False  # whether the draft in view is drawn: it is `round.drafts[-1]` then
    logits: Tensor = field(default_factory=lambda: torch.empty(0))  # (V,) of the draft in view
    best: int = 0  # its most probable token
    q: list[Tensor] = field(default_factory=list)  # (V,) distribution of each draft, when sampling
    coins: list[float] = field(default_factory=list)  # what will decide its acceptance, likewise
    surprise: list[float] = field(default_factory=list)  # -log p_max of each draft made, the one in view included
    doubt: float = 0.0  # of the drafts drawn
    peril: float = LOG_FLOOR  # likewise
    risk: float = 0.0  # likewise
    state: Tensor = field(default_factory=lambda: torch.empty(0))  # (H,) that gave the draft in view
    margin: float = 0.0  # of the draft in view

    def open_round(self) -> None:
        self.round, self.candidate, self.q, self.coins, self.surprise = Round(), 0, [], [], []
        self.doubt, self.peril, self.risk = 0.0, LOG_FLOOR, 0.0


class DraftLiveBackend:
    """`DraftTraceBackend`'s interface over the language model, decoding `lanes` continuations together.

    Each lane has nodes of its own: its candidates, then its drafts 2 .. cap. They hold the open round.
    """

    def __init__(
        self,
        lm: LayeredLM,
        prompts: list[Prompt],
        lanes: int,
        max_new_tokens: int,
        sampling: Sampling,
        candidate_layers: tuple[int, ...],
        features: tuple[str, ...],
        cap: int,
    ):
        room = lm.geometry.context - max_new_tokens - 1
        if room < 2:
            raise LedeError(
                f"max_new_tokens={max_new_tokens} leaves no room in {lm.name}'s context of {lm.geometry.context}"
            )
        self.lm, self.sampling, self.cap = lm, sampling, cap
        self.candidate_layers, self.features = candidate_layers, features
        self.prompt_ids = [prompt.id for prompt in prompts]
        self.tokens = [fit_prompt(lm.encode(prompt.text), room, prompt.task)[0] for prompt in prompts]
        self.session = lm.session(lanes, max(map(len, self.tokens)) + max_new_tokens + 1, width=cap + 1)
        self._memory = memory_of(lm)
        self._stride = len(candidate_layers) + cap - 1  # nodes a lane
        self._first = np.arange(lanes) * self._stride
        self.signals = np.zeros((lanes * self._stride, len(features)), np.float32)
        self.after = np.full(lanes * self._stride, -1)
        self._lanes = [_Lane(0, Draws(0), None) for _ in range(lanes)]
        self._looks_up = bool(LOOKUP_FEATURES.intersection(features))
        self._head = lm.acceptance_head if asks_head(features) else None
        if self._head is not None:
            for layer in candidate_layers:
                self._head.candidate(layer)  # raises where it knows nothing of that layer
        elif asks_head(features):
            raise LedeError(
                f"the features {HEAD_FEATURES} are what a model's acceptance head says, and {lm.name!r} has none; "
                "train one (python -m agents.acceptance_head), or choose other features"
            )

    @torch.inference_mode()
    def start_many(self, lanes: np.ndarray, prompts: np.ndarray, seeds: np.ndarray) -> None:
        """Begin the continuations of prompts on lanes, (n,) each; the seeds key their draws, as the decoder's do."""
        for lane, prompt, seed in zip(lanes.tolist(), prompts.tolist(), seeds.tolist(), strict=True):
            ids = self.tokens[prompt]
            self._memory.prefill(self.session, lane, ids[:-1])
            self._lanes[lane] = _Lane(ids[-1], Draws(seed), Lookup(ids) if self._looks_up else None)

    def cell(self, lane: Any, token: Any) -> Any:
        """Node of the first candidate."""
        return self._first[lane]

    @torch.inference_mode()
    def open(self, who: np.ndarray) -> None:
        """Begin a round on the lanes of a mask, (lanes,) booleans, at the first candidate."""
        rows = np.flatnonzero(who).tolist()
        for row in rows:
            self.session.close_round(row, 0)  # of one that a reset left open
            self._lanes[row].open_round()
        if rows:
            self.session.feed(rows, [self._lanes[row].pending for row in rows])
            self._view(rows)

    @torch.inference_mode()
    def keep(self, who: np.ndarray) -> None:
        """Draw the draft in view of the lanes of a mask, and say what may follow it."""
        self._draw([row for row in np.flatnonzero(who).tolist() if not self._lanes[row].kept])

    @torch.inference_mode()
    def move(self, walking: np.ndarray, drafting: np.ndarray) -> None:
        """Take the lanes of a mask to the next candidate, those of another to the next draft: one forward for all
        that share a segment."""
        rows = np.flatnonzero(drafting).tolist()
        if rows:
            self.session.feed(rows, [self._lanes[row].round.drafts[-1] for row in rows])
        for row in np.flatnonzero(walking).tolist():
            self._lanes[row].candidate += 1
            self._lanes[row].surprise.pop()
        rows = np.flatnonzero(walking | drafting).tolist()
        if rows:
            self._view(rows)

    def observe(self, node: Any, cell: Any, draft: Any) -> np.ndarray:
        """(..., F) features of nodes."""
        return self.signals.take(node, axis=0)

    @torch.inference_mode()
    def settle(self, who: np.ndarray, cell: Any, drafts: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Verify the rounds of the lanes of a mask: (lanes,) accepted, emitted, and whether the last token emitted is
        an EOS. They count where the mask is true."""
        counts = np.zeros((3, len(who)), np.int64)
        rows = np.flatnonzero(who).tolist()
        if rows:
            self.session.feed(rows, [self._lanes[row].round.drafts[-1] for row in rows])
            counts[:, rows] = self._finish(rows)
        return counts[0], counts[1], counts[2] > 0

    @torch.inference_mode()
    def step(self, who: np.ndarray, token: Any) -> np.ndarray:
        """Emit one token at full depth on the lanes of a mask: (lanes,) where it is an EOS."""
        rows = np.flatnonzero(who).tolist()
        for row in rows:
            self._lanes[row].open_round()
        self.session.feed(rows, [self._lanes[row].pending for row in rows])
        ended = np.zeros(len(who), bool)
        ended[rows] = self._finish(rows)[2]
        return ended

    def _finish(self, rows: list[int]) -> np.ndarray:
        """Verify the open rounds of ascending rows: (3, rows) accepted, emitted, ended."""
        logits = self.lm.logits(torch.cat(self.session.finish(rows)))  # (sum of d + 1, V)
        surprise = iter((logits.logsumexp(-1) - logits.amax(-1)).tolist())  # -log p_max
        counts = np.zeros((3, len(rows)), np.int64)
        for column, (row, outcome) in enumerate(zip(rows, self._outcomes(rows, logits), strict=True)):
            known = list(islice(surprise, len(self._lanes[row].round.drafts) + 1))
            ended = self._settle(row, outcome, known)
            round_ = self._lanes[row].round
            counts[:, column] = round_.accepted, len(round_.emitted), ended
        return counts

    def _outcomes(self, rows: list[int], logits: Tensor) -> list[tuple[int, int | None]]:
        """(accepted, next token) of each row's round, given their full-depth logits, row after row."""
        lanes = [self._lanes[row] for row in rows]
        drafts = [lane.round.drafts for lane in lanes]
        if self.sampling.greedy:
            targets = iter(best_tokens(logits).tolist())
            return [greedy_match(own, list(islice(targets, len(own) + 1))) for own in drafts]
        after = [lane.draws.next() for lane in lanes]
        q, coins = [lane.q for lane in lanes], [lane.coins for lane in lanes]
        return speculative_matches(drafts, self.sampling.probabilities(logits), q, coins, after)

    def _settle(self, row: int, outcome: tuple[int, int | None], surprise: list[float]) -> bool:
        """Book a lane's verified round, given -log p_max at each of its positions; whether it ends by an EOS."""
        lane = self._lanes[row]
        ended = lane.round.settle(*outcome, self.lm.eos_ids)
        for value in surprise[: len(lane.round.emitted)]:
            lane.trace.push(value)
        if lane.lookup is not None:
            lane.lookup.extend(lane.round.emitted)
        lane.pending = lane.round.emitted[-1]
        self.session.close_round(row, lane.round.accepted + 1)
        return ended

    def _view(self, rows: list[int]) -> None:
        """Run the newest slot of ascending rows to where its lane stands, and write down its signals."""
        lanes = [self._lanes[row] for row in rows]
        layers = [self.candidate_layers[lane.candidate] for lane in lanes]
        self.session.advance(rows, layers)
        states = self.session.newest(rows)  # (R, H)
        logits = self.lm.logits(states)  # (R, V)
        found = [NO_GUESS if lane.lookup is None else lane.lookup.guess(lane.round.drafts) for lane in lanes]
        guesses = torch.tensor([token for token, _ in found], device=logits.device)
        raw = raw_signals(logits, guesses).double().cpu().numpy()  # double: features round once, as the decoder's
        drafts = np.array([len(lane.round.drafts) for lane in lanes])  # before the one in view
        for lane, own, best, state in zip(lanes, logits, best_tokens(logits).tolist(), states, strict=True):
            lane.logits, lane.best, lane.kept, lane.state = own, best, False, state
        nodes = [self._node(row) for row in rows]
        self.signals[nodes] = compute_features(
            self.features,
            raw,
            layer=np.array(layers) / self.lm.n_layers,
            trace=np.array([lane.trace.mean(lane.surprise) for lane in lanes]),
            match=np.array([match for _, match in found]),
            phase=np.where(drafts, 2, 1),
            position=drafts / self.cap,
            doubt=np.minimum([lane.doubt for lane in lanes], -LOG_FLOOR),
            temperature=self.sampling.temperature,
        )
        for lane, signals in zip(lanes, raw, strict=True):
            lane.surprise.append(-float(signals[0]))
            lane.margin = float(signals[0] - signals[1])
        last = len(self.candidate_layers) - 1
        # No way but to keep these.
        self._draw([row for row, lane in zip(rows, lanes, strict=True) if lane.candidate == last or lane.round.drafts])

    def _draw(self, rows: list[int]) -> None:
        """Draw the drafts in view of lanes."""
        if not rows:
            return
        lanes = [self._lanes[row] for row in rows]
        if self.sampling.greedy:
            said = self._outlooks(lanes, [lane.best for lane in lanes])
            for row, lane, own in zip(rows, lanes, said, strict=True):
                self._keep(row, lane.best, 0.0, own)
            return
        logits = torch.stack([lane.logits for lane in lanes])  # (R, V)
        q = self.sampling.probabilities(logits)
        tokens = draw_rows(q, [lane.draws.next() for lane in lanes])
        for lane, own in zip(lanes, q, strict=True):
            lane.q.append(own)
            lane.coins.append(lane.draws.next())
        pairs = torch.tensor([[lane.best, token] for lane, token in zip(lanes, tokens, strict=True)])
        heights = logits.gather(-1, pairs.to(logits.device)).tolist()
        said = self._outlooks(lanes, tokens)
        for row, token, (best, own), outlook in zip(rows, tokens, heights, said, strict=True):
            self._keep(row, token, best - own, outlook)

    def _outlooks(self, lanes: list[_Lane], tokens: list[int]) -> list[list[float]]:
        """What the acceptance head says of the tokens drawn, where the features read it; one answer a lane."""
        said = [NOTHING_SAID] * len(lanes)
        if self._head is None:
            return said
        layers = [self.candidate_layers[lane.candidate] for lane in lanes]
        for layer in sorted(set(layers)):
            at = [place for place, own in enumerate(layers) if own == layer]
            states, logits = (torch.stack([getattr(lanes[i], name) for i in at]) for name in ("state", "logits"))
            drawn = torch.tensor([tokens[i] for i in at], device=logits.device)
            answers = self._head.read(self.lm, states, logits, drawn, layer, self.sampling.temperature).tolist()
            for place, answer in zip(at, answers, strict=True):
                said[place] = answer
        return said

    def _keep(self, row: int, token: int, shortfall: float, outlook: list[float]) -> None:
        """Make the token a lane's next draft, so far below the best one, and say what may follow it."""
        lane = self._lanes[row]
        self.after[self._node(row)] = -1 if token in self.lm.eos_ids else self._node(row, ahead=1)
        shortfall = min(shortfall, -LOG_FLOOR)
        doubt = draft_doubt(lane.margin, shortfall)
        lane.peril = max(lane.peril, draft_peril(doubt, lane.coins[-1] if lane.coins else 1.0))
        after_draw = {"drawn": shortfall, "peril": lane.peril}
        if self._head is not None:
            odds, slope, ahead = outlook
            own_odds = draft_odds(odds, slope, lane.coins[-1] if lane.coins else 1.0)
            lane.risk += draft_risk(own_odds)
            after_draw |= {"risk": min(lane.risk, -LOG_FLOOR), "odds": own_odds, "ahead": draft_ahead(ahead)}
        if lane.round.drafts:  # in phase 2, where the decision comes after the draw
            for name, value in after_draw.items():
                if name in self.features:
                    self.signals[self._node(row), self.features.index(name)] = value
        lane.kept, lane.doubt = True, lane.doubt + doubt
        lane.round.drafts.append(token)
        lane.round.exits.append(self.candidate_layers[lane.candidate])

    def _node(self, row: int, ahead: int = 0) -> int:
        """Where the draft in view of a lane is in the tables, or the one `ahead` of it; -1 beyond draft number cap."""
        lane = self._lanes[row]
        before = len(lane.round.drafts) - lane.kept + ahead  # drafts made before it
        place = len(self.candidate_layers) + before - 1 if before else lane.candidate
        return row * self._stride + place if place < self._stride else -1
