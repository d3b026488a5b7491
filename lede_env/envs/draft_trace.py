"""The draft MDP from a recorded trace: exact, whatever the policy does, by looking steps up in arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lede_env.data.trace_file import Trace
from lede_env.engine.acceptance import Sampling
from lede_env.engine.signals import HEAD_FEATURES, LOG_FLOOR, TRACE_WINDOW, asks_head, compute_features
from lede_env.envs.trace_backend import TraceBackend
from lede_env.errors import LedeError

PART = 1 << 16  # cells handled together while building: bounds the memory that takes


class DraftTraceBackend(TraceBackend):
    """The trace as a graph of drafts, which all lanes share.

    Every draft that can be made is a *node*: its distribution, its token, and which draft follows it at that layer.
    Nodes 0 .. N C - 1 are the *cells*, the drafts made in the right context: cell = row C + candidate. The others are
    those of the branches, in the trace's order.

        cell (n, c) --right--> cell (n + 1, c) --right--> cell (n + 2, c) --wrong--> branch node --> branch node
            `after[node]` is where an arrow leads; -1 after an EOS, and where the recording ends

    A round that starts at row n is in phase 1 at the cells of row n. Leaving at candidate c begins the chain above.
    Its drafts are accepted as far as it is right: `run[cell]`, so that is all verification needs to know.
    """

    def __init__(
        self,
        trace: Trace,
        prompt_ids: Sequence[str],
        lanes: int,
        max_new_tokens: int,
        sampling: Sampling,
        candidate_layers: Sequence[int],
        features: tuple[str, ...],
        cap: int,
    ):
        super().__init__(trace, prompt_ids, lanes, max_new_tokens, sampling, candidate_layers, features)
        if cap > trace.header.draft_cap:
            raise LedeError(
                f"cap={cap}, but the trace's branches allow for {trace.header.draft_cap} drafts a round; "
                "ask for that many, or record another"
            )
        self.cap, self._width = cap, len(trace.header.candidate_layers)
        self.signals = np.concatenate([self.observations.reshape(-1, len(features)), self._branch_signals()])
        self._shortfall = np.concatenate([trace.shortfall.reshape(-1), trace.branch_shortfall])  # (nodes,)
        if "drawn" in features:
            self.signals[:, features.index("drawn")] = self._shortfall
        self.after = self._edges()  # (nodes,) int32
        # Small types: thousands of lanes read from all over the tables, which had better fit the processor's cache.
        self.run = _runs(trace, cap).reshape(-1)  # (cells,) drafts in a row that are right, from here, at most cap
        self.left = np.repeat(_tokens_left(trace, cap + 2), self._width)  # (cells,) tokens until the EOS, included
        # What features of a draft are not of its node alone: column -> float32 table.
        number = np.arange(cap + 1, dtype=np.float32)
        by_draft = {"phase": np.minimum(number, 2), "position": (np.arange(-1, cap) / cap).astype(np.float32)}
        by_round = {}  # (cells * cap,): of draft k of the round left at a cell, at cell * cap + k - 1
        if {"doubt", "peril"}.intersection(features):
            by_round["doubt"], by_round["peril"] = self._draft_doubts()
        if "trace" in features:
            by_round["trace"] = self._draft_traces()
        if asks_head(features):
            by_round |= self._draft_outlooks()
        self.by_draft = {features.index(name): of for name, of in by_draft.items() if name in features}  # (cap + 1,)
        self.by_round = {features.index(name): of for name, of in by_round.items() if name in features}
        # Phase 1 decides before the draw.
        self.drawn = features.index("drawn") if "drawn" in features else None  # column that is zero in phase 1

    def cell(self, lane: Any, token: Any) -> Any:
        """Node of the first candidate for a round that starts when `token` new tokens are there."""
        return (self.base[lane] + token) * self._width

    def open(self, who: np.ndarray) -> None:
        """Begin a round on the lanes of a mask, (lanes,) booleans, at the first candidate. All is known."""

    def keep(self, who: np.ndarray) -> None:
        """Draw the draft in view of the lanes of a mask. It was drawn at recording."""

    def move(self, walking: np.ndarray, drafting: np.ndarray) -> None:
        """Take the lanes of a mask to the next candidate, those of another to the next draft. All is known."""

    def observe(self, node: Any, cell: Any, draft: Any) -> np.ndarray:
        """(..., F) features of draft number `draft` of a round, which is `node`, the round's first being `cell`."""
        out = self.signals.take(node, axis=0, mode="clip")
        for column, of_round in self.by_round.items():
            out[..., column] = of_round.take(cell * self.cap + (draft - 1), mode="clip")
        for column, of_draft in self.by_draft.items():
            out[..., column] = of_draft.take(draft)
        if self.drawn is not None:
            out[..., self.drawn] *= np.greater(draft, 1)
        return out

    def settle(self, who: np.ndarray, cell: Any, drafts: Any) -> tuple[Any, Any, Any]:
        """Verify the rounds of the lanes of a mask, which made `drafts` drafts and left at `cell`: accepted, emitted,
        and whether the last token emitted is an EOS. They count where the mask is true."""
        accepted = np.minimum(self.run.take(cell, mode="clip"), drafts)
        left = self.left.take(cell, mode="clip")
        emitted = np.minimum(accepted + 1, left)
        return accepted, emitted, emitted == left

    def step(self, who: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Emit one token, number `token`, at full depth on the lanes of a mask: where it is an EOS."""
        lanes = np.flatnonzero(who)
        ended = np.zeros(len(who), bool)
        ended[lanes] = self.left.take(self.cell(lanes, token[lanes])) == 1
        return ended

    def _branch_signals(self) -> np.ndarray:
        """(M, F) features of the branch nodes."""
        trace = self.trace
        candidate = np.nonzero(trace.branch >= 0)[1]  # branches ascend with (row, candidate)
        layer = np.array(trace.header.candidate_layers)[np.repeat(candidate, np.diff(trace.branch_starts))]
        return compute_features(
            self.features,
            trace.branch_raw,
            layer=layer / trace.header.n_layers,
            trace=0.0,
            match=trace.branch_match,
            temperature=trace.header.temperature,
        )

    def _edges(self) -> np.ndarray:
        """(nodes,) int32: the node of the draft that follows, -1 where none can."""
        trace, cells = self.trace, self.trace.accepted.size
        last = np.zeros(len(trace.targets), bool)
        last[trace.starts[1:] - 1] = True  # the row of an EOS, or the last one recorded
        right = np.where(last[:, None], -1, np.arange(cells).reshape(-1, self._width) + self._width)
        wrong = np.where(trace.branch >= 0, cells + trace.branch_starts[trace.branch], -1)
        within = cells + 1 + np.arange(len(trace.branch_tokens))
        within[trace.branch_starts[1:] - 1] = -1
        return np.concatenate([np.where(trace.accepted, right, wrong).reshape(-1), within]).astype(np.int32)

    def _draft_doubts(self) -> tuple[np.ndarray, np.ndarray]:
        """(cells * cap,) the features `doubt` and `peril` of draft k of a round, at cell * cap + k - 1: of its drafts
        before k, and of those up to k, which phase 2 draws before it decides."""
        trace, cells = self.trace, self.trace.accepted.size
        raw = np.concatenate([trace.raw.reshape(cells, -1)[:, :2], trace.branch_raw[:, :2]])  # (nodes, 2)
        own = np.log1p(np.exp(raw[:, 1] - raw[:, 0])) + self._shortfall  # `draft_doubt`
        coin = np.concatenate([trace.coin.reshape(-1), trace.branch_coin])
        peril = np.clip(own + np.log(coin), LOG_FLOOR, -LOG_FLOOR)  # `draft_peril`
        sums, node = np.zeros((cells, self.cap), np.float32), np.arange(cells)
        worst = np.empty_like(sums)
        worst[:, 0] = peril[node]
        for k in range(1, self.cap):
            sums[:, k] = sums[:, k - 1] + own[node]
            node = self.after[node]  # -1, where the chain ends: some node, and never looked up
            worst[:, k] = np.maximum(worst[:, k - 1], peril[node])
        worst[:, 0] = LOG_FLOOR  # phase 1 decides before the draw
        return np.minimum(sums, -LOG_FLOOR).reshape(-1), worst.reshape(-1)

    def _draft_outlooks(self) -> dict[str, np.ndarray]:
        """(cells * cap,) each of `HEAD_FEATURES`, of draft k of a round at cell * cap + k - 1; 0 in phase 1, which
        decides before the draw."""
        trace, cells = self.trace, self.trace.accepted.size
        if trace.outlook is None or trace.branch_outlook is None:
            raise LedeError(
                f"the features {HEAD_FEATURES} are what a model's acceptance head says, which this trace does not "
                "hold; record it again with a model that has one, at layers it knows, or choose other features"
            )
        said = np.concatenate([trace.outlook.reshape(cells, -1), trace.branch_outlook]).astype(np.float64)
        coin = np.concatenate([trace.coin.reshape(-1), trace.branch_coin])
        odds = np.clip(said[:, 0] - said[:, 1] * np.log(coin), LOG_FLOOR, -LOG_FLOOR)  # `draft_odds`
        own = np.log1p(np.exp(-odds))  # `draft_risk`
        ahead = np.clip(said[:, 2], LOG_FLOOR, -LOG_FLOOR)
        tables = {name: np.zeros((cells, self.cap), np.float32) for name in HEAD_FEATURES}
        node = np.arange(cells)
        total = own[node]
        for k in range(1, self.cap):
            node = self.after[node]  # -1, where the chain ends: some node, and never looked up
            total = total + own[node]
            for name, values in (("risk", np.minimum(total, -LOG_FLOOR)), ("odds", odds[node]), ("ahead", ahead[node])):
                tables[name][:, k] = values
        return {name: table.reshape(-1) for name, table in tables.items()}

    def _draft_traces(self) -> np.ndarray:
        """(cells * cap,) the `trace` feature of draft k of a round, at cell * cap + k - 1: the mean over a window of
        the tokens before the round, by their full-depth distributions, and its drafts before k, by their own."""
        trace, cells = self.trace, self.trace.accepted.size
        total = np.concatenate([[0.0], np.cumsum(np.minimum(trace.neg_log_p_max, -LOG_FLOOR), dtype=np.float64)])
        before = np.arange(len(trace.targets)) - np.repeat(trace.starts[:-1], np.diff(trace.starts))  # tokens, a row
        surprise = -np.concatenate([trace.raw.reshape(cells, -1)[:, 0], trace.branch_raw[:, 0]])  # (nodes,)
        means = np.empty((cells, self.cap), np.float32)
        for begin in range(0, cells, PART):
            node = np.arange(begin, min(begin + PART, cells))
            row = node // self._width
            drawn = np.zeros((self.cap, len(node)))  # sums over the drafts before draft k
            for k in range(self.cap):
                own = min(k, TRACE_WINDOW)
                others = np.minimum(before[row], TRACE_WINDOW - own)
                seen = drawn[k] - drawn[k - own] + total[row] - total[row - others]
                means[begin : begin + PART, k] = seen / np.maximum(own + others, 1)
                if k + 1 < self.cap:
                    drawn[k + 1] = drawn[k] + surprise[node]
                    node = self.after[node]  # -1, where the chain ends: some node, and never looked up
        return means.reshape(-1)


def _runs(trace: Trace, cap: int) -> np.ndarray:
    """(N, C) int8: how many drafts of a round from this row on are right in a row, at most `cap`."""
    accepted = trace.accepted.astype(np.int8)
    goes_on = np.ones((len(accepted), 1), np.int8)
    goes_on[trace.starts[1:] - 1] = 0  # the next row is another text's
    run = accepted
    for _ in range(cap - 1):
        run = accepted * (1 + goes_on * np.roll(run, -1, axis=0))
    return run


def _tokens_left(trace: Trace, far: int) -> np.ndarray:
    """(N,) int8: tokens from this row to the EOS, itself included; `far` where there are as many or no EOS."""
    ends = np.repeat(trace.starts[1:], np.diff(trace.starts))  # (N,) end of the row's text
    left = np.minimum(ends - np.arange(len(ends)), far)
    return np.where(trace.ends[ends - 1], left, far).astype(np.int8)
