"""Does a trajectory file hold what its environment does? Its actions are played again, and every column compared."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lede_env.data.trajectory_file import COLUMNS, Episode, Trajectories, prompt_difference, read_trajectories
from lede_env.digest import digest
from lede_env.errors import LedeError
from lede_env.policies import EXIT
from lede_env.recording import Act, make_player_envs, play
from lede_env.registration import pinned

LANES = 512  # episodes played together on a trace
LIVE_LANES = 16
NOISE = 1e-4  # of observations, from one machine to another
ROUNDING = 1e-5  # of other fractions
COMPARED = [name for name in COLUMNS if name not in ("actions", "behaviour_logprob")]  # the policy's own


@dataclass(frozen=True)
class Difference:
    """The first row of a file that its environment does not reproduce."""

    column: str  # of COLUMNS, or final_observations: what was seen after the row
    row: int
    episode: int
    recorded: Any  # in the file
    replayed: Any


@dataclass(frozen=True)
class Validation:
    """What was checked. True if nothing differs."""

    path: str
    rows: int
    episodes: int
    difference: Difference | None = None

    def __bool__(self) -> bool:
        return self.difference is None

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.path}: {self.rows} rows of {self.episodes} episodes, all reproduced"
        found = self.difference
        return (
            f"{self.path}: {found.column} differs first at row {found.row}, in episode {found.episode}: "
            f"{found.recorded} in the file, {found.replayed} when played again"
        )


def validate(path: str | os.PathLike, trace: str | os.PathLike | None = None) -> Validation:
    """Play a trajectory file's actions again in the environment that its header names, and compare.

    All columns but `behaviour_logprob`, which only the policy could confirm: it must be finite and at most 0.
    Observations may differ by 1e-4. Greedy texts in which two tokens are as good as tied may differ between a trace and
    the model, or between two machines. At a temperature the model draws other texts than a trace holds, so that a file
    repeats only where it was recorded.

    Args:
        path: a file by `lede record`, of either MDP.
        trace: file of the trace to play; by default the language model decodes everything again.

    Returns:
        What was checked, with the first row that differs, if any; the one of the earliest episode.

    Raises:
        LedeError: not a trajectory file, or its environment cannot be made again: the model, the prompts or their
            ids, the cost model or an argument is not what it was.
    """
    data = read_trajectories(path)
    impossible = _first_impossible(data)
    if impossible is not None:
        return _result(path, data, impossible)
    lanes = min(LIVE_LANES if trace is None else LANES, data.n_episodes)
    envs = make_player_envs(attribute(path, data, "env_id", str), lanes, **_arguments(path, data, trace))
    try:
        core: Any = envs.unwrapped
        _check_environment(path, data, core)
        bounds = np.append(data["episode_starts"], data.n_rows).astype(np.int64)  # (E + 1,)
        first = attribute(path, data, "first_episode", int) if "first_episode" in data.attributes else 0
        seed = attribute(path, data, "seed", int)
        numbers = range(first, first + data.n_episodes)
        for number, played in play(envs, _replay(data["actions"], bounds, first), numbers, seed):
            place = number - first
            found = _first_difference(data, place, slice(bounds[place], bounds[place + 1]), played)
            if found is not None:
                return _result(path, data, found)
    finally:
        envs.close()
    return _result(path, data, None)


def _result(path: str | os.PathLike, data: Trajectories, difference: Difference | None) -> Validation:
    return Validation(os.fspath(path), data.n_rows, data.n_episodes, difference)


def _first_impossible(data: Trajectories) -> Difference | None:
    """The first value that no policy gives."""
    logprobs = data["behaviour_logprob"]
    for name, wrong, expected in (
        ("actions", data["actions"] > EXIT, "0 or 1"),
        ("behaviour_logprob", ~(np.isfinite(logprobs) & (logprobs <= 0)), "finite and at most 0"),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            episode = int(np.searchsorted(data["episode_starts"], row, "right")) - 1
            return Difference(name, row, episode, data[name][row].item(), expected)
    return None


def attribute(path: str | os.PathLike, data: Trajectories, name: str, kind: type) -> Any:
    """What a file's header must say to be played again.

    Raises:
        LedeError: it does not, or it is not of this kind; whole numbers count from 0.
    """
    value = data.attributes.get(name)
    if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
        raise LedeError(
            f"{path}: attribute {name!r} is {value!r}, so its environment cannot be made again; validate files that "
            "`lede record` wrote"
        )
    return value


def _arguments(path: str | os.PathLike, data: Trajectories, trace: str | os.PathLike | None) -> dict[str, Any]:
    """What `gym.make_vec` needs beside the file's id: every value that the header holds."""
    config = pinned(attribute(path, data, "env_id", str))
    chosen = {field.name for field in fields(config)} - {"features", "episode"}  # those are the player's
    kwargs = {name: value for name, value in data.attributes.items() if name in chosen}
    model = attribute(path, data, "model_name", str)
    if config.weights != "twin" and config.model != model:
        kwargs["model"] = model
    return kwargs if trace is None else {**kwargs, "backend": "trace", "trace": os.fspath(trace)}


def _check_environment(path: str | os.PathLike, data: Trajectories, core: Any) -> None:
    recorded, now = data.attributes, core.attributes
    differences = [
        f"{name} is {recorded.get(name)!r} in the file and {value!r} in the environment at hand"
        for name, value in now.items()
        if digest(recorded.get(name)) != digest(value)
    ]
    if data.prompt_ids != list(core.prompt_ids):
        differences.append(f"prompt_ids differ, {prompt_difference(data.prompt_ids, core.prompt_ids)}")
    if differences:
        raise LedeError(
            f"{path}: {differences[0]}; validate against the model, trace, prompts and cost model that it was recorded "
            "with"
        )


def _replay(actions: np.ndarray, bounds: np.ndarray, first: int) -> Act:
    """Takes the file's actions, (rows,); where an episode goes on longer than in the file, its last one again.

    `first` is the number of the file's first episode.
    """

    def act(observations: np.ndarray, numbers: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.maximum(numbers - first, 0)  # -1 where none is played
        rows = np.minimum(bounds[places] + steps, bounds[places + 1] - 1)
        return actions[rows], np.zeros(len(rows))

    return act


def _first_difference(data: Trajectories, number: int, rows: slice, episode: Episode) -> Difference | None:
    """The first row of an episode in which the file and the replay differ."""
    known = rows.stop - rows.start
    common, found = min(known, len(episode)), None
    for name in COMPARED:
        recorded, replayed = data[name][rows][:common], getattr(episode, name)[:common]
        if recorded.dtype.kind == "f":
            tolerance = NOISE if name == "observations" else ROUNDING
            same = np.abs(recorded - replayed) <= tolerance  # false for NaN
        else:
            same = recorded == replayed
        differing = np.flatnonzero(~same.reshape(common, -1).all(1))
        if len(differing) and (found is None or differing[0] < found[0]):
            found = differing[0], name, recorded[differing[0]], replayed[differing[0]]
    if found is not None:
        return Difference(found[1], rows.start + int(found[0]), number, found[2].tolist(), found[3].tolist())
    last = rows.start + common - 1
    if known != len(episode):
        return Difference("episode_starts", last, number, f"{known} rows", f"{len(episode)} rows")
    seen = data["final_observations"][number]
    if not (np.abs(seen - episode.final_observation) <= NOISE).all():
        return Difference("final_observations", last, number, seen.tolist(), episode.final_observation.tolist())
    return None
