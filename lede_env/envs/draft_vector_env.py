"""The draft MDP for many sequences at once: arrays over a trace, or one forward of the language model for all."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from lede_env.envs.draft_config import DraftConfig
from lede_env.envs.draft_mdp import make_draft_mdp
from lede_env.envs.vector_env import ALL, Played, TextVectorEnv, check_num_envs, masked, select


class SpeculativeDraftVectorEnv(TextVectorEnv):
    """
    ## Description
    `gym.make_vec("LEDE-Tiny-Draft-v0", num_envs=N)`: N `SpeculativeDraftEnv`s, which see for spaces, rewards and
    arguments. Environment i, reset with seed s + i, does what the single one does with that seed, whatever N is.

    ## Resets
    `autoreset_mode` is `SAME_STEP` by default; `NEXT_STEP` and `DISABLED` work as in Gymnasium too;
    under `DISABLED` an episode that has ended sleeps until it is reset: reward 0, no flags, its action ignored.
    `reset(seed=)` takes a seed, or one each. `options={"reset_mask": ...}`, (N,) booleans, resets some and leaves the
    others where they are; `options={"prompt_ids": [...]}` chooses the prompts, one each, None where the environment
    shall draw it.

    ## Info
    Every key of the single environment as an array (N,), with a mask `_key` beside it, in `reward_terms` too. Keys
    that only a verification has are -1 where the mask is false.

    One thing differs from Gymnasium's own vector environments. Keys of the action (`cost, discount, reward_terms,
    exit_layer, drafted, accepted, emitted, rounds`) always describe the action just taken, also where `SAME_STEP` has
    reset the environment in the same step, so no reader needs a special case for the last step of an episode.
    `final_info` repeats the whole info of the episodes that have just ended, `final_obs` is (N, F); their rows count
    where `_final_info` and `_final_obs` are true.
    """

    def __init__(
        self, num_envs: int = 1, *, autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP, **kwargs: Any
    ):
        check_num_envs(num_envs)
        mdp = make_draft_mdp(DraftConfig.parse(kwargs), lanes=num_envs)
        super().__init__(mdp, num_envs, autoreset_mode, in_parts=mdp.round_episodes)
        self._last = len(self._layers) - 1
        self._token = np.zeros(num_envs, np.int64)  # new tokens emitted; replaced, not written: infos hold it
        # Of the open round, (N,) each.
        self._candidate = np.zeros(num_envs, np.int64)
        self._draft = np.ones(num_envs, np.int64)  # number of the draft in view
        self._cell = self._table.cell(np.arange(num_envs), self._token)
        self._node = self._cell.copy()
        self._decisions = np.zeros(num_envs, np.int64)

    def _start(self, lanes: np.ndarray, new: np.ndarray) -> None:
        self._token = self._token.copy()
        self._token[lanes[new]] = 0
        lanes = lanes[new | (self._decisions[lanes] > 0)]  # a round that a reset leaves begins again
        self._candidate[lanes] = self._decisions[lanes] = 0
        self._draft[lanes] = 1
        self._cell[lanes] = self._node[lanes] = self._table.cell(lanes, self._token[lanes])
        opened = np.zeros(self.num_envs, bool)
        opened[lanes] = True
        self._table.open(opened)

    def _open(self, who: np.ndarray) -> None:
        """Stand at the first candidate of a round, on the lanes of a mask."""
        first, others = self._table.cell(ALL, self._token), ~who
        self._candidate *= others
        self._decisions *= others
        self._draft = select(who, 1, self._draft)
        self._cell = select(who, first, self._cell)
        self._node = select(who, first, self._node)

    def _play(self, exits: np.ndarray, awake: np.ndarray) -> Played:
        exits, first = exits & awake, self._draft == 1
        walks = first & awake & ~exits
        walking = walks & (self._candidate < self._last)
        limit = np.minimum(self._mdp.max_new_tokens - 1 - self._token, self._mdp.cap)  # drafts of the round
        self._table.keep(exits & first)
        after = self._table.after.take(self._node, mode="clip")
        drafting = exits & (after >= 0) & (self._draft < limit)
        self._decisions += awake
        self._draft += drafting
        self._candidate += walking
        self._cell += walking
        self._node = select(drafting, after, self._node + walking)
        self._table.move(walking, drafting)
        full = (self._table.after.take(self._node, mode="clip") < 0) | (self._draft >= limit)
        drawn = ~first | drafting | (self._candidate == self._last)
        moved = walking | drafting
        return self._verify(awake & (~moved | (full & drawn)), self._candidate + (walks & ~moved))

    def _verify(self, who: np.ndarray, continues: np.ndarray) -> Played:
        """Settle the rounds of the lanes of a mask, pay for them, and begin the next ones. `continues`: of phase 1.

        Counts are 0 where the mask is false, and so is what is paid for them.
        """
        mdp, table, candidate = self._mdp, self._table, self._candidate
        rounds = who.astype(np.int64)
        missing = rounds - 1  # what makes counts -1 where the mask is false
        accepted, emitted, ended = table.settle(who, self._cell, self._draft)
        accepted, emitted, drafted = accepted * rounds, emitted * rounds, self._draft * rounds
        ended = ended & who
        over = np.flatnonzero(ended)
        drafted[over] = np.minimum(drafted[over], emitted[over])  # nothing after an EOS counts
        cost = mdp.costs.take(candidate * (mdp.cap + 1) + drafted) + self._decisions * mdp.decision_cost
        self._token = self._token + emitted
        plain = who & ~ended & (self._token == mdp.max_new_tokens - 1)
        if plain.any():  # nothing to draft: a plain step
            ended |= table.step(plain, self._token)
            for count in (self._token, emitted, rounds):
                count += plain
            cost += plain * mdp.plain_cost
        cost *= who
        truncated = who & ~ended & (self._token == mdp.max_new_tokens)
        values = mdp.reward.of_round(candidate, continues * who, drafted, accepted, emitted, cost)
        of_action = {
            "cost": cost,
            "discount": 1.0 - who,
            "reward_terms": masked(dict(zip(mdp.reward.terms, values, strict=True)), self._everyone),
        }
        of_round = {
            "exit_layer": select(who, self._layers.take(candidate), -1),
            "drafted": drafted + missing,
            "accepted": accepted + missing,
            "emitted": emitted + missing,
            "rounds": rounds + missing,
        }
        self._open(who)
        table.open(who & ~ended)
        info = masked(of_action, self._everyone) | masked(of_round, who)
        return Played(sum(values), who, ended, truncated, info)

    def _observations(self, lanes: np.ndarray | slice = ALL) -> np.ndarray:
        observations = self._table.observe(self._node[lanes], self._cell[lanes], self._draft[lanes])
        blank = self._blank[lanes]
        if blank.any():
            observations[blank] = self._mdp.observation_space.low
        return observations

    def _infos(self) -> dict[str, Any]:
        """Of the observation returned."""
        info = {
            "prompt_id": self._prompt_id,
            "token_index": self._token,
            "layer": self._layers.take(self._candidate),
            "phase": np.minimum(self._draft, 2),
            "drafts": self._draft - 1,
        }
        return masked(info, self._everyone)
