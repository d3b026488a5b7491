"""What the vector forms of both MDPs share: which texts they play, resets, and Gymnasium's autoreset modes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lede_env.arguments import whole_number
from lede_env.envs.forking import fork
from lede_env.envs.texts import CLOSED, draw_key, draw_texts, known_options, prompt_index
from lede_env.errors import LedeError
from lede_env.policies import CONTINUE, EXIT

ALL = slice(None)


@dataclass(frozen=True)
class Asked:
    """What a reset asks for, (N,) each."""

    lanes: np.ndarray  # booleans: the sequences to reset
    prompts: np.ndarray  # index of the prompt, -1 where it is to be drawn
    seeded: np.ndarray  # booleans: those that get a key; the others go on with theirs
    keys: np.ndarray  # uint64


@dataclass(frozen=True)
class Played:
    """What the actions did, (N,) each: arrays, or tensors of `TensorVectorEnv`."""

    rewards: Any
    parted: Any  # a part of the continuation is over
    ended: Any  # its last token is an EOS
    truncated: Any  # it has all its tokens, and does not end by an EOS
    info: dict[str, Any]  # of the actions


class TextVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N sequences of prompts' continuations. A subclass plays the actions.

    `in_parts`: an episode is a part of a continuation; a reset goes on with the next part, or a new prompt.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012 - Gymnasium's form
    fork = fork

    def __init__(self, mdp: Any, num_envs: int, autoreset_mode: AutoresetMode | str, in_parts: bool):
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = mdp.observation_space
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._mdp, self._table, self._in_parts = mdp, mdp.backend, in_parts
        self.prompt_ids = self._table.prompt_ids
        self.features = mdp.features
        self.attributes = mdp.attributes
        self._layers = np.array(mdp.candidate_layers)
        self._names = np.array(self.prompt_ids, dtype=object)
        self._keys = seeding.np_random(None)[0].integers(2**64, size=num_envs, dtype=np.uint64)  # until seeded
        self._texts = np.zeros(num_envs, np.uint64)  # texts begun since the key was drawn
        self._begun = False  # no reset yet
        self._prompt_id = np.full(num_envs, self.prompt_ids[0], dtype=object)  # replaced, not written: infos hold it
        self._prompt_over = np.ones(num_envs, bool)  # the next reset begins a prompt, whatever `episode` says
        self._over = np.ones(num_envs, bool)  # the episode ended and was not reset
        self._everyone = np.ones(num_envs, bool)  # the mask of keys that all have, shared by all infos
        self._everyone.setflags(write=False)
        self._blank = np.ones(num_envs, bool)  # the text ended (or never began): there is no observation

    @abstractmethod
    def _start(self, lanes: np.ndarray, new: np.ndarray) -> None:
        """Begin episodes on (n,) lanes; those of `new`, (n,) booleans, on a text that the backend has just begun."""

    @abstractmethod
    def _play(self, exits: np.ndarray, awake: np.ndarray) -> Played:
        """Exit or continue where lanes are awake, (N,) booleans both; to the others nothing happens."""

    @abstractmethod
    def _observations(self, lanes: np.ndarray | slice = ALL) -> np.ndarray:
        """(n, F) float32: what lanes see, a fresh array."""

    @abstractmethod
    def _infos(self) -> dict[str, Any]:
        """The info of where lanes stand."""

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        asked = self._asked(seed, options)
        self._keys[asked.seeded], self._texts[asked.seeded] = asked.keys[asked.seeded], 0
        self._prompt_over |= asked.seeded | (asked.lanes & (asked.prompts >= 0))
        self._begin(np.flatnonzero(asked.lanes), asked.prompts)
        self._begun = True
        nobody = np.zeros(self.num_envs, bool)
        idle = self._play(nobody, nobody)
        return self._observations(), self._infos() | idle.info

    def _asked(self, seed: int | Sequence[int | None] | None, options: Mapping[str, Any] | None) -> Asked:
        """The arguments of a reset, checked."""
        if self.closed:
            raise LedeError(CLOSED)
        lanes, prompts = self._checked_options(known_options(options, ["reset_mask", "prompt_ids"]))
        seeds = self._checked_seeds(seed)
        seeded = lanes & np.array([each is not None for each in seeds])
        keys = np.zeros(self.num_envs, np.uint64)
        for lane in np.flatnonzero(seeded).tolist():
            keys[lane] = draw_key(seeding.np_random(seeds[lane])[0])
        return Asked(lanes, prompts, seeded, keys)

    def _checked_options(self, options: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Which sequences to reset (N,), and the index of each one's prompt, -1 where it is to be drawn."""
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise LedeError(f"reset_mask must be {self.num_envs} booleans, at least one true; got {mask!r}")
        names = options.get("prompt_ids", [None] * self.num_envs)
        if not isinstance(names, Sequence | np.ndarray) or isinstance(names, str) or len(names) != self.num_envs:
            raise LedeError(f"prompt_ids must be a list of {self.num_envs} prompts, one an environment; got {names!r}")
        return mask, np.array([-1 if name is None else prompt_index(self.prompt_ids, name) for name in names])

    def _checked_seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        """One seed each; an int s stands for s, s + 1, ..."""
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + lane for lane in range(self.num_envs)]
        if not isinstance(seed, Sequence | np.ndarray) or isinstance(seed, str):
            raise LedeError(f"seed={seed!r} must be a whole number, or a list of {self.num_envs}")
        if len(seed) != self.num_envs:
            raise LedeError(f"seed lists {len(seed)} seeds for {self.num_envs} environments; give one each")
        return [None if each is None else whole_number("seed", each) for each in seed]

    def _begin(self, lanes: np.ndarray, chosen: np.ndarray | None = None) -> None:
        """Start the lanes' next episodes, on new prompts but where parts are to go on with the old one."""
        new = self._prompt_over[lanes] if self._in_parts else np.ones(len(lanes), bool)
        fresh = lanes[new]
        prompts, draw_seeds = draw_texts(len(self.prompt_ids), self._keys[fresh], self._texts[fresh])
        if chosen is not None:
            prompts = np.where(chosen[fresh] < 0, prompts, chosen[fresh])
        self._table.start_many(fresh, prompts, draw_seeds)
        self._prompt_id = self._prompt_id.copy()
        self._prompt_id[fresh] = self._names[prompts]
        self._texts[fresh] += 1
        self._prompt_over[lanes] = self._over[lanes] = self._blank[lanes] = False
        self._start(lanes, new)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        actions = np.asarray(actions)
        exits = actions == EXIT
        whole = actions.shape == (self.num_envs,) and actions.dtype.kind in "iub"
        if not whole or not (exits | (actions == CONTINUE)).all():
            raise LedeError(f"actions must be {self.num_envs} values out of 0 (continue) and 1 (exit), got {actions!r}")
        if self.closed or not self._begun:
            raise LedeError(CLOSED if self.closed else "step() before reset(); call reset() first")
        asleep = self._over.copy()  # `_begin` writes into it
        if self.autoreset_mode is not AutoresetMode.DISABLED and asleep.any():  # reset by this step, action ignored
            self._begin(np.flatnonzero(asleep))
        played = self._play(exits, ~asleep)
        self._prompt_over |= played.ended | played.truncated
        self._blank |= played.ended
        terminated = (played.parted & ~played.truncated) if self._in_parts else played.ended
        self._over = terminated | played.truncated
        if self.autoreset_mode is AutoresetMode.DISABLED:
            self._over |= asleep
        info = self._infos() | played.info
        if self.autoreset_mode is not AutoresetMode.SAME_STEP or not self._over.any():
            return self._observations(), played.rewards, terminated, played.truncated, info
        lanes, final = np.flatnonzero(self._over), masked({"final_info": info}, self._over)
        last, self._over = self._observations(lanes), np.zeros(self.num_envs, bool)
        self._begin(lanes)
        observations = self._observations()  # of the new episodes too: a language model computes them with the others
        final["final_obs"], final["_final_obs"] = observations.copy(), final["_final_info"]
        final["final_obs"][lanes] = last
        return observations, played.rewards, terminated, played.truncated, self._infos() | played.info | final


def select(mask: np.ndarray, one: Any, other: Any) -> np.ndarray:
    """`np.where` for integers, by arithmetic: without branches, which a mask like a coin's makes four times as slow."""
    return other + (one - other) * mask


def check_num_envs(num_envs: Any) -> None:
    if not isinstance(num_envs, Integral) or isinstance(num_envs, bool) or num_envs < 1:
        raise LedeError(f"num_envs={num_envs!r} must be a whole number, at least 1")


def masked(info: dict[str, Any], mask: Any) -> dict[str, Any]:
    """The info with Gymnasium's mask `_key` beside each key: which environments have it."""
    return info | {f"_{key}": mask for key in info}
