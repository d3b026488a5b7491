"""The draft MDP's steps on a trace, as tensors: `SpeculativeDraftVectorEnv` with its tables on a device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lede_env.envs.draft_mdp import DraftMDP
from lede_env.envs.rewards import DraftReward, PaperDraftReward
from lede_env.envs.vector_env import Played, masked


class TensorDrafts:
    """Where N lanes stand, and what their actions do. Tensors are replaced, never written: infos hold them."""

    def __init__(self, mdp: DraftMDP, lanes: int, device: torch.device):
        put = partial(torch.tensor, device=device)
        table: Any = mdp.backend
        self._mdp, self._width, self._last = mdp, len(mdp.candidate_layers), len(mdp.candidate_layers) - 1
        self._signals, self._after = put(table.signals), put(table.after)  # by node
        self._run, self._left = put(table.run), put(table.left)  # by cell
        self._by_round = {column: put(of) for column, of in table.by_round.items()}
        self._by_draft = {column: put(of) for column, of in table.by_draft.items()}
        self._drawn = table.drawn
        self._layers, self._costs = put(mdp.candidate_layers), put(mdp.costs.reshape(-1))
        self._reward = reward_on(mdp.reward, device)
        self._everyone = torch.ones(lanes, dtype=torch.bool, device=device)
        zeros = torch.zeros(lanes, dtype=torch.int64, device=device)
        self._base = self._token = zeros  # row at which the text begins; new tokens emitted
        # Of the open round, (N,) each.
        self._candidate = self._decisions = zeros
        self._draft = zeros + 1  # number of the draft in view
        self._cell = self._node = zeros

    def begin(self, lanes: Tensor, new: Tensor, base: Tensor) -> None:
        """Begin episodes on the lanes of a mask; those of `new`, another, on a text whose first row `base` says."""
        self._base, self._token = base, self._token.masked_fill(new, 0)
        self._open(new | (lanes & (self._decisions > 0)))  # a round that a reset leaves begins again

    def _first_cell(self) -> Tensor:
        """(N,) where a round would start. The last text may end with the tables."""
        return ((self._base + self._token) * self._width).clamp(max=len(self._run) - 1)

    def _open(self, who: Tensor) -> None:
        """Stand at the first candidate of a round, on the lanes of a mask."""
        first = self._first_cell()
        self._candidate = self._candidate.masked_fill(who, 0)
        self._decisions = self._decisions.masked_fill(who, 0)
        self._draft = self._draft.masked_fill(who, 1)
        self._cell = torch.where(who, first, self._cell)
        self._node = torch.where(who, first, self._node)

    def play(self, exits: Tensor, awake: Tensor) -> Played:
        """Exit or continue where lanes are awake, (N,) booleans both; to the others nothing happens."""
        exits, first = exits & awake, self._draft == 1
        walks = first & awake & ~exits
        walking = walks & (self._candidate < self._last)
        limit = (self._mdp.max_new_tokens - 1 - self._token).clamp(max=self._mdp.cap)  # drafts of the round
        after = self._after[self._node]
        drafting = exits & (after >= 0) & (self._draft < limit)
        self._decisions = self._decisions + awake
        self._draft = self._draft + drafting
        self._candidate = self._candidate + walking
        self._cell = self._cell + walking
        self._node = torch.where(drafting, after, self._node + walking)
        full = (self._after[self._node] < 0) | (self._draft >= limit)
        drawn = ~first | drafting | (self._candidate == self._last)
        moved = walking | drafting
        return self._verify(awake & (~moved | (full & drawn)), walks & ~moved)

    def _verify(self, who: Tensor, continued: Tensor) -> Played:
        """Settle the rounds of the lanes of a mask, pay for them, and begin the next ones. `continued`: where phase 1
        ended by one more continue.

        Counts are 0 where the mask is false, and so is what is paid for them.
        """
        mdp, candidate, rounds = self._mdp, self._candidate, who.long()
        missing = rounds - 1  # what makes counts -1 where the mask is false
        left = self._left[self._cell]
        accepted = torch.minimum(self._run[self._cell], self._draft)
        emitted = torch.minimum(accepted + 1, left)
        ended = (emitted == left) & who
        accepted, emitted, drafted = accepted * rounds, emitted * rounds, self._draft * rounds
        drafted = torch.where(ended, torch.minimum(drafted, emitted), drafted)  # nothing after an EOS counts
        cost = self._costs[candidate * (mdp.cap + 1) + drafted] + self._decisions.double() * mdp.decision_cost
        self._token = self._token + emitted
        plain = who & ~ended & (self._token == mdp.max_new_tokens - 1)  # nothing to draft: a plain step
        ended = ended | (plain & (self._left[self._first_cell()] == 1))
        self._token, emitted, rounds = self._token + plain, emitted + plain, rounds + plain
        cost = (cost + plain.double() * mdp.plain_cost) * who
        truncated = who & ~ended & (self._token == mdp.max_new_tokens)
        continues = ((candidate + continued) * who).double()
        counts = drafted.double(), accepted.double(), emitted.double()
        values: Any = self._reward.of_round(candidate, continues, *counts, cost)
        of_action = {
            "cost": cost,
            "discount": (~who).double(),
            "reward_terms": masked(dict(zip(self._reward.terms, values, strict=True)), self._everyone),
        }
        of_round = {
            "exit_layer": self._layers[candidate].masked_fill(~who, -1),
            "drafted": drafted + missing,
            "accepted": accepted + missing,
            "emitted": emitted + missing,
            "rounds": rounds + missing,
        }
        self._open(who)
        info = masked(of_action, self._everyone) | masked(of_round, who)
        return Played(sum(values), who, ended, truncated, info)

    def observations(self) -> Tensor:
        """(N, F) float32: what lanes see that have a text to see, a fresh tensor."""
        seen = self._signals[self._node]
        place = self._cell * self._mdp.cap + (self._draft - 1)
        for column, of_round in self._by_round.items():
            seen[:, column] = of_round[place]
        for column, of_draft in self._by_draft.items():
            seen[:, column] = of_draft[self._draft]
        if self._drawn is not None:
            seen[:, self._drawn] *= self._draft > 1
        return seen

    def infos(self) -> dict[str, Any]:
        """Of the observation returned."""
        return {
            "token_index": self._token,
            "layer": self._layers[self._candidate],
            "phase": self._draft.clamp(max=2),
            "drafts": self._draft - 1,
        }


def reward_on(reward: DraftReward, device: torch.device) -> DraftReward:
    """The reward for counts that are float64 tensors on a device: its formula is the same, its table is there."""
    if not isinstance(reward, PaperDraftReward):
        return reward
    accepted: Any = torch.tensor(reward.table.accepted, device=device)
    return replace(reward, table=replace(reward.table, accepted=accepted))
