"""Playing episodes and logging them: the one loop behind `lede record` and the reference agents.

Episode n of a run depends on (seed, n) alone: its prompt, its draws and its coins. So the number of environments
played together, and a stop and resume in between, leave no trace in the file, but for float rounding in the
observations (up to 1e-4: the model's sums depend on how many rows it runs). A newer torch may round otherwise
too; a resumed file keeps the versions that began it, as provenance.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from lede_env.arguments import whole_number
from lede_env.data.trajectory_file import COLUMNS, Episode, TrajectoryWriter, read_trajectories
from lede_env.digest import digest
from lede_env.errors import LedeError
from lede_env.policies import CONTINUE, EXIT, ExitPolicy, check_compatible
from lede_env.registration import extended_for, pinned

# (observations (N, F), episode numbers (N,), steps into the episode (N,)) -> actions (N,), log-probabilities (N,)
Act = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_player_envs(env_id: str, num_envs: int, reads: Sequence[str] = (), **kwargs: Any) -> VectorEnv:
    """The vector environment that `play` needs: every feature, whole prompts, episodes started by hand.

    reads: what the player observes, for features of an acceptance head, which are there where it reads them.
    """
    features = extended_for(env_id, reads)
    fixed: dict[str, Any] = {"features": features, "episode": "prompt", "autoreset_mode": AutoresetMode.DISABLED}
    for name in fixed.keys() & kwargs.keys():
        raise LedeError(
            f"{name}={kwargs[name]!r} cannot be chosen here: whole prompts with all features are played, "
            "select from them when loading"
        )
    check_env_id(env_id)
    return gym.make_vec(env_id, num_envs=num_envs, **kwargs, **fixed)


def check_env_id(env_id: str) -> None:
    """Raise a LedeError that lists the ids unless Gymnasium knows this one."""
    if env_id not in gym.registry:
        pinned(env_id)


def check_output(path: Path) -> None:
    """Raise a LedeError, before a model is loaded, unless a file can be written there. Missing folders are made."""
    if path.is_dir():
        raise LedeError(f"{path} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedeError(f"{path} cannot be written ({error}); choose another path") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise LedeError(f"{path} cannot be written: permission denied; choose another path")


def play(
    envs: VectorEnv,
    act: Act,
    numbers: Sequence[int],
    seed: int,
    finished: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Episode]]:
    """Play the episodes of these numbers, in waves of as many as there are environments; yields (number, episode)
    in order.

    A wave's episodes begin together, so that every forward of the model serves all of them, and are yielded when its
    last one is over. `finished` hears earlier: how many episodes are over so far, whenever that grows.
    """
    n = envs.num_envs
    for begin in range(0, len(numbers), n):
        playing = np.full(n, -1)  # episode of each environment; -1: none is left, or it is over
        playing[: len(numbers[begin : begin + n])] = numbers[begin : begin + n]
        tell = (lambda count, begin=begin: finished(begin + count)) if finished else None
        yield from _play_wave(envs, act, playing, seed, tell)


def _play_wave(
    envs: VectorEnv, act: Act, playing: np.ndarray, seed: int, finished: Callable[[int], None] | None
) -> Iterator[tuple[int, Episode]]:
    prompts, steps = np.zeros(len(playing), np.int64), np.zeros(len(playing), np.int64)
    observations, infos = _start(envs, playing, prompts, seed)
    ones = np.ones(len(playing), bool)  # the exit MDP has but one phase, the draft MDP forces nothing
    history: list[dict[str, np.ndarray]] = []  # the steps of all environments, a row each
    over: list[tuple[int, int, int, np.ndarray]] = []  # (episode, environment, steps, final observation) of each
    while (playing >= 0).any():
        actions, logprobs = act(observations, playing, steps)
        following, rewards, terminals, timeouts, outcome = envs.step(actions)
        row = {
            "observations": observations, "actions": actions, "rewards": rewards, "terminals": terminals,
            "timeouts": timeouts, "discount": outcome["discount"], "layer": infos["layer"],
            "phase": infos.get("phase", ones), "token_index": infos["token_index"], "prompt_id": prompts,
            "accepted": np.where(outcome["_accepted"], outcome["accepted"], -1),
            "forced": outcome.get("forced", ~ones), "behaviour_logprob": logprobs, "cost": outcome["cost"],
        }  # fmt: skip
        history.append(row)
        steps += playing >= 0
        ended = np.flatnonzero((terminals | timeouts) & (playing >= 0)).tolist()
        over += [(int(playing[i]), i, len(history), following[i]) for i in ended]
        playing[ended] = -1
        if ended and finished:
            finished(len(over))
        observations, infos = following, outcome
    columns = {name: np.array([row[name] for row in history], dtype) for name, dtype in COLUMNS.items()}  # (S, N)
    for number, i, length, final in sorted(over, key=itemgetter(0)):  # they ended in another order: short ones first
        yield number, Episode(**{name: own[:length, i] for name, own in columns.items()}, final_observation=final)


def _start(envs: Any, playing: np.ndarray, prompts: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Reset the environments that have an episode to play, and note their prompts."""
    seeds: list[int | None] = [None] * len(playing)
    chosen: list[str | None] = [None] * len(playing)
    known = envs.unwrapped.prompt_ids
    for i in np.flatnonzero(playing >= 0).tolist():
        number = int(playing[i])
        prompts[i] = prompt_of(seed, number, len(known))
        seeds[i], chosen[i] = episode_seed(seed, number), known[prompts[i]]
    return envs.reset(seed=seeds, options={"reset_mask": playing >= 0, "prompt_ids": chosen})


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
    from lede_env.engine.acceptance import derive_seed, first_uniforms

    columns = [list(available).index(name) for name in policy.features]

    def act(observations: np.ndarray, numbers: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exit_probability = np.asarray(policy.exit_probability(observations[:, columns]), np.float64)
        valid = (exit_probability >= 0) & (exit_probability <= 1)
        if valid.shape != (len(observations),) or not valid.all():
            raise LedeError(
                f"{type(policy).__name__}.exit_probability must return {len(observations)} numbers in [0, 1], one an "
                f"observation; got {exit_probability!r}"
            )
        path: list[Any] = [part.astype(np.uint64) for part in (numbers, np.ones_like(numbers), steps)]
        keys: Any = derive_seed(seed, *path)  # elementwise
        actions = np.where(first_uniforms(keys) < exit_probability, EXIT, CONTINUE)
        return actions, np.log(np.where(actions == EXIT, exit_probability, 1.0 - exit_probability))

    return act


def run_attributes(envs: Any, **more: Any) -> dict[str, Any]:
    """What identifies a run, for the file's header: environment, model, versions, and what the caller adds."""
    attributes = dict(envs.unwrapped.attributes)
    packages = ("lede-env", "torch", "transformers", "gymnasium", "numpy", "h5py")
    return {
        **attributes,
        "environment_hash": digest(attributes),
        "software": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        **more,
    }


def policy_digest(policy: ExitPolicy) -> str:
    """What a policy is, whatever its path: its class and its fields, arrays by content. One that is no dataclass counts
    by its repr, which must then say all that matters."""
    return digest([type(policy).__name__, asdict(policy, dict_factory=_said) if is_dataclass(policy) else repr(policy)])


def _said(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields of a dataclass, without those that policies did not have when some were told apart, where these are unset:
    the acceptance head, and the chance below which bonus tokens are given up."""
    unset = {"head": None, "bonus_from": 0.0}
    return {name: value for name, value in fields if name not in unset or value != unset[name]}


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
) -> tuple[int, int]:
    """Log episodes of a policy to a trajectory file; returns how many episodes and rows it holds.

    Args:
        policy: whose probabilities are logged as `behaviour_logprob`.
        episodes: number of episodes the file shall hold in the end; one that holds more is left as it is.
        resume: go on with an existing file of the same run: the same environment, down to its prompts and its cost
            model, the same policy, down to its weights, and the same seed. Software versions may differ.
        policy_name: what the file calls the policy; by default its repr. Resuming demands the same.
        progress: called with the number of episodes that the file holds or that are over and soon will be in it: at
            the start, then as they end.
        env_kwargs: override what the id pins.

    Raises:
        LedeError: a bad argument, a policy that does not fit the environment, or a file that `TrajectoryWriter`
            refuses.
    """
    seed = whole_number("seed", seed)
    if episodes < 1 or num_envs < 1 or seed < 0:
        raise LedeError(
            f"episodes={episodes} and num_envs={num_envs} must be at least 1, and seed={seed} must not be negative"
        )
    check_output(Path(out))
    envs = make_player_envs(env_id, min(num_envs, episodes), policy.features, **env_kwargs)
    try:
        core: Any = envs.unwrapped
        check_compatible(
            policy,
            core.attributes["model_fingerprint"],
            core.attributes["candidate_layers"],
            core.features,
            core.attributes["mdp"],
        )
        attributes = run_attributes(
            envs, env_id=env_id, seed=seed, policy=policy_name or repr(policy), policy_digest=policy_digest(policy)
        )
        act = policy_act(policy, core.features, seed)
        return log_episodes(envs, act, range(episodes), out, attributes, resume=resume, progress=progress)
    finally:
        envs.close()


def log_episodes(
    envs: VectorEnv,
    act: Act,
    numbers: range,
    out: Path,
    attributes: Mapping[str, Any],
    *,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Play the episodes of these numbers, or those of them that a file to resume lacks, into a trajectory file.

    `attributes` are the file's, with the run's `seed`; progress and result: see `record`.
    """
    core: Any = envs.unwrapped
    with TrajectoryWriter(out, attributes, core.prompt_ids, core.features, resume=resume) as writer:
        held = writer.episodes
        tell = (lambda count: progress(held + count)) if progress else None
        if tell:
            tell(0)
        for _, episode in play(envs, act, numbers[held:], attributes["seed"], finished=tell):
            writer.append(episode)
    content = read_trajectories(out, columns=())
    return content.n_episodes, content.n_rows
