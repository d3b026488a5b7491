"""Playing episodes and logging them: the one loop behind `lede record` and the reference agents.

Episode n of a run depends on (seed, n) alone: its prompt, its draws and its coins. So the number of environments
played together, and a stop and resume in between, leave no trace in the file.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from lede_env.data.trajectory_file import COLUMNS, Episode, TrajectoryWriter
from lede_env.errors import LedeError
from lede_env.policies import ExitPolicy, check_compatible

# (observations (N, F), episode numbers (N,), steps into the episode (N,)) -> actions (N,), log-probabilities (N,)
Act = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_player_envs(env_id: str, num_envs: int, **kwargs: Any) -> VectorEnv:
    """The vector environment that `play` needs: every feature, episodes started by hand."""
    arguments = {**kwargs, "features": "extended", "autoreset_mode": AutoresetMode.DISABLED}
    return gym.make_vec(env_id, num_envs=num_envs, **arguments)


def play(envs: VectorEnv, act: Act, numbers: Sequence[int], seed: int) -> Iterator[tuple[int, Episode]]:
    """Play the episodes of these numbers, several at a time; yields (number, episode) as each finishes."""
    n, core = envs.num_envs, envs.unwrapped
    waiting = iter(numbers)
    playing = np.array([next(waiting, -1) for _ in range(n)])  # episode of each environment; -1: none is left
    steps, starting = np.zeros(n, np.int64), np.ones(n, bool)
    rows: list[list[tuple]] = [[] for _ in range(n)]
    while (playing >= 0).any():
        if starting.any():
            observations, infos = _start(envs, core, playing, starting, seed)
        actions, logprobs = act(observations, playing, steps)
        following, rewards, terminals, timeouts, outcome = envs.step(actions)
        exited = outcome["_accepted"]
        for i in np.flatnonzero(playing >= 0).tolist():
            rows[i].append(
                (
                    observations[i], actions[i], rewards[i], terminals[i], timeouts[i], outcome["discount"][i],
                    infos["layer"][i], 1, infos["token_index"][i], core.prompt_ids.index(infos["prompt_id"][i]),
                    outcome["accepted"][i] if exited[i] else -1, outcome["forced"][i], logprobs[i], outcome["cost"][i],
                )
            )  # fmt: skip
        steps += 1
        starting = terminals | timeouts
        for i in np.flatnonzero(starting).tolist():
            if playing[i] >= 0:
                columns = {
                    name: np.array(values, COLUMNS[name])
                    for name, values in zip(COLUMNS, zip(*rows[i], strict=True), strict=True)
                }
                yield int(playing[i]), Episode(**columns, final_observation=following[i])
            rows[i], steps[i], playing[i] = [], 0, next(waiting, -1)
        observations, infos = following, outcome


def _start(
    envs: VectorEnv, core: Any, playing: np.ndarray, starting: np.ndarray, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Reset the environments that begin an episode. One with nothing left to play repeats the run's first prompt."""
    numbers = np.maximum(playing, 0).tolist()
    return envs.reset(
        seed=[episode_seed(seed, number) for number in numbers],
        options={
            "reset_mask": starting,
            "prompt_ids": [core.prompt_ids[prompt_of(seed, number, len(core.prompt_ids))] for number in numbers],
        },
    )


def episode_seed(seed: int, number: int) -> int:
    """The environment's seed for an episode."""
    from lede_env.engine.acceptance import derive_seed

    return derive_seed(seed, number, 0) >> 1


def prompt_of(seed: int, number: int, n_prompts: int) -> int:
    """Index of an episode's prompt: a fresh seeded order of all prompts, over and over."""
    cycle, place = divmod(number, n_prompts)
    return int(np.random.default_rng((seed, cycle)).permutation(n_prompts)[place])


def policy_act(policy: ExitPolicy, available: Sequence[str], seed: int) -> Act:
    """Act by a policy's probabilities, with coins keyed by (seed, episode, step)."""
    from lede_env.engine.acceptance import Draws, derive_seed

    columns = [list(available).index(name) for name in policy.features]

    def act(observations: np.ndarray, numbers: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exit_probability = np.asarray(policy.exit_probability(observations[:, columns]), np.float64)
        coins = np.array(
            [
                Draws(derive_seed(seed, number, 1, step)).next()
                for number, step in zip(numbers.tolist(), steps.tolist(), strict=True)
            ]
        )
        actions = (coins < exit_probability).astype(np.int64)
        chosen = np.where(actions == 1, exit_probability, 1.0 - exit_probability)
        return actions, np.log(np.maximum(chosen, 1e-300))

    return act


def run_attributes(envs: VectorEnv, **more: Any) -> dict[str, Any]:
    """What identifies a run, for the file's header: environment, model, versions, and what the caller adds."""
    attributes = dict(envs.unwrapped.attributes)
    digest = hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()[:16]
    packages = ("lede-env", "torch", "transformers", "gymnasium", "numpy", "h5py")
    return {
        **attributes,
        "environment_hash": digest,
        "software": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        **more,
    }


def record(
    env_id: str,
    policy: ExitPolicy,
    episodes: int,
    out: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    num_envs: int = 16,
    policy_name: str = "",
    progress: Callable[[int], None] | None = None,
    **env_kwargs: Any,
) -> int:
    """Log episodes of a policy to a trajectory file (design section 6); returns the number of rows in it.

    Args:
        policy: whose probabilities are logged as `behaviour_logprob`.
        episodes: number of episodes the file shall hold in the end.
        resume: go on with an existing file of the same run.
        progress: called with the number of episodes in the file, as it grows.
        env_kwargs: override what the id pins.
    """
    if episodes < 1:
        raise LedeError(f"episodes={episodes} must be at least 1")
    envs = make_player_envs(env_id, min(num_envs, episodes), **env_kwargs)
    try:
        core = envs.unwrapped
        check_compatible(
            policy,
            core.attributes["model_fingerprint"],
            core.attributes["candidate_layers"],
            core.features,
            "exit",
        )
        attributes = run_attributes(envs, env_id=env_id, seed=seed, policy=policy_name or type(policy).__name__)
        with TrajectoryWriter(out, attributes, core.prompt_ids, core.features, resume=resume) as writer:
            finished: dict[int, Episode] = {}
            first = writer.episodes
            for number, episode in play(envs, policy_act(policy, core.features, seed), range(first, episodes), seed):
                finished[number] = episode
                while writer.episodes in finished:  # in order, whatever the order they finish in
                    writer.append(finished.pop(writer.episodes))
                if progress:
                    progress(writer.episodes)
        return writer.rows
    finally:
        envs.close()
