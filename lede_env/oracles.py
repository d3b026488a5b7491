"""Both MDPs on a trace as arrays: the exact value of every policy, and the clairvoyant optimum (design section 6).

Neither MDP's text depends on what a policy does, so a trace holds every outcome there can be: a table of them is all
that policies, coins and optima need. Nothing here is played, nothing is sampled.

Shapes: X texts (prompts times samples, samples adjacent), T positions, C candidates, K drafts a round, P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lede_env.engine.cost_model import CostModel
from lede_env.envs.draft_mdp import DraftMDP
from lede_env.envs.draft_trace import DraftTraceBackend
from lede_env.envs.exit_mdp import ExitMDP
from lede_env.envs.trace_backend import TraceBackend
from lede_env.errors import LedeError
from lede_env.policies import ExitPolicy

Totals = dict[str, np.ndarray]  # (P,) sums over a prompt's continuation, by name; means over its samples


@dataclass(frozen=True)
class Texts:
    """The continuations that an environment on a trace can play."""

    rows: np.ndarray  # (X, T) row in the trace; past the end of a text, its last
    there: np.ndarray  # (X, T) whether the text has the position
    samples: int

    @classmethod
    def of(cls, backend: TraceBackend, max_new_tokens: int) -> Texts:
        trace, samples = backend.trace, backend.trace.header.samples
        place = {prompt_id: index for index, prompt_id in enumerate(trace.prompt_ids)}
        first = np.array([place[prompt_id] for prompt_id in backend.prompt_ids]) * samples
        texts = (first[:, None] + np.arange(samples)).reshape(-1)  # (X,)
        lengths = np.diff(trace.starts)[texts, None]
        position = np.arange(max_new_tokens)
        rows = trace.starts[texts, None] + np.minimum(position, lengths - 1)
        return cls(rows, position < lengths, samples)

    def per_prompt(self, values: np.ndarray) -> np.ndarray:
        """(X,) -> (P,) means over the samples."""
        return values.reshape(-1, self.samples).mean(1)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.rows[:, 0])

    def place(self, starts: np.ndarray, token: Any) -> tuple[np.ndarray, Any]:
        """(n,) rows at which texts start, (n,) tokens emitted -> which of the X texts these are, and which position.

        Of a text that is over the last position, where what is done does not matter.
        """
        text = self._order[np.searchsorted(self.rows[self._order, 0], starts)]
        return text, np.minimum(token, self.rows.shape[1] - 1)


def tabulate(env: Any) -> ExitTable | DraftTable:
    """The table of an environment on a trace, single or vector; wrappers are looked through.

    Raises:
        LedeError: it is none of this project's, or plays live, where only what happens is known.
    """
    mdp = getattr(getattr(env, "unwrapped", env), "_mdp", None)
    if isinstance(mdp, ExitMDP) and isinstance(mdp.backend, TraceBackend):
        return ExitTable(mdp)
    if isinstance(mdp, DraftMDP) and isinstance(mdp.backend, DraftTraceBackend):
        return DraftTable(mdp)
    raise LedeError(f"{env!r} is no environment on a trace, where alone all outcomes are known; use backend='trace'")


def ask(policy: ExitPolicy, features: tuple[str, ...], observations: np.ndarray) -> np.ndarray:
    """(n, F) observations of these features -> (n,) the policy's probabilities of exiting, checked."""
    columns = [features.index(name) for name in policy.features]
    chances = np.asarray(policy.exit_probability(observations[:, columns]), np.float64)
    if chances.shape != (len(observations),) or not ((chances >= 0.0) & (chances <= 1.0)).all():
        raise LedeError(
            f"{type(policy).__name__}.exit_probability gave {chances!r} for {len(observations)} observations; "
            "expected one probability in [0, 1] for each"
        )
    return chances


class ExitTable:
    """The exit MDP on a trace.

    Decisions are (X, T, C): the probability of exiting at each candidate; the last one's does not matter. At a
    temperature, values are expected over the coins that decide whether a draft is accepted, given the text.
    """

    def __init__(self, mdp: ExitMDP):
        candidates = np.arange(len(mdp.candidate_layers))
        backend: Any = mdp.backend
        self.mdp, self.backend = mdp, backend
        self.texts = Texts.of(backend, mdp.max_new_tokens)
        self.chance = backend.trace.accept_probability[self.texts.rows].astype(np.float64)  # (X, T, C)
        walked = mdp.reward.continue_ * candidates
        self.if_accepted = mdp.reward.accepted + walked  # (C,) a token's return if it leaves at a candidate
        self.if_rejected = mdp.reward.rejected + walked

    def observations(self, candidate: int, where: np.ndarray) -> np.ndarray:
        """(n, F): what is seen at a candidate at the n positions of an (X, T) mask."""
        return self.backend.observations[self.texts.rows[where], candidate]

    def decisions(self, policy: ExitPolicy) -> np.ndarray:
        """What a policy does wherever it can come to."""
        exits = np.zeros(self.chance.shape)
        where = self.texts.there
        for candidate in range(exits.shape[-1] - 1):
            chances = ask(policy, self.backend.features, self.observations(candidate, where))
            exits[where, candidate] = chances
            where = where & (exits[..., candidate] < 1.0)
        return exits

    def optimum(self) -> np.ndarray:
        """What the clairvoyant does, who knows which drafts are accepted: leave where the token's return is highest."""
        right = self.backend.trace.accepted[self.texts.rows]
        value = np.where(right, self.if_accepted, self.if_rejected)
        return (value >= _best_from(value)).astype(np.float64)

    def place(self, info: Mapping[str, Any]) -> tuple:
        """Where in the tables the environment stands, by its info."""
        candidate = np.searchsorted(self.mdp.candidate_layers, info["layer"])
        return (*self.texts.place(self.backend.base, info["token_index"]), candidate)

    def play(self, exits: np.ndarray) -> Totals:
        """The exact totals of decisions."""
        leaves = exits.copy()
        leaves[..., -1] = 1.0
        leaves[..., 1:] *= np.cumprod(1.0 - exits[..., :-1], axis=-1)
        return self._totals(leaves, self.chance)

    def oracle(self) -> Totals:
        """The clairvoyant's totals, expected over the coins.

        One uniform u a token decides for all layers: a draft is accepted where u is below its chance. Between two
        neighbouring chances nothing changes, so the expectation is a sum over C + 1 intervals of u.
        """
        edges = np.zeros((*self.chance.shape[:-1], self.chance.shape[-1] + 2))
        edges[..., 1:-1], edges[..., -1] = np.sort(self.chance, axis=-1), 1.0
        parts = []
        for i, width in enumerate(np.moveaxis(np.diff(edges, axis=-1), -1, 0)):  # (X, T)
            right = self.chance > edges[..., i : i + 1]
            best = np.where(right, self.if_accepted, self.if_rejected).argmax(-1)
            leaves = width[..., None] * (best[..., None] == np.arange(right.shape[-1]))
            parts.append(self._totals(leaves, right))
        return {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}

    def _totals(self, leaves: np.ndarray, chance: np.ndarray) -> Totals:
        """Of (X, T, C) probabilities of leaving at each candidate, and of being accepted there."""
        leaves = leaves * self.texts.there[..., None]
        right = leaves * chance
        sums = {
            "returns": right @ self.if_accepted + (leaves - right) @ self.if_rejected,
            "drafted": leaves.sum(-1),
            "accepted": right.sum(-1),
            "exit_layers": leaves @ np.array(self.mdp.candidate_layers, np.float64),
        }
        return {name: self.texts.per_prompt(values.sum(1)) for name, values in sums.items()}


class DraftTable:
    """The draft MDP on a trace: all outcomes of all rounds.

    Decisions are (X, T, C, K): the probability of exiting at candidate c of a round that starts at position t, draft
    k = 1 (phase 1) or draft k >= 2 of that layer (phase 2) being in view. Where nothing is asked it does not matter.
    The other tables have the same shape, by the layer that drafts and the number of drafts verified.
    """

    def __init__(self, mdp: DraftMDP):
        backend: Any = mdp.backend
        self.mdp, self.backend = mdp, backend
        self.texts = Texts.of(backend, mdp.max_new_tokens)
        width, positions = len(mdp.candidate_layers), np.arange(mdp.max_new_tokens)
        self.cells = self.texts.rows[..., None] * width + np.arange(width)  # (X, T, C)
        self.nodes = self._nodes()  # (X, T, C, K), -1 where no such draft can be made
        # Most drafts a round can make: with the budget, and up to an EOS. (X, T, C)
        room = np.minimum(mdp.cap, mdp.max_new_tokens - 1 - positions)[:, None]
        self.lengths = np.minimum((self.nodes >= 0).sum(-1), room)
        self._settle()

    def _nodes(self) -> np.ndarray:
        nodes = np.empty((*self.cells.shape, self.mdp.cap), np.int32)
        nodes[..., 0] = self.cells
        for k in range(1, self.mdp.cap):
            before = nodes[..., k - 1]
            nodes[..., k] = np.where(before >= 0, self.backend.after[before], -1)
        return nodes

    def _settle(self) -> None:
        """Verify every round there can be, as the environment does."""
        mdp, last = self.mdp, len(self.mdp.candidate_layers) - 1
        drafts = np.arange(1, mdp.cap + 1)
        candidate = np.arange(last + 1)[:, None]
        position = np.arange(mdp.max_new_tokens)[:, None, None]
        full = drafts == self.lengths[..., None]  # verified without a question
        # Leaving before the last candidate makes draft 2, if there can be one.
        short = (candidate == last) | (self.lengths[..., None] == 1)
        self.possible = (drafts <= self.lengths[..., None]) & ((drafts > 1) | short)
        accepted, emitted, ended = self.backend.settle(np.ones(1, bool), self.cells[..., None], drafts)
        self.drafted = np.where(ended, np.minimum(drafts, emitted), drafts)
        plain = ~ended & (position + emitted == mdp.max_new_tokens - 1)
        self.accepted, self.emitted, self.rounds = accepted, emitted + plain, 1 + plain
        self.decisions_made = candidate + drafts - (full & ((drafts > 1) | (candidate == last)))
        self.continues = candidate + ((candidate == last) & (drafts == 1) & ~full)
        self.cost = (
            mdp.costs[candidate, self.drafted] + self.decisions_made * mdp.decision_cost + plain * mdp.plain_cost
        )
        self.next = np.where(ended, mdp.max_new_tokens, np.minimum(position + self.emitted, mdp.max_new_tokens))

    def without_bonus(self, least: float, costs: CostModel) -> DraftTable:
        """This table, if rounds are played as a policy of `bonus_from=least` has the decoder play them; its own costs.

        A round that the policy ends, and whose drafts together the acceptance head gives less than this probability, is
        verified without its last draft having gone through the layers, and has no bonus token; rounds of one draft,
        of which the head is not asked in time, always have one. The environments have no such rounds.
        """
        table, mdp = copy(self), self.mdp
        drafts = np.arange(1, mdp.cap + 1)
        risk = self.backend.by_round[self.backend.features.index("risk")]
        risk = risk[self.cells[..., None] * mdp.cap + drafts - 1]  # (X, T, C, K) of the drafts up to k
        position = np.arange(mdp.max_new_tokens)[:, None, None]
        asked = (drafts > 1) & (drafts < self.lengths[..., None])
        gives_up = asked & (np.exp(-risk) < least) & (self.drafted == drafts)  # what an EOS cuts short saves nothing
        whole = gives_up & (self.accepted >= drafts)
        table.emitted, table.rounds = np.where(whole, drafts, self.emitted), np.where(whole, 1, self.rounds)
        saved = [
            [costs.round(layer, d, 0, 0) - costs.round(layer, d, 0, 0, bonus=False) for d in range(1, mdp.cap + 1)]
            for layer in mdp.candidate_layers
        ]
        # What followed a bonus token at the end of the budget, a plain step, now follows the round after.
        table.cost = self.cost - gives_up * np.array(saved) - whole * (self.rounds - 1) * mdp.plain_cost
        table.next = np.where(whole, position + drafts, self.next)
        table.__dict__.pop("reward", None)  # of what it was
        return table

    @cached_property
    def reward(self) -> np.ndarray:
        """Of each round."""
        terms = self.mdp.reward.of_round(
            np.arange(len(self.mdp.candidate_layers))[:, None],
            self.continues,
            self.drafted,
            self.accepted,
            self.emitted,
            self.cost,
        )
        return sum(terms[1:], start=terms[0])

    @cached_property
    def starts(self) -> np.ndarray:
        """(X, T) where a round may start."""
        return self.texts.there & (np.arange(self.mdp.max_new_tokens) < self.mdp.max_new_tokens - 1)

    def observations(self, draft: int, where: np.ndarray) -> np.ndarray:
        """(n, F): what is seen of draft number `draft` of the n rounds of an (X, T, C) mask."""
        return self.backend.observe(self.nodes[..., draft - 1][where], self.cells[where], draft)

    def asked(self, draft: int) -> np.ndarray:
        """(X, T, C) whether a decision is asked with this draft in view, at the starts."""
        here = self.lengths > draft
        if draft == 1:
            here[..., :-1] = True  # to go on is possible, whatever the draft
        return here & self.starts[..., None]

    def decisions(self, policy: ExitPolicy) -> np.ndarray:
        """What a policy does wherever it can come to from any start."""
        exits = np.zeros(self.nodes.shape)
        walking, going = self.starts, np.zeros_like(self.cells, bool)
        asked = self.asked(1)
        for candidate in range(self.cells.shape[-1]):
            here = np.zeros_like(going)
            here[..., candidate] = walking & asked[..., candidate]
            self._ask(policy, 1, here, exits)
            going |= here & (exits[..., 0] > 0.0)
            walking = walking & (exits[..., candidate, 0] < 1.0)
        for draft in range(2, self.mdp.cap):
            here = going & self.asked(draft)
            self._ask(policy, draft, here, exits)
            going = here & (exits[..., draft - 1] > 0.0)
        return exits

    def _ask(self, policy: ExitPolicy, draft: int, where: np.ndarray, exits: np.ndarray) -> None:
        if where.any():
            exits[where, draft - 1] = ask(policy, self.backend.features, self.observations(draft, where))

    def place(self, info: Mapping[str, Any]) -> tuple:
        """Where in the tables the environment stands, by its info."""
        candidate = np.searchsorted(self.mdp.candidate_layers, info["layer"])
        return (*self.texts.place(self.backend.base, info["token_index"]), candidate, info["drafts"])

    def optimum(self) -> np.ndarray:
        """What the clairvoyant does, who knows all texts and drafts: the decisions of the highest return."""
        return self.optimum_of(self.reward)

    def optimum_of(self, payoff: np.ndarray) -> np.ndarray:
        """The decisions of the highest sum of payoffs, (X, T, C, K) of each round: dynamic programming, from the end.

        They are optimal wherever a round stands, also where an optimal one would not have come to.
        """
        payoff = np.where(self.possible, payoff, -np.inf)
        total, value = np.empty_like(payoff), np.zeros((len(payoff), self.mdp.max_new_tokens + 1))
        for t in reversed(range(self.mdp.max_new_tokens - 1)):
            following = np.take_along_axis(value, self.next[:, t].reshape(len(value), -1), axis=1)
            total[:, t] = payoff[:, t] + following.reshape(total[:, t].shape)
            value[:, t] = total[:, t].max((1, 2))
        total[:, -1] = -np.inf
        stop, best = total, _best_from(total)  # best[k]: of drafting to k or further
        go = np.concatenate([best[..., 1:], np.full_like(best[..., :1], -np.inf)], axis=-1)
        exits = (go > stop).astype(np.float64)
        leave = best[..., 0].copy()  # of leaving phase 1 at a candidate, to draft on
        leave[..., -1] = go[..., -1, 0]
        stay = np.empty_like(leave)
        stay[..., -1] = stop[..., -1, 0]
        stay[..., :-1] = _best_from(best[..., 0])[..., 1:]
        exits[..., 0] = leave >= stay
        return exits

    def play(self, exits: np.ndarray) -> Totals:
        """The exact totals of decisions: the probability of every round, by a pass over the positions."""
        rounds = self._round_chances(exits)
        lanes, tokens = len(exits), self.mdp.max_new_tokens
        starts = np.zeros((lanes, tokens + 1))
        starts[:, 0] = 1.0
        for t in range(tokens - 1):
            rounds[:, t] *= starts[:, t, None, None]
            chances = rounds[:, t].reshape(lanes, -1)
            lane, outcome = np.nonzero(chances)
            goal = self.next[:, t].reshape(lanes, -1)[lane, outcome]
            np.add.at(starts, (lane, goal), chances[lane, outcome])
        rounds[:, -1] = 0.0
        layers = np.array(self.mdp.candidate_layers)[:, None]
        of_round = {
            "returns": self.reward,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "exit_layers": layers * self.drafted,
            "rounds": self.rounds,
            "emitted": self.emitted,
            "cost": self.cost,
            "decisions": self.decisions_made,
        }
        return {name: self.texts.per_prompt((rounds * value).sum((1, 2, 3))) for name, value in of_round.items()}

    def oracle(self) -> Totals:
        """The clairvoyant's totals: the highest return there is."""
        return self.play(self.optimum())

    def fastest(self) -> Totals:
        """Those of the highest modelled speedup: a text's tokens are given, so its cost is lowest."""
        return self.play(self.optimum_of(-self.cost))

    def _round_chances(self, exits: np.ndarray) -> np.ndarray:
        """(X, T, C, K) probability that a round, once it starts, ends so: its layer, its drafts."""
        chances = np.zeros(exits.shape)
        leave = exits[..., 0].copy()
        leave[..., -1] = 1.0
        leave[..., 1:] *= np.cumprod(1.0 - exits[..., :-1, 0], axis=-1)  # (X, T, C)
        stops = self.lengths == 1
        stopping = np.where(stops, 1.0, 0.0)
        stopping[..., -1] = np.where(stops[..., -1], 1.0, 1.0 - exits[..., -1, 0])
        chances[..., 0] = leave * stopping
        going = leave - chances[..., 0]
        for draft in range(2, self.mdp.cap + 1):
            stopping = np.where(self.lengths <= draft, 1.0, 1.0 - exits[..., draft - 1])
            chances[..., draft - 1] = going * stopping
            going = going - chances[..., draft - 1]
        return chances


class Oracle:
    """The clairvoyant optimum of an environment on a trace: it knows what every decision will lead to.

    No `ExitPolicy`, which decides by what it observes: it looks into the environment it plays, and is an upper bound
    for policies, not one of them. Wherever it is put, what it does from there on is optimal.

        oracle = Oracle(env)
        observation, info = env.reset()
        observation, reward, terminated, truncated, info = env.step(oracle.act(info))

    A vector environment's infos give its actions, (N,). It belongs to that one environment, forks not included. The
    optimum is of the undiscounted return over a prompt.

    Raises:
        LedeError: the environment is not one on a trace.
    """

    def __init__(self, env: Any):
        self._table = tabulate(env)
        self._exits = self._table.optimum()

    def act(self, info: Mapping[str, Any]) -> Any:
        """The action where the environment stands, by the info of its last reset or step."""
        actions = self._exits[self._table.place(info)].astype(np.int64)
        return actions if np.ndim(info["token_index"]) else actions[0]


def _best_from(values: np.ndarray) -> np.ndarray:
    """(..., n) -> (..., n): the highest from each place of the last axis on."""
    return np.maximum.accumulate(values[..., ::-1], axis=-1)[..., ::-1]
