"""A dataset: logged episodes as arrays, and what offline-RL libraries want of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lede_env.data.trajectory_file import Episode, Trajectories, read_trajectories
from lede_env.data.trajectory_layout import COLUMNS, TABLES
from lede_env.errors import LedeError
from lede_env.tasks import SPLITS

if TYPE_CHECKING:
    from d3rlpy.dataset import ReplayBuffer as D3rlpyBuffer
    from minari import MinariDataset
    from stable_baselines3.common.buffers import ReplayBuffer as SB3Buffer

MAPPED_BYTES = 1 << 30  # an uncompressed file of this size or more is memory-mapped
# What datasets must have in common to be joined: the decision problem, whatever its prompts.
PROBLEM = (
    "mdp", "model_fingerprint", "candidate_layers", "features", "reward", "reward_kwargs", "rho", "cap", "temperature",
    "top_k", "top_p", "max_new_tokens", "cost_model_digest",
)  # fmt: skip


class Dataset(Trajectories):
    """N logged decisions of E episodes: `dataset["rewards"]`, or all columns by name in `dataset.arrays`.

    How rows align, for two episodes of 3 and 1 decisions:

        row i                 0        1        2     |  3
        observations[i]       o0       o1       o2    |  o3      what the agent saw, (N, F)
        actions[i]            a0       a1       a2    |  a3      0 continue, 1 exit
        rewards[i]            r0       r1       r2    |  r3
        next_observations[i]  o1       o2       f0    |  f1      final_observations[e] after an episode's last row
        terminals[i]          0        0        1     |  0       ended by itself
        timeouts[i]           0        0        0     |  1       cut: bootstrap from f1, unless discount is 0
        discount[i]           1        0        1     |  0       factor on the value of next_observations: 0 where a
                                                                 token exits (draft MDP: at each verification)
        episode_starts        0                       |  3       (E,)
        bounds                0                       |  3    4  (E + 1,)

    A target is `rewards + gamma * discount * (1 - terminals) * value(next_observations)`. Beside these, a row has

        layer, phase, token_index   where the decision was made       prompt_id   index into `prompt_ids`
        accepted                    what an exit (draft MDP: a verification) brought; -1 elsewhere
        forced                      the exit MDP's last candidate, where either action exits: no choice was made
        behaviour_logprob           of the action, under the policy that acted; nats
        cost                        modelled, in autoregressive steps

    `attributes` says what all of it comes from: environment, model, prompts, policy, seed, versions.
    """

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the observations' columns."""
        return tuple(self.attributes["features"])

    def attribute(self, name: str) -> Any:
        """An attribute that must be there.

        Raises:
            LedeError: it is not.
        """
        if name not in self.attributes:
            raise LedeError(f"{self!r} does not say its {name}; record or make it again")
        return self.attributes[name]

    def __repr__(self) -> str:
        name = self.attributes.get("dataset", self.attributes.get("env_id", "dataset"))
        return f"Dataset({name!r}, {self.n_episodes} episodes, {self.n_rows} transitions, {self.features})"

    def __len__(self) -> int:
        return self.n_rows

    @cached_property
    def bounds(self) -> np.ndarray:
        """(E + 1,) int64: episode e is rows bounds[e] to bounds[e + 1]."""
        return np.append(self["episode_starts"], self.n_rows).astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """(E,) decisions of each episode."""
        return np.diff(self.bounds)

    @property
    def returns(self) -> np.ndarray:
        """(E,) undiscounted sum of the rewards of each episode: of a whole prompt."""
        if not self.n_episodes:
            return np.zeros(0)
        return np.add.reduceat(self["rewards"].astype(np.float64), self.bounds[:-1])

    @property
    def next_observations(self) -> np.ndarray:
        """(N, F) what was seen after each row, a new array."""
        following = np.empty_like(self["observations"])
        following[:-1] = self["observations"][1:]
        following[self.bounds[1:] - 1] = self["final_observations"]
        return following

    def episodes(self) -> Iterator[Episode]:
        """Each episode as an `Episode`, whose arrays are views."""
        for number, (begin, end) in enumerate(zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True)):
            columns = {name: self.arrays[name][begin:end] for name in COLUMNS}
            yield Episode(**columns, final_observation=self.arrays["final_observations"][number])

    def take(self, episodes: np.ndarray | Sequence[int]) -> Dataset:
        """Some episodes, by number or by a mask (E,), in the order given; copies."""
        chosen = np.arange(self.n_episodes)[np.asarray(episodes, None if len(episodes) else np.int64)]
        bounds = np.concatenate([[0], np.cumsum(self.lengths[chosen])])
        shift = self.bounds[chosen] - bounds[:-1]
        rows = np.arange(bounds[-1]) + np.repeat(shift, np.diff(bounds))
        arrays = {name: np.asarray(self.arrays[name][rows]) for name in COLUMNS}
        arrays["episode_starts"] = bounds[:-1].astype(TABLES["episode_starts"])
        arrays["final_observations"] = self.arrays["final_observations"][chosen]
        return Dataset(arrays, self.attributes, self.prompt_ids, len(rows))

    def filter(self, keep: Callable[[Episode], bool]) -> Dataset:
        """The episodes of which `keep` is true."""
        return self.take(np.array([bool(keep(episode)) for episode in self.episodes()], bool))

    def split(self) -> dict[str, Dataset]:
        """The parts whose prompts are for "train", "validation" and "test"; those that have episodes. The attribute
        `part` of each is its name."""
        members = self.attribute("prompt_splits")
        of_prompt = np.zeros(len(self.prompt_ids), np.int64)
        try:
            for number, name in enumerate(SPLITS):
                of_prompt[members[name]] = number
            of_episode = of_prompt[self["prompt_id"][self.bounds[:-1]]]  # (E,)
        except (KeyError, IndexError, TypeError) as error:
            raise LedeError(f"{self!r} is damaged, its prompts or their splits ({error}); make it again") from error
        parts = {name: self.take(of_episode == number) for number, name in enumerate(SPLITS)}
        return {
            name: Dataset(part.arrays, {**part.attributes, "part": name}, part.prompt_ids, part.n_rows)
            for name, part in parts.items()
            if part.n_episodes
        }

    def select(self, features: str | Sequence[str]) -> Dataset:
        """With some features alone: "paper", "extended" (all but an acceptance head's) or a tuple of names."""
        from lede_env.engine.signals import select_features

        names = select_features(features, self.attribute("mdp"))
        if names == self.features:
            return self
        lacking = [name for name in names if name not in self.features]
        if lacking:
            raise LedeError(f"features={features!r} needs {lacking}, but {self!r} lacks them; make or record it again")
        columns = [self.features.index(name) for name in names]
        selected = {name: self.arrays[name][:, columns] for name in ("observations", "final_observations")}
        attributes = {**self.attributes, "features": list(names)}
        return Dataset(self.arrays | selected, attributes, self.prompt_ids, self.n_rows)

    def concat(self, *others: Dataset) -> Dataset:
        """This one's episodes, then those of others of the same decision problem, whatever their prompts."""
        parts = (self, *others)
        for name in PROBLEM:
            values = [part.attributes.get(name) for part in parts]
            if any(value != values[0] for value in values):
                raise LedeError(f"datasets of different problems cannot be joined: {name} is {values}")
        prompt_ids = list(dict.fromkeys(prompt_id for part in parts for prompt_id in part.prompt_ids))
        place = {prompt_id: index for index, prompt_id in enumerate(prompt_ids)}
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in (*COLUMNS, "final_observations")}
        renumbered = [np.array([place[i] for i in part.prompt_ids])[part["prompt_id"]] for part in parts]
        arrays["prompt_id"] = np.concatenate(renumbered).astype(COLUMNS["prompt_id"])
        starts = np.cumsum([0, *np.concatenate([part.lengths for part in parts])])[:-1]
        arrays["episode_starts"] = starts.astype(TABLES["episode_starts"])
        shared = {
            name: value
            for name, value in self.attributes.items()
            if all(name in part.attributes and part.attributes[name] == value for part in others)
        }
        shared["prompt_splits"] = _joined_splits(parts, place)
        return Dataset(arrays, shared, prompt_ids, len(arrays["actions"]))

    def to_d3rlpy(self, boundary: str = "token") -> D3rlpyBuffer:
        """As d3rlpy's replay buffer; see `lede_env.data.exporters.to_d3rlpy`."""
        from lede_env.data.exporters import to_d3rlpy

        return to_d3rlpy(self, boundary)

    def to_minari(self, dataset_id: str, **about: Any) -> MinariDataset:
        """Into Minari's local storage; see `lede_env.data.exporters.to_minari`."""
        from lede_env.data.exporters import to_minari

        return to_minari(self, dataset_id, **about)

    def fill_sb3(self, buffer: SB3Buffer, boundary: str = "token") -> None:
        """Into a replay buffer of Stable-Baselines3; see `lede_env.data.exporters.fill_sb3`."""
        from lede_env.data.exporters import fill_sb3

        fill_sb3(self, buffer, boundary)

    def to_rlds(self) -> Iterator[dict[str, Any]]:
        """Episodes in the form of RLDS; see `lede_env.data.exporters.to_rlds`."""
        from lede_env.data.exporters import to_rlds

        return to_rlds(self)


def _joined_splits(parts: Sequence[Dataset], place: dict[str, int]) -> dict[str, list[int]]:
    """`prompt_splits` of joined datasets, whose prompts lie at these places."""
    known = [(part, part.attributes.get("prompt_splits", {})) for part in parts]
    return {
        name: sorted({place[part.prompt_ids[i]] for part, splits in known for i in splits.get(name, ())})
        for name in SPLITS
    }


def read_dataset(path: str | os.PathLike) -> Dataset:
    """A trajectory file as a dataset: in memory, or memory-mapped where it is large and uncompressed.

    Raises:
        LedeError: no such file, or one that `read_trajectories` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise LedeError(f"{path}: no such file; make one with `lede dataset make` or `lede record`")
    content = read_trajectories(path, mapped=path.stat().st_size >= MAPPED_BYTES)
    return Dataset(content.arrays, content.attributes, content.prompt_ids, content.n_rows)
